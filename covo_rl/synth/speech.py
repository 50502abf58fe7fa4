"""Formant-synthesised speech of digits, with the exact time of every word and the true fundamental of every frame.

A pulse train and noise, shaped frame by frame by the formants of a phone table (after Klatt, JASA 67, 1980; vowels of
Peterson and Barney, 1952). Words carry lexical tones; speakers differ in fundamental, formants, tilt, rate and breath.

    utterance("train", 17)                          # always the same speaker, words and wave
    write_speech("data/digits", count=500)          # wav files and rows.jsonl, for `covo-rl speech`
"""

from __future__ import annotations

import wave as wav
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from covo_rl.data.files import json_line, write_atomically
from covo_rl.synth.phones import PHONES, PRONUNCIATIONS, Phone
from covo_rl.synth.sounds import RATE, Rng

DIGITS = tuple(PRONUNCIATIONS)
#: tone -> semitones relative to the speaker's fundamental, at the start and the end of the word.
TONES = {"level": (0, 0), "rise": (-3, 4), "fall": (4, -4), "low": (-4, -4)}
#: split -> voices in it; none is in two.
SPEECH_SPLITS = {"train": 64, "validation": 16, "test": 16}
_CODE, _FRAME = 960, 240  # samples of one speech code (40 ms) and of one frame of `Utterance.f0_Z` (10 ms)
_CONTROL, _FFT = 120, 1024  # a control frame is 5 ms; the response of a frame rings for up to 33 ms
_BINS_HZ = np.fft.rfftfreq(_FFT, 1 / RATE).astype(np.float32)


@dataclass(frozen=True)
class Speaker:
    """A voice. `tilt`: slope of its spectrum in dB an octave. `rate`: its speed. `breath`: noise under the voice."""

    name: str
    sex: str
    f0_hz: float
    formant_scale: float
    tilt: float
    rate: float
    breath: float


@dataclass(frozen=True)
class Utterance:
    """Speech and all that is true of it. `words`: (text, start, end) in seconds; `tones`: one a word.

    wave: (T,) float32 at 24 kHz, a whole number of codes long. f0_Z: (T / 240,) float32, the fundamental in Hz at the
    centre of every 10 ms, 0 where there is no voice.
    """

    wave: np.ndarray
    text: str
    words: tuple[tuple[str, float, float], ...]
    tones: tuple[str, ...]
    speaker: Speaker
    f0_Z: np.ndarray


def speakers(count: int, seed: int = 0, split: str = "train") -> list[Speaker]:
    """The first voices of a split, women and men by turns; voice i depends on (seed, split, i) only.

    Raises:
        ValueError: there is no such split.
    """
    return [_speaker(split, index, seed) for index in range(count)]


def _speaker(split: str, index: int, seed: int) -> Speaker:
    rng = _rng(split, index, seed, 0)
    sex = ("female", "male")[index % 2]
    low, high, scale = (165, 250, 1.17) if sex == "female" else (85, 150, 1.0)
    return Speaker(
        name=f"{split}-{seed}-{index:03d}",
        sex=sex,
        f0_hz=float(np.exp(rng.uniform(np.log(low), np.log(high)))),
        formant_scale=float(scale * rng.uniform(0.94, 1.06)),
        tilt=float(rng.uniform(3, 8)),
        rate=float(rng.uniform(0.85, 1.2)),
        breath=float(rng.uniform(0.005, 0.05)),
    )


def _rng(split: str, index: int, seed: int, kind: int) -> Rng:
    if split not in SPEECH_SPLITS:
        raise ValueError(f"no split is called {split!r}; there are {', '.join(SPEECH_SPLITS)}")
    return np.random.default_rng([seed, list(SPEECH_SPLITS).index(split), index, kind])


def utterance(split: str, index: int, seed: int = 0) -> Utterance:
    """Two to six digits by a voice of the split: utterance `index`, whichever others are made."""
    rng = _rng(split, index, seed, 1)
    speaker = _speaker(split, int(rng.integers(SPEECH_SPLITS.get(split, 1))), seed)
    return say_digits([str(word) for word in rng.choice(DIGITS, rng.integers(2, 7))], speaker, rng)


