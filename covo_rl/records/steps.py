"""What a step leaves behind: its metrics over all ranks, its rollouts as rows, and where its time went."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from covo_rl.algo.advantage import Advantages, concatenated
from covo_rl.data.files import plain
from covo_rl.rewards.rules.criteria import words
from covo_rl.rewards.scoring import beside, figures, whole_sums
from covo_rl.types import Group, RewardTable, Rollout

if TYPE_CHECKING:
    from covo_rl.engines.base import TextDecoder


#: columns that only some steps or runs have, as those of eval/SET are; what a reward logs under such a name is not
#: taken for them
SOMETIMES = ("eval_accuracy", "listen_real", "listen_silent", "listen_rows", "kl")


class Clock:
    """Wall seconds by phase of a step."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(phase, time.perf_counter() - start)

    def add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self.start


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a line of metrics.jsonl, those within `seconds` as `seconds/PHASE`."""
    flat = {}
    for name, value in metrics.items():
        parts = (
            {f"{name}/{part}": inner for part, inner in value.items()} if isinstance(value, Mapping) else {name: value}
        )
        flat |= {part: float(inner) for part, inner in parts.items() if is_number(inner)}
    return flat


def is_number(value: Any) -> bool:
    """Whether a value that a file holds is a number to compute with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


@dataclass(frozen=True)
class StepRecord:
    """What is known of one step, over all ranks: its line of metrics.jsonl, and its rows of rollouts/step_N.jsonl."""

    step: int
    metrics: Mapping[str, Any]
    rollouts: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class StepShare:
    """One rank's share of a step, small enough to gather: its scores, and (N,) figures of its rollouts and groups."""

    table: RewardTable
    lengths_N: np.ndarray
    truncated_N: np.ndarray
    format_broken_N: np.ndarray
    thinking_words_N: np.ndarray
    surprisal_N: np.ndarray  # -log p of all tokens of a rollout, in nats
    informative_P: np.ndarray
    lags_N: np.ndarray  # optimiser updates between the policy that sampled and the one that the step began with

    @classmethod
    def of(cls, groups: Sequence[Group], table: RewardTable, advantages: Advantages, version: int = 0) -> StepShare:
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        return cls(
            table,
            np.array([len(r.completion_ids) for r in rollouts], dtype=float),
            np.array([r.stop_reason == "length" for r in rollouts], dtype=float),
            np.array([bool(r.problems) for r in rollouts], dtype=float),
            np.array([len(words(r.think or "", None)) for r in rollouts], dtype=float),
            np.array([-sum(r.logps) for r in rollouts], dtype=float),
            advantages.informative_P.astype(float),
            np.array([version - r.version for r in rollouts], dtype=float),
        )


