"""Streams for learning when to speak, with simulated encoder features: perception is given, timing is to be learnt.

    streams = draw_streams("rl", 512, seed=0)           sft, rl or test; the same streams for the same seed
    features_KD = encoder_features(streams[0], width)   (chunks, D) float32, noise included

A user says digits in fragments. A pause, or the turn's end, follows a fragment, and its last word tells which:

    cue          share    before a pause                    at the turn's end
    prosody      30 %     pitch stays up, level stays       pitch and level fall
    word         26 %     a function word                   a digit
    both         36 %     both                              both
    none          8 %     a digit, nothing else             the same: nobody can tell them apart

A chunk's percepts are what is heard in it, in parts of the chunk: level, movement of pitch and of level, the word.
`encoder_features` adds noise and turns them into the decoder's width by a fixed random matrix. This says nothing of how
well an encoder perceives (probe.py measures that), and everything of what a decoder makes of what it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp
from typing import NamedTuple

import numpy as np

from covo_rl.duplex.grid import CHUNK_SECONDS, chunk_of, decision_time
from covo_rl.duplex.presets import (
    AFTER,
    BEFORE,
    BREAK_CHUNKS,
    GAP_MEDIAN,
    GAP_SECONDS,
    SPREAD,
    SimulationPreset,
    draw_pause,
)
from covo_rl.duplex.presets import PRESETS as RECORDED
from covo_rl.duplex.rollout import TimingStream, stop_generator
from covo_rl.synth.speech import DIGITS

CUES = {"prosody": 0.30, "word": 0.26, "both": 0.36, "none": 0.08}
#: words: the ten digits, a function word, "mm"
FUNCTION_WORD, HUM, WORDS = 10, 11, 12
LEVEL, PITCH, FALL = 0, 1, 2
PERCEPTS = 3 + WORDS
#: chunks that a listening stream goes on after the user's turn: SHIFT is late after 15
TAIL = 18
#: share of back-channels that say "mm"; the others are a word, and only that it stays alone tells them from a barge-in
HUMMED = 0.5
TEST_COUNTS = {"pause": 240, "single": 150, "barge_in": 100, "back_channel": 100, "hold": 50}


#: pauses are as long as in streams from recordings. Of RL two in three ask a listening model; of replies 40 % are
#: interrupted, 40 % hear a back-channel
PRESETS = {
    "sft": replace(RECORDED["sft"], kinds={"barge_in": 0.3, "back_channel": 0.3, "hold": 0.4}),
    "rl": replace(RECORDED["rl"], kinds={"pause": 6, "single": 4, "barge_in": 2, "back_channel": 2, "hold": 1},
                  pause_share=0.6),
    "test": replace(RECORDED["test"], kinds=TEST_COUNTS, pause_share=0.6),
}  # fmt: skip


class Sound(NamedTuple):
    """A word of the user, times in seconds; movements from -1 to 1."""

    start: float
    end: float
    word: int
    level: float = 1.0
    pitch: float = 0.0
    fall: float = 0.0


@dataclass(frozen=True, kw_only=True)
class FeatureStream(TimingStream):
    """A TimingStream and all that is heard in it, over `chunks` chunks.

    `shift_chunk` is where supervised data says SHIFT, `gold_stop` the stop that it prescribes. `reply` holds the words
    that the model says in a speaking stream, `decisions` chunks long. Supervised data are speaking streams whole: the
    user's turn with THINK, SHIFT, the reply, BREAK.
    """

    sounds: tuple[Sound, ...]
    chunks: int
    shift_chunk: int
    gold_stop: int
    reply: tuple[int, ...] = ()

    @property
    def break_chunk(self) -> int | None:
        """Where supervised data says BREAK: for a barge-in, else when the codes are out; None: it never speaks."""
        return None if self.listening else self.first_chunk + self.gold_stop


def draw_streams(
    preset: str, count: int | Mapping[str, int], seed: int, *, cue: str | None = None
) -> list[FeatureStream]:
    """`count` streams, kinds by the preset's shares, or so many of each kind (TEST_COUNTS).

    The i-th does not depend on how many are drawn. `cue` replaces every stream's own: with "none" the same streams,
    that no longer tell the end of a turn.

    Raises:
        ValueError: an unknown preset or cue.
    """
    if preset not in PRESETS or cue not in (None, *CUES):
        raise ValueError(f"preset {preset!r}, cue {cue!r}: presets are {', '.join(PRESETS)}, cues {', '.join(CUES)}")
    plan = PRESETS[preset]
    shares = np.array([*plan.kinds.values()], dtype=float)
    if isinstance(count, int):
        names = [f"{preset}-{i}" for i in range(count)]
        kinds = [stop_generator(seed, name, 0).choice([*plan.kinds], p=shares / shares.sum()) for name in names]
    else:
        names = [f"{preset}-{kind}-{i}" for kind, n in count.items() for i in range(n)]
        kinds = [kind for kind, n in count.items() for _ in range(n)]
    return [
        _stream(name, str(kind), plan, stop_generator(seed, name, 1), cue)
        for name, kind in zip(names, kinds, strict=True)
    ]


def percepts(stream: FeatureStream) -> np.ndarray:
    """(chunks, PERCEPTS) float32: level, pitch, fall, one of WORDS, each times the part of the chunk it fills."""
    heard_KF = np.zeros((stream.chunks, PERCEPTS), dtype=np.float32)
    for sound in stream.sounds:
        for k in range(chunk_of(sound.start), min(chunk_of(sound.end) + 1, stream.chunks)):
            inside = min(sound.end, decision_time(k)) - max(sound.start, CHUNK_SECONDS * k)
            part = max(0.0, inside) / CHUNK_SECONDS
            heard_KF[k, [LEVEL, PITCH, FALL]] += part * np.array([sound.level, sound.pitch, sound.fall])
            heard_KF[k, 3 + sound.word] += part * sound.level
    return heard_KF


def encoder_features(stream: FeatureStream, width: int, *, noise: float = 0.4, seed: int = 0) -> np.ndarray:
    """(chunks, width) float32, of variance about 1 where the user speaks; `noise` is the deviation of each percept's.

    `seed` is that of matrix and noise: one for all streams of a model.
    """
    matrix_FD = np.random.default_rng([seed, width]).standard_normal((PERCEPTS, width)) / np.sqrt(3)
    noise_KF = noise * stop_generator(seed, stream.id, 2).standard_normal((stream.chunks, PERCEPTS))
    return ((percepts(stream) + noise_KF) @ matrix_FD).astype(np.float32)


def _stream(name: str, kind: str, plan: SimulationPreset, rng: np.random.Generator, cue: str | None) -> FeatureStream:
    own = str(rng.choice([*CUES], p=[*CUES.values()]))
    cue = own if cue is None else cue
    paused = kind == "pause" or (kind not in ("pause", "single") and rng.random() < plan.pause_share)
    count = int(1 + (rng.random() < 0.3)) if paused else 0
    sounds, pauses = _turn([_pause(plan, rng) for _ in range(count)], cue, rng)
    end = sounds[-1].end
    shift = chunk_of(end + _cut_log_normal(rng, GAP_MEDIAN, GAP_SECONDS))
    common = {"id": name, "kind": kind, "pauses": tuple(pauses), "cue": cue, "shift_chunk": shift}
    digits = tuple(sound.word for sound in sounds if sound.word < FUNCTION_WORD)
    if kind in ("pause", "single"):
        chunks = chunk_of(end) + 1 + TAIL
        return FeatureStream(
            **common, sounds=tuple(sounds), chunks=chunks, first_chunk=0, decisions=chunks, turn_end=end,
            gold_stop=shift, answer=" ".join(DIGITS[digit] for digit in digits),
        )  # fmt: skip
    length = int(rng.integers(12, 26))
    # codes of a chunk sound in the next one
    spoken = decision_time(shift + 1), decision_time(shift + 1 + length)
    onset = float(rng.uniform(spoken[0] + BEFORE, spoken[1] - AFTER))
    event, event_end = _event(kind, onset, rng)
    stop, chunks = length, shift + length + 4
    if kind == "barge_in" and event_end is not None:
        stop, chunks = chunk_of(onset) + BREAK_CHUNKS - shift - 1, max(chunk_of(event_end), shift + length + 1)
    return FeatureStream(
        **common, sounds=(*sounds, *event), chunks=chunks, first_chunk=shift + 1, decisions=length,
        turn_end=event_end, onset=None if event_end is None else onset, gold_stop=min(stop, length),
        reply=digits[:length],
    )  # fmt: skip


def _pause(plan: SimulationPreset, rng: np.random.Generator) -> float:
    if plan.pause_median is None:
        return draw_pause(rng, plan)
    return _cut_log_normal(rng, plan.pause_median, plan.pause_seconds)


def _cut_log_normal(rng: np.random.Generator, median: float, limits: tuple[float, float]) -> float:
    """What is outside the limits is moved to them, where `draw_log_normal` draws again."""
    return min(max(median * exp(SPREAD * rng.standard_normal()), limits[0]), limits[1])


def _turn(pauses: Sequence[float], cue: str, rng: np.random.Generator) -> tuple[list[Sound], list[tuple[float, float]]]:
    """The words of a turn that begins after a moment, and where its pauses are."""
    sounds, places, now = [], [], float(rng.uniform(0.2, 0.8))
    for i in range(len(pauses) + 1):
        words = _fragment(now, rng)
        sounds += [*words[:-1], _marked(words[-1], cue, final=i == len(pauses))]
        now = words[-1].end
        if i < len(pauses):
            places.append((now, now + pauses[i]))
            now += pauses[i]
    return sounds, places


def _fragment(start: float, rng: np.random.Generator) -> list[Sound]:
    """Two to five words without a gap; the last one is a digit."""
    words = []
    count = int(rng.integers(2, 6))
    for i in range(count):
        end = start + float(rng.uniform(0.22, 0.42))
        digit, function = int(rng.integers(10)), rng.random() < 0.2
        words.append(Sound(start, end, FUNCTION_WORD if function and i < count - 1 else digit))
        start = end
    return words


def _marked(word: Sound, cue: str, *, final: bool) -> Sound:
    """The last word of a fragment as its cue makes it."""
    if cue in ("prosody", "both"):
        word = word._replace(pitch=-1.0 if final else 0.7, fall=1.0 if final else 0.0)
    if cue in ("word", "both") and not final:
        word = word._replace(word=FUNCTION_WORD)
    return word


def _event(kind: str, onset: float, rng: np.random.Generator) -> tuple[list[Sound], float | None]:
    """What the user says while the model speaks, and its end."""
    if kind == "back_channel":
        level = 10 ** (rng.uniform(-6, 0) / 20)
        end = onset + float(rng.uniform(0.2, 0.6))
        word = HUM if rng.random() < HUMMED else int(rng.integers(10))
        return [Sound(onset, end, word, level=float(level))], end
    if kind == "barge_in":
        words = _fragment(onset, rng)
        words += _fragment(words[-1].end, rng)
        return words, words[-1].end
    return [], None
