"""Fragments -> the ids and labels of a document, for every task on recordings and for text.

    ac    B S S E          a slot for 4 codes; every fragment is its own clip, or an encoding would hear what comes next
    t     text ids
    ad    ids of codes, without delimiters: no text has them
    t|ad  5 text ids, 15 codes, and so on; what is left of one kind follows at once

A pattern deals its kinds to consecutive fragments, so that content goes on while its form changes:

    "ac>t>ad"   f1 heard, f2 read, f3 spoken, f4 heard ...

The first fragment is the query and not taught, nor is what frames audio, an instruction, or a document's first id.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from covo_rl.models.covo_audio.processing import IGNORE, interleave
from covo_rl.speech import SAY_ALOUD
from covo_rl.speech.grid import check_codes, count_slots
from covo_rl.speech.rows import SpeechRow
from covo_rl.supervised.pretrain.document import BuildOptions, Document, SkippedError, Vocabulary
from covo_rl.supervised.pretrain.fragments import Fragment, draw_fragments, whole_row

Kind = Literal["ac", "t", "ad", "t|ad"]
#: pattern -> the kinds that consecutive fragments get, cyclically
PATTERNS: dict[str, tuple[Kind, ...]] = {
    "ac>t>ad": ("ac", "t", "ad"),
    "ad>t>ad": ("ad", "t"),
    "ac>t>ac": ("ac", "t"),
    "ac>t|ad": ("ac", "t|ad"),
}
#: those with text and codes of one fragment
PARALLEL = frozenset(pattern for pattern, kinds in PATTERNS.items() if "t|ad" in kinds)
#: the patterns of an interleaving task, each as often
INTERLEAVE_1, INTERLEAVE_2 = ("ac>t|ad", "ac>t>ac"), ("ad>t>ad", "ac>t>ad")
#: what asks for a task, one drawn for each document; a newline follows
INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "asr": ("Transcribe the speech.", "Write down what is said.", "What does the speaker say?",
            "Turn the speech into text."),
    "tts": (SAY_ALOUD, "Read the text out.", "Speak this text.", "Turn the text into speech."),
    "continuation": ("Continue the speech in text.", "Write how the speech goes on.", "What is said next? Write it.",
                     "Go on in writing."),
    "audio_only": ("Continue the speech.", "Say how the speech goes on.", "Speak on.", "Go on speaking."),
}  # fmt: skip
#: of one document, in order
Rows = Sequence[SpeechRow]


class Draft:
    """A document as it is written, piece by piece; `taught` pieces get labels, but for the document's first id."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.clips: list[tuple[str, int, int]] = []

    def add(self, ids: Sequence[int], taught: bool) -> None:
        """Ids as they are."""
        self.labels += ids if taught else [IGNORE] * len(ids)
        self.ids += ids

    def instruct(self, instruction: str) -> None:
        """An instruction and its newline; an empty one is none."""
        if instruction:
            self.add(self.vocabulary.text(f"{instruction}\n"), taught=False)

    def piece(self, kind: Kind, fragment: Fragment, taught: bool) -> None:
        """A fragment in one modality, or in text and codes; audio is never taught.

        Raises:
            SkippedError: a fragment without codes, or whose text has no ids.
            CodeError: a code that the vocabulary does not have.
        """
        if kind == "ac":
            self.add(heard(fragment, self.vocabulary), taught=False)
            self.clips.append((fragment.row, fragment.a, fragment.b))
        else:
            write = {"t": written, "ad": spoken, "t|ad": written_and_spoken}[kind]
            self.add(write(fragment, self.vocabulary), taught)

    def close(self, complete: bool = True) -> Document:
        """The document with its end, which is taught if nothing was dropped."""
        self.add([self.vocabulary.text_end], taught=complete)
        self.labels[0] = IGNORE
        return Document(self.ids, self.labels, tuple(self.clips), complete=complete)


