"""The linter's questions to rewards that judge when a duplex rollout stops: those that take `shift_time` or
`break_time`.

Alone, each says only what it says. Together they must not pay for a policy that listens to nothing: over the streams
here, which are like those of training, each such policy stays below LIMIT of the best that can be earned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from covo_rl.rewards.call import Outcome
from covo_rl.rewards.columns import example_from_row, group_from_completions, reward_columns
from covo_rl.rewards.rules.turns import CHUNK_SECONDS, LISTENING, ROUNDING, SPEAKING, stop_columns
from covo_rl.rewards.scoring import Component
from covo_rl.rewards.specs import RewardError
from covo_rl.rewards.worker import run_components

TIMEOUT = 20.0
LIMIT = 0.85
REPLY = "three five"


class LintStream(NamedTuple):
    """One question to a model: its decisions are due in `decisions`; times in seconds."""

    kind: str
    decisions: range
    turn_end: float | None = None
    onset: float | None = None
    pauses: tuple[tuple[float, float], ...] = ()


#: pauses in 60 % of the turns; of the replies 40 % are interrupted, 40 % hear a back-channel, 20 % nothing
STREAMS: tuple[LintStream, ...] = (
    *(LintStream("single", range(math.ceil(end / CHUNK_SECONDS) + 18), end) for end in (1.3, 2.05, 2.9, 3.52)),
    *(LintStream("pause", range(math.ceil((stop + 1.4) / CHUNK_SECONDS) + 18), stop + 1.4, None, ((at, stop),))
      for at, stop in ((0.9, 1.3), (1.25, 1.95), (1.6, 2.6), (1.1, 2.6), (0.75, 2.95), (1.42, 4.42))),
    *(LintStream("barge_in", range(12, 52), at + 2.5, at) for at in (2.4, 3.1, 4.25, 5.6)),
    *(LintStream("back_channel", range(12, 52), at + 0.4, at) for at in (2.45, 3.2, 4.3, 5.5)),
    *(LintStream("hold", range(12, 12 + chunks)) for chunks in (20, 40)),
)  # fmt: skip


def _sounds(stream: LintStream, chunk: int) -> bool:
    """Whether the user is heard in this chunk."""
    begin, end = CHUNK_SECONDS * chunk, CHUNK_SECONDS * (chunk + 1)
    first = 0.0 if stream.kind in LISTENING else math.inf if stream.onset is None else stream.onset
    inside = end > first + ROUNDING and begin < (stream.turn_end or 0.0) - ROUNDING
    return inside and not any(start <= begin and end <= stop for start, stop in stream.pauses)


#: who listens to nothing: name, kinds of streams, chunk of the stop or None
POLICIES: dict[str, tuple[tuple[str, ...], Callable[[LintStream], int | None]]] = {
    "always THINK": (LISTENING, lambda stream: None),
    "SHIFT at 0": (LISTENING, lambda stream: 0),
    "SHIFT at once when silent": (LISTENING, lambda s: next((k for k in s.decisions if not _sounds(s, k)), None)),
    "never BREAK": (SPEAKING, lambda stream: None),
    "BREAK at any sound": (SPEAKING, lambda s: next((k for k in s.decisions if _sounds(s, k)), None)),
}


def times(term: Component) -> bool:
    """Whether a reward judges when a duplex rollout stops."""
    return bool(term.reward.parameters & {"shift_time", "break_time"})


def reads_reply(term: Component) -> bool:
    """Whether it also judges what is said after a stop, which has to be decoded for it."""
    return times(term) and "reply" in term.reward.parameters


def check_timing(terms: Sequence[Component]) -> None:
    """Raises RewardError: a reward judges when a duplex rollout stops, and these rollouts are replies."""
    if names := ", ".join(term.name for term in terms if times(term)):
        raise RewardError(f"{names}: judges when a full-duplex rollout stops (columns shift_time, break_time), and a "
                          "rollout of this run is a reply to a prompt: leave it out")  # fmt: skip


def timing_problems(term: Component, full: bool) -> Iterator[tuple[str, str]]:
    """(check, what is wrong) of one reward."""
    outcome, stops = _all_stops(term)
    for why in list(dict.fromkeys(outcome.failures))[:3]:
        yield "odd input", why.removeprefix("failed: ")
    scores = np.array(outcome.scores)
    if not outcome.failures and np.isnan(scores).all():
        yield "gold", "says nothing of any stream"
    again = np.array(_all_stops(term)[0].scores) if full else scores
    for (stream, chunk), first, second in zip(stops, scores, again, strict=True):
        where = f"{stream.kind} stream, stop in {'no chunk' if chunk is None else f'chunk {chunk}'}"
        if first < 0 or first > 1:
            yield "range", f"{where}: {first:g} is outside [0, 1]"
        if not np.array_equal(first, second, equal_nan=True):
            yield "determinism", f"{where}: {first:g}, then {second:g}"


def policy_shares(terms: Sequence[Component]) -> dict[str, float]:
    """By policy, its part of the best sum over the streams of its kinds; none where nothing can be earned there.

    What is said counts for none of them: who hears nothing does not know it.
    """
    total, stops = np.zeros(0), []
    if not (timed := [term for term in terms if not reads_reply(term)]):
        return {}
    for term in timed:
        outcome, stops = _all_stops(term)
        total = np.nan_to_num(outcome.scores) * term.weight + (total if len(total) else 0.0)
    earned: dict[LintStream, dict[int | None, float]] = {}
    for (stream, chunk), value in zip(stops, total, strict=True):
        earned.setdefault(stream, {})[chunk] = float(value)
    shares = {}
    for name, (kinds, policy) in POLICIES.items():
        streams = [stream for stream in STREAMS if stream.kind in kinds]
        if (best := sum(max(earned[stream].values()) for stream in streams)) > 0:
            shares[name] = sum(earned[stream][policy(stream)] for stream in streams) / best
    return shares


def policy_problems(terms: Sequence[Component]) -> Iterator[tuple[str, str]]:
    """(check, what is wrong) of their sum."""
    for name, share in policy_shares(terms).items():
        if share >= LIMIT:
            yield (
                "hack",
                f"the policy {name!r} earns {share:.0%} of the best sum, {LIMIT:.0%} or more: add a reward that it "
                f"loses, such as {_against(name)}",
            )


def _against(policy: str) -> str:
    speaking = {"never BREAK": "barge_in", "BREAK at any sound": "back_channel"}
    return speaking.get(policy, "early_response or turn_taking")


def _all_stops(term: Component) -> tuple[Outcome, list[tuple[LintStream, int | None]]]:
    """Scores of every stop of every stream, never among them. What is said after each of them is what is expected."""
    stops: list[tuple[LintStream, int | None]] = [(s, chunk) for s in STREAMS for chunk in (*s.decisions, None)]
    columns: dict[str, Any] = reward_columns([group_from_completions(example_from_row({}), [""] * len(stops))])
    for stream in STREAMS:
        chunks = [*stream.decisions, None]
        one = stop_columns(stream.kind, chunks, turn_end=stream.turn_end, onset=stream.onset, pauses=stream.pauses)
        for name, values in one.items():
            columns.setdefault(name, []).extend(values)
    columns["reply"] = [None if chunk is None else REPLY for _, chunk in stops]
    columns["expected"] = [REPLY] * len(stops)
    return run_components([term.reward], columns, TIMEOUT)[0], stops
