"""The fundamental of speech: YIN (de Cheveigné and Kawahara, JASA 111, 2002) and the smoothest path through its dips.

No torch.
"""

from __future__ import annotations

import numpy as np

#: Hz; a difference function is over a window this long, in seconds
LOWEST, HIGHEST = 60.0, 500.0
WINDOW_SECONDS = 0.025
#: a frame is voiced where the dip is below it: 0 is a period that repeats exactly
VOICED_BELOW = 0.35
#: dips below it are equally good, so that the shortest period wins: between samples a dip is never quite 0
DEEP = 0.1
#: weaker frames than this share of the loudest one (-40 dB) have no voice
QUIETEST = 0.01
#: cost of an octave between frames, of a change of voicing, and of a candidate, an octave below HIGHEST
_JUMP, _SWITCH, _LOW = 1.0, 0.15, 0.03
_CANDIDATES, _BLOCK = 5, 2000


def track_f0(wave_T: np.ndarray, rate: int) -> np.ndarray:
    """F0 in Hz, float32 (floor(T / (rate / 100)),): one for every 10 ms, at its centre; 0 where there is no voice.

    Raises:
        ValueError: no mono wave, or a rate below 2 kHz or that 10 ms do not divide.
    """
    wave = np.asarray(wave_T, dtype=np.float64)
    if wave.ndim != 1 or rate < 2000 or rate % 100:
        raise ValueError(f"a wave of shape {wave.shape} at {rate} Hz: expected (T,) at a multiple of 100 Hz, 2000 up")
    hop, frames = rate // 100, len(wave) // (rate // 100)
    if not frames:
        return np.zeros(0, np.float32)
    window, longest = round(WINDOW_SECONDS * rate), int(rate / LOWEST) + 2
    # the window and its shifted copy lie around the centre of the frame
    lead = (window + longest) // 2 - hop // 2
    padded = np.pad(wave - wave.mean(), (lead, window + longest + hop))
    pieces = np.lib.stride_tricks.sliding_window_view(padded, window + longest)[: frames * hop : hop]
    blocks = [_dips(pieces[i : i + _BLOCK], window, longest, rate) for i in range(0, frames, _BLOCK)]
    f0_ZC, depth_ZC = (np.concatenate(part) for part in zip(*blocks, strict=True))
    energy = np.sqrt(np.mean(pieces[:, longest // 2 : longest // 2 + window] ** 2, axis=1))
    depth_ZC[energy <= QUIETEST * max(energy.max(), 1e-9)] = 1.0
    return _path(f0_ZC, depth_ZC).astype(np.float32)


def _dips(pieces_ZT: np.ndarray, window: int, longest: int, rate: int) -> tuple[np.ndarray, np.ndarray]:
    """F0 and depth (Z, candidates) of the deepest dips of the cumulative mean normalised difference; depth 1: none."""
    size = 1 << int(np.ceil(np.log2(window + longest)))
    spectrum = np.fft.rfft(pieces_ZT, size)
    correlation = np.fft.irfft(spectrum * np.fft.rfft(pieces_ZT[:, :window], size).conj(), size)[:, :longest]
    energy = np.cumsum(np.pad(pieces_ZT**2, ((0, 0), (1, 0))), axis=1)
    shifted = energy[:, window : window + longest] - energy[:, :longest]
    difference = np.maximum(shifted[:, :1] + shifted - 2 * correlation, 0)
    mean = np.cumsum(difference, axis=1) / np.arange(1, longest + 1)
    normal = np.where(mean > 1e-12, difference / np.maximum(mean, 1e-12), 1.0)
    first = int(rate / HIGHEST)
    left, middle, right = normal[:, first - 1 : -2], normal[:, first:-1], normal[:, first + 1 :]
    dip = (middle <= left) & (middle < right)
    bend = left - 2 * middle + right
    shift = np.where(dip & (bend > 0), 0.5 * (left - right) / np.where(bend > 0, bend, 1), 0)
    depth = np.clip(np.where(dip, middle - 0.25 * (left - right) * shift, 1.0), DEEP, 1)
    lag = np.arange(first, longest - 1) + shift
    order = np.argsort(depth + _LOW * np.log2(lag), axis=1)[:, :_CANDIDATES]
    return rate / np.take_along_axis(lag, order, 1), np.take_along_axis(depth, order, 1)


def _path(f0_ZC: np.ndarray, depth_ZC: np.ndarray) -> np.ndarray:
    """The cheapest path (Viterbi): deep dips, no octave jumps, voice that lasts; the last state is no voice."""
    local = np.column_stack([depth_ZC + _LOW * np.log2(HIGHEST / f0_ZC), np.full(len(f0_ZC), VOICED_BELOW)])
    local[:, :-1][depth_ZC >= 1] = 9.0
    octave = np.column_stack([np.log2(f0_ZC), np.zeros(len(f0_ZC))])
    voiced = np.arange(local.shape[1]) < local.shape[1] - 1
    cost, steps = local[0], []
    for i in range(1, len(local)):
        jump = _JUMP * np.abs(octave[i - 1][:, None] - octave[i][None])
        jump = np.where(voiced[:, None] & voiced, jump, np.where(voiced[:, None] == voiced, 0.0, _SWITCH))
        total = cost[:, None] + jump
        steps.append(total.argmin(axis=0))
        cost = total.min(axis=0) + local[i]
    state, path = int(cost.argmin()), []
    for step in [*reversed(steps), None]:
        path.append(state)
        state = state if step is None else int(step[state])
    chosen = np.array(path[::-1])
    f0 = np.column_stack([f0_ZC, np.zeros(len(f0_ZC))])
    return f0[np.arange(len(f0)), chosen]
