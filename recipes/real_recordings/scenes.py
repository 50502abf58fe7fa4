"""Clips of three seconds made of recordings, and what is asked about them.

Every clip has the same length, bandwidth (that of a telephone, which the narrowest source has) and a level that is
drawn at random: neither tells an answer. Noise is laid under it, so that the recording's own floor does not. Training
clips play their pieces up to 16 % faster or slower, as another speaker or a drum of another size would sound;
held-out clips are the recordings as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations

import numpy as np
from recordings import DRUMS, NUMBERS, SPLITS, VOICES, Recording

from covo_rl.audio import AudioError, audio_fingerprint, decode, resample
from covo_rl.types import Clip

RATE = 8000  # Hz, of asterisk's recordings; wider ones are brought down
SECONDS = 3.0
COUNTS = ("one", "two", "three", "four", "five")
KINDS = ("voice", "animal", "drum", "guitar")
QUIET = 0.02  # of the peak: what lies below at either end of a recording is cut
SHORTEST, SHORTEST_SENTENCE = 0.02, 1.0  # seconds of sound in a recording
Rng = np.random.Generator
Facts = dict[str, str]


class Library:
    """The recordings of one split by group and label, with their sounds: mono, 8 kHz, trimmed, peak 1."""

    def __init__(self, sounds: Mapping[Recording, np.ndarray], split: str) -> None:
        self.split, self.sounds = split, sounds
        self.by_label: dict[tuple[str, str], list[Recording]] = {}
        for recording in sounds:
            if recording.split == split:
                self.by_label.setdefault((recording.group, recording.label), []).append(recording)

    @cached_property
    def speakers(self) -> dict[str, list[Recording]]:
        """Recordings of single letters and syllables by speaker."""
        result: dict[str, list[Recording]] = {}
        for recording in self.by_label.get(("speech", "voice"), []):
            result.setdefault(recording.source, []).append(recording)
        return result

    def draw(self, group: str, label: str, rng: Rng) -> Recording:
        """One recording: first a source, then one of its recordings, so that none counts by its number of files."""
        recordings = self.by_label[group, label]
        sources = sorted({recording.source for recording in recordings})
        source = sources[rng.integers(len(sources))]
        own = [recording for recording in recordings if recording.source == source]
        return own[rng.integers(len(own))]

    def piece(self, recording: Recording, rng: Rng, longest: float, speed: float | None = None) -> np.ndarray:
        """The recording, in training at another speed, at most `longest` seconds of it, with soft ends."""
        wave = self.sounds[recording]
        if self.split == "train":
            wave = _played(wave, speed or _speed(rng))
        return _soft(wave[: round(longest * RATE)])


def load_sounds(recordings: Sequence[Recording]) -> tuple[dict[Recording, np.ndarray], list[str]]:
    """(Recording -> its sound, why others are left out).

    Left out are damaged recordings, those shorter than `SHORTEST` and `SHORTEST_SENTENCE`, and of one sound under two
    names in two splits the held-out one.

    Raises:
        AudioError: over a twentieth is damaged: these are not the packages that they should be.
    """
    sounds, problems = {}, []
    for recording in recordings:
        try:
            wave = _trimmed(*decode(Clip(path=str(recording.path))))
        except AudioError as error:
            problems.append(str(error))
            continue
        shortest = SHORTEST_SENTENCE if recording.group == "voices" else SHORTEST
        if len(wave) >= shortest * RATE:
            sounds[recording] = wave
        elif recording.group != "voices":
            problems.append(f"{recording.path}: {len(wave) / RATE:.3f} s of sound")
    if len(problems) > len(recordings) / 20:
        raise AudioError(f"{len(problems)} of {len(recordings)} recordings cannot be used, first: {problems[0]}")
    heard: dict[str, Recording] = {}
    for recording in sorted(sounds, key=lambda r: SPLITS.index(r.split)):
        first = heard.setdefault(audio_fingerprint(sounds[recording], RATE), recording)
        if first.split != recording.split:
            del sounds[recording]
            problems.append(f"{recording.path}: the same sound as {first.path.name} of the {first.split} split")
    return sounds, problems


def _speed(rng: Rng) -> float:
    return float(np.exp(rng.uniform(-0.15, 0.15)))


def _trimmed(wave: np.ndarray, rate: int) -> np.ndarray:
    wave = resample(wave, rate, RATE)
    peak = float(np.abs(wave).max(initial=0))
    loud = np.flatnonzero(np.abs(wave) > QUIET * peak)
    return (wave[loud[0] : loud[-1] + 1] / peak).astype(np.float32) if peak > 0 else wave[:0]


def _played(wave: np.ndarray, speed: float) -> np.ndarray:
    """At another speed, pitch and formants included; linear interpolation, as nothing above 4 kHz matters here."""
    places = np.arange(0, max(len(wave) - 1, 0), speed)
    return np.interp(places, np.arange(len(wave)), wave).astype(np.float32)


def _soft(wave: np.ndarray, attack: float = 0.003, release: float = 0.03) -> np.ndarray:
    wave = wave.copy()
    for part, seconds in ((wave, attack), (wave[::-1], release)):
        count = min(round(seconds * RATE), len(part))
        part[:count] *= np.linspace(0, 1, count, dtype=np.float32)
    return wave


def place(pieces: Sequence[tuple[float, np.ndarray]]) -> np.ndarray:
    """Pieces at their starts in seconds -> a clip of `SECONDS`; what reaches beyond is faded and cut."""
    clip = np.zeros(round(SECONDS * RATE), dtype=np.float32)
    for start, wave in pieces:
        begin = round(start * RATE)
        wave = wave if begin + len(wave) <= len(clip) else _soft(wave[: len(clip) - begin])
        clip[begin : begin + len(wave)] += wave
    return clip


def finished(clip: np.ndarray, rng: Rng) -> np.ndarray:
    """int16 clip: at a level of -44 to -32 dB (root mean square), over noise 25 to 40 dB below.

    So low that the peak of a single hit fits: were it brought down to fit, its level would tell which drum it is.
    """
    level = 10 ** (rng.uniform(-44, -32) / 20)
    clip = clip * (level / max(float(np.sqrt(np.mean(clip**2))), 1e-6))
    clip = clip + rng.standard_normal(len(clip)) * level * 10 ** (-rng.uniform(25, 40) / 20)
    return np.round(np.clip(clip, -1, 1) * 32767).astype(np.int16)


def _voice(library: Library, facts: Facts, rng: Rng) -> np.ndarray:
    wave = library.sounds[library.draw("voices", facts["voice"], rng)]
    longest = round(rng.uniform(1.2, 2.4) * RATE)
    begin = int(rng.integers(max(len(wave) - longest, 0) + 1))
    return place([(rng.uniform(0, 0.5), _soft(wave[begin : begin + longest]))])


def _number(library: Library, facts: Facts, rng: Rng) -> np.ndarray:
    word = library.piece(library.draw("numbers", facts["number"], rng), rng, 1.5)
    return place([(rng.uniform(0.1, 1.2), word)])


def _words(library: Library, facts: Facts, rng: Rng) -> np.ndarray:
    speakers = sorted(library.speakers)
    own = library.speakers[speakers[rng.integers(len(speakers))]]
    speed = _speed(rng)
    numbers = rng.permutation(len(own))[: COUNTS.index(facts["words"]) + 1]
    return _spread([library.piece(own[i], rng, 0.45, speed) for i in numbers], rng)


def _hits(library: Library, facts: Facts, rng: Rng) -> np.ndarray:
    recording, speed = library.draw("drums", facts["drum"], rng), _speed(rng)
    hit = library.piece(recording, rng, 0.4, speed)
    return _spread([hit * rng.uniform(0.6, 1.0) for _ in range(COUNTS.index(facts["hits"]) + 1)], rng)


def _spread(pieces: Sequence[np.ndarray], rng: Rng) -> np.ndarray:
    """The pieces one after the other, with uneven pauses that fill the clip."""
    room = SECONDS - 0.05 - sum(len(piece) for piece in pieces) / RATE
    shares = rng.dirichlet(np.full(len(pieces) + 1, 4.0)) * max(room - 0.08 * len(pieces), 0)
    placed, start = [], float(shares[0])
    for piece, pause in zip(pieces, shares[1:], strict=True):
        placed.append((start, piece))
        start += len(piece) / RATE + 0.08 + float(pause)
    return place(placed)


def _drum(library: Library, facts: Facts, rng: Rng) -> np.ndarray:
    recording, speed = library.draw("drums", facts["drum"], rng), _speed(rng)
    return place([(rng.uniform(0.05, 0.6), library.piece(recording, rng, 1.5, speed))])


def _sound(library: Library, kind: str, rng: Rng, seconds: float) -> np.ndarray:
    """About `seconds` of a kind of sound: one recording, or several of the same voice or kit one after the other."""
    if kind in ("animal", "guitar"):
        return library.piece(library.draw(kind, kind, rng), rng, seconds)
    if kind == "voice":
        speakers = sorted(library.speakers)
        own = library.speakers[speakers[rng.integers(len(speakers))]]
    else:
        first = library.draw("drums", str(rng.choice(list(DRUMS))), rng)
        own = [r for label in DRUMS for r in library.by_label.get(("drums", label), []) if r.source == first.source]
    pieces, total, speed = [], 0.0, _speed(rng)
    while total < seconds:
        wave = library.piece(own[rng.integers(len(own))], rng, 0.6, speed)
        wave = np.concatenate([wave, np.zeros(round(rng.uniform(0.02, 0.15) * RATE), np.float32)])
        pieces.append(wave)
        total += len(wave) / RATE
    return _soft(np.concatenate(pieces)[: round(seconds * RATE)])


def _kind(library: Library, facts: Facts, rng: Rng) -> np.ndarray:
    return place([(rng.uniform(0, 0.5), _sound(library, facts["kind"], rng, rng.uniform(1.2, 2.4)))])


def _order(library: Library, facts: Facts, rng: Rng) -> np.ndarray:
    pieces, start = [], rng.uniform(0.0, 0.2)
    for kind in facts["order"].split(" then "):
        sound = _sound(library, kind, rng, rng.uniform(0.8, 1.2))
        pieces.append((start, sound / max(float(np.sqrt(np.mean(sound**2))), 1e-6)))
        start = max(start + len(sound) / RATE + rng.uniform(0.05, 0.2), 1.2)
    return place(pieces)


@dataclass(frozen=True)
class Task:
    """`evidence` is true when filled with the facts; `lexicon`: fact -> all values; the first fact is asked for."""

    name: str
    modality: str
    lexicon: Mapping[str, tuple[str, ...]]
    evidence: str
    questions: tuple[str, ...]
    render: Callable[[Library, Facts, Rng], np.ndarray]

    @property
    def options(self) -> tuple[str, ...]:
        return KINDS if self.name == "order" else self.lexicon[self.name]


TASKS = (
    Task("voice", "speech", {"voice": VOICES}, "I hear the voice of {voice}.",
         ("Whose voice is it?", "Who is speaking?"), _voice),
    Task("number", "speech", {"number": NUMBERS}, "I hear the number {number}.",
         ("Which number is spoken?", "Which digit is said?"), _number),
    Task("words", "speech", {"words": COUNTS}, "I hear words, count {words}.",
         ("How many words are spoken?", "Count the words."), _words),
    Task("hits", "music", {"hits": COUNTS, "drum": tuple(DRUMS)}, "I hear the {drum}, count {hits}.",
         ("How many times is the drum hit?", "Count the hits."), _hits),
    Task("drum", "music", {"drum": tuple(DRUMS)}, "I hear the {drum}.",
         ("Which part of the drum kit is hit?", "Which drum is it?"), _drum),
    Task("kind", "sound", {"kind": KINDS}, "I hear the {kind}.",
         ("What kind of sound is it?", "What makes the sound?"), _kind),
    Task("order", "sound", {"order": tuple(f"{a} then {b}" for a, b in permutations(KINDS, 2))}, "I hear {order}.",
         ("Which sound comes first?", "What is heard at the start?"), _order),
)  # fmt: skip
