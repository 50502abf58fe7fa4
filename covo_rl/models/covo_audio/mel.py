"""The mel filter bank of Whisper's log-mel: Slaney's scale and area normalisation, rounded as librosa rounds it.

The triangles are stored in float32 before they are normalised. The published features were computed with filters
made that way; filters rounded once (`transformers.audio_utils.mel_filter_bank`) differ in the last bit, which a
random decoder magnifies to 3e-4 in a logit.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

BREAK_HZ = 1000.0  # linear below, logarithmic above
HZ_PER_MEL = 200.0 / 3
LOG_STEP = np.log(6.4) / 27


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    knee = BREAK_HZ / HZ_PER_MEL
    return np.where(mel >= knee, BREAK_HZ * np.exp(LOG_STEP * (mel - knee)), HZ_PER_MEL * mel)


def _hz_to_mel(hz: float) -> float:
    knee = BREAK_HZ / HZ_PER_MEL
    return knee + np.log(hz / BREAK_HZ) / LOG_STEP if hz >= BREAK_HZ else hz / HZ_PER_MEL


@lru_cache(maxsize=8)
def mel_filters(n_fft: int, mel_bins: int, rate: int) -> torch.Tensor:
    """Filters (mel_bins, n_fft // 2 + 1) float32 from 0 Hz to half of `rate` (Hz)."""
    edges = _mel_to_hz(np.linspace(0.0, _hz_to_mel(rate / 2), mel_bins + 2))
    widths = np.diff(edges)[:, None]
    slopes = edges[:, None] - np.fft.rfftfreq(n_fft, 1.0 / rate)[None, :]
    rising, falling = -slopes[:-2] / widths[:-1], slopes[2:] / widths[1:]
    filters = np.maximum(0, np.minimum(rising, falling)).astype(np.float32)
    filters *= (2.0 / (edges[2:] - edges[:-2]))[:, None]
    return torch.from_numpy(filters)
