"""Ids of a document back to what they were written from: segments of one modality, and the pieces of a pattern.

Kinds: `instruction`, `ac` (its frame and slots), `t`, `ad`, `end`, and `chat` (what frames turns). Text and codes of
one `t|ad` are segments of one fragment, where elsewhere each is a fragment of its own. Ids alone do not tell the two
apart; a document's task does, or the pattern it was written in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from covo_rl.models.covo_audio.processing import IGNORE
from covo_rl.speech.grid import count_slots
from covo_rl.supervised.pretrain.builder import INSTRUCTIONS, PARALLEL, spoken, written
from covo_rl.supervised.pretrain.document import Document, Vocabulary
from covo_rl.supervised.pretrain.fragments import Fragment

SegmentKind = Literal["instruction", "ac", "t", "ad", "end", "chat"]
#: tasks whose text and codes are `t|ad`, and those that write one fragment twice
_PARALLEL_TASKS, _TWICE_TASKS = ("interleave_1",), ("asr", "tts")
_ROLES = ("system", "user", "assistant")


class ReadError(ValueError):
    """Ids that no document has; the message names the position."""


@dataclass(frozen=True)
class Segment:
    """Positions [start, end) of one kind. `fragment`: which of the document it is, from 0; None for what frames them.

    `clip`: of an `ac`, (row id, a, b). `taught`: whether a label is in it.
    """

    kind: SegmentKind
    start: int
    end: int
    fragment: int | None = None
    clip: tuple[str, int, int] | None = None
    taught: bool = False


@dataclass(frozen=True)
class Piece:
    """A fragment as a document holds it: its text ids, its codes (both for `t|ad`), or its clip."""

    kind: Literal["ac", "t", "ad", "t|ad"]
    text: tuple[int, ...] = ()
    codes: tuple[int, ...] = ()
    clip: tuple[str, int, int] | None = None
    taught: bool = False


def segments(document: Document, vocabulary: Vocabulary, pattern: str | None = None) -> list[Segment]:
    """The document from its first position to its last. `pattern`: default: what its task is written in.

    Raises:
        ReadError: audio without its end, more or fewer clips than audio, an id that the vocabulary does not have.
    """
    runs = _instructed(_runs(document, vocabulary), document, vocabulary)
    chat = vocabulary.turn_start in document.ids
    parallel = chat or (pattern in PARALLEL if pattern else document.task in _PARALLEL_TASKS)
    clips = iter(document.clips)
    found: list[Segment] = []
    number, before = -1, ""
    for kind, start, end in runs:
        taught = any(label != IGNORE for label in document.labels[start:end])
        clip = next(clips, None) if kind == "ac" else None
        if kind == "ac" and clip is None:
            raise ReadError(f"position {start}: audio beyond the {len(document.clips)} clips of the document")
        framing = kind in ("instruction", "end", "chat")
        together = parallel and {kind, before} == {"t", "ad"}
        twice = document.task in _TWICE_TASKS and number >= 0
        number += not (framing or together or twice)
        found.append(Segment(kind, start, end, None if framing else number, clip, taught))
        before = kind
    if (left := next(clips, None)) is not None:
        raise ReadError(f"the document has no audio for its clip {left}")
    return found


def pieces(document: Document, vocabulary: Vocabulary, pattern: str | None = None) -> list[Piece]:
    """The fragments of a document in order, in the kinds that they were written in. A task of one fragment has two.

    Fragments of one kind that follow one another, as in a continuation, are one piece. Raises ReadError.
    """
    groups: list[list[Segment]] = []
    for segment in segments(document, vocabulary, pattern):
        if segment.fragment is None:
            continue
        joins = groups and groups[-1][0].fragment == segment.fragment and document.task not in _TWICE_TASKS
        groups[-1].append(segment) if joins else groups.append([segment])
    return [_piece(group, document.ids, vocabulary) for group in groups]


def document_problems(
    document: Document, vocabulary: Vocabulary, fragments: Sequence[Fragment] = (), pattern: str | None = None
) -> list[str]:
    """What is wrong with a document; nothing where it keeps to the rules.

    Labels are ids of a response and never of what frames it, slots are as many as the clips need, the end is taught
    only of what is complete. `fragments`: what it must say, in order.
    """
    try:
        found = segments(document, vocabulary, pattern)
    except ReadError as error:
        return [str(error)]
    ids, labels = document.ids, document.labels
    problems = [
        f"position {i}: label {label} of id {ids[i]}" for i, label in enumerate(labels) if label not in (IGNORE, ids[i])
    ]
    if labels and labels[0] != IGNORE:
        problems.append("position 0: the first id is taught, which nothing predicts")
    for segment in found:
        # a turn's end is what a speaker says last; the rest of a chat's frame nobody says
        said = [i for i in range(segment.start, segment.end) if labels[i] != IGNORE and ids[i] != vocabulary.turn_end]
        if said and segment.kind in ("ac", "instruction", "chat"):
            problems.append(f"position {said[0]}: {segment.kind} is taught")
        if segment.clip and segment.end - segment.start - 2 != (
            slots := count_slots(segment.clip[2] - segment.clip[1])
        ):
            problems.append(f"position {segment.start}: {segment.end - segment.start - 2} slots, its clip has {slots}")
        if segment.kind == "end" and (
            segment.end != len(ids) or segment.taught != (document.complete and len(ids) > 1)
        ):
            problems.append(f"position {segment.start}: the end stands before others, or is taught of a part")
    if fragments and not problems and not _says(pieces(document, vocabulary, pattern), fragments, document, vocabulary):
        problems.append("its pieces are not its fragments")
    return problems


def _runs(document: Document, vocabulary: Vocabulary) -> list[tuple[SegmentKind, int, int]]:
    """Positions of one kind each; codes that are taught part from codes that are not, as a response from its query."""
    ids, runs, i = document.ids, list[tuple[SegmentKind, int, int]](), 0
    while i < len(ids):
        kind = _kind(ids[i], i, vocabulary)
        start, i = i, i + 1
        if kind == "ac":
            i = _audio_end(ids, start, vocabulary)
        elif kind == "chat":
            i = _frame_end(ids, start, vocabulary)
        elif kind in ("t", "ad"):
            while i < len(ids) and _kind(ids[i], i, vocabulary) == kind:
                if kind == "ad" and document.labels[i - 1] == IGNORE != document.labels[i]:
                    break
                i += 1
        runs.append((kind, start, i))
    return runs


def _kind(id: int, position: int, vocabulary: Vocabulary) -> SegmentKind:
    if vocabulary.first_code <= id < vocabulary.first_code + vocabulary.codes:
        return "ad"
    if not 0 <= id < vocabulary.first_code:
        raise ReadError(f"position {position}: id {id}; the last is {vocabulary.first_code + vocabulary.codes - 1}")
    if id in (vocabulary.slot, vocabulary.audio_start, vocabulary.audio_end):
        return "ac"
    if id in (vocabulary.turn_start, vocabulary.turn_end):
        return "chat"
    return "end" if id == vocabulary.text_end else "t"


def _audio_end(ids: Sequence[int], start: int, vocabulary: Vocabulary) -> int:
    i = start + 1
    while i < len(ids) and ids[i] == vocabulary.slot:
        i += 1
    if ids[start] != vocabulary.audio_start or i == start + 1 or i == len(ids) or ids[i] != vocabulary.audio_end:
        raise ReadError(f"position {start}: audio is its start, slots, its end")
    return i + 1


def _frame_end(ids: Sequence[int], start: int, vocabulary: Vocabulary) -> int:
    """After a turn's role and newline, or after the newline that follows its end."""
    if ids[start] == vocabulary.turn_end:
        i = start + 1
        while i < len(ids) and ids[i] != vocabulary.turn_start:
            i += 1
        return i
    newline = vocabulary.text("\n")
    for name in (vocabulary.text(role) for role in _ROLES):
        end = start + 1 + len(name)
        if ids[start + 1 : end] == name:
            # a newline that became one id with the text after it is the text's
            return end + (len(newline) if ids[end : end + len(newline)] == newline else 0)
    return start + 1


