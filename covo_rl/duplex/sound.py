"""What a simulated channel is made of: where somebody speaks in a recording, and the tone of its room. No torch.

A pause that is cut into a recording, the time after its end and the time between turns are all filled with the same
tone, made anew from what is quiet in the recording: a stretch of zeros, or one repeated, would give the answer away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from covo_rl.duplex.data import Span
from covo_rl.speech.grid import RATE

Rng = np.random.Generator
#: seconds of quiet that end a stretch of speech in a recording without times of words
MIN_QUIET = 0.06
#: dB from the quietest twentieth of a recording to its loudest below which nothing of it is called quiet
MIN_RANGE = 10.0
#: seconds over which a piece fades into the tone around it, and of a recording that are kept around its speech
FADE, CONTEXT = 0.01, 0.08
_FRAME, _HOP, _FFT = 480, 240, 512  # samples: 20 ms, 10 ms
#: least standard deviation of the tone, in steps of 16 bits: less would be rounded to runs of equal samples
_STEPS = 2 / 32_768


@dataclass(frozen=True)
class Levels:
    """Root mean square of each 10 ms, `quiet` where it is near the quietest of the recording, the level of speech."""

    frames_Z: np.ndarray
    quiet_Z: np.ndarray
    speech: float


def measure_levels(wave_T: np.ndarray) -> Levels:
    """Quiet is what lies in the lower third, in dB, between the quietest twentieth of frames and the loudest tenth."""
    padded = np.pad(wave_T.astype(np.float64), (_HOP // 2, _FRAME))
    frames_ZT = np.lib.stride_tricks.sliding_window_view(padded, _FRAME)[: max(1, len(wave_T) // _HOP) * _HOP : _HOP]
    frames_Z = np.sqrt(np.mean(np.square(frames_ZT), axis=1))
    level_Z = 20 * np.log10(frames_Z + 1e-7)
    low, high = np.quantile(level_Z, (0.05, 0.9))
    quiet_Z = level_Z < low + (high - low) / 3 if high - low >= MIN_RANGE else np.zeros(len(level_Z), bool)
    loud_Z = frames_Z[level_Z >= high - 20]
    return Levels(frames_Z, quiet_Z, float(np.sqrt(np.mean(loud_Z**2))))


def speech_islands(wave_T: np.ndarray, words: Sequence[tuple[str, float, float]] | None, levels: Levels) -> list[Span]:
    """Stretches of speech, in seconds: words where their times are known, else what lies between quiets of 60 ms.

    A pause may be put between any two of them, and nowhere else: never into a word.
    """
    seconds = len(wave_T) / RATE
    if words:
        return [(start, min(end, seconds)) for _, start, end in words]
    loud = np.flatnonzero(~levels.quiet_Z)
    if not len(loud):
        return [(0.0, seconds)]
    breaks = np.flatnonzero(np.diff(loud) > MIN_QUIET * RATE / _HOP)
    firsts, lasts = loud[[0, *(breaks + 1)]], loud[[*breaks, -1]]
    return [(first * _HOP / RATE, min((last + 1) * _HOP / RATE, seconds))
            for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True)]  # fmt: skip


def room_tone(wave_T: np.ndarray, levels: Levels) -> np.ndarray:
    """Gain (257,) at frequencies from 0 to 12 kHz that makes white noise into what is quiet in a recording.

    A recording that is never quiet, or only digitally, has none: zeros.
    """
    starts = np.flatnonzero(levels.quiet_Z) * _HOP
    starts = starts[starts + _FFT <= len(wave_T)]
    if not len(starts):
        return np.zeros(_FFT // 2 + 1)
    window = np.hanning(_FFT)
    pieces = np.stack([wave_T[start : start + _FFT] for start in starts])
    power = np.square(np.abs(np.fft.rfft((pieces - pieces.mean()) * window))) / np.sum(window**2)
    return np.sqrt(np.median(power, axis=0) / np.log(2))  # power is exponential: a burst moves its mean, not its median


def shaped_noise(samples: int, gain_B: np.ndarray, rng: Rng) -> np.ndarray:
    """(samples,) of white noise of deviation 1 through gains at equally spaced frequencies from 0 to 12 kHz."""
    size = -(-samples // 4096) * 4096  # without large primes, of which a transform is slow
    spectrum = np.fft.rfft(rng.standard_normal(size))
    spectrum *= np.interp(np.linspace(0, 1, len(spectrum)), np.linspace(0, 1, len(gain_B)), gain_B)
    return np.fft.irfft(spectrum, size)[:samples]


def noise_floor(samples: int, level: float, rng: Rng) -> np.ndarray:
    """Noise of a root mean square, never less than two steps of 16 bits, somewhere between white and brown."""
    octaves = np.log2(np.maximum(np.linspace(0, RATE / 2, _FFT // 2 + 1), 60) / 60)
    noise = shaped_noise(samples, 10 ** (-rng.uniform(0, 6) * octaves / 20), rng)
    return noise * max(level, _STEPS) / max(float(np.std(noise)), 1e-12)


def fit_length(wave_T: np.ndarray, start: int, samples: int) -> tuple[int, np.ndarray]:
    """Where a wave begins in a channel, and what of it lies within the channel."""
    return max(start, 0), wave_T[max(-start, 0) : max(samples - start, 0)]


def faded_end(wave_T: np.ndarray) -> np.ndarray:
    """The wave, over whose last 10 ms it becomes silent."""
    wave_T, length = wave_T.copy(), min(round(FADE * RATE), len(wave_T))
    wave_T[len(wave_T) - length :] *= np.linspace(1, 0, length)
    return wave_T


class UserChannel:
    """The user's side: pieces of recordings in the tone of their room, and what sounds beside them.

    tones: (start in samples, gain) of each recording, in order; a tone changes halfway into the silence before it.
    """

    def __init__(self, samples: int, tones: Sequence[tuple[int, np.ndarray]], rng: Rng) -> None:
        starts = [0, *(start for start, _ in tones[1:]), samples]
        self.wave_T = np.zeros(samples)
        for (a, b), (_, gain_B) in zip(pairwise(starts), tones, strict=True):
            part = shaped_noise(max(b - a, 1), gain_B, rng)
            self.wave_T[a:b] = part[: b - a]

    def put(self, start: int, piece_T: np.ndarray) -> None:
        """Lay a piece over the tone, into which both its ends fade: of equal power, as the two are not alike."""
        start, piece_T = fit_length(piece_T, start, len(self.wave_T))
        ramp = np.sin(np.linspace(0, np.pi / 2, min(round(FADE * RATE), len(piece_T) // 2)))
        weight_T = np.ones(len(piece_T))
        weight_T[: len(ramp)], weight_T[len(piece_T) - len(ramp) :] = ramp, ramp[::-1]
        place = slice(start, start + len(piece_T))
        self.wave_T[place] = np.sqrt(1 - weight_T**2) * self.wave_T[place] + weight_T * piece_T

    def add(self, start: int, sound_T: np.ndarray) -> None:
        """Add a sound to what is there."""
        start, sound_T = fit_length(sound_T, start, len(self.wave_T))
        self.wave_T[start : start + len(sound_T)] += sound_T


def with_tail(wave_T: np.ndarray, seconds: float, rng: Rng) -> np.ndarray:
    """(T,) float32: a recording at 24 kHz, with so many seconds of the tone of its room after it.

    Both are never digitally silent: where a recording's zeros end would tell that it is over.
    """
    samples = len(wave_T) + round(seconds * RATE)
    user = UserChannel(samples, [(0, room_tone(wave_T, measure_levels(wave_T)))], rng)
    user.put(0, np.asarray(wave_T, np.float64))
    user.wave_T += noise_floor(samples, 0.0, rng)
    return user.wave_T.astype(np.float32)


def two_channels(user_T: np.ndarray, model_T: np.ndarray) -> np.ndarray:
    """(T, 2) float32; a channel that would clip is turned down as a whole."""
    waves = [wave_T * min(1.0, 0.99 / max(float(np.abs(wave_T).max(initial=0)), 1e-9)) for wave_T in (user_T, model_T)]
    return np.stack(waves, axis=1).astype(np.float32)
