"""Groups -> RewardTable: all components at once, every failure explained; the weighted sum, the gate, the figures."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from covo_rl.config import ConfigError, RewardConfig, number_map
from covo_rl.rewards.columns import reward_columns
from covo_rl.rewards.specs import Reward, RewardError, Source, load_reward
from covo_rl.rewards.worker import Outcome, run_components
from covo_rl.types import Group, RewardTable, visible

logger = logging.getLogger("covo_rl.rewards")
_reported: set[str] = set()


@dataclass(frozen=True)
class Component:
    """A term of R_total: a function and its weight."""

    reward: Reward
    weight: float

    @property
    def name(self) -> str:
        """Its name in tables: the spec as it was given."""
        return self.reward.source.spec


def components(rewards: str | Sequence[Any] | Mapping[Any, float]) -> list[Component]:
    """`a,b=0.5`, a list of specs, or a mapping spec (or function) -> weight.

    Raises:
        RewardError: nothing given, or a reward that cannot be loaded.
    """
    weights: Any = rewards
    if isinstance(rewards, str | Mapping):
        try:
            numbers = number_map(rewards, what="rewards", default=1.0)
        except ConfigError as error:
            raise RewardError(error.problems[0]) from None
        weights = dict(zip(rewards, numbers.values(), strict=True)) if isinstance(rewards, Mapping) else numbers
    if not isinstance(weights, Mapping):
        weights = dict.fromkeys(weights, 1.0)
    if not weights:
        raise RewardError("no rewards given; write for example rewards: accuracy,format")
    terms = []
    for spec, weight in weights.items():
        reward: Any = load_reward(spec) if isinstance(spec, str) else spec
        if not isinstance(reward, Reward):
            name = getattr(spec, "__name__", type(spec).__name__)
            reward = Reward(Source(name, name, "object", repr(spec)), reward)
        terms.append(Component(reward, float(weight)))
    return terms


def score(
    groups: Sequence[Group], config: RewardConfig | None = None, *, trainer_state: Any = None, rewards: Any = None,
    judge: Any = None,
) -> RewardTable:  # fmt: skip
    """Score all rollouts of P groups with G rollouts each.

    `rewards` replaces those of `config` and may hold functions; `judge` replaces the one that `config.judge` names.

    Raises:
        RewardError: a reward cannot be loaded, the gate is no component, or a component failed and
            `reward_failure` is "stop".
    """
    config = config or RewardConfig()
    terms = components(rewards if rewards is not None else config.rewards)
    names = [term.name for term in terms]
    if config.reward_gate not in ("none", *names):
        raise RewardError(f"reward_gate {config.reward_gate!r} is not among the rewards: {names}")
    columns = reward_columns(groups, trainer_state)
    if judge is not None or config.judge:
        from covo_rl.rewards.judge import judge_from_spec  # urllib takes a while to import

        columns["judge"] = judge_from_spec(config.judge) if judge is None else judge
    outcomes = run_components([term.reward for term in terms], columns, config.reward_timeout)
    failures = [outcome.failures for outcome in outcomes if outcome.failures]
    for whys in failures:  # logged once in its wording; the table holds all of them
        if whys[0] not in _reported:
            _reported.add(whys[0])
            logger.warning("%s (%d of %d scores)", visible(whys[0]), len(whys), len(columns["completions"]))
    if failures and config.reward_failure == "stop":
        raise RewardError(f"{failures[0][0]} (reward_failure is stop)")
    return _table(terms, outcomes, len(groups), config.reward_gate)


def _table(terms: Sequence[Component], outcomes: Sequence[Outcome], prompts: int, gate: str) -> RewardTable:
    """Raw components (P, G, R), their weighted sum (P, G), and what is missing."""
    names = tuple(term.name for term in terms)
    rewards_RN = np.array([outcome.scores for outcome in outcomes], dtype=np.float64)
    generations = rewards_RN.shape[1] // max(prompts, 1)
    rewards_PGR = rewards_RN.reshape(len(terms), prompts, generations).transpose(1, 2, 0)
    weights_R = np.array([term.weight for term in terms], dtype=np.float64)
    rewards_PG = weighted_sum(rewards_PGR, weights_R, names.index(gate) if gate != "none" else None)
    missing, seconds, metrics, extras = {}, {}, {}, {}
    for name, outcome in zip(names, outcomes, strict=True):
        missing |= {(*divmod(index, generations), name): why for index, why in outcome.missing.items()}
        seconds[name] = outcome.seconds
        metrics |= outcome.metrics
        extras |= outcome.extras
    metrics |= figures(names, rewards_PGR, rewards_PG)
    return RewardTable(names, weights_R, rewards_PGR, rewards_PG, missing, seconds, metrics, extras)


def weighted_sum(rewards_PGR: np.ndarray, weights_R: np.ndarray, gate: int | None = None) -> np.ndarray:
    """(P, G) sum over the graded components; a missing one adds nothing, and NaN where none is graded.

    With a gate (an index of R) the other components count only where the gate's component is 1.
    """
    weighted = rewards_PGR * weights_R
    if gate is not None:
        closed = rewards_PGR[..., gate] != 1  # an ungradeable gate is closed
        weighted[closed[..., None] & (np.arange(len(weights_R)) != gate)] = 0.0
    return np.where(np.isnan(rewards_PGR).all(axis=-1), np.nan, np.nansum(weighted, axis=-1))


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
        result["rewards/wrong_outranks_right"] = wrong_outranks_right(columns["accuracy"], rewards_PG)
    return result


def wrong_outranks_right(accuracy_PG: np.ndarray, rewards_PG: np.ndarray) -> float:
    """Share of (right, wrong) pairs of one prompt in which the wrong one has the higher total.

    >>> wrong_outranks_right(np.array([[1.0, 0.0, 0.0]]), np.array([[2.0, 3.0, 1.0]]))
    0.5
    """
    pairs_PGG = (accuracy_PG == 1)[:, :, None] & (accuracy_PG == 0)[:, None, :]
    higher_PGG = rewards_PG[:, :, None] < rewards_PG[:, None, :]
    return float((pairs_PGG & higher_PGG).sum() / pairs_PGG.sum()) if pairs_PGG.any() else 0.0
