"""Log-mel at 100 Hz of 24 kHz speech, and Griffin-Lim back: the latents of decoders that are trained here.

Magnitude STFT with a periodic Hann window of 1024 and hop 240, reflected by 392 on both sides and not centred: frame k
is centred on sample 240k + 120, and a wave has exactly samples / 240 frames.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from transformers.audio_utils import mel_filter_bank

from covo_rl.models.covo_audio.token2wav.configuration import FRAME_RATE, HOP

RATE = FRAME_RATE * HOP
N_FFT = 1024
MARGIN = (N_FFT - HOP) // 2
MEL_BINS = 64
FLOOR = 1e-4


@lru_cache(maxsize=8)
def mel_bank(bins: int = MEL_BINS, n_fft: int = N_FFT, rate: int = RATE, top: float = RATE / 2) -> torch.Tensor:
    """HTK-mel triangles of height 1, 0 to `top` Hz: (bins, n_fft / 2 + 1) float32 on the CPU, shared, so read only."""
    triangles = mel_filter_bank(n_fft // 2 + 1, bins, 0.0, top, rate, norm=None, mel_scale="htk")
    return torch.from_numpy(triangles.T.copy()).float()


@lru_cache(maxsize=2)
def _inverse_bank() -> torch.Tensor:
    return torch.linalg.pinv(mel_bank().double()).float()


def log_mel(waves_BT: torch.Tensor) -> torch.Tensor:
    """24 kHz waves (B, T) float -> ln(max(mel, 1e-4)) (B, T // 240, 64) of their dtype.

    Raises:
        ValueError: fewer than 393 samples (16 ms), which cannot be reflected.
    """
    if waves_BT.shape[-1] <= MARGIN:
        raise ValueError(f"{waves_BT.shape[-1]} samples; the mel needs more than {MARGIN} (at 24 kHz one code is 960)")
    magnitude = stft(F.pad(waves_BT, (MARGIN, MARGIN), mode="reflect")).abs()
    return (mel_bank().to(magnitude) @ magnitude).clamp(min=FLOOR).log().mT


@torch.no_grad()
def griffin_lim(
    mel_BZE: torch.Tensor, iterations: int = 32, seed: int = 0, head_BT: torch.Tensor | None = None
) -> torch.Tensor:
    """Log-mel (B, Z, 64) -> waves (B, 1, 240 Z) at 24 kHz float32, by Griffin and Lim (1984).

    Magnitudes are the pseudo-inverse of the mel bank, at least 1e-5; phases begin at random, the same for every row.
    `head_BT` is the known beginning of the waves, which stays as it is: so a stream goes on without a seam.
    """
    mel = mel_BZE.float()
    magnitude = (_inverse_bank().to(mel) @ mel.exp().mT).clamp(min=1e-5)
    generator = torch.Generator().manual_seed(seed)
    phase = torch.rand(magnitude.shape[1:], generator=generator, device="cpu").to(mel) * 2 * torch.pi
    spectrum = torch.polar(magnitude, phase.expand_as(magnitude))
    wave = overlap_add(spectrum)
    for _ in range(iterations):
        if head_BT is not None:
            wave[:, MARGIN : MARGIN + head_BT.shape[-1]] = head_BT
        spectrum = stft(wave)
        wave = overlap_add(magnitude * spectrum / spectrum.abs().clamp(min=1e-9))
    return wave[:, None, MARGIN:-MARGIN]


def stft(padded_BT: torch.Tensor) -> torch.Tensor:
    """Waves that have `MARGIN` samples more on both sides, (B, 240 Z + 784) -> spectrum (B, 513, Z)."""
    window = torch.hann_window(N_FFT, dtype=padded_BT.dtype, device=padded_BT.device)
    return torch.stft(padded_BT, N_FFT, HOP, window=window, center=False, return_complex=True)


def overlap_add(spectrum: torch.Tensor) -> torch.Tensor:
    """The wave (B, 240 Z + 784) whose STFT is nearest to `spectrum` (B, 513, Z): torch.istft wants centred ones."""
    window = torch.hann_window(N_FFT, dtype=spectrum.real.dtype, device=spectrum.device)[:, None]
    pieces = torch.fft.irfft(spectrum, n=N_FFT, dim=1) * window
    size = (1, HOP * (spectrum.shape[-1] - 1) + N_FFT)
    fold = {"output_size": size, "kernel_size": (1, N_FFT), "stride": (1, HOP)}
    weight = F.fold((window**2).expand(1, N_FFT, spectrum.shape[-1]), **fold)
    return (F.fold(pieces, **fold) / weight.clamp(min=1e-8))[:, 0, 0]
