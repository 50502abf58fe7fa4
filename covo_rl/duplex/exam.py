"""A stream's question put to a live session: how much would it rather stop, at each decision that is due?

The session hears the user's channel as it comes and is led along the stream: it listens where the stream's model does
and says its replies, with codes of its own where the stream has none. Until its first stop that is the way it goes by
itself, so these are the logits of its own decisions; in one run there are those of all stops, as on a trunk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from covo_rl.data.read import DataError, Problem
from covo_rl.duplex.data import DuplexStream
from covo_rl.duplex.grid import CHUNK_CODES, CHUNK_SAMPLES
from covo_rl.duplex.ids import DuplexIds, DuplexIdsError
from covo_rl.duplex.layout import CHUNK_POSITIONS, ChunkDecision
from covo_rl.duplex.plan import PlanError, ReplyPlan, plan_chunks
from covo_rl.duplex.rollout import TimingStream
from covo_rl.duplex.session import DuplexSession
from covo_rl.duplex.targets import Tokenize, count_chunks, last_question, stream_replies
from covo_rl.models.text import text_ids


@dataclass(frozen=True)
class ExamResult:
    """`z_K`: float64 logits of stopping at each decision of `stream`, for `timing_figures`.

    `text_cut`: ids of replies that were not said, as their sound leaves no chunk for them; `dropped`: chunks that left
    the session's context.
    """

    stream: TimingStream
    z_K: torch.Tensor
    text_cut: int
    dropped: int


def led_decisions(stream: DuplexStream, ids: DuplexIds, tokenize: Tokenize) -> tuple[list[ChunkDecision], int]:
    """The decision of each whole chunk of a stream, and how many ids of text its replies' sound leaves no chunk for.

    A reply without codes has none here: a session draws its own.

    Raises:
        DataError, DuplexIdsError: replies that cannot be laid out, or do not fit the ids.
    """
    plans, own, text_cut = [], [], 0
    for reply in stream_replies(stream):
        text = tuple(tokenize(reply.text))
        text_cut += max(len(text) - reply.chunks, 0) if reply.break_at is None else 0
        codes = (0,) * (CHUNK_CODES * reply.chunks) if reply.codes is None else reply.codes
        plans.append(ReplyPlan(reply.shift, text[: reply.chunks], codes, reply.break_at))
        own += [*range(reply.shift, reply.end)] if reply.codes is None else []
    try:
        decisions = plan_chunks(plans, count_chunks(stream), ids)
    except PlanError as error:
        raise DataError("stream", [Problem(stream.id, what) for what in str(error).split("\n")]) from error
    for chunk in own:
        if chunk < len(decisions):
            decisions[chunk] = replace(decisions[chunk], codes=())
    return decisions, text_cut


def exam_problems(session: DuplexSession, stream: DuplexStream) -> list[str]:
    """Why the stream cannot be put to the session, told before anything is heard."""
    try:
        last_question(stream)
        led_decisions(stream, session.ids, _tokenize(session))
    except DataError as error:
        return [str(problem) for problem in error.problems]
    except DuplexIdsError as error:
        return [f"{stream.id}: {error}"]
    longest = max((reply.end - reply.shift for reply in stream_replies(stream)), default=0)
    needed = len(session.system_ids) + CHUNK_POSITIONS * (longest + 1)
    if needed > session.max_positions:
        return [f"{stream.id}: its longest reply needs {needed} positions; the model has {session.max_positions}"]
    return []


def examine(session: DuplexSession, stream: DuplexStream, user_T: np.ndarray) -> ExamResult:
    """Put the last question of a stream to a session, which begins anew. `user_T`: float at 24 kHz.

    Raises:
        DataError: a stream that cannot be put; `exam_problems` tells beforehand.
    """
    question = last_question(stream)
    decisions, text_cut = led_decisions(stream, session.ids, _tokenize(session))
    end = question.first_chunk + question.decisions
    session.reset()
    session.follow(decisions)
    events = []
    for start in range(0, len(user_T), CHUNK_SAMPLES):
        events += session.push(user_T[start : start + CHUNK_SAMPLES])
        if len(session.decisions) >= end:
            break
    else:
        events += session.end()
    due = range(question.first_chunk, end)
    z = [event.stop_logit for event in events if event.type == "decision" and event.chunk in due]
    if len(z) != question.decisions:
        what = f"{len(user_T)} samples have decisions up to chunk {len(session.decisions) - 1}, and {end - 1} is asked"
        raise DataError("stream", [Problem(stream.id, what)])
    dropped = sum(event.count for event in events if event.type == "dropped")
    return ExamResult(question, torch.tensor(z, dtype=torch.float64), text_cut, dropped)


def _tokenize(session: DuplexSession) -> Tokenize:
    return partial(text_ids, session.family.tokenizer)
