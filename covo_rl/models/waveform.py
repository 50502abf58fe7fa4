"""Samples before the mel: any array to mono float32, and the windowed-sinc resampler that Covo-Audio specifies.

Hann-windowed sinc, width 6, roll-off 0.99. With `o` and `m` the old and new rate divided by their gcd, output phase
`p` in 0..m-1 sees tap `j` with weight `sinc(t) * cos(pi t / 12)^2 * base / o`, where `base = 0.99 min(o, m)` and
`t = clamp((j / o - p / m) * base, -6, 6)`. This is torchaudio's `sinc_interp_hann`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

WIDTH = 6
ROLLOFF = 0.99
MAX_KERNEL_NUMEL = 4_000_000  # beyond it (rates without a useful common divisor) taps are gathered per sample
GATHER_BLOCK = 65_536  # output samples per block of the gathering path
MAX_CHANNELS = 8  # an axis this short is taken for channels when the orientation has to be found


def mono_float(waveform: Any, name: str = "clip") -> torch.Tensor:
    """Any array of samples as mono float32 `(samples,)`.

    Takes `(samples,)`, `(samples, channels)` or `(channels, samples)`; integer PCM is scaled to [-1, 1); exactly two
    channels are averaged. Raises ValueError that begins with `name` for no samples, more than two channels, complex
    or non-numeric data, NaN or infinite samples.
    """
    if isinstance(waveform, torch.Tensor):
        waveform = waveform.detach().cpu()
        waveform = (waveform.float() if waveform.is_floating_point() else waveform).numpy()
    array = np.ascontiguousarray(waveform)
    kind = array.dtype.kind
    if kind not in "fiub":
        raise ValueError(f"{name}: array of dtype {array.dtype}; expected real samples, float or integer PCM")
    if kind == "u" and array.dtype != np.uint8:
        raise ValueError(f"{name}: {array.dtype} samples have no usual zero level; convert them to float first")
    if not array.size:
        raise ValueError(f"{name}: no samples (shape {array.shape})")
    if kind == "u":
        array = (array.astype(np.float32) - 128) / 128
    elif kind == "i":
        array = array / -float(np.iinfo(array.dtype).min)
    array = array.astype(np.float32, copy=False)
    if array.ndim == 2:
        rows, columns = array.shape
        array = array.T if rows <= MAX_CHANNELS < columns else array
        if array.shape[1] > 2:
            raise ValueError(
                f"{name}: {array.shape[1]} channels (shape {rows} x {columns}); the model takes mono, or stereo which "
                "is averaged. Mix or choose the channels yourself"
            )
        array = array.mean(1)
    if array.ndim != 1:
        raise ValueError(f"{name}: shape {array.shape}; expected (samples,) or (samples, 2)")
    if bad := int((~np.isfinite(array)).sum()):
        raise ValueError(f"{name}: {bad} of {array.size} samples are NaN or infinite")
    return torch.from_numpy(array)


def whole_rate(rate: Any) -> int:
    """A sampling rate in Hz; raises ValueError for one that is not a positive whole number."""
    if not (isinstance(rate, (int, float, np.integer, np.floating)) and rate > 0 and not rate % 1):
        raise ValueError(f"sampling rate {rate!r} is not a positive whole number of Hz")
    return int(rate)


@lru_cache(maxsize=32)
def resampling_kernel(old: int, new: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Taps (m, 1, 2 W + o) float32 for rates already divided by their gcd; computed in `dtype`.

    The 24 to 16 kHz kernel of the model is built in float64, file-rate kernels in float32.
    """
    base, half_width = _reach(old, new)
    taps = torch.arange(-half_width, half_width + old, dtype=dtype)[None, :] / old
    phases = torch.arange(0, -new, -1, dtype=dtype)[:, None] / new
    return _weights((phases + taps) * base, base / old).float()[:, None]


def _reach(old: int, new: int) -> tuple[float, int]:
    """The cut-off `base`, and the taps W on each side of a sample."""
    base = ROLLOFF * min(old, new)
    return base, math.ceil(WIDTH * old / base)


def _weights(t: torch.Tensor, scale: float) -> torch.Tensor:
    t = t.clamp(-WIDTH, WIDTH)
    window = torch.cos(t * math.pi / WIDTH / 2) ** 2
    return torch.sinc(t) * window * scale


def sinc_resample(
    waveform: torch.Tensor, rate: int, new_rate: int, *, kernel_dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Mono float32 `(samples,)` at `rate` Hz to `(ceil(samples * new_rate / rate),)` at `new_rate` Hz.

    Raises ValueError for a rate that is not a positive whole number.
    """
    rate, new_rate = whole_rate(rate), whole_rate(new_rate)
    if rate == new_rate:
        return waveform
    divisor = math.gcd(rate, new_rate)
    old, new = rate // divisor, new_rate // divisor
    length = math.ceil(new * waveform.shape[-1] / old)
    _, half_width = _reach(old, new)
    if new * (2 * half_width + old) > MAX_KERNEL_NUMEL:
        return _gathered(waveform, old, new, length)
    padded = F.pad(waveform[None, None], (half_width, half_width + old))
    return F.conv1d(padded, resampling_kernel(old, new, kernel_dtype), stride=old)[0].T.reshape(-1)[:length]


def _gathered(waveform: torch.Tensor, old: int, new: int, length: int) -> torch.Tensor:
    """The same sum over the taps inside the window only; memory does not grow with `old * new`."""
    base, half_width = _reach(old, new)
    padded = F.pad(waveform, (half_width, half_width + 2))
    offsets = torch.arange(-half_width, half_width + 2)
    blocks = []
    for positions in torch.arange(length).split(GATHER_BLOCK):
        nearest = positions * old // new
        fraction = (positions * old - nearest * new).double() / new
        t = (offsets[None, :] - fraction[:, None]) * (base / old)
        index = (nearest[:, None] + offsets[None, :] + half_width).clamp(max=padded.shape[0] - 1)
        blocks.append((padded[index] * _weights(t, base / old).float()).sum(1))
    return torch.cat(blocks)