def say_digits(
    words: Sequence[str],
    speaker: Speaker,
    rng: Rng,
    tones: Sequence[str] | None = None,
    breaks: Sequence[bool] | None = None,
) -> Utterance:
    """Digit words in a voice, one tone a word (drawn where none are named); lengths and pauses vary with `rng`.

    `breaks`: after which words the speaker pauses for 0.25 to 0.4 s; by default after one in five, drawn.

    Raises:
        ValueError: no words, a word that is no digit, an unknown tone, or not one tone and break a word.
    """
    tones = [str(tone) for tone in rng.choice(list(TONES), len(words))] if tones is None else list(tones)
    for name, values, known in (("word", words, DIGITS), ("tone", tones, TONES)):
        if strange := [value for value in values if value not in known]:
            raise ValueError(f"no {name} is called {strange[0]!r}; there are {', '.join(known)}")
    if not words or len(tones) != len(words):
        raise ValueError(f"{len(words)} words and {len(tones)} tones: at least one word, and one tone a word")
    if breaks is not None and len(breaks) != len(words):
        raise ValueError(f"{len(words)} words and {len(breaks)} breaks: one a word")
    phones, times = [(PHONES["-"], rng.uniform(0.05, 0.15))], []
    pitch = [(0.0, 0.0)]  # (second, semitones), joined by straight lines
    end = phones[0][1]
    for place, (word, tone) in enumerate(zip(words, tones, strict=True)):
        start = end
        for name in PRONUNCIATIONS[word].split():
            phone = PHONES[name]
            phones.append((phone, phone.seconds * rng.uniform(0.85, 1.15) / speaker.rate))
            end += phones[-1][1]
        times.append((word, round(start, 4), round(end, 4)))
        pitch += [(start, TONES[tone][0]), (end, TONES[tone][1])]
        pauses = rng.random() < 0.2 if breaks is None else breaks[place]
        pause = rng.uniform(0.25, 0.4) if pauses else rng.uniform(0.04, 0.12)
        phones.append((PHONES["-"], pause))
        end += pause
    samples = -(-round(end * RATE) // _CODE) * _CODE
    wave, f0_T = _render(phones, pitch, samples, speaker, rng)
    centres = np.arange(_FRAME // 2, samples, _FRAME)
    return Utterance(wave, " ".join(words), tuple(times), tuple(tones), speaker, f0_T[centres])


def _render(
    phones: Sequence[tuple[Phone, float]],
    pitch: Sequence[tuple[float, float]],
    samples: int,
    speaker: Speaker,
    rng: Rng,
) -> tuple[np.ndarray, np.ndarray]:
    """(wave, fundamental in Hz at every sample, 0 without voice)."""
    frames = samples // _CONTROL + 1
    ends = np.cumsum([seconds for _, seconds in phones]) * RATE / _CONTROL
    which = np.minimum(np.searchsorted(ends, np.arange(frames), side="right"), len(phones) - 1)
    table = [phones[i][0] for i in which]
    formants_F3 = _smooth(np.array([phone.formants for phone in table], dtype=np.float64), 11)
    formants_F3 *= speaker.formant_scale * rng.uniform(0.98, 1.02, 3)
    voice_F, noise_F = _smooth(np.array([(phone.voice, phone.noise) for phone in table]), 5).T
    t, at = np.arange(samples), np.arange(frames) * _CONTROL
    seconds, heights = np.array(pitch).T
    semitones = np.interp(t / RATE, seconds, heights) - t / RATE * 0.3  # and falls a little towards the end
    semitones += np.interp(t, at, _smooth(rng.standard_normal((frames, 1)), 21)[:, 0])
    f0_T = speaker.f0_hz * 2 ** (semitones / 12)
    voice_T = np.interp(t, at, voice_F)
    breath = speaker.breath * voice_T * rng.standard_normal(samples) * 3
    hiss = np.interp(t, at, noise_F) * rng.standard_normal(samples)
    bands_F2 = _smooth(np.array([phone.band for phone in table]), 3)
    wave = _filter(voice_T * _pulses(f0_T) + breath, _vocal_tract(formants_F3, speaker))
    wave = wave / np.sqrt(np.mean(wave[voice_T > 0.5] ** 2))
    fricative = _filter(hiss, _noise_band(bands_F2 * speaker.formant_scale**0.5))
    wave = wave + 1.2 * fricative + rng.uniform(1e-3, 4e-3) * rng.standard_normal(samples)
    wave = wave * rng.uniform(0.4, 0.9) / np.abs(wave).max()
    return wave.astype(np.float32), np.where(voice_T > 0.1, f0_T, 0).astype(np.float32)


def _smooth(values_FN: np.ndarray, width: int) -> np.ndarray:
    """Running mean over an odd number of control frames, the ends held."""
    padded = np.pad(values_FN, ((width // 2 + 1, width // 2), (0, 0)), mode="edge").cumsum(axis=0)
    return (padded[width:] - padded[:-width]) / width


def _pulses(f0_T: np.ndarray) -> np.ndarray:
    """Equal harmonics up to 11 kHz in closed form: 1/2 + sum cos(n x) = sin((N + 1/2) x) / (2 sin(x/2))."""
    phase = 2 * np.pi * np.cumsum(f0_T) / RATE
    count, half = np.floor(11_000 / f0_T), np.sin(phase / 2)
    small = np.abs(half) < 1e-6
    return np.where(small, count, np.sin((count + 0.5) * phase) / np.where(small, 1, 2 * half) - 0.5)


def _vocal_tract(formants_F3: np.ndarray, speaker: Speaker) -> np.ndarray:
    """Responses (frames, bins) of five resonances in a row, with the voice's tilt."""
    f, scale = _BINS_HZ, speaker.formant_scale
    source = 10 ** (-speaker.tilt / 20 * np.log2(np.maximum(f, 80) / 80)) * (f > 40)
    # each resonance falls by 12 dB an octave above itself; the ones that are left out would hold the level up
    source = source * (1 + (f / (4000 * scale)) ** 2) ** 2
    damping = np.ones((len(formants_F3), len(f)), np.complex64)
    high = np.broadcast_to(np.array([3500.0, 4500.0]) * scale, (len(formants_F3), 2))
    centres = np.hstack([formants_F3, high]).astype(np.float32).T[:, :, None]
    for centre, width in zip(centres, (60, 80, 120, 200, 250), strict=True):
        damping *= 1 - (f / centre) ** 2 + 1j * (f * np.float32(width) / centre**2)
    return source / damping


def _noise_band(bands_F2: np.ndarray) -> np.ndarray:
    bands = bands_F2.astype(np.float32)
    return np.exp(-0.5 * ((_BINS_HZ - bands[:, :1]) / bands[:, 1:]) ** 2)


def _filter(source_T: np.ndarray, responses_FB: np.ndarray) -> np.ndarray:
    """Overlap-add: Hann windows of two control frames, each through its own response."""
    window = np.hanning(2 * _CONTROL + 1)[:-1].astype(np.float32)
    padded = np.pad(source_T.astype(np.float32), _CONTROL)
    pieces = np.lib.stride_tricks.sliding_window_view(padded, 2 * _CONTROL)[::_CONTROL][: len(responses_FB)]
    ringing = np.fft.irfft(np.fft.rfft(pieces * window, _FFT) * responses_FB, _FFT)
    hops = -(-_FFT // _CONTROL)
    ringing = np.pad(ringing, ((0, 0), (0, hops * _CONTROL - _FFT))).reshape(len(ringing), hops, _CONTROL)
    total = np.zeros((len(ringing) + hops, _CONTROL))
    for hop in range(hops):
        total[hop : hop + len(ringing)] += ringing[:, hop]
    return total.ravel()[_CONTROL : _CONTROL + len(source_T)]


def write_wav(path: Path, wave_T: np.ndarray) -> None:
    """Write samples within [-1, 1] at 24 kHz, 16 bits each."""
    with wav.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, len(wave_T), "NONE", ""))
        file.writeframes(np.round(wave_T * 32_767).astype("<i2").tobytes())


def write_speech(folder: str | Path, *, split: str = "train", count: int = 500, seed: int = 0) -> Path:
    """Write utterances as 16-bit wav and one row each; returns `folder/rows.jsonl`, whose paths are beside it.

    All that a voice says is one document, in the order of the utterances' numbers.
    """
    folder = Path(folder)
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for index in range(count):
        spoken, name = utterance(split, index, seed), f"{split}-{seed}-{index:05d}"
        write_wav(folder / f"audio/{name}.wav", spoken.wave)
        rows.append({
            "id": name, "audio": f"audio/{name}.wav", "text": spoken.text, "language": "en",
            "speaker": spoken.speaker.name, "document": spoken.speaker.name, "position": index, "words": spoken.words,
            "tones": spoken.tones, "sex": spoken.speaker.sex,
        })  # fmt: skip
    path = folder / "rows.jsonl"
    write_atomically(path, lambda file: file.writelines(map(json_line, rows)))
    return path
