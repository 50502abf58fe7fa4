"""Rewards -> advantages. Pure, numpy only, float64.

A rollout's advantage is its reward minus the mean of its group, divided (by default) by the group's sample standard
deviation plus 1e-4, as in GRPO (arXiv 2402.03300) and with TRL's options and numbers. What is not gradeable (NaN) or
infinite is left out of every statistic and gets advantage 0; a group without variance teaches nothing and is counted.

`scale_rewards: batch` and `component_advantages` use statistics of the whole batch: with several ranks gather
`rewards_PG` and `rewards_PGR` first (`concatenated`), and take the rank's own rows of the result (`Advantages.part`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from covo_rl.config import LossConfig
from covo_rl.types import RewardTable

STD_EPS = 1e-4
#: a standard deviation below this is rounding: the group has no variance
ZERO_STD = 1e-8


@dataclass(frozen=True)
class Advantages:
    """`advantages_PG` (P, G) float64, 0 where nothing was gradeable; `informative_P` (P,) bool: group has variance.

    `rewards_PG` (P, G) are the rewards that were used, over-long penalty included, NaN where not gradeable.
    `statistics` are numbers for the log: reward, reward_std, frac_reward_zero_std, groups_without_variance,
    rewards_missing, rewards_infinite, overlong_penalty.
    """

    advantages_PG: np.ndarray
    informative_P: np.ndarray
    rewards_PG: np.ndarray
    statistics: Mapping[str, float]

    def part(self, groups: slice) -> Advantages:
        """Only these groups; the statistics stay those of the whole batch."""
        return Advantages(
            self.advantages_PG[groups], self.informative_P[groups], self.rewards_PG[groups], self.statistics
        )


def concatenated(tables: Sequence[RewardTable]) -> RewardTable:
    """The tables of all ranks, in rank order, as one (numbers only; the reasons of missing entries stay behind).

    A table without groups, of a rank that had none, does not know G; it is left out.
    """
    tables = [table for table in tables if len(table.rewards_PG)] or tables[:1]
    return RewardTable(
        names=tables[0].names,
        weights_R=tables[0].weights_R,
        rewards_PGR=np.concatenate([table.rewards_PGR for table in tables]),
        rewards_PG=np.concatenate([table.rewards_PG for table in tables]),
        gate=tables[0].gate,
    )


def advantages(
    table: RewardTable,
    config: LossConfig,
    *,
    lengths_PG: np.ndarray | None = None,
    max_completion_length: int | None = None,
) -> Advantages:
    """Advantages of all groups in `table`.

    With `config.overlong_buffer` the soft over-long penalty is added to the reward (as one more component of weight 1
    with `component_advantages`); it needs `lengths_PG` in tokens and `max_completion_length`.

    Raises:
        ValueError: the penalty is on and lengths are missing, shapes disagree, or `scale_rewards` is unknown.
    """
    rewards_PG = np.array(table.rewards_PG, dtype=np.float64)
    rewards_PGR = np.array(table.rewards_PGR, dtype=np.float64)
    weights_R = np.asarray(table.weights_R, dtype=np.float64)
    if rewards_PG.ndim != 2 or rewards_PGR.shape != (*rewards_PG.shape, len(weights_R)):
        raise ValueError(f"rewards_PG {rewards_PG.shape}, rewards_PGR {rewards_PGR.shape}, weights {weights_R.shape}")
    infinite = np.isinf(rewards_PG) | np.isinf(rewards_PGR).any(axis=-1)
    rewards_PG[infinite] = np.nan
    rewards_PGR[np.isinf(rewards_PGR)] = np.nan
    penalty_PG = np.zeros_like(rewards_PG)
    if config.overlong_buffer:
        if lengths_PG is None or max_completion_length is None:
            raise ValueError("overlong_buffer is on: give lengths_PG and max_completion_length")
        penalty_PG = overlong_penalty(lengths_PG, max_completion_length, config.overlong_buffer)
        rewards_PG = rewards_PG + penalty_PG
    if config.component_advantages:
        if config.overlong_buffer:
            gradeable_PG = np.where(np.isnan(rewards_PG), np.nan, penalty_PG)
            rewards_PGR = np.concatenate([rewards_PGR, gradeable_PG[..., None]], axis=-1)
            weights_R = np.append(weights_R, 1.0)
        rewards_PGR[np.isnan(rewards_PG)] = np.nan
        result_PG, informative_P = by_component(rewards_PGR, weights_R)
    else:
        result_PG, informative_P = by_sum(rewards_PG, config.scale_rewards)
    statistics = _statistics(rewards_PG, informative_P, infinite)
    if config.overlong_buffer:
        statistics["overlong_penalty"] = float(penalty_PG.mean())
    return Advantages(result_PG, informative_P, rewards_PG, statistics)


def by_sum(rewards_PG: np.ndarray, scale_rewards: str) -> tuple[np.ndarray, np.ndarray]:
    """(P, G) rewards, NaN where not gradeable -> (advantages_PG, informative_P); TRL's `sum_then_normalize`.

    [0, 0, 1, 1] has mean 0.5 and sample deviation 0.5774: advantages -0.8659, -0.8659, 0.8659, 0.8659.
    """
    centred_PG = rewards_PG - nan_mean(rewards_PG, axis=1)
    std_P1 = nan_std(rewards_PG, axis=1)
    informative_P = std_P1[:, 0] > ZERO_STD
    if scale_rewards == "group":
        result_PG = centred_PG / (std_P1 + STD_EPS)
    elif scale_rewards == "batch":
        result_PG = centred_PG / (nan_std(rewards_PG, axis=None) + STD_EPS)
    elif scale_rewards == "none":
        result_PG = centred_PG
    else:
        raise ValueError(f"scale_rewards {scale_rewards!r}: choose group, batch or none")
    return _finish(result_PG, informative_P), informative_P


def by_component(rewards_PGR: np.ndarray, weights_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Normalise each component in its group, sum with weights, normalise over the batch.

    GDPO (arXiv 2601.05242), TRL's `normalize_then_sum`: a component with little spread counts as much as one with
    much. A component that is not gradeable for a rollout contributes nothing to it.
    """
    unscorable_PG = np.isnan(rewards_PGR).all(axis=-1)
    normalised_PGR = (rewards_PGR - nan_mean(rewards_PGR, axis=1)) / (nan_std(rewards_PGR, axis=1) + STD_EPS)
    sum_PG = np.nansum(normalised_PGR * weights_R, axis=-1)
    sum_PG[unscorable_PG] = np.nan
    informative_P = nan_std(sum_PG, axis=1)[:, 0] > ZERO_STD
    result_PG = (sum_PG - nan_mean(sum_PG, axis=None)) / (nan_std(sum_PG, axis=None) + STD_EPS)
    return _finish(result_PG, informative_P), informative_P


