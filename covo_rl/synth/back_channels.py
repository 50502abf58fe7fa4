"""What a listener says while another speaks, and by which he does not take the turn: "mm", "yeah", in the phones of a
digit voice. One list per language; where there is none, the hum that every language has.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from covo_rl.synth.phones import PHONES, Phone
from covo_rl.synth.sounds import RATE, Rng
from covo_rl.synth.speech import Speaker, _render

_HUM = Phone(0.16, 0.6, 0, (3000.0, 2000.0), (250, 1100, 2200))
_BREATH = Phone(0.05, 0.0, 0.25, (1500.0, 1000.0), (600, 1400, 2450))
_SOUNDS = {**PHONES, "m": _HUM, "h": _BREATH}
#: language -> what is said: its phones
BACK_CHANNELS = {
    "en": {"mm": "m m", "mm-hm": "m h m", "uh-huh": "uh uh h u", "yeah": "y e a"},
    "zh": {"嗯": "m m", "对": "t uu e y", "哦": "aw o"},
    "": {"mm": "m m"},
}
#: seconds that one lasts, at least and at most
BACK_CHANNEL_SECONDS = (0.2, 0.6)


def say_back_channel(language: str | None, speaker: Speaker, rng: Rng) -> tuple[str, np.ndarray]:
    """(what is said, float32 (T,) at 24 kHz of root mean square 0.1): one of the list, drawn, and as long as drawn."""
    words = BACK_CHANNELS.get(language or "", BACK_CHANNELS[""])
    word = list(words)[int(rng.integers(len(words)))]
    phones = [_SOUNDS[name] for name in words[word].split()]
    seconds = rng.uniform(BACK_CHANNEL_SECONDS[0] + 0.02, BACK_CHANNEL_SECONDS[1])
    scale = seconds / sum(phone.seconds for phone in phones)
    timed = [(replace(phone, seconds=scale * phone.seconds), scale * phone.seconds) for phone in phones]
    falls = [(0.0, rng.uniform(-1, 1)), (seconds, rng.uniform(-4, 2))]
    wave_T, _ = _render(timed, falls, round(seconds * RATE), speaker, rng)
    return word, 0.1 * wave_T / np.float32(np.sqrt(np.mean(wave_T**2)))


def listener(f0_hz: float, rng: Rng) -> Speaker:
    """A voice of a fundamental, as that of somebody who was heard: high ones have the formants of a woman."""
    sex, scale = ("female", 1.17) if f0_hz > 160 else ("male", 1.0)
    tilt, breath = rng.uniform(3, 8), rng.uniform(0.005, 0.05)
    return Speaker("listener", sex, f0_hz, scale * rng.uniform(0.97, 1.03), tilt, 1.0, breath)
