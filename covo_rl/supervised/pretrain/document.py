"""What every task makes of its rows: a `Document`; the `Vocabulary` of its ids; what a `DocumentTask` is."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from covo_rl.duplex.ids import DuplexIds
from covo_rl.models.covo_audio.processing import IGNORE
from covo_rl.models.text import text_ids
from covo_rl.types import UserError


class SkippedError(UserError, ValueError):
    """A row, or rows, of which a task makes no document; `reason` is the same for all of its kind and counted."""

    def __init__(self, reason: str, row: str = "") -> None:
        self.reason, self.row = reason, row
        super().__init__(f"{row}: {reason}" if row else reason)


@dataclass(frozen=True)
class Document:
    """ids, labels: equally long, labels unshifted and IGNORE where nothing is taught.

    `clips`: (row id, a, b) of every run of audio slots, in order: codes [a, b) of the row's recording, which is its
    samples [960 a, 960 b) at 24 kHz. `complete`: nothing of what it was made of is missing at its end. `streamed`: its
    clip is the user's channel of a stream, heard by the streaming encoder; its slots stand apart, one to a chunk.
    """

    ids: list[int]
    labels: list[int]
    clips: tuple[tuple[str, int, int], ...] = ()
    task: str = ""
    complete: bool = True
    streamed: bool = False

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.labels)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def supervised(self) -> int:
        """How many of its labels are taught."""
        return sum(label != IGNORE for label in self.labels)


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a model with audio slots and codes: `codes` of them from `first_code` on.

    `text` gives the ids of a text by itself; special tokens that it spells stay text. `duplex`: those of a model that
    listens while it speaks.
    """

    text: Callable[[str], list[int]]
    text_end: int
    turn_start: int
    turn_end: int
    audio_start: int
    slot: int
    audio_end: int
    first_code: int
    codes: int
    duplex: DuplexIds | None = None

    @classmethod
    def of(cls, family: Any) -> Vocabulary:
        """Of a loaded Covo-Audio.

        Raises:
            ValueError: a family without codes of speech, or with ids of full duplex that do not fit.
        """
        config, tokenizer = family.model.config, family.tokenizer
        if not family.code_ids:
            raise ValueError(f"a {config.model_type} model writes no codes of speech; pre-training needs Covo-Audio")
        return cls(
            text=partial(text_ids, tokenizer),
            text_end=config.text_end_token_id,
            turn_start=tokenizer.convert_tokens_to_ids("<|im_start|>"),
            turn_end=config.turn_end_token_id,
            audio_start=config.audio_bos_token_id,
            slot=config.audio_placeholder_token_id,
            audio_end=config.audio_eos_token_id,
            first_code=family.code_ids.start,
            codes=len(family.code_ids),
            duplex=None if config.duplex is None else DuplexIds.of(family),
        )


@dataclass(frozen=True)
class BuildOptions:
    """How documents are written.

    `sentence_share`: how often interleaving is by sentence and not by phrase. `content`: `continue` deals each fragment
    to one modality, `repeat` writes the same fragment in all of a pattern. `query`: what asks for the line of a
    pseudo-dialogue, `text` (a template) or `none`; `text_loss`: its text is taught too, as a control.
    """

    sentence_share: float = 0.5
    content: Literal["continue", "repeat"] = "continue"
    query: Literal["text", "none"] = "text"
    text_loss: bool = False


@dataclass(frozen=True)
class DocumentTask:
    """`unit`: one draw is a `row` of speech, the rows of a `document` in order, a `text`, a `dialogue` or a `stream`.

    `needs`: what every row must have (audio, text, words, codes); voice: its speaker, where it has one, is named in a
    system message. `build(unit, vocabulary, rng, options)`: a sequence of SpeechRows (of one for `row`), a TextRow, a
    DialogueRow or a StreamRow -> its Document, whose `task` the caller sets.
    Raises SkippedError where there is none.
    """

    unit: Literal["row", "document", "text", "dialogue", "stream"]
    build: Callable[[Any, Vocabulary, random.Random, BuildOptions], Document]
    needs: Sequence[str] = field(default_factory=tuple)
