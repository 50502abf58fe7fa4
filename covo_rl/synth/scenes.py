"""What can be heard and asked. A scene renders a clip with known facts; a question asks for one of them.

The facts of a clip are drawn uniformly and the wrong options uniformly from the other values of the asked fact,
so that without the audio every option is equally likely.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from covo_rl.synth import sounds
from covo_rl.synth.sounds import Rng, event, note, place, vowel

Facts = Mapping[str, str]
SECONDS = 3.0
EVENTS = ("bell", "buzzer", "hiss", "knock", "whistle")
INSTRUMENTS = ("flute", "organ", "guitar", "trumpet")
COUNTS = ("one", "two", "three", "four", "five")
LOUDNESS = ("louder", "softer", "even", "pulsing")
MELODIES = ("rising", "falling", "level", "zigzag")
TEMPOS = {"slow": (1.4, 1.7), "moderate": (2.4, 2.9), "fast": (4.2, 5.0), "frantic": (7.5, 9.0)}  # onsets a second
PLACES = ("first", "second", "third", "fourth")


@dataclass(frozen=True)
class Scene:
    """`lexicon`: fact -> its possible values. `evidence`: a sentence that is true when filled with the facts."""

    lexicon: Mapping[str, tuple[str, ...]]
    evidence: str
    render: Callable[[Facts, Rng], np.ndarray]


@dataclass(frozen=True)
class Task:
    """A kind of question about a scene: its wordings, and all options that there are."""

    name: str
    modality: str
    category: str
    scene: str
    options: tuple[str, ...]
    questions: tuple[str, ...]

    def answer(self, facts: Facts) -> str:
        """The right option: the fact of the task's name. `order, first` and `order, last` ask for a part of it."""
        fact, _, part = self.name.partition(", ")
        return facts[fact].split(" then ")[-1 if part == "last" else 0]


def _repeats(facts: Facts, rng: Rng) -> np.ndarray:
    count = COUNTS.index(facts["count"]) + 1
    gap = rng.uniform(0.42, 0.54)
    start, pitch = rng.uniform(0.05, 0.2), rng.random()
    pieces = [(start + i * gap + rng.uniform(-0.02, 0.02), event(facts["source"], 0.22, rng, pitch))
              for i in range(count)]  # fmt: skip
    tail = start + count * gap
    return place(pieces, rng.uniform(max(tail, 1.0), SECONDS))


def _pair(facts: Facts, rng: Rng) -> np.ndarray:
    first, last = facts["order"].split(" then ")
    a, b, gap, start = rng.uniform(0.5, 0.9), rng.uniform(0.5, 0.9), rng.uniform(0.05, 0.4), rng.uniform(0.05, 0.25)
    return place([(start, event(first, a, rng)), (start + a + gap, event(last, b, rng))], start + a + gap + b + 0.05)


def _swell(facts: Facts, rng: Rng) -> np.ndarray:
    seconds = rng.uniform(1.6, 2.9)
    t = np.linspace(0, 1, round(seconds * sounds.RATE), dtype=np.float32)
    wave = event(str(rng.choice(["buzzer", "hiss", "whistle"])), seconds, rng)[: len(t)]
    depth = rng.uniform(3.0, 4.5)  # e-folds, 26 to 39 dB
    level = {
        "louder": np.exp(depth * (t - 1)),
        "softer": np.exp(-depth * t),
        "even": np.ones_like(t),
        "pulsing": np.exp(depth * 0.5 * (np.cos(2 * np.pi * rng.uniform(2.5, 4.0) * seconds * t) - 1)),
    }[facts["loudness"]]
    return wave * level.astype(np.float32)


def _melody(facts: Facts, rng: Rng) -> np.ndarray:
    notes, step, length = int(rng.integers(4, 7)), rng.uniform(2.5, 4.5), rng.uniform(0.25, 0.42)
    shape = {
        "rising": np.arange(notes),
        "falling": -np.arange(notes),
        "level": np.zeros(notes),
        "zigzag": 1.5 * (np.arange(notes) % 2),
    }[facts["melody"]]
    pitches = 440 * 2 ** ((step * (shape - shape.mean()) + rng.uniform(-5, 5)) / 12)
    start = rng.uniform(0.03, 0.2)
    pieces = [(start + i * length, note(facts["instrument"], f, 0.92 * length, rng)) for i, f in enumerate(pitches)]
    return place(pieces, start + notes * length + 0.05)


