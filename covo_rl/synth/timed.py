"""Words that are said when somebody wants them said: each fills its time, with the movement of pitch and level it has.

say_timed([TimedWord("two", 0.0, 0.3), TimedWord("four", 0.3, 0.7, pitch=-5, fall=10)], speaker, rng)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from covo_rl.synth.back_channels import _SOUNDS, BACK_CHANNELS
from covo_rl.synth.phones import PRONUNCIATIONS
from covo_rl.synth.sounds import RATE, Rng
from covo_rl.synth.speech import Speaker, _render

#: what is said beside digits: a word after which a turn goes on, and what a listener says
_WORDS = {**PRONUNCIATIONS, "and": "a n", **BACK_CHANNELS["en"]}
#: root mean square of words at level 1, and the seconds for which the last one rings
LOUDNESS, RING = 0.08, 0.04


#: seconds: words of which one begins where the other ends may be this far off, by rounding
ROUNDING = 1e-6


class TimedWord(NamedTuple):
    """A word and its times in seconds. Within it pitch moves by `pitch` semitones, and `level` by -`fall` dB."""

    text: str
    start: float
    end: float
    level: float = 1.0
    pitch: float = 0.0
    fall: float = 0.0


def say_timed(words: Sequence[TimedWord], speaker: Speaker, rng: Rng) -> np.ndarray:
    """float32 (T,) at 24 kHz, from the start of the first word until RING after the end of the last.

    Raises:
        ValueError: no words, one that nobody can say, or times out of order.
    """
    if not words or (strange := [word.text for word in words if word.text not in _WORDS]):
        raise ValueError(f"words {strange if words else []}: expected one or more of {', '.join(_WORDS)}")
    edges = [second for word in words for second in (word.start, word.end)]
    if any(after < before - ROUNDING for before, after in pairwise(edges)):
        raise ValueError(f"words from {edges[0]} to {edges[-1]} s overlap or are out of order")
    phones, now = [], edges[0]
    for word in words:
        phones += [(_SOUNDS["-"], word.start - now)] if word.start > now + ROUNDING else []
        parts = [_SOUNDS[name] for name in _WORDS[word.text].split()]
        scale = (word.end - word.start) / sum(part.seconds for part in parts)
        phones += [(replace(part, seconds=scale * part.seconds), scale * part.seconds) for part in parts]
        now = word.end
    phones.append((_SOUNDS["-"], RING))
    times = [second - edges[0] for second in edges]
    samples = round((times[-1] + RING) * RATE)
    semitones = [height for word in words for height in (0.0, word.pitch)]
    wave_T, _ = _render(phones, [*zip(times, semitones, strict=True)], samples, speaker, rng)
    levels = [dB for word in words for dB in (_decibels(word.level), _decibels(word.level) - word.fall)]
    gain_T = 10 ** (np.interp(np.arange(samples) / RATE, times, levels) / 20)
    return (gain_T * wave_T * LOUDNESS / np.sqrt(np.mean(wave_T**2))).astype(np.float32)


def _decibels(level: float) -> float:
    return float(20 * np.log10(max(level, 1e-3)))
