"""Replies of a stream -> a decision per chunk: what supervised examples teach.

4: S | 5: w0 cccc | 6: w1 cccc | 7: _ cccc | 8: B
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from covo_rl.duplex.grid import CHUNK_CODES
from covo_rl.duplex.ids import DuplexIds, TokenKind
from covo_rl.duplex.layout import ChunkDecision
from covo_rl.types import UserError

#: share of replies whose text outlasts their codes, beyond which the data are wrong
MAX_OVERFLOW = 0.05


class PlanError(UserError, ValueError):
    """Replies that cannot be laid out."""


@dataclass(frozen=True)
class ReplyPlan:
    """A reply: SHIFT in the chunk `shift`, then its text ids and codes (0 is the first), both without end.

    `break_at` is the chunk of a BREAK before the reply's own end, a barge-in: what comes after is never taught.
    """

    shift: int
    text_ids: tuple[int, ...]
    codes: tuple[int, ...]
    break_at: int | None = None

    @property
    def chunks(self) -> int:
        """Chunks of text and codes, without a barge-in."""
        return max(len(self.text_ids), -(-len(self.codes) // CHUNK_CODES))

    @property
    def end(self) -> int:
        """The chunk of the BREAK."""
        return self.shift + 1 + self.chunks if self.break_at is None else self.break_at

    @property
    def overflows(self) -> bool:
        """Whether codes of silence are appended until the text is out."""
        return len(self.text_ids) > -(-len(self.codes) // CHUNK_CODES)


def plan_chunks(replies: Sequence[ReplyPlan], chunks: int, ids: DuplexIds) -> list[ChunkDecision]:
    """The decision of each of a stream's chunks; a reply that the stream's end cuts is unfinished.

    Raises:
        PlanError: with all that is wrong: replies that overlap or begin outside the stream, a BREAK where none can be,
            ids that are no text, codes that there are not.
    """
    if problems := _problems(replies, chunks, ids):
        raise PlanError("\n".join(problems))
    plan = [ChunkDecision(ids.think)] * chunks
    for reply in replies:
        decisions = _reply_decisions(reply, ids)[: chunks - reply.shift]
        plan[reply.shift : reply.shift + len(decisions)] = decisions
    return plan


def _reply_decisions(reply: ReplyPlan, ids: DuplexIds) -> list[ChunkDecision]:
    """From SHIFT to BREAK."""
    count = reply.chunks
    codes = [*reply.codes, *ids.silence(len(reply.codes), count * CHUNK_CODES - len(reply.codes))]
    text = [*reply.text_ids, *[ids.text_pad] * (count - len(reply.text_ids))]
    spoken = [
        ChunkDecision(token, tuple(codes[CHUNK_CODES * i : CHUNK_CODES * (i + 1)])) for i, token in enumerate(text)
    ]
    return [ChunkDecision(ids.shift), *spoken[: reply.end - reply.shift - 1], ChunkDecision(ids.break_)]


def _problems(replies: Sequence[ReplyPlan], chunks: int, ids: DuplexIds) -> list[str]:
    problems, before = [], -1
    for number, reply in enumerate(replies):
        name = f"reply {number}"
        if not before < reply.shift < chunks:
            problems.append(f"{name}: SHIFT in chunk {reply.shift}; it may be in {before + 1} to {chunks - 1}")
        natural = reply.shift + 1 + reply.chunks
        if reply.break_at is not None and not reply.shift < reply.break_at <= natural:
            problems.append(
                f"{name}: BREAK in chunk {reply.break_at}; after SHIFT and by its own end it may be in "
                f"{reply.shift + 1} to {natural}"
            )
        if wrong := [i for i in reply.text_ids if ids.kind(i) is not TokenKind.TEXT]:
            problems.append(f"{name}: id {wrong[0]} is {ids.kind(wrong[0]).value}, not text")
        if wrong := [code for code in reply.codes if not 0 <= code < ids.num_codes]:
            problems.append(f"{name}: code {wrong[0]}; there are 0 to {ids.num_codes - 1}")
        before = reply.end
    return problems


def overflow_problem(count: int, replies: int) -> str:
    """What is wrong where the text of `count` of so many replies outlasts their codes; empty where few do."""
    if count <= MAX_OVERFLOW * replies:
        return ""
    return (
        f"the text of {count} of {replies} replies outlasts their codes, over {MAX_OVERFLOW:.0%}: a chunk has room for "
        "one text id and four codes; are the codes those of the whole reply?"
    )
