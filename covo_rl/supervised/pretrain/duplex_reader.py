"""A document of a stream back to what it was written from, and what of it breaks the rules."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

from covo_rl.duplex.grid import CHUNK_CODES, CHUNK_SECONDS
from covo_rl.duplex.ids import DuplexIds, TokenKind
from covo_rl.duplex.layout import ChunkDecision, read_chunks
from covo_rl.duplex.machine import LayoutError
from covo_rl.models.covo_audio.processing import IGNORE
from covo_rl.supervised.pretrain.document import Document, Vocabulary
from covo_rl.supervised.pretrain.reader import ReadError

StreamKind = Literal["chat", "listen", "shift", "reply", "break"]
_KINDS: dict[TokenKind, StreamKind] = {
    TokenKind.THINK: "listen", TokenKind.SHIFT: "shift", TokenKind.TEXT: "reply", TokenKind.TEXT_PAD: "reply",
    TokenKind.BREAK: "break",
}  # fmt: skip
#: codes that are written out
FIRST_CODES = 12


@dataclass(frozen=True)
class StreamRun:
    """Positions [start, end) of chunks of one kind, or of what frames them (`chat`); `reply`: which it is, from 0.

    `chunk`: the number of the first of its `decisions`.
    """

    kind: StreamKind
    start: int
    end: int
    reply: int | None = None
    chunk: int = 0
    decisions: tuple[ChunkDecision, ...] = ()


def read_decisions(document: Document, vocabulary: Vocabulary) -> list[ChunkDecision]:
    """What the model does in each chunk: the inverse of how a stream is written.

    Raises:
        ReadError: ids that no stream has, or a model that has none for one.
    """
    ids, start = _ids(vocabulary), _body(document, vocabulary)
    try:
        return read_chunks(document.ids[start:-1], ids)
    except LayoutError as error:
        raise ReadError(f"its chunks, which begin at position {start}: {error}") from None


def stream_runs(document: Document, vocabulary: Vocabulary) -> list[StreamRun]:
    """The document from its first position to its last. Raises ReadError."""
    ids, start = _ids(vocabulary), _body(document, vocabulary)
    runs = [StreamRun("chat", 0, start)]
    reply = -1
    for chunk, decision in enumerate(read_decisions(document, vocabulary)):
        kind, before = _KINDS[ids.kind(decision.token)], runs[-1]
        reply += kind == "shift"
        end = before.end + 2 + len(decision.codes)
        if kind == before.kind:
            runs[-1] = replace(before, end=end, decisions=(*before.decisions, decision))
        else:
            runs.append(StreamRun(kind, before.end, end, None if kind == "listen" else reply, chunk, (decision,)))
    return [*runs, StreamRun("chat", len(document) - 1, len(document))]


def run_content(run: StreamRun, document: Document, vocabulary: Vocabulary, tokenizer: Any) -> str:
    """A run for the eye; what may be written from right to left stands last."""
    if run.kind == "chat":
        return tokenizer.decode(document.ids[run.start : run.end], skip_special_tokens=False)
    ids, count = _ids(vocabulary), len(run.decisions)
    start, end = CHUNK_SECONDS * run.chunk, CHUNK_SECONDS * (run.chunk + count)
    where = f"{count} chunk{'s' * (count != 1)} from {run.chunk}, {start:.2f} to {end:.2f} s"
    if run.kind != "reply":
        return where
    codes = [code for decision in run.decisions for code in decision.codes]
    text = [decision.token for decision in run.decisions if decision.token != ids.text_pad]
    more = " ..." if len(codes) > FIRST_CODES else ""
    said = f"{len(codes)} codes: {' '.join(map(str, codes[:FIRST_CODES]))}{more}; {len(text)} ids of text"
    return f"{where}; {said}: {tokenizer.decode(text, skip_special_tokens=False)}"


def stream_problems(document: Document, vocabulary: Vocabulary) -> list[str]:
    """What is wrong with a document of a stream; nothing where it keeps to the rules.

    Its chunks are a dialogue, as many as its one clip has; labels are the ids of all that the model chooses, and of
    nothing else.
    """
    try:
        decisions, start = read_decisions(document, vocabulary), _body(document, vocabulary)
    except ReadError as error:
        return [str(error)]
    problems = []
    clips = [clip[1:] for clip in document.clips]
    if clips != [(0, CHUNK_CODES * len(decisions))]:
        problems.append(f"{len(decisions)} chunks, and its clips have the codes {clips}: one clip has four to a chunk")
    slots = {start, *accumulate((2 + len(decision.codes) for decision in decisions), initial=start)}
    for i, (id, label) in enumerate(zip(document.ids, document.labels, strict=True)):
        chosen = start <= i < len(document) - 1 and i not in slots
        if label != (id if chosen else IGNORE):
            what = "the model chooses it" if chosen else "nobody chooses it"
            problems.append(f"position {i}: label {label} of id {id}, and {what}")
    return problems


def _ids(vocabulary: Vocabulary) -> DuplexIds:
    if vocabulary.duplex is None:
        raise ReadError("it is of a stream, and the model has no ids of full duplex")
    return vocabulary.duplex


def _body(document: Document, vocabulary: Vocabulary) -> int:
    """Where the first chunk begins."""
    ids = document.ids
    if vocabulary.audio_start not in ids or ids[-1] != vocabulary.audio_end:
        raise ReadError("a stream is a system message, audio's start, chunks, audio's end")
    return ids.index(vocabulary.audio_start) + 1
