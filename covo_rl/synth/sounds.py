"""Waveforms from numpy alone: everyday sounds, instruments and formant-synthesised voices.

Every generator returns mono float32 of peak about 1 at `RATE`; random detail comes from the given generator.
Vowel formants follow Peterson and Barney (1952), male averages, scaled for the other speakers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RATE = 24_000
Rng = np.random.Generator
FORMANTS = {"ah": (730, 1090, 2440), "ee": (270, 2290, 3010), "oo": (300, 870, 2240), "eh": (530, 1840, 2480)}
#: speaker -> (lowest, highest fundamental in Hz, formant scale); a whisper has no fundamental.
SPEAKERS = {"man": (90, 130, 1.0), "woman": (190, 240, 1.15), "child": (300, 370, 1.35), "whisper": (0, 0, 1.08)}


def _time(seconds: float) -> np.ndarray:
    return np.arange(round(seconds * RATE), dtype=np.float32) / RATE


def _edges(wave: np.ndarray, attack: float = 0.01, release: float = 0.02) -> np.ndarray:
    """Fade both ends in place, so that no click tells where a sound was pasted."""
    for part, seconds in ((wave, attack), (wave[::-1], release)):
        length = min(round(seconds * RATE), len(wave))
        part[:length] *= np.linspace(0, 1, length, dtype=np.float32)
    return wave


def _harmonics(frequency_hz: np.ndarray | float, amplitudes: Sequence[float], seconds: float) -> np.ndarray:
    """Sum of sines at multiples of a fixed or moving fundamental; those above 11 kHz are left out."""
    t = _time(seconds)
    phase = 2 * np.pi * np.cumsum(np.broadcast_to(np.float64(1) * frequency_hz, t.shape)) / RATE
    top = int(11_000 / np.max(frequency_hz))
    wave = np.zeros(len(t), dtype=np.float32)
    for n, amplitude in enumerate(amplitudes[:top], start=1):
        wave += np.float32(amplitude) * np.sin((n * phase).astype(np.float32))
    return wave


def _shaped_noise(seconds: float, gain_of_hz, rng: Rng) -> np.ndarray:
    """White noise with the given gain at every frequency."""
    noise = rng.standard_normal(round(seconds * RATE))
    spectrum = np.fft.rfft(noise)
    spectrum *= gain_of_hz(np.fft.rfftfreq(len(noise), 1 / RATE))
    return np.fft.irfft(spectrum, len(noise)).astype(np.float32)


def _peak(wave: np.ndarray) -> np.ndarray:
    return wave / max(float(np.abs(wave).max(initial=0.0)), 1e-6)


def event(name: str, seconds: float, rng: Rng, pitch: float | None = None) -> np.ndarray:
    """A short everyday sound: bell, buzzer, hiss, knock or whistle. `pitch` in [0, 1] keeps repeats alike."""
    p = rng.random() if pitch is None else pitch
    t = _time(seconds)
    waves = {
        "bell": lambda: sum(a * np.exp(-t * d) * np.sin(2 * np.pi * (500 + 400 * p) * r * t)
                            for r, a, d in ((1, 1, 9), (2.76, 0.6, 12), (5.4, 0.35, 18), (8.93, 0.2, 25))),
        "buzzer": lambda: _harmonics(100 + 80 * p, [1 / n**0.7 for n in range(1, 40)], seconds),
        "hiss": lambda: _shaped_noise(seconds, lambda f: 1 / (1 + np.exp((2500 + 2000 * p - f) / 300)), rng),
        "knock": lambda: np.sin(2 * np.pi * (110 + 60 * p) * t) * np.exp(-t * 30)
                         + 0.5 * _shaped_noise(seconds, lambda f: f < 900, rng) * np.exp(-t * 60),
        "whistle": lambda: _harmonics((1500 + 1200 * p) * (1 + 0.1 * t / seconds), [1], seconds),
    }  # fmt: skip
    if name not in waves:
        raise ValueError(f"no sound is called {name!r}; there are {', '.join(waves)}")
    return _edges(_peak(np.asarray(waves[name](), dtype=np.float32)), attack=0.004)


def note(instrument: str, frequency_hz: float, seconds: float, rng: Rng) -> np.ndarray:
    """One note of flute, organ, guitar or trumpet."""
    attack, release = 0.01, 0.02
    if instrument == "flute":
        breath = _shaped_noise(seconds, lambda f: (f > 1500) & (f < 6000), rng)
        wave = _harmonics(frequency_hz, [1, 0.12], seconds) + 0.12 * _peak(breath)
        attack, release = min(0.06, seconds / 4), 0.04
    elif instrument == "organ":
        wave = _harmonics(frequency_hz, [1, 0.9, 0.8, 0.7, 0, 0.6, 0, 0.5], seconds)
    elif instrument == "guitar":
        wave = _harmonics(frequency_hz, [1 / n for n in range(1, 14)], seconds) * np.exp(-_time(seconds) * 9)
        attack = 0.002
    elif instrument == "trumpet":
        bright = [float(np.exp(-(((n * frequency_hz - 2200) / 1500) ** 2)) + 0.25) for n in range(1, 22)]
        wobble = frequency_hz * (1 + 0.006 * np.sin(2 * np.pi * 6 * _time(seconds)))
        wave, attack = _harmonics(wobble, bright, seconds), min(0.04, seconds / 4)
    else:
        raise ValueError(f"no instrument is called {instrument!r}; there are flute, organ, guitar, trumpet")
    return _edges(_peak(wave), attack, release)


def vowel(name: str, speaker: str, seconds: float, rng: Rng, *, lift: float = 1.0, voice: float = 0.5) -> np.ndarray:
    """A sustained vowel. `lift` multiplies the fundamental, `voice` in [0, 1] picks it in the speaker's range."""
    low, high, scale = SPEAKERS[speaker]
    bands = [(f * scale, 60 + 0.06 * f, 0.6**i) for i, f in enumerate(FORMANTS[name])]

    def gain(f):
        return sum(g / (1 + ((f - centre) / width) ** 2) for centre, width, g in bands)

    if speaker == "whisper":
        return _edges(_peak(_shaped_noise(seconds, lambda f: gain(f) * (f > 150), rng)), 0.03, 0.04)
    f0 = (low + (high - low) * voice) * lift
    contour = f0 * (1.03 - 0.06 * _time(seconds) / seconds)
    amplitudes = [float(gain(n * f0)) / n**0.5 for n in range(1, 1 + int(5000 / f0))]
    return _edges(_peak(_harmonics(contour, amplitudes, seconds)), 0.03, 0.04)


def place(pieces: Sequence[tuple[float, np.ndarray]], seconds: float) -> np.ndarray:
    """Add pieces at their start times (seconds) into a clip; what sticks out at the end is cut."""
    clip = np.zeros(round(seconds * RATE), dtype=np.float32)
    for start, wave in pieces:
        at = round(start * RATE)
        clip[at : at + len(wave)] += wave[: max(len(clip) - at, 0)]
    return clip


def pcm16(clip: np.ndarray, level: float, noise: float, rng: Rng) -> np.ndarray:
    """Set the peak to `level`, add white noise at `noise` times that, as 16-bit integers."""
    clip = level * (_peak(clip) + noise * rng.standard_normal(len(clip), dtype=np.float32))
    return np.round(np.clip(clip, -1, 1) * 32_767).astype(np.int16)
