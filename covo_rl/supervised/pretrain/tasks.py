"""Every task by its name: what one draw takes, what its rows need, what it makes of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from covo_rl.supervised.pretrain.document import Document, Vocabulary


@dataclass(frozen=True)
class BuildOptions:
    """How documents are written.

    `sentence_share`: how often interleaving is by sentence and not by phrase. `content`: `continue` deals each fragment
    to one modality, `repeat` writes the same fragment in all of a pattern. `query`: what asks for the line of a
    pseudo-dialogue, `text` (a template) or `none`.
    """

    sentence_share: float = 0.5
    content: Literal["continue", "repeat"] = "continue"
    query: Literal["text", "none"] = "text"


@dataclass(frozen=True)
class Task:
    """`unit`: one draw is a `row` of speech, the rows of a `document` in order, a `text` or a `dialogue`.

    `needs`: fields that every row must have (audio, text, words, codes). `build(unit, vocabulary, rng, options)`: a
    sequence of SpeechRows (of one for `row`), a TextRow or a DialogueRow -> its Document, whose `task` the caller sets.
    Raises SkippedError where there is none.
    """

    unit: Literal["row", "document", "text", "dialogue"]
    build: Callable[[Any, Vocabulary, random.Random, BuildOptions], Document]
    needs: Sequence[str] = field(default_factory=tuple)


#: name -> task, as configurations name them; filled with the builders of builder.py and dialogues.py
TASKS: dict[str, Task] = {}
