"""A row of a speech set and the reply to it, whatever the official files look like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from covo_rl.evaluate.speech.sets import KINDS
from covo_rl.types import Clip


class Word(NamedTuple):
    """A word with its times in seconds; some transcribers leave the last end out (None)."""

    text: str
    start: float
    end: float | None


@dataclass(frozen=True)
class SpokenRound:
    """What is put to the model at once, and what is expected: clips, their wording, the reference.

    Of a row of `pairs`, round 0 is the right candidate and round 1 the wrong one; of `tsc`, 0 is the prompt, 1 the
    right ending, 2 the wrong one. Of `tts`, `text` is what the prompt clip says and `reference` what is to be said.
    """

    clips: tuple[Clip, ...] = ()
    text: str | None = None
    reference: str | None = None


@dataclass(frozen=True)
class SpeechItem:
    """One item. `id` is the row's own, `key` its place in its file, from 0 in four digits; either names it in a
    predictions file, alone or as SUBSET/ID.

    `times` are the annotated times in seconds, `columns` the row as it stands in the file.
    """

    id: str
    key: str
    subset: str
    kind: str
    rounds: tuple[SpokenRound, ...]
    language: str
    choices: tuple[str, ...] = ()
    times: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)
    #: file and line, for messages
    place: str = ""

    @property
    def name(self) -> str:
        """The row's name in the whole set: SUBSET/ID."""
        return f"{self.subset}/{self.id}"

    @property
    def clips(self) -> tuple[Clip, ...]:
        return tuple(clip for turn in self.rounds for clip in turn.clips)

    @property
    def text(self) -> str | None:
        return self.rounds[0].text

    @property
    def reference(self) -> str | None:
        return self.rounds[0].reference


def round_count(row: SpeechItem) -> int:
    """Replies that a row has."""
    return len(row.rounds) if KINDS[row.kind].dialogue else 1


@dataclass(frozen=True)
class GivenReply:
    """A reply, one entry a round in the tuples; what is not there is None.

    `segments` are those of MTR-DuplexBench ({"timestamp": [start, end], "text", "words": [{"word", "start", "end"}]}),
    `turns` those of a live session ({"channel", "start", "end", "text"?}), all in seconds; `logps` are the log-probs of
    the tokens of each candidate.
    """

    texts: tuple[str | None, ...] = (None,)
    audio: tuple[str | None, ...] = (None,)
    asr_texts: tuple[str | None, ...] = (None,)
    words: tuple[tuple[Word, ...] | None, ...] = (None,)
    segments: tuple[Mapping[str, Any], ...] | None = None
    turns: tuple[Mapping[str, Any], ...] | None = None
    thinking: str | None = None
    logps: tuple[tuple[float, ...], ...] | None = None

    @property
    def text(self) -> str | None:
        return self.texts[0]

    @property
    def is_empty(self) -> bool:
        """Nothing was replied: no text, no audio, no words. An empty text is a reply."""
        parts = (*self.texts, *self.audio, *self.asr_texts, *self.words, self.segments, self.turns, self.logps)
        return all(part is None for part in parts)
