"""Groups -> RewardTable: all components at once, every failure explained; the weighted sum, the gate, the figures."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from covo_rl.config import ConfigError, RewardConfig, number_map
from covo_rl.rewards.call import Outcome
from covo_rl.rewards.columns import reward_columns
from covo_rl.rewards.functions import FunctionReward
from covo_rl.rewards.specs import Reward, RewardError
from covo_rl.rewards.worker import reward_of, run_components
from covo_rl.types import Group, RewardTable, shown, visible

logger = logging.getLogger("covo_rl.rewards")
WINDOW = 10  # steps over which failures are judged
RESERVED = ("total",)  # a component's figures stand beside those of the sum
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

    @property
    def reads_whole(self) -> bool:
        """Whether it takes a whole reply, which then has no blocks, for the answer: `accuracy(part='text')`."""
        return self.reward.source.arguments.get("part") == "text"


def components(rewards: str | Sequence[Any] | Mapping[Any, float]) -> list[Component]:
    """`a,b=0.5`, a list of specs (or of components, as they are), or a mapping spec (or function) -> weight.

    Raises:
        RewardError: nothing given, a reward that cannot be loaded, a weight that is no number, a name that is used
            twice or that means something else in the tables.
    """
    if isinstance(rewards, str | Mapping):
        try:
            numbers = number_map(rewards, what="rewards", default=1.0)
        except ConfigError as error:
            raise RewardError(error.problems[0]) from None
        weights: Any = list(zip(rewards if isinstance(rewards, Mapping) else numbers, numbers.values(), strict=True))
    else:
        weights = [(spec.reward, spec.weight) if isinstance(spec, Component) else (spec, 1.0) for spec in rewards]
    if not weights:
        raise RewardError("no rewards given; write for example rewards: accuracy,format")
    terms: list[Component] = []
    for spec, weight in weights:
        reward: Any = reward_of(spec) if isinstance(spec, str) else spec
        if not isinstance(reward, Reward):
            if not callable(reward) or isinstance(reward, type):
                raise RewardError(f"reward {shown(spec)}: neither a name nor a function; of a class, give an object")
            reward = FunctionReward(reward)
        terms.append(Component(reward, float(weight)))
        name = terms[-1].name
        if name in RESERVED:
            raise RewardError(f"a reward cannot be named {name!r}, which is the weighted sum: give it another name")
        if name in [term.name for term in terms[:-1]]:
            raise RewardError(f"two rewards are named {name!r}: name each once, or give a function another __name__")
    return terms


def score(
    groups: Sequence[Group], config: RewardConfig | None = None, *, trainer_state: Any = None, rewards: Any = None,
    judge: Any = None, explain: bool = False, group_ids: Sequence[int] | None = None,
) -> RewardTable:  # fmt: skip
    """Score all rollouts of P groups with G rollouts each; groups of one number in `group_ids` are parts of one.

    `rewards` replaces those of `config` and may hold functions; `judge` replaces the one that `config.judge` names.
    `explain`: our own rewards also log a line of reason for each score, as `NAME_reason` (extras).

    Raises:
        RewardError: a reward cannot be loaded, the gate is no component, or a component failed and
            `reward_failure` is "stop".
    """
    config = config or RewardConfig()
    terms = components(rewards if rewards is not None else config.rewards)
    names = [term.name for term in terms]
    if config.reward_gate not in ("none", *names):
        raise RewardError(f"reward_gate {config.reward_gate!r} is not among the rewards: {names}")
    columns = reward_columns(groups, trainer_state, group_ids)
    if judge is not None or config.judge:
        from covo_rl.rewards.judge import judge_from_spec  # urllib takes a while to import

        columns["judge"] = judge_from_spec(config.judge, config.judge_audio) if judge is None else judge
    if config.scorer_model:
        columns["scorer_model"] = config.scorer_model
    if explain:
        columns["explain"] = True
    outcomes = run_components([term.reward for term in terms], columns, config.reward_timeout)
    failures = [outcome.failures for outcome in outcomes if outcome.failures]
    for whys in failures:  # logged once in its wording; the table holds all of them
        if whys[0] not in _reported:
            _reported.add(whys[0])
            logger.warning("%s (%d of %d scores)", visible(whys[0]), len(whys), len(columns["completions"]))
    if failures and config.reward_failure == "stop":
        raise RewardError(f"{failures[0][0]} (reward_failure is stop)")
    return _table(terms, outcomes, len(groups), config.reward_gate)


class Scoring(threading.Thread):
    """`score(...)` under way in a daemon thread, which keeps no process from ending.

    A local judge is waited for here: it shares the device, and its memory, with whatever would go on meanwhile.
    """

    def __init__(self, groups: Sequence[Group], config: RewardConfig | None = None, **options: Any) -> None:
        super().__init__(name="score", daemon=True)
        config = config or RewardConfig()
        self._score = partial(score, groups, config, **options)
        self._result: RewardTable | None = None
        self._error: BaseException | None = None
        self.start()
        if (config.judge or "").startswith("transformers:"):
            self.wait()

    def run(self) -> None:
        try:
            self._result = self._score()
        except BaseException as error:  # whatever it is, it is raised where it is waited for
            self._error = error

    def wait(self) -> None:
        """Until `table` has an answer."""
        while self.is_alive():
            self.join(1.0)  # without a limit, a Ctrl-C that another thread received would not end it

    def table(self) -> RewardTable:
        """Wait for the scores. Raises what `score` raised."""
        self.wait()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result


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
        metrics = beside(metrics, outcome.metrics, name)
        extras = beside(extras, outcome.extras, name)
    table = RewardTable(names, weights_R, rewards_PGR, rewards_PG, missing, seconds, extras=extras, gate=gate)
    return replace(table, metrics=beside(figures(names, rewards_PGR, whole_sums(table)), metrics))


def beside(own: Mapping[str, Any], logged: Mapping[str, Any], prefix: str = "logged") -> dict[str, Any]:
    """`own`, and what rewards logged; where a name is taken, as `prefix/name`: nothing of ours can be forged."""
    return {**own, **{f"{prefix}/{name}" if name in own else name: value for name, value in logged.items()}}


def weighted_sum(rewards_PGR: np.ndarray, weights_R: np.ndarray, gate: int | None = None) -> np.ndarray:
    """(P, G) sums that can be compared within a group: NaN for a rollout that lacks a component which siblings have.

    A missing component is not a zero: such a rollout leaves its group, and siblings do not outrank it for that. A
    component that a whole group lacks leaves the group. A component of weight 0 may be missing. With a gate (an index
    of R) the others count only where the gate's component is 1; without a graded gate there is no sum.
    """
    counted_PGR = np.broadcast_to(weights_R != 0, rewards_PGR.shape).copy()
    if gate is not None:
        counted_PGR &= (rewards_PGR[..., gate] == 1)[..., None]
        counted_PGR[..., gate] = True
    missing_PGR = np.isnan(rewards_PGR)
    nobody_P1R = (missing_PGR | ~counted_PGR).all(axis=1, keepdims=True)
    graded_PG = ~(missing_PGR & counted_PGR & ~nobody_P1R).any(axis=-1) & ~missing_PGR.all(axis=-1)
    if gate is not None:
        graded_PG &= ~missing_PGR[..., gate]
    return np.where(graded_PG, np.nansum(np.where(counted_PGR, rewards_PGR * weights_R, 0.0), axis=-1), np.nan)


def whole_sums(table: RewardTable) -> np.ndarray:
    """(P, G) sums for figures over groups and steps: NaN also where a component failed for a whole group.

    Within the group its sums can be compared; beside others they would show an outage of the judge as a fall.
    """
    sums_PG, gate = table.rewards_PG.copy(), table.gate
    for (p, g, name), why in table.missing.items():
        counted = table.weights_R[table.names.index(name)] and (
            gate in ("none", name) or table.rewards_PGR[p, g, table.names.index(gate)] == 1
        )
        if counted and why.startswith("failed"):
            sums_PG[p, g] = np.nan
    return sums_PG


class FailureWindow:
    """Does a component fail too often? Its share of failed scores, as the mean over the last steps (`WINDOW` at most).

    Steps still to come count as good, and a single step never is too often, unless the limit is 0: an outage passes,
    and with the limit 0.2 a component that always fails is noticed at the third step.
    """

    def __init__(self, limit: float, steps: int = WINDOW) -> None:
        self.limit, self.steps = limit, max(1, min(steps, WINDOW))
        self.shares: dict[str, deque[float]] = {}

    def add(self, tables: Sequence[RewardTable]) -> str:
        """One step, with the tables of all ranks; what is wrong by now, or ""."""
        problems = []
        for r, name in enumerate(tables[0].names):
            failures = [why for table in tables for why in table.failures(name)]
            scores = max(sum(table.rewards_PGR[..., r].size for table in tables), 1)
            shares = self.shares.setdefault(name, deque(maxlen=self.steps))
            shares.append(len(failures) / scores)
            mean = sum(shares) / self.steps
            if failures and mean > self.limit and (sum(map(bool, shares)) > 1 or not self.limit):
                problems.append(
                    f"reward {name}: {len(failures)} of {scores} scores failed, {mean:.0%} over the last {self.steps} "
                    f"steps, above reward_failure_limit {self.limit:g}. The first: {failures[0]}"
                )
        return "; ".join(problems)


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
