"""What a stream teaches and asks: replies in chunks, which plan.py lays out, and questions of when to stop.

user | one two ....                       single: SHIFT, but not before the end of the turn
model|              three four five       hold: no BREAK
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from covo_rl.data.read import DataError, Problem
from covo_rl.duplex.data import DuplexStream, DuplexTurn, MarkType
from covo_rl.duplex.grid import CHUNK_SAMPLES, chunk_of
from covo_rl.duplex.ids import DuplexIds
from covo_rl.duplex.layout import ChunkDecision
from covo_rl.duplex.plan import PlanError, ReplyPlan, plan_chunks
from covo_rl.duplex.rollout import TimingStream
from covo_rl.speech.grid import CODE_SECONDS, RATE

#: seconds from which a pause makes a turn one with pauses: within a phrase people pause for less
LONG_PAUSE = 0.5
#: of a reply, that a question is about; the first counts before the second
EVENTS_OF_REPLIES: tuple[MarkType, ...] = ("barge_in", "back_channel")
#: text of a reply -> ids
Tokenize = Callable[[str], Sequence[int]]


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


def is_answered(stream: DuplexStream) -> bool:
    """Whether the model replies to the user's last turn, if there is one: else what follows it would teach silence."""
    users, replies = stream.turns_of("user"), stream.turns_of("model")
    return not users or (bool(replies) and replies[-1].start >= users[-1].end)


def plan_stream(
    stream: DuplexStream, ids: DuplexIds, tokenize: Tokenize
) -> tuple[list[ReplyPlan], list[ChunkDecision]]:
    """The replies with the ids of their texts, and what the model does in each whole chunk.

    Text that outlasts the codes of its reply gets codes of silence.

    Raises:
        DataError: replies that are too near to be laid out.
        PlanError: replies without codes, codes that there are not, ids that are no text, text that makes one too long.
        DuplexIdsError: silence is needed, and the model says no code for it.
    """
    plans = [
        ReplyPlan(reply.shift, tuple(tokenize(reply.text)), reply.codes or (), reply.break_at)
        for reply in coded_replies(stream)
    ]
    return plans, plan_chunks(plans, count_chunks(stream), ids)


def coded_replies(stream: DuplexStream) -> list[StreamReply]:
    """The model's turns by chunks, each with the codes that it says.

    Raises:
        DataError, PlanError: they cannot be laid out, or one has no codes.
    """
    replies = stream_replies(stream)
    if any(reply.codes is None for reply in replies):
        raise PlanError("the model speaks and events.json has no codes of it: make the streams from dialogues that "
                        "`covo-rl speech encode` has gone over")  # fmt: skip
    return replies


def stream_questions(stream: DuplexStream) -> list[TimingStream]:
    """Every question of a stream that has a decision, in order: one for each reply, one for the user's turn before it
    and after the last. A turn over which the model spoke on asks only whether it stops.

    Raises:
        DataError: replies that cannot be laid out.
    """
    replies = stream_replies(stream)
    questions: list[TimingStream] = []
    listening_from = 0
    spoken_over = [turn for turn in stream.turns_of("model") if turn.interrupted_at is None]
    users = [user for user in stream.turns_of("user")
             if not any(turn.start <= user.start < turn.end for turn in spoken_over)]  # fmt: skip
    for turn, reply in zip([*stream.turns_of("model"), None], [*replies, None], strict=True):
        until = count_chunks(stream) if reply is None else reply.shift + 1
        waiting = [user for user in users if listening_from <= chunk_of(user.end) < until]
        if waiting:
            questions.append(_listening(stream, waiting[-1], listening_from, until))
        if turn is not None and reply is not None:
            if reply.end > reply.shift + 1:
                questions.append(_speaking(stream, turn, reply))
            listening_from = reply.end + 1
    return questions


def last_question(stream: DuplexStream) -> TimingStream:
    """What an RL or test stream is about.

    Raises:
        DataError: it asks nothing, or its replies cannot be laid out.
    """
    if not (questions := stream_questions(stream)):
        what = "it asks nothing: there is no turn of the user that waits for an answer, and no reply"
        raise DataError("stream", [Problem(stream.id, what)])
    return questions[-1]


def _listening(stream: DuplexStream, turn: DuplexTurn, first: int, until: int) -> TimingStream:
    longest = max((end - start for start, end in turn.pauses), default=0.0)
    return TimingStream(
        id=stream.id, kind="pause" if longest >= LONG_PAUSE else "single", first_chunk=first, decisions=until - first,
        turn_end=turn.end, pauses=turn.pauses,
    )  # fmt: skip


def _speaking(stream: DuplexStream, turn: DuplexTurn, reply: StreamReply) -> TimingStream:
    """Of several things that happen in a reply the barge-in counts, then the first back-channel."""
    marks = (mark for kind in EVENTS_OF_REPLIES for mark in stream.marks(kind)
             if mark.channel == "user" and turn.start <= mark.start < turn.end)  # fmt: skip
    first, count = reply.shift + 1, reply.end - reply.shift - 1
    if (mark := next(marks, None)) is None:
        return TimingStream(id=stream.id, kind="hold", first_chunk=first, decisions=count)
    return TimingStream(
        id=stream.id, kind=mark.type, first_chunk=first, decisions=count, turn_end=mark.end, onset=mark.start
    )
