"""From a stream of samples to the log-mel of the streaming encoder, all at once or from a window per chunk.

    samples -> resampled to the mel's rate -> STFT, frame t centred on sample 160 t -> log-mel, floored by the past

Silence (zeros) precedes and follows the stream. Frame t is floored at m_t - 8, m_t = max(m_{t-1}, largest log10 mel of
frame t): the maximum of the whole clip, which the published front end takes, is not known yet.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from covo_rl.models.covo_audio.features import FRAMES_PER_SECOND, mel_filters
from covo_rl.models.waveform import resampling_kernel, sinc_resample

N_FFT = 400
DYNAMIC_RANGE = 8.0  # log10 of the power between the largest value and the floor


class StreamingMel:
    """Sizes of a chunk, and its mel, for a CovoAudioConfig and samples at `sampling_rate` Hz.

    `frames` mel frames per chunk; `chunk_samples` of it; a chunk's frames and the one after need `window_samples`,
    which begin `lead_samples` before the chunk; `look_ahead` samples after the chunk's end are among them: 308 at
    24 kHz, 200 at 16 kHz.

    Raises ValueError for a rate that is neither that of the model's samples nor that of its mel.
    """

    def __init__(self, config: Any, sampling_rate: int | None = None) -> None:
        self.mel_rate = config.feature_sampling_rate
        self.sampling_rate = config.sampling_rate if sampling_rate is None else sampling_rate
        if self.sampling_rate not in (config.sampling_rate, self.mel_rate):
            raise ValueError(
                f"sampling_rate={sampling_rate}: a stream has {config.sampling_rate} Hz, the model's own rate, or "
                f"{self.mel_rate} Hz, that of its mel; resample it first"
            )
        self.hop, self.frames = self.mel_rate // FRAMES_PER_SECOND, config.slot_frames
        self.mel_bins = config.encoder_config.num_mel_bins
        divisor = math.gcd(self.sampling_rate, self.mel_rate)
        self.old, self.new = self.sampling_rate // divisor, self.mel_rate // divisor
        self.kernel, margin = _taps(self.old, self.new)
        signal, half = self.frames * self.hop + N_FFT, N_FFT // 2
        if half % self.new or signal % self.new:
            raise ValueError(f"{self.sampling_rate} Hz to {self.mel_rate} Hz: a chunk is no whole number of samples")
        self.chunk_samples = self.frames * self.hop * self.old // self.new
        self.lead_samples = half * self.old // self.new + margin
        self.window_samples = (signal // self.new - 1) * self.old + self.kernel.shape[2]
        self.look_ahead = self.window_samples - self.lead_samples - self.chunk_samples

    def chunks(self, samples: int) -> int:
        """Chunks that a stream of so many samples begins."""
        return -(-samples // self.chunk_samples)

    def window(self, audio_BT: torch.Tensor, peak_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`window_samples` of one chunk -> mel (B, M, frames + 1), with the next frame, and their m_t (B, F).

        `peak_B` is m of the frame before.
        """
        signal_BPQ = F.conv1d(audio_BT[:, None], self.kernel.to(audio_BT.device), stride=self.old)
        return self.log_mel(signal_BPQ.transpose(1, 2).flatten(1), peak_B)

    def whole(self, samples_BT: torch.Tensor, peak_B: torch.Tensor) -> torch.Tensor:
        """Whole streams -> mel (B, M, chunks * frames + 1) of all their chunks and one frame."""
        chunks, half = self.chunks(samples_BT.shape[1]), N_FFT // 2
        after = chunks * self.chunk_samples + self.look_ahead - samples_BT.shape[1]
        # silence before the resampler, not after it: its taps ring before the first sample too
        audio_BT = F.pad(samples_BT, (half * self.old // self.new, after))
        rates = (self.sampling_rate, self.mel_rate)
        signals = [sinc_resample(audio_T, *rates, kernel_dtype=torch.float64) for audio_T in audio_BT.cpu()]
        signal_BT = torch.stack(signals)[:, : chunks * self.frames * self.hop + N_FFT]
        return self.log_mel(signal_BT.to(samples_BT.device), peak_B)[0]

    def log_mel(self, signal_BT: torch.Tensor, peak_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples at the mel's rate from 200 before a frame's centre on -> frames (B, M, F) and their m_t (B, F).

        float32, whatever the encoder computes in.
        """
        window = torch.hann_window(N_FFT, device=signal_BT.device)
        with torch.autocast(signal_BT.device.type, enabled=False):
            spectrum = torch.stft(signal_BT, N_FFT, self.hop, window=window, center=False, return_complex=True)
            filters = mel_filters(N_FFT, self.mel_bins, self.mel_rate).to(signal_BT.device)
            logs_BMF = (filters @ spectrum.abs() ** 2).clamp(min=1e-10).log10()
        peaks_BF = torch.maximum(logs_BMF.amax(1).cummax(1).values, peak_B[:, None])
        return (torch.maximum(logs_BMF, peaks_BF[:, None] - DYNAMIC_RANGE) + 4.0) / 4.0, peaks_BF


def _taps(old: int, new: int) -> tuple[torch.Tensor, int]:
    """The resampler's kernel (new, 1, taps) without the zeros at its end, and how many taps precede a sample."""
    if old == new:
        return torch.ones(1, 1, 1), 0
    kernel = resampling_kernel(old, new, torch.float64)
    last = int(kernel.abs().amax((0, 1)).nonzero().max())
    return kernel[..., : last + 1], (kernel.shape[2] - old) // 2
