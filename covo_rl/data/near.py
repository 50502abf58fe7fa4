"""The same recording after lossy coding, resampling or a change of level: candidates by spectrum, proof by waveform.

A clip is brought to 8 kHz. Its outline is the log energy in 16 time segments x 16 bands, unit length; outlines that
agree make a candidate. It is confirmed when the waveforms themselves correlate over 0.98 at some lag of up to 0.1 s
(codecs add delay), so that two takes of the same kind of sound are not confused: their phases and noise differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from covo_rl.audio import ClipStore, resample
from covo_rl.types import Clip

RATE = 8_000
SEGMENTS = BANDS = 16
#: Cosine of outlines, and correlation of waveforms.
OUTLINE, WAVEFORM = 0.9, 0.98
MAX_LAG = 0.1
_WINDOW = 256
_BLOCK = 2_048


def near_pairs(left: Sequence[tuple[Clip, float]], right: Sequence[tuple[Clip, float]]) -> list[tuple[int, int]]:
    """Positions (in left, in right) of clips that hold the same recording. Each side is a list of (clip, seconds)."""
    if not left or not right:
        return []
    store = ClipStore(memory_mb=512)
    outlines = [np.stack([_outline(_at_8k(store, clip)) for clip, _ in side]) for side in (left, right)]
    seconds = [np.array([length for _, length in side]) for side in (left, right)]
    found = []
    for start in range(0, len(left), _BLOCK):
        cosine = outlines[0][start : start + _BLOCK] @ outlines[1].T
        apart = np.abs(seconds[0][start : start + _BLOCK, None] - seconds[1][None])
        for i, j in np.argwhere((cosine > OUTLINE) & (apart < 2 * MAX_LAG)):
            pair = _at_8k(store, left[start + i][0]), _at_8k(store, right[j][0])
            if _correlation(*pair) > WAVEFORM:
                found.append((int(start + i), int(j)))
    return found


def _at_8k(store: ClipStore, clip: Clip) -> np.ndarray:
    return resample(*store.waveform(store.key(clip)), RATE)


def _outline(waveform: np.ndarray) -> np.ndarray:
    """Unit vector (SEGMENTS * BANDS,), float32: log energies without their mean, so that level does not matter."""
    padded = np.pad(waveform, (0, max(0, _WINDOW * SEGMENTS - len(waveform))))
    frames = padded[: len(padded) // _WINDOW * _WINDOW].reshape(-1, _WINDOW) * np.hanning(_WINDOW)
    power = np.square(np.abs(np.fft.rfft(frames, axis=1)[:, : _WINDOW // 2])).reshape(len(frames), BANDS, -1).sum(-1)
    pooled = np.stack([part.mean(axis=0) for part in np.array_split(power, SEGMENTS)])
    values = np.log(pooled + 1e-6 * pooled.max() + 1e-20).reshape(-1)
    values -= values.mean()
    return (values / max(float(np.linalg.norm(values)), 1e-9)).astype(np.float32)


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Largest absolute normalised correlation over lags up to MAX_LAG."""
    size = 1 << (len(one) + len(other)).bit_length()
    product = np.fft.irfft(np.fft.rfft(one, size) * np.conj(np.fft.rfft(other, size)), size)
    lags = int(MAX_LAG * RATE)
    peak = max(np.abs(product[: lags + 1]).max(), np.abs(product[-lags:]).max())
    energy = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
    return float(peak) / energy if energy else 0.0
