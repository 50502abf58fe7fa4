"""Outcomes of the components -> RewardTable: the weighted sum, the gate, and exact figures for the log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from covo_rl.types import RewardTable

if TYPE_CHECKING:
    from covo_rl.rewards.call import Outcome
    from covo_rl.rewards.scoring import Component


def make_table(
    terms: Sequence[Component], outcomes: Sequence[Outcome], prompts: int, gate: str = "none"
) -> RewardTable:
    """Raw components (P, G, R), their weighted sum (P, G).

    A missing component adds nothing to the sum; a rollout without any is NaN. With a gate the other components count
    only where the gate's component is 1; `rewards_PGR` stays raw.
    """
    names = tuple(term.name for term in terms)
    rewards_RN = np.array([outcome.scores for outcome in outcomes], dtype=np.float64)
    rollouts = rewards_RN.shape[1] // max(prompts, 1)
    rewards_PGR = rewards_RN.reshape(len(terms), prompts, rollouts).transpose(1, 2, 0)
    weights_R = np.array([term.weight for term in terms], dtype=np.float64)
    rewards_PG = weighted_sum(rewards_PGR, weights_R, names.index(gate) if gate != "none" else None)
    missing = {
        (index // rollouts, index % rollouts, term.name): why
        for term, outcome in zip(terms, outcomes, strict=True)
        for index, why in outcome.missing.items()
    }
    metrics: dict[str, float] = {}
    for outcome in outcomes:
        metrics |= outcome.metrics
    metrics |= figures(names, rewards_PGR, rewards_PG)
    seconds = {term.name: outcome.seconds for term, outcome in zip(terms, outcomes, strict=True)}
    extras = {name: values for outcome in outcomes for name, values in outcome.extras.items()}
    return RewardTable(names, weights_R, rewards_PGR, rewards_PG, missing, seconds, metrics, extras)


def weighted_sum(rewards_PGR: np.ndarray, weights_R: np.ndarray, gate: int | None = None) -> np.ndarray:
    """(P, G) sum over the graded components; NaN where none is graded."""
    weighted = rewards_PGR * weights_R
    if gate is not None:
        closed = rewards_PGR[..., gate] != 1  # an ungradeable gate is closed
        others = np.arange(len(weights_R)) != gate
        weighted = np.where(closed[..., None] & others, np.where(np.isnan(weighted), np.nan, 0.0), weighted)
    total = np.nansum(weighted, axis=-1)
    return np.where(np.isnan(rewards_PGR).all(axis=-1), np.nan, total)


def figures(names: Sequence[str], rewards_PGR: np.ndarray, rewards_PG: np.ndarray) -> dict[str, float]:
    """`rewards/NAME/mean`, `/std` (over graded scores, n in the denominator), `/none` (share), and the total's."""
    result = {}
    columns = {name: rewards_PGR[..., r] for r, name in enumerate(names)} | {"total": rewards_PG}
    for name, values in columns.items():
        graded = values[np.isfinite(values)]
        if graded.size:
            result |= {f"rewards/{name}/mean": float(graded.mean()), f"rewards/{name}/std": float(graded.std())}
        result[f"rewards/{name}/none"] = 1.0 - graded.size / max(values.size, 1)
    if "accuracy" in names:
        result["rewards/wrong_outranks_right"] = wrong_outranks_right(
            rewards_PGR[..., names.index("accuracy")], rewards_PG
        )
    return result


def wrong_outranks_right(accuracy_PG: np.ndarray, rewards_PG: np.ndarray) -> float:
    """Share of (right, wrong) pairs of one prompt in which the wrong one has the higher total.

    >>> wrong_outranks_right(np.array([[1.0, 0.0, 0.0]]), np.array([[2.0, 3.0, 1.0]]))
    0.5
    """
    pairs = higher = 0
    for accuracy_G, rewards_G in zip(accuracy_PG, rewards_PG, strict=True):
        right, wrong = rewards_G[accuracy_G == 1], rewards_G[accuracy_G == 0]
        pairs += right.size * wrong.size
        higher += int((wrong[None, :] > right[:, None]).sum())
    return higher / pairs if pairs else 0.0