def _beat(facts: Facts, rng: Rng) -> np.ndarray:
    rate = rng.uniform(*TEMPOS[facts["tempo"]])
    seconds, start, pitch = rng.uniform(2.2, SECONDS), rng.uniform(0.02, 0.15), 440 * 2 ** rng.uniform(-0.8, 0.8)
    length = min(0.6 / rate, 0.3)
    times = np.arange(start, seconds - 0.08, 1 / rate)
    return place([(s, note(facts["instrument"], pitch, length, rng)) for s in times], seconds)


def _voice(facts: Facts, rng: Rng) -> np.ndarray:
    times, length, voice = int(rng.integers(1, 4)), rng.uniform(0.35, 0.6), rng.random()
    start, gap = rng.uniform(0.05, 0.2), rng.uniform(0.08, 0.15)
    pieces = [(start + i * (length + gap), vowel(facts["vowel"], facts["speaker"], length, rng, voice=voice))
              for i in range(times)]  # fmt: skip
    return place(pieces, max(start + times * (length + gap), 1.0))


def _stress(facts: Facts, rng: Rng) -> np.ndarray:
    voice, speaker, start = rng.random(), str(rng.choice(["man", "woman", "child"])), rng.uniform(0.05, 0.2)
    pieces = []
    for syllable in PLACES:
        strong = syllable == facts["stress"]
        length = rng.uniform(0.26, 0.34) * (1.5 if strong else 1.0)
        name = str(rng.choice(list(sounds.FORMANTS)))
        wave = vowel(name, speaker, length, rng, lift=1.35 if strong else 1.0, voice=voice)
        pieces.append((start, wave * np.float32(1.0 if strong else rng.uniform(0.2, 0.3))))
        start += length + rng.uniform(0.08, 0.14)
    return place(pieces, start)


SCENES: dict[str, Scene] = {
    "repeats": Scene({"source": EVENTS, "count": COUNTS}, "I hear the {source}, count {count}.", _repeats),
    "pair": Scene({"order": tuple(f"{a} then {b}" for a, b in permutations(EVENTS, 2))},
                  "I hear {order}.", _pair),
    "swell": Scene({"loudness": LOUDNESS}, "The sound is {loudness} over time.", _swell),
    "melody": Scene({"instrument": INSTRUMENTS, "melody": MELODIES}, "I hear the {instrument} with a {melody} tune.",
                    _melody),
    "beat": Scene({"instrument": INSTRUMENTS, "tempo": tuple(TEMPOS)}, "I hear the {instrument} with a {tempo} beat.",
                  _beat),
    "voice": Scene({"speaker": tuple(sounds.SPEAKERS), "vowel": tuple(sounds.FORMANTS)},
                   "I hear the {speaker} say {vowel}.", _voice),
    "stress": Scene({"stress": PLACES}, "The {stress} syllable stands out.", _stress),
}  # fmt: skip

TASKS: tuple[Task, ...] = (
    Task("count", "sound", "Reasoning", "repeats", COUNTS,
         ("How many times does the sound occur?", "How often is the sound heard?", "Count the sounds.")),
    Task("source", "sound", "Information Extraction", "repeats", EVENTS,
         ("What makes the sound?", "Which object is heard?", "Name the source of the sound.")),
    Task("order, first", "sound", "Reasoning", "pair", EVENTS,
         ("Which sound comes first?", "What is heard at the start?", "Which of the sounds starts the clip?")),
    Task("order, last", "sound", "Reasoning", "pair", EVENTS,
         ("Which sound comes last?", "What is heard at the end?", "Which of the sounds ends the clip?")),
    Task("loudness", "sound", "Information Extraction", "swell", LOUDNESS,
         ("How does the loudness change?", "How does the sound evolve?", "Is the sound louder, softer or neither?")),
    Task("melody", "music", "Reasoning", "melody", MELODIES,
         ("How does the melody move?", "What is the shape of the melody?", "Describe the direction of the notes.")),
    Task("instrument", "music", "Information Extraction", "melody", INSTRUMENTS,
         ("Which instrument plays?", "What instrument is heard?", "Name the instrument.")),
    Task("tempo", "music", "Reasoning", "beat", tuple(TEMPOS),
         ("What is the tempo?", "How quick is the beat?", "Which tempo do the notes have?")),
    Task("vowel", "speech", "Information Extraction", "voice", tuple(sounds.FORMANTS),
         ("Which vowel is spoken?", "What does the voice say?", "Name the vowel.")),
    Task("speaker", "speech", "Information Extraction", "voice", tuple(sounds.SPEAKERS),
         ("Who is speaking?", "What kind of voice is it?", "Which speaker is heard?")),
    Task("stress", "speech", "Reasoning", "stress", PLACES,
         ("Which syllable is stressed?", "Where is the stress?", "Which syllable is the strongest?")),
)  # fmt: skip
