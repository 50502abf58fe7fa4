"""Half-duplex dialogues that streams are simulated from, as plain values, and their splits. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np

from covo_rl.data.read import DataError, Problem, some
from covo_rl.duplex.data import Channel, Span
from covo_rl.duplex.sound import CONTEXT, measure_levels, room_tone, speech_islands
from covo_rl.speech.grid import RATE
from covo_rl.types import UserError

#: shorter silences inside a turn are no pauses: they separate no fragments
MIN_PAUSE = 0.18
Split = Literal["train", "test"]


class SplitError(UserError, ValueError):
    """Dialogues that cannot be split without a dialogue or a speaker in both parts."""


@dataclass(frozen=True)
class SourceTurn:
    """A turn and how its recording is read: (T,) float32 at 24 kHz. words: (text, start, end) in seconds, or None."""

    channel: Channel
    load: Callable[[], np.ndarray]
    text: str = ""
    words: tuple[tuple[str, float, float], ...] | None = None
    codes: tuple[int, ...] | None = None
    speaker: str | None = None


@dataclass(frozen=True)
class SourceDialogue:
    """Turns of user and model by turns, each with its recording."""

    id: str
    turns: tuple[SourceTurn, ...]
    language: str | None = None
    tokenizer: str | None = None

    @property
    def speakers(self) -> frozenset[str]:
        """Who is the user, as far as it is known."""
        return frozenset(turn.speaker for turn in self.turns if turn.channel == "user" and turn.speaker is not None)


class Recording:
    """A user's turn, heard: where its speech is, how loud, in which room."""

    def __init__(self, turn: SourceTurn) -> None:
        self.turn, self.wave_T = turn, np.asarray(turn.load(), np.float64)
        self.levels = measure_levels(self.wave_T)
        self.islands = speech_islands(self.wave_T, turn.words, self.levels)

    @cached_property
    def tone_B(self) -> np.ndarray:
        """What is quiet in it, as `room_tone`."""
        return room_tone(self.wave_T, self.levels)

    def lay(self, pauses: Mapping[int, float]) -> LaidTurn:
        """The turn with pauses after some of its islands: seconds by number, of which a silence there is a part."""
        zero, shift = self.islands[0][0], 0.0
        begin = max(zero - CONTEXT, 0.0)
        pieces: list[tuple[float, np.ndarray]] = []
        fragments = [self.islands[0]]
        for number, (start, end) in enumerate(self.islands[1:]):
            before = self.islands[number][1]
            extra = round(max(pauses.get(number, 0.0) - (start - before), 0.0) * RATE) / RATE
            if extra:
                cut = (before + start) / 2
                pieces.append((begin + shift, self._part(begin, cut)))
                begin, shift = cut, shift + extra
            if start + shift - fragments[-1][1] >= MIN_PAUSE - 1e-9:
                fragments.append((start + shift, end + shift))
            else:
                fragments[-1] = (fragments[-1][0], max(end + shift, fragments[-1][1]))
        pieces.append((begin + shift, self._part(begin, self.islands[-1][1] + CONTEXT)))
        return LaidTurn(tuple((start - zero, piece_T) for start, piece_T in pieces),
                        tuple((start - zero, end - zero) for start, end in fragments))  # fmt: skip

    def _part(self, start: float, end: float) -> np.ndarray:
        return self.wave_T[round(start * RATE) : round(end * RATE)]


@dataclass(frozen=True)
class LaidTurn:
    """Pieces of a recording and fragments of speech, in seconds from the start of speech, before which pieces begin."""

    pieces: tuple[tuple[float, np.ndarray], ...]
    fragments: tuple[Span, ...]


