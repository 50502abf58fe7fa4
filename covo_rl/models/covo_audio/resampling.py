"""Windowed-sinc resampling as Covo-Audio specifies it: Hann-windowed sinc, width 6, roll-off 0.99.

With `o` and `m` the old and new rate divided by their gcd, output phase `p` in 0..m-1 sees tap `j` with weight
`sinc(t) * cos(pi t / 12)^2 * base / o`, where `t = clamp((j / o - p / m) * base, -6, 6)` and `base = 0.99 min(o, m)`.
This is torchaudio's `sinc_interp_hann`; kernels are built once per pair of rates.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F

WIDTH = 6
ROLLOFF = 0.99
MAX_KERNEL_NUMEL = 4_000_000  # beyond it (rates without a useful common divisor) taps are gathered per sample
GATHER_BLOCK = 65_536  # output samples per block of the gathering path


@lru_cache(maxsize=32)
def resampling_kernel(old: int, new: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Taps (m, 1, 2 W + o) float32 for rates already divided by their gcd; computed in `dtype`.

    The 24 to 16 kHz kernel of the model is built in float64, file-rate kernels in float32.
    """
    base = ROLLOFF * min(old, new)
    half_width = math.ceil(WIDTH * old / base)
    taps = torch.arange(-half_width, half_width + old, dtype=dtype)[None, :] / old
    phases = torch.arange(0, -new, -1, dtype=dtype)[:, None] / new
    return _weights((phases + taps) * base, base / old).float()[:, None]


def _weights(t: torch.Tensor, scale: float) -> torch.Tensor:
    t = t.clamp(-WIDTH, WIDTH)
    window = torch.cos(t * math.pi / WIDTH / 2) ** 2
    return torch.sinc(t) * window * scale


def resample(
    waveform: torch.Tensor, rate: int, new_rate: int, *, kernel_dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Mono float32 `(samples,)` at `rate` Hz to `(ceil(samples * new_rate / rate),)` at `new_rate` Hz.

    Raises ValueError for a rate that is not a positive whole number.
    """
    for value in (rate, new_rate):
        if value <= 0 or value != int(value):
            raise ValueError(f"sampling rate {value!r} is not a positive whole number of Hz")
    if rate == new_rate:
        return waveform
    divisor = math.gcd(int(rate), int(new_rate))
    old, new = int(rate) // divisor, int(new_rate) // divisor
    length = math.ceil(new * waveform.shape[-1] / old)
    half_width = math.ceil(WIDTH * old / (ROLLOFF * min(old, new)))
    if new * (2 * half_width + old) > MAX_KERNEL_NUMEL:
        return _gathered(waveform, old, new, half_width, length)
    kernel = resampling_kernel(old, new, kernel_dtype)
    padded = F.pad(waveform[None, None], (half_width, half_width + old))
    return F.conv1d(padded, kernel, stride=old)[0].T.reshape(-1)[:length]


def _gathered(waveform: torch.Tensor, old: int, new: int, half_width: int, length: int) -> torch.Tensor:
    """The same sum over the taps inside the window only; memory does not grow with `old * new`."""
    base = ROLLOFF * min(old, new)
    padded = F.pad(waveform, (half_width, half_width + 2))
    offsets = torch.arange(-half_width, half_width + 2)
    blocks = []
    for start in range(0, length, GATHER_BLOCK):
        position = torch.arange(start, min(start + GATHER_BLOCK, length)) * old
        nearest = position // new
        fraction = (position - nearest * new).double() / new
        t = (offsets[None, :] - fraction[:, None]) * (base / old)
        index = (nearest[:, None] + offsets[None, :] + half_width).clamp(max=padded.shape[0] - 1)
        blocks.append((padded[index] * _weights(t, base / old).float()).sum(1))
    return torch.cat(blocks) if blocks else waveform.new_zeros(0)
