"""Rollouts that are one number: the chunk in which a model stops listening, or stops speaking.

    TimingStream        one question: when do you stop? Its decisions are due in chunks first, first + 1, ...
    z_K                 logit of stopping against going on at each of them, from one forward (trunk.py)
    stop_logps(z_K)     log-probs of stopping at each decision, and of never: (K + 1,), never last
    sample_stops        G of them, drawn from the hazards sigmoid(z_K)
    score_stops         what each possible stop earns

A stop is the index of a decision, from 0; K itself stands for never. Its chunk is `stream.first_chunk + stop`.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from covo_rl.duplex.grid import chunk_of, decision_time
from covo_rl.rewards import Component, RewardError
from covo_rl.rewards.columns import example_from_row, group_from_completions, reward_columns
from covo_rl.rewards.rules.turns import LISTENING, of_kind, stop_columns
from covo_rl.rewards.worker import run_components


@dataclass(frozen=True, kw_only=True)
class TimingStream:
    """One question to a model, as rewards see it (covo_rl/rewards/rules/turns.py says what the fields mean).

    `decisions` chunks from `first_chunk` on hold a decision: of a listening stream all of its chunks, of a speaking
    one those in which its reply has codes left. `cue` says how the user's turn tells its end; "" where nobody knows.
    `answer`: what a model that listens should say then, None where nobody knows. Times in seconds.
    """

    id: str
    kind: str
    first_chunk: int
    decisions: int
    turn_end: float | None = None
    onset: float | None = None
    pauses: tuple[tuple[float, float], ...] = ()
    cue: str = ""
    answer: str | None = None

    def __post_init__(self) -> None:
        if self.decisions < 1 or self.first_chunk < 0:
            raise ValueError(f"stream {self.id}: {self.decisions} decisions from chunk {self.first_chunk} on; there "
                             "must be one or more, from chunk 0 or later")  # fmt: skip
        needed = {"turn_end": self.kind != "hold", "onset": self.kind in ("barge_in", "back_channel")}
        if wrong := [name for name, has in needed.items() if (getattr(self, name) is not None) != has]:
            raise ValueError(f"stream {self.id}, kind {self.kind}: {' and '.join(wrong)} must be given where the "
                             "user's turn or event has one, and only there")  # fmt: skip

    @property
    def listening(self) -> bool:
        """Whether the model listens and stops with SHIFT; else it speaks and stops with BREAK."""
        return of_kind([self.kind], LISTENING)[0]

    def chunk(self, stop: int) -> int | None:
        """The chunk of a stop; None for never."""
        return self.first_chunk + stop if stop < self.decisions else None

    def time(self, stop: int) -> float | None:
        """When a stop is said, in seconds; None for never."""
        chunk = self.chunk(stop)
        return None if chunk is None else decision_time(chunk)

    def decision_of(self, seconds: float) -> int:
        """The decision of the chunk that holds this time; below 0 or from `decisions` on where none is due."""
        return chunk_of(seconds) - self.first_chunk

    def columns(self, stops: Sequence[int]) -> dict[str, list[Any]]:
        """What rewards are told of rollouts that stopped there."""
        chunks = [self.chunk(stop) for stop in stops]
        return stop_columns(self.kind, chunks, turn_end=self.turn_end, onset=self.onset, pauses=self.pauses)


def stop_logps(z_K: torch.Tensor) -> torch.Tensor:
    """Log-probs of stopping at each decision and, last, of never: (K,) logits -> (K + 1,), differentiable.

    log P(k) = sum over j < k of log(1 - h_j), + log h_k, with h = sigmoid(z).
    """
    on_K = F.logsigmoid(-z_K).cumsum(0)
    return torch.cat([F.logsigmoid(z_K), z_K.new_zeros(1)]) + torch.cat([z_K.new_zeros(1), on_K])


def stop_generator(seed: int, stream_id: str, *more: int) -> np.random.Generator:
    """Numbers of one stream, the same whatever else is drawn; `more` tells steps apart."""
    return np.random.default_rng([seed, zlib.crc32(stream_id.encode()), *more])


def sample_stops(z_K: torch.Tensor, generations: int, rng: np.random.Generator) -> np.ndarray:
    """Stops (G,) int64 of rollouts drawn from the hazards; K is never."""
    ends_K = np.cumsum(np.exp(stop_logps(z_K.detach().double()).cpu().numpy()))[:-1]
    return np.searchsorted(ends_K, rng.random(generations), side="right")


def greedy_stop(z_K: torch.Tensor) -> int:
    """The first decision whose hazard is above one half; K, never, where none is."""
    stops = (z_K > 0).nonzero()
    return int(stops[0]) if len(stops) else len(z_K)


@dataclass(frozen=True)
class StopReply:
    """What a model says after a stop: its text; whether that was `cut` at the limit; what rewards logged of it."""

    text: str
    cut: bool
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StopRewards:
    """What every stop of one stream earns: `total_S` (K + 1,) float64, never last, and `parts`, by component.

    A component that does not judge such streams is not in `parts`. `failures` says why others are not. `replies`, by
    stop, are those that were decoded (content.py); of a component that reads them other stops have no score.
    """

    total_S: np.ndarray
    parts: Mapping[str, np.ndarray]
    failures: Mapping[str, str]
    replies: Mapping[int, StopReply] = field(default_factory=dict)


def score_stops(
    streams: Sequence[TimingStream], rewards: Sequence[Component], *, timeout: float = 60.0
) -> list[StopRewards]:
    """Every stop of every stream under the weighted sum of these rewards, in one call of each.

    A component that fails for one stop of a stream, or says None of some, leaves that stream's sum: no other stop
    outranks it for that.

    Raises:
        RewardError: a stream of which no component judges all stops.
    """
    judged = judge_stops(
        streams, [stream.columns(range(stream.decisions + 1)) for stream in streams], rewards, timeout=timeout
    )
    results = []
    for stream, (parts, failures, _) in zip(streams, judged, strict=True):
        if not parts:
            why = "; ".join(f"{name} {why}" for name, why in failures.items()) or "each of them says None"
            raise RewardError(f"stream {stream.id} ({stream.kind}): none of {', '.join(t.name for t in rewards)} "
                              f"judges all of its stops: {why}")  # fmt: skip
        total_S = sum((t.weight * parts[t.name] for t in rewards if t.name in parts), np.zeros(stream.decisions + 1))
        results.append(StopRewards(total_S, parts, failures))
    return results


def judge_stops(
    streams: Sequence[TimingStream], columns: Sequence[Mapping[str, list[Any]]], rewards: Sequence[Component], *,
    timeout: float = 60.0, judge: Any = None,
) -> list[tuple[dict[str, np.ndarray], dict[str, str], dict[str, list[Any]]]]:  # fmt: skip
    """What each reward says of some stops of each stream, which `columns` tell of, in one call of each: of each stream
    scores by component, why one is missing, and what they logged of each stop.

    A component that has no score of one of a stream's stops, or more, has none of that stream.
    """
    if not streams:
        return []
    together: dict[str, Any] = {} if judge is None else {"judge": judge}
    counts = [len(own["chunk"]) for own in columns]
    for stream, own, count in zip(streams, columns, counts, strict=True):
        group = reward_columns([group_from_completions(example_from_row({"id": stream.id}), [""] * count)])
        for name, values in (group | dict(own)).items():
            if isinstance(values, list):
                together.setdefault(name, []).extend(values)
            else:
                together[name] = values
    outcomes = run_components([term.reward for term in rewards], together, timeout)
    results, first = [], 0
    for count in counts:
        parts: dict[str, np.ndarray] = {}
        failures: dict[str, str] = {}
        notes: dict[str, list[Any]] = {}
        for term, outcome in zip(rewards, outcomes, strict=True):
            scores_S = np.array(outcome.scores[first : first + count])
            if not np.isnan(scores_S).any():
                parts[term.name] = scores_S
            elif why := next((outcome.missing[i] for i in range(first, first + count)
                              if outcome.missing.get(i, "").startswith("failed")), ""):  # fmt: skip
                failures[term.name] = why
            elif judged := int((~np.isnan(scores_S)).sum()):
                failures[term.name] = f"judges {judged} of {count} stops"
            notes |= {name: values[first : first + count] for name, values in outcome.extras.items()}
        results.append((parts, failures, notes))
        first += count
    return results


def shuffled_stops(scored: StopRewards, rng: np.random.Generator) -> StopRewards:
    """The same rewards, dealt to the stops at random: the control of which training must gain nothing."""
    order = rng.permutation(len(scored.total_S))
    parts = {name: part_S[order] for name, part_S in scored.parts.items()}
    return StopRewards(scored.total_S[order], parts, scored.failures)