def overlong_penalty(lengths: np.ndarray, max_completion_length: int, buffer: int) -> np.ndarray:
    """Soft over-long penalty in [-1, 0], DAPO eq. 13 (arXiv 2503.14476): a ramp over the last `buffer` tokens.

    Limit 100, buffer 20: 80 tokens cost 0, 90 cost -0.5, 100 cost -1. `buffer` 0 means no ramp: 0 up to the limit.
    """
    lengths = np.asarray(lengths, dtype=np.float64)
    excess = lengths - (max_completion_length - buffer)
    ramp = -np.clip(excess, 0, None) / buffer if buffer else np.zeros_like(lengths)
    return np.where(lengths > max_completion_length, -1.0, ramp)


def nan_mean(values: np.ndarray, axis: int | None) -> np.ndarray:
    """Mean without NaN along `axis`, axis kept; NaN where nothing is left (numpy would warn)."""
    counted = ~np.isnan(values)
    count = counted.sum(axis=axis, keepdims=True)
    total = np.where(counted, values, 0.0).sum(axis=axis, keepdims=True)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def nan_std(values: np.ndarray, axis: int | None) -> np.ndarray:
    """Sample standard deviation (divisor n - 1) without NaN, axis kept; NaN where fewer than two values are left."""
    count = (~np.isnan(values)).sum(axis=axis, keepdims=True)
    squares = nan_mean((values - nan_mean(values, axis)) ** 2, axis)
    return np.where(count > 1, np.sqrt(squares * count / np.maximum(count - 1, 1)), np.nan)


def _finish(result_PG: np.ndarray, informative_P: np.ndarray) -> np.ndarray:
    """Exact zeros for what is not gradeable and for groups whose spread is only rounding."""
    return np.where(informative_P[:, None], np.nan_to_num(result_PG, nan=0.0), 0.0)


def _statistics(rewards_PG: np.ndarray, informative_P: np.ndarray, infinite_PG: np.ndarray) -> dict[str, float]:
    groups = len(informative_P)
    without = groups - int(informative_P.sum())
    return {
        "reward": nan_mean(rewards_PG, axis=None).item(),
        "reward_std": nan_std(rewards_PG, axis=None).item(),
        "frac_reward_zero_std": without / groups if groups else 0.0,
        "groups_without_variance": float(without),
        "rewards_missing": float(np.isnan(rewards_PG).sum()),
        "rewards_infinite": float(infinite_PG.sum()),
    }
