"""From a wave at 24 kHz to what WavLM's transformer reads: two frames a code, exactly."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covo_rl.models.covo_audio.token2wav.mel import mel_bank
from covo_rl.models.waveform import mono_float, sinc_resample
from covo_rl.speech.grid import CODE_SAMPLES, RATE, count_codes

WAVLM_RATE = 16_000
#: zeros on both sides give L codes 2L frames: the convolutions see 400 samples every 320, the mel 1024 every 480
CONV_MARGIN, MEL_MARGIN = 40, 272
MEL_WINDOW, MEL_HOP, MEL_BINS, MEL_TOP = 1024, 480, 80, 8000.0


class MelFrontEnd(nn.Module):
    """Takes the place of WavLM's convolutions where a tokenizer is tiny: (B, T) at 24 kHz -> (B, 80, T // 480).

    The log-mel of 0 to 8 kHz, standardised by bin over the training clips.
    """

    mean_E: Tensor
    deviation_E: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean_E", torch.zeros(MEL_BINS))
        self.register_buffer("deviation_E", torch.ones(MEL_BINS))

    def forward(self, waves_BT: Tensor) -> Tensor:
        window = torch.hann_window(MEL_WINDOW, device=waves_BT.device)
        spectrum = torch.stft(waves_BT.float(), MEL_WINDOW, MEL_HOP, window=window, center=False, return_complex=True)
        mel = mel_bank(MEL_BINS, MEL_WINDOW, RATE, MEL_TOP).to(window) @ spectrum.abs()
        return ((mel.clamp(min=1e-3).log() - self.mean_E[:, None]) / self.deviation_E[:, None]).to(waves_BT.dtype)


def prepare_wave(wave: Tensor | np.ndarray, front_end: str) -> Tensor:
    """Mono 24 kHz (T,) -> float32 samples of the front end's rate, mean 0 and variance 1 over the real ones, padded.

    Raises:
        ValueError: no samples, several channels, NaN or infinities.
    """
    samples = mono_float(wave, "wave")
    codes = count_codes(len(samples))
    rate, margin = (WAVLM_RATE, CONV_MARGIN) if front_end == "conv" else (RATE, MEL_MARGIN)
    samples = sinc_resample(samples, RATE, rate)
    samples = (samples - samples.mean()) / (samples.var(correction=0) + 1e-7).sqrt()
    return F.pad(samples, (margin, codes * CODE_SAMPLES * rate // RATE - len(samples) + margin))