@dataclass(frozen=True)
class Surroundings:
    """What simulation takes beside a dialogue: the others of its split, recorded back-channels, and whether the user's
    microphone hears the model."""

    dialogues: Sequence[SourceDialogue]
    back_channels: tuple[SourceTurn, ...] = ()
    echo: bool = False

    def continuation(self, dialogue: SourceDialogue, rng: np.random.Generator) -> SourceDialogue | None:
        """Another dialogue that the same user begins: he goes on with it where this one ends."""
        others = [other for other in self.dialogues if other.id != dialogue.id and other.turns[0].channel == "user"
                  and dialogue.speakers and dialogue.speakers == other.speakers]  # fmt: skip
        return others[int(rng.integers(len(others)))] if others else None

    def side_talk(self, dialogue: SourceDialogue, rng: np.random.Generator) -> tuple[SourceDialogue, SourceTurn] | None:
        """A turn of somebody else who is known to be no user of the dialogue."""
        others = [other for other in self.dialogues
                  if dialogue.speakers and other.speakers and not dialogue.speakers & other.speakers]  # fmt: skip
        if not others:
            return None
        other = others[int(rng.integers(len(others)))]
        turns = [turn for turn in other.turns if turn.channel == "user"]
        return other, turns[int(rng.integers(len(turns)))]


def seeded(seed: int, *names: str) -> np.random.Generator:
    """Draws that depend on the seed and the names only, whatever else is drawn."""
    digest = hashlib.sha256("\0".join(names).encode("utf-8", "surrogatepass")).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest[:16], ">u4").tolist()])


def dialogue_problems(dialogues: Sequence[SourceDialogue]) -> list[Problem]:
    """What keeps dialogues from becoming streams; recordings are not read."""
    problems, ids = [], set()
    for dialogue in dialogues:
        channels = [turn.channel for turn in dialogue.turns]
        if "user" not in channels:
            problems.append(Problem(dialogue.id, "it has no turn of the user: a stream needs somebody to listen to"))
        if any(a == b for a, b in pairwise(channels)):
            problems.append(Problem(dialogue.id, "two turns in a row are of the same channel: they take turns"))
        if dialogue.id in ids:
            problems.append(Problem(dialogue.id, "another dialogue has this id"))
        ids.add(dialogue.id)
    digests = sorted({dialogue.tokenizer for dialogue in dialogues if dialogue.tokenizer})
    if len(digests) > 1:  # one stream may be made of two dialogues
        what = f"the codes are of {len(digests)} tokenizers ({some(digests)}): encode all of them with one"
        problems.append(Problem("dialogues", what))
    return problems


def split_dialogues(
    dialogues: Sequence[SourceDialogue], test_share: float, seed: int
) -> dict[Split, list[SourceDialogue]]:
    """Parts that share no dialogue and no speaker of the user; those that share a speaker stay together.

    Raises:
        DataError: dialogues that cannot become streams.
        SplitError: a share outside 0 to 1, or all of them share a speaker.
    """
    if not 0 <= test_share < 1:
        raise SplitError(f"a test share of {test_share}: it is 0 or more, and below 1")
    if problems := dialogue_problems(dialogues):
        raise DataError("dialogues", problems)
    if not test_share:
        return {"train": list(dialogues), "test": []}
    groups = _groups(dialogues)
    if len(groups) < 2:
        raise SplitError(
            f"{len(dialogues)} dialogues of one user cannot be split by speaker: give a test share of 0, and dialogues "
            "of others for the test, or name a `speaker` in each user's turn, if there are several"
        )
    groups.sort(key=lambda group: seeded(seed, "split", min(dialogue.id for dialogue in group)).random())
    test: list[SourceDialogue] = []
    while len(groups) > 1 and (not test or len(test) + len(groups[0]) / 2 < test_share * len(dialogues)):
        test += groups.pop(0)
    chosen = {dialogue.id for dialogue in test}
    return {
        "train": [dialogue for dialogue in dialogues if dialogue.id not in chosen],
        "test": [dialogue for dialogue in dialogues if dialogue.id in chosen],
    }


def _groups(dialogues: Sequence[SourceDialogue]) -> list[list[SourceDialogue]]:
    """Dialogues that speakers join, be it through others."""
    groups: list[tuple[set[str], list[SourceDialogue]]] = []
    for dialogue in dialogues:
        voices, joined = set(dialogue.speakers), [dialogue]
        for group in [group for group in groups if group[0] & voices]:
            groups.remove(group)
            voices |= group[0]
            joined = [*group[1], *joined]
        groups.append((voices, joined))
    return [joined for _, joined in groups]
