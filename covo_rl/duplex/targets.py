"""What a stream teaches and asks: replies in chunks, which plan.py lays out, and questions of when to stop. No torch.

user | one two ....                       single: SHIFT, but not before the end of the turn
model|              three four five       hold: no BREAK
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from covo_rl.data.read import DataError, Problem
from covo_rl.duplex.data import DuplexStream, DuplexTurn, Span
from covo_rl.duplex.grid import CHUNK_SAMPLES, chunk_of
from covo_rl.speech.grid import CODE_SECONDS, RATE

QuestionKind = Literal["single", "pause", "barge_in", "back_channel", "hold"]
#: seconds from which a pause makes a turn one with pauses: within a phrase people pause for less
LONG_PAUSE = 0.5


@dataclass(frozen=True)
class StreamReply:
    """A reply by chunks: SHIFT in `shift`, `chunks` of speech after it, then BREAK, or before in `break_at`.

    `text` and `codes` are those of the whole reply, also where it is interrupted.
    """

    shift: int
    chunks: int
    text: str = ""
    codes: tuple[int, ...] | None = None
    break_at: int | None = None

    @property
    def end(self) -> int:
        """The chunk of BREAK."""
        return self.shift + self.chunks + 1 if self.break_at is None else self.break_at


@dataclass(frozen=True)
class StreamQuestion:
    """When does the model stop what it does? Its decisions are due in `decisions` chunks from `first_chunk` on.

    turn_end: where the user's turn, barge-in or back-channel ends; onset: where the latter two begin. Seconds.
    """

    kind: QuestionKind
    first_chunk: int
    decisions: int
    turn_end: float | None = None
    onset: float | None = None
    pauses: tuple[Span, ...] = ()


def count_chunks(stream: DuplexStream) -> int:
    """Whole chunks of a stream: those in which a decision falls."""
    return round(stream.seconds * RATE) // CHUNK_SAMPLES


def stream_replies(stream: DuplexStream) -> list[StreamReply]:
    """The model's turns by chunks: codes of a chunk sound in the next one, and SHIFT is one chunk before the first.

    Raises:
        DataError: a reply that begins too early to have a SHIFT, or two that are too near for BREAK and SHIFT.
    """
    replies = [_reply(turn) for turn in stream.turns_of("model")]
    problems, free = [], 0
    for turn, reply in zip(stream.turns_of("model"), replies, strict=True):
        if reply.shift < free:
            what = f"the model's turn from {turn.start} s needs its SHIFT in chunk {reply.shift}, and the first that is"
            problems.append(Problem(stream.id, f"{what} free is {free}: sound comes two chunks after SHIFT"))
        free = reply.end + 1
    if problems:
        raise DataError("stream", problems)
    return replies


def _reply(turn: DuplexTurn) -> StreamReply:
    seconds = turn.end - turn.start if turn.codes is None else len(turn.codes) * CODE_SECONDS
    chunks = -(-round(seconds * RATE) // CHUNK_SAMPLES)
    break_at = None if turn.interrupted_at is None else chunk_of(turn.interrupted_at) - 1
    return StreamReply(chunk_of(turn.start) - 2, chunks, turn.text, turn.codes, break_at)


def stream_questions(stream: DuplexStream) -> list[StreamQuestion]:
    """Every question of a stream, in order: one for each reply, one for the user's turn before it and after the last.
    A turn over which the model spoke on asks only whether it stops. An RL or test stream is about its last question.

    Raises:
        DataError: replies that cannot be laid out.
    """
    replies = stream_replies(stream)
    questions: list[StreamQuestion] = []
    listening_from = 0
    spoken_over = [turn for turn in stream.turns_of("model") if turn.interrupted_at is None]
    users = [user for user in stream.turns_of("user")
             if not any(turn.start <= user.start < turn.end for turn in spoken_over)]  # fmt: skip
    for turn, reply in zip([*stream.turns_of("model"), None], [*replies, None], strict=True):
        until = count_chunks(stream) if reply is None else reply.shift + 1
        waiting = [user for user in users if listening_from <= chunk_of(user.end) < until]
        if waiting:
            questions.append(_listening(waiting[-1], listening_from, until))
        if turn is not None and reply is not None:
            questions.append(_speaking(stream, turn, reply))
            listening_from = reply.end + 1
    return questions


def _listening(turn: DuplexTurn, first: int, until: int) -> StreamQuestion:
    longest = max((end - start for start, end in turn.pauses), default=0.0)
    kind = "pause" if longest >= LONG_PAUSE else "single"
    return StreamQuestion(kind, first, until - first, turn.end, pauses=turn.pauses)


def _speaking(stream: DuplexStream, turn: DuplexTurn, reply: StreamReply) -> StreamQuestion:
    """Of several things that happen in a reply the barge-in counts, then the first back-channel."""
    first, count = reply.shift + 1, reply.end - reply.shift - 1
    kinds: tuple[Literal["barge_in", "back_channel"], ...] = ("barge_in", "back_channel")
    for kind in kinds:
        for mark in stream.marks(kind):
            if mark.channel == "user" and turn.start <= mark.start < turn.end:
                return StreamQuestion(kind, first, count, mark.end, mark.start)
    return StreamQuestion("hold", first, count)
