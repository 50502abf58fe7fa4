"""The phones of ten digits: how long, how loud, which resonances (after Klatt, 1980; Peterson and Barney, 1952)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Phone:
    """Length, amplitude of voice and of noise, centre and width of the noise band, the three formants (Hz)."""

    seconds: float
    voice: float
    noise: float
    band: tuple[float, float]
    formants: tuple[float, float, float]


_NONE = (3000.0, 2000.0)
PHONES = {
    "a": Phone(0.11, 1.0, 0, _NONE, (730, 1150, 2440)),
    "aw": Phone(0.15, 1.0, 0, _NONE, (570, 840, 2410)),
    "e": Phone(0.11, 1.0, 0, _NONE, (530, 1840, 2480)),
    "i": Phone(0.09, 1.0, 0, _NONE, (400, 1980, 2550)),
    "ii": Phone(0.17, 1.0, 0, _NONE, (280, 2280, 3000)),
    "o": Phone(0.10, 1.0, 0, _NONE, (490, 910, 2450)),
    "u": Phone(0.13, 1.0, 0, _NONE, (640, 1190, 2390)),
    "uh": Phone(0.07, 0.8, 0, _NONE, (500, 1400, 2450)),
    "uu": Phone(0.17, 1.0, 0, _NONE, (310, 900, 2240)),
    "w": Phone(0.08, 0.8, 0, _NONE, (310, 700, 2200)),
    "y": Phone(0.08, 0.9, 0, _NONE, (300, 2200, 2900)),
    "r": Phone(0.08, 0.8, 0, _NONE, (400, 1150, 1550)),
    "n": Phone(0.08, 0.5, 0, _NONE, (260, 1500, 2600)),
    "z": Phone(0.09, 0.4, 0.6, (6000, 1500), (300, 1600, 2550)),
    "v": Phone(0.06, 0.5, 0.25, (5500, 3500), (300, 1100, 2300)),
    "s": Phone(0.12, 0.0, 1.0, (6500, 1600), (320, 1600, 2550)),
    "f": Phone(0.11, 0.0, 0.45, (5500, 3500), (340, 1100, 2200)),
    "th": Phone(0.10, 0.0, 0.35, (7500, 2500), (320, 1290, 2540)),
    "t": Phone(0.03, 0.0, 1.0, (4500, 1800), (350, 1750, 2650)),
    "k": Phone(0.03, 0.0, 1.0, (2000, 700), (350, 1900, 2300)),
    "-": Phone(0.05, 0.0, 0, _NONE, (300, 1600, 2500)),
}
#: word -> its phones; a diphthong is two vowels, a stop a pause and a burst
PRONUNCIATIONS = {
    "zero": "z i r o w", "one": "w u n", "two": "- t uu", "three": "th r ii", "four": "f aw r", "five": "f a y v",
    "six": "s i - k s", "seven": "s e v uh n", "eight": "e y - t", "nine": "n a y n",
}  # fmt: skip