def _instructed(
    runs: list[tuple[SegmentKind, int, int]], document: Document, vocabulary: Vocabulary
) -> list[tuple[SegmentKind, int, int]]:
    """The instruction of a task apart from the text that follows it."""
    templates = INSTRUCTIONS.get(document.task, ())
    for ids in (vocabulary.text(f"{template}\n") for template in templates):
        if ids and document.ids[: len(ids)] == ids:
            (kind, _, end), *rest = runs
            return [("instruction", 0, len(ids)), *([(kind, len(ids), end)] if end > len(ids) else []), *rest]
    return runs


def _piece(group: Sequence[Segment], ids: Sequence[int], vocabulary: Vocabulary) -> Piece:
    text = tuple(ids[i] for part in group if part.kind == "t" for i in range(part.start, part.end))
    codes = tuple(
        ids[i] - vocabulary.first_code for part in group if part.kind == "ad" for i in range(part.start, part.end)
    )
    taught = any(part.taught for part in group)
    if group[0].kind == "ac":
        return Piece("ac", clip=group[0].clip, taught=taught)
    return Piece("t|ad" if text and codes else "t" if text else "ad", text, codes, taught=taught)


def _says(found: Sequence[Piece], fragments: Sequence[Fragment], document: Document, vocabulary: Vocabulary) -> bool:
    """Whether the pieces are the fragments in order; a piece may be the same as the one before in another kind."""
    place = 0
    for piece in found:
        for start in (place, place - 1):
            count = _matched(piece, fragments[start:], vocabulary) if start >= 0 else 0
            if count:
                place = start + count
                break
        else:
            return False
    return place == len(fragments) or (not document.complete and place == len(fragments) - 1)


def _matched(piece: Piece, fragments: Sequence[Fragment], vocabulary: Vocabulary) -> int:
    """How many of the first fragments the piece is; 0: none."""
    if piece.kind == "ac":
        return int(bool(fragments) and piece.clip == (fragments[0].row, fragments[0].a, fragments[0].b))
    text: list[int] = []
    codes: list[int] = []
    for count, fragment in enumerate(fragments, 1):
        text += written(fragment, vocabulary) if piece.text else []
        codes += spoken(fragment, vocabulary) if piece.codes else []
        if len(text) == len(piece.text) and len(codes) == len(piece.codes):
            said = [code - vocabulary.first_code for code in codes]
            return count if (text, said) == (list(piece.text), list(piece.codes)) else 0
        if len(text) > len(piece.text) or len(codes) > len(piece.codes):
            return 0
    return 0