def heard(fragment: Fragment, vocabulary: Vocabulary) -> list[int]:
    """Audio in: its slots between the two ids that frame them."""
    if not len(fragment):
        raise SkippedError("no codes", fragment.row)
    return [vocabulary.audio_start, *[vocabulary.slot] * count_slots(len(fragment)), vocabulary.audio_end]


def written(fragment: Fragment, vocabulary: Vocabulary) -> list[int]:
    """The ids of its text, tokenized by itself."""
    ids = vocabulary.text(fragment.text)
    if not ids:
        raise SkippedError("no text", fragment.row)
    return ids


def spoken(fragment: Fragment, vocabulary: Vocabulary) -> list[int]:
    """The ids of its codes."""
    return (_codes(fragment, vocabulary) + vocabulary.first_code).tolist()


def written_and_spoken(fragment: Fragment, vocabulary: Vocabulary) -> list[int]:
    """Text and codes at once, in blocks: `t|ad`."""
    codes = _codes(fragment, vocabulary).tolist()
    return interleave(written(fragment, vocabulary), codes, vocabulary.first_code)


def interleaved(
    fragments: Sequence[Fragment], pattern: str, vocabulary: Vocabulary, content: str = "continue"
) -> Document:
    """Consecutive fragments in the kinds of a pattern. Audio at the end, which nothing answers, is dropped.

    With `content` "repeat" every fragment is written in all kinds, one after the other.

    Raises:
        SkippedError: fewer than two fragments to deal the kinds to.
        ValueError: another pattern or content.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"pattern {pattern!r:.40} does not exist; write one of {', '.join(PATTERNS)}")
    if content not in ("continue", "repeat"):
        raise ValueError(f"content {content!r:.40} does not exist; write continue or repeat")
    kinds = PATTERNS[pattern]
    if content == "repeat":
        dealt: list[tuple[Kind, Fragment]] = [(kind, fragment) for fragment in fragments for kind in kinds]
    else:
        dealt = [(kinds[i % len(kinds)], fragment) for i, fragment in enumerate(fragments)]
    if len(dealt) < 2:
        raise SkippedError("fewer than two fragments", fragments[0].row if fragments else "")
    complete = dealt[-1][0] != "ac"
    draft = Draft(vocabulary)
    for i, (kind, fragment) in enumerate(dealt if complete else dealt[:-1]):
        draft.piece(kind, fragment, taught=i > 0)
    return draft.close(complete)


def asr(fragment: Fragment, vocabulary: Vocabulary, instruction: str = INSTRUCTIONS["asr"][0]) -> Document:
    """instruction | ac | t."""
    return _answer(instruction, "ac", fragment, "t", [fragment], vocabulary)


def tts(fragment: Fragment, vocabulary: Vocabulary, instruction: str = INSTRUCTIONS["tts"][0]) -> Document:
    """instruction | t | ad."""
    return _answer(instruction, "t", fragment, "ad", [fragment], vocabulary)


def continuation(
    fragments: Sequence[Fragment], vocabulary: Vocabulary, instruction: str = INSTRUCTIONS["continuation"][0]
) -> Document:
    """instruction | ac of the first | t of the others.

    Raises:
        SkippedError: fewer than two fragments.
    """
    _need_two(fragments)
    return _answer(instruction, "ac", fragments[0], "t", fragments[1:], vocabulary)


def audio_only(
    fragments: Sequence[Fragment], vocabulary: Vocabulary, query: Literal["ac", "ad"] = "ac",
    instruction: str = INSTRUCTIONS["audio_only"][0],
) -> Document:  # fmt: skip
    """instruction | ac or ad of the first | ad of the others.

    Raises:
        SkippedError: fewer than two fragments.
    """
    _need_two(fragments)
    return _answer(instruction, query, fragments[0], "ad", fragments[1:], vocabulary)


def text_document(text: str, vocabulary: Vocabulary, row: str = "") -> Document:
    """Text alone, as long as it is: `cut_text` makes parts of it.

    Raises:
        SkippedError: a text without ids.
    """
    draft = Draft(vocabulary)
    draft.add(written(Fragment(text, 0, 0, row), vocabulary), taught=True)
    return draft.close()


def cut_text(document: Document, length: int) -> list[Document]:
    """A document of text in parts of `length` ids, the last with what is left: its end alone, perhaps.

    Only the last has the end and may be complete; the first id of each is not taught.

    Raises:
        ValueError: a document with clips, or a length under 2.
    """
    if length < 2 or document.clips:
        raise ValueError(f"only text is cut, into parts of at least 2 ids: {len(document.clips)} clips, {length} ids")
    cuts = [*range(0, len(document), length), len(document)]
    parts = []
    for start, end in pairwise(cuts):
        labels = [IGNORE, *document.labels[start + 1 : end]]
        complete = document.complete and end == len(document)
        parts.append(Document(document.ids[start:end], labels, (), document.task, complete))
    return parts


def build_asr(rows: Rows, vocabulary: Vocabulary, rng: random.Random, options: BuildOptions) -> Document:
    return asr(whole_row(rows[0]), vocabulary, rng.choice(INSTRUCTIONS["asr"]))


def build_tts(rows: Rows, vocabulary: Vocabulary, rng: random.Random, options: BuildOptions) -> Document:
    return tts(whole_row(rows[0]), vocabulary, rng.choice(INSTRUCTIONS["tts"]))


def build_continuation(rows: Rows, vocabulary: Vocabulary, rng: random.Random, options: BuildOptions) -> Document:
    instruction = rng.choice(INSTRUCTIONS["continuation"])
    return continuation(draw_fragments(rows, rng, options.sentence_share), vocabulary, instruction)


def build_audio_only(rows: Rows, vocabulary: Vocabulary, rng: random.Random, options: BuildOptions) -> Document:
    query, instruction = rng.choice(("ac", "ad")), rng.choice(INSTRUCTIONS["audio_only"])
    return audio_only(draw_fragments(rows, rng, options.sentence_share), vocabulary, query, instruction)


def build_interleave_1(rows: Rows, vocabulary: Vocabulary, rng: random.Random, options: BuildOptions) -> Document:
    return _build_interleaved(INTERLEAVE_1, rows, vocabulary, rng, options)


def build_interleave_2(rows: Rows, vocabulary: Vocabulary, rng: random.Random, options: BuildOptions) -> Document:
    return _build_interleaved(INTERLEAVE_2, rows, vocabulary, rng, options)


def build_text(row: Any, vocabulary: Vocabulary, rng: random.Random, options: BuildOptions) -> Document:
    """row: a TextRow."""
    return text_document(row.text, vocabulary, row.id)


def _build_interleaved(
    patterns: Sequence[str], rows: Rows, vocabulary: Vocabulary, rng: random.Random,
    options: BuildOptions,
) -> Document:  # fmt: skip
    pattern = rng.choice(patterns)
    least = 1 if options.content == "repeat" else 2
    fragments = draw_fragments(rows, rng, options.sentence_share, least)
    return interleaved(fragments, pattern, vocabulary, options.content)


def _answer(
    instruction: str, asks: Kind, query: Fragment, answers: Kind, response: Sequence[Fragment], vocabulary: Vocabulary
) -> Document:
    draft = Draft(vocabulary)
    draft.instruct(instruction)
    draft.piece(asks, query, taught=False)
    for fragment in response:
        draft.piece(answers, fragment, taught=True)
    return draft.close()


def _need_two(fragments: Sequence[Fragment]) -> None:
    if len(fragments) < 2:
        raise SkippedError("fewer than two fragments", fragments[0].row if fragments else "")


def _codes(fragment: Fragment, vocabulary: Vocabulary) -> np.ndarray:
    """(L,) int64, each one that the vocabulary has."""
    if fragment.codes is None or not len(fragment):
        raise SkippedError("no codes", fragment.row)
    codes = np.asarray(fragment.codes, dtype=np.int64)
    if len(codes) != len(fragment):
        raise SkippedError("not as many codes as its length says", fragment.row)
    if codes.min() < 0 or codes.max() >= vocabulary.codes:
        check_codes([codes.tolist()], vocabulary.codes, [fragment.row])
    return codes