def step_metrics(shares: Sequence[StepShare], others: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The shares of all ranks -> figures over all rollouts of the step, keyed as in metrics.jsonl, after `others`.

    `sampling/entropy` is the mean -log p of the sampled tokens: what sampling expects it to be is the entropy, at the
    temperature of sampling, without a pass for it. `failed_NAME` is the part of `none_NAME` that raised or timed out.
    What rewards log by themselves is averaged over ranks by their rollouts; a name that is taken becomes `logged/NAME`.
    """

    def mean(name: str) -> float:
        values = np.concatenate([getattr(share, name) for share in shares])
        return float(values.mean()) if values.size else 0.0

    table = concatenated([share.table for share in shares])
    metrics: dict[str, Any] = dict(others or {})
    for r, name in enumerate(table.names):
        graded = table.rewards_PGR[..., r][np.isfinite(table.rewards_PGR[..., r])]
        metrics[f"reward_{name}"] = float(graded.mean()) if graded.size else None
        metrics[f"none_{name}"] = 1.0 - graded.size / max(table.rewards_PG.size, 1)
        failures = sum(len(share.table.failures(name)) for share in shares)
        metrics[f"failed_{name}"] = failures / max(table.rewards_PG.size, 1)
    whole_PG = concatenated([replace(share.table, rewards_PG=whole_sums(share.table)) for share in shares]).rewards_PG
    total = whole_PG[np.isfinite(whole_PG)]
    metrics["reward_total"] = float(total.mean()) if total.size else None
    metrics["none_total"] = 1.0 - np.isfinite(table.rewards_PG).sum().item() / max(table.rewards_PG.size, 1)
    metrics["zero_variance_groups"] = 1.0 - mean("informative_P") if table.rewards_PG.size else 0.0
    metrics["completion_length"], metrics["truncated"] = mean("lengths_N"), mean("truncated_N")
    metrics["format_broken"], metrics["thinking_words"] = mean("format_broken_N"), mean("thinking_words_N")
    metrics["engine/lag"] = mean("lags_N")
    metrics["sampling/entropy"] = mean("surprisal_N") / max(mean("lengths_N"), 1e-9)
    scores, logged = figures(table.names, table.rewards_PGR, whole_PG), {}
    for share in shares:
        weight = share.table.rewards_PG.size / max(table.rewards_PG.size, 1)
        for name, value in share.table.metrics.items():
            if name not in scores:  # those are of the scores of all ranks
                logged[name] = logged.get(name, 0.0) + value * weight
    metrics |= {name: value for name, value in scores.items() if not name.endswith(("/mean", "/none"))}
    sometimes = (*SOMETIMES, *(name for name in logged if name.startswith("eval/")))
    absent = [name for name in sometimes if name not in metrics]
    metrics = beside(metrics | dict.fromkeys(absent), logged)
    return {name: value for name, value in metrics.items() if name not in absent}


def rollout_rows(
    groups: Sequence[Group], table: RewardTable, advantages: Advantages, *, first_group: int = 0,
    decoder: TextDecoder | None = None, version: int = 0,
) -> list[Mapping[str, Any]]:  # fmt: skip
    """One JSON-ready row per rollout; clips by name and content, never by waveform.

    `group` counts from `first_group`: over the ranks of a step. A column of the data with the name of one of ours
    becomes `row/NAME`. With a `decoder`, `token_logps` is [characters of the completion, 1/100 nat] by token. `version`
    is that of the policy that the step began with.
    """
    rows: list[Mapping[str, Any]] = []
    rewards, totals, shares = map(plain, (table.rewards_PGR, table.rewards_PG, advantages.advantages_PG))
    for p, group in enumerate(groups):
        example, columns = group.prompt.example, plain(group.prompt.example.columns)
        shared = {
            "id": example.id,
            "clips": [clip.name if clip.path is None else os.path.abspath(clip.path) for clip in example.clips],
            "clip_keys": list(group.prompt.clip_keys),  # sha256 of what was heard: the report plays nothing else
            "question": example.question,
            "choices": list(example.choices),
            "answer": example.answer,
            "group": first_group + p,
        }
        for g, rollout in enumerate(group.rollouts):
            own = {
                **shared,
                "rollout": g,
                "completion": rollout.text,
                "completion_codes": list(rollout.codes),
                "parsed_answer": rollout.answer,
                "stop_reason": rollout.stop_reason,
                "problems": list(rollout.problems),
                "rewards": dict(zip(table.names, rewards[p][g], strict=True)),
                "missing": {name: why for name in table.names if (why := table.missing.get((p, g, name)))},
                "reward_total": totals[p][g],
                "advantage": shares[p][g],
                "length": len(rollout.completion_ids),
                "lag": version - rollout.version,
                "mean_logp": plain(sum(rollout.logps) / max(len(rollout.logps), 1)),
                "token_logps": _token_logps(rollout, decoder) if decoder else None,
            }
            logged = {name: values[p * len(group.rollouts) + g] for name, values in table.extras.items()}
            rows.append(beside(beside(own, columns, "row"), logged))
    return rows


def _token_logps(rollout: Rollout, decoder: TextDecoder) -> list[list[int]] | None:
    """None where a log-prob is not finite, or the text does not come apart by token."""
    characters = decoder.characters(rollout.completion_ids, rollout.text)
    if characters is None or not all(map(math.isfinite, rollout.logps)):
        return None
    return [characters, [round(100 * logp) for logp in rollout.logps]]
