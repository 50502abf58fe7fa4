"""Groups -> RewardTable: all components at once, each with its time limit, every failure caught and explained.

Our own rewards run in daemon threads. Plugins run in worker processes that are killed when their time is over, so
that no plugin can hold up a rank while the others wait; `my_function.isolation = "thread"` opts out, for a function
that needs live objects of this process.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from covo_rl.config import RewardConfig
from covo_rl.rewards.call import Outcome, call
from covo_rl.rewards.columns import TrainerState, from_groups
from covo_rl.rewards.specs import Reward, RewardError, Source, load_reward
from covo_rl.rewards.table import make_table
from covo_rl.rewards.worker import LOAD_SECONDS, Worker

if TYPE_CHECKING:
    from covo_rl.types import Group, RewardTable

logger = logging.getLogger("covo_rl.rewards")
_IN_PROCESS = ("trl", "covo_rl")
_workers: dict[str, Worker] = {}


@dataclass(frozen=True)
class Component:
    """A term of R_total: its name in tables (the spec as it was given), its function and its weight."""

    name: str
    reward: Reward
    weight: float


def components(rewards: str | Mapping[str, float] | Sequence[str] | Mapping[Any, float]) -> list[Component]:
    """`a,b=0.5`, a list of specs, or a mapping spec (or function) -> weight.

    Raises:
        RewardError: nothing given, or a reward that cannot be loaded.
    """
    if isinstance(rewards, str):
        weights: Mapping[Any, float] = dict(_split(rewards))
    elif isinstance(rewards, Mapping):
        weights = {spec: float(w) for spec, w in rewards.items()}
    else:
        weights = dict.fromkeys(rewards, 1.0)
    if not weights:
        raise RewardError("no rewards given; write for example rewards: accuracy,format")
    return [Component(*_named(spec), weight) for spec, weight in weights.items()]


def _split(text: str) -> list[tuple[str, float]]:
    """Like config.number_map, but commas and equal signs inside brackets belong to arguments."""
    parts, depth = [""], 0
    for ch in text:
        depth += (ch == "(") - (ch == ")")
        if ch == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += ch
    result = []
    for part in (p.strip() for p in parts if p.strip()):
        bracket = part.rfind(")")
        name, _, number = part.rpartition("=") if "=" in part[bracket + 1 :] else (part, "", "1")
        try:
            result.append((name.strip(), float(number)))
        except ValueError:
            raise RewardError(f"rewards: cannot read the weight in {part!r}; write name=number") from None
    return result


def _named(spec: Any) -> tuple[str, Reward]:
    if isinstance(spec, str):
        return spec, load_reward(spec)
    if isinstance(spec, Reward):
        return spec.source.spec, spec
    name = getattr(spec, "__name__", type(spec).__name__)
    return name, Reward(Source(name, name, "object", repr(spec), name, {}), spec)


def score(
    groups: Sequence[Group],
    config: RewardConfig | None = None,
    *,
    trainer_state: Any = None,
    rewards: Any = None,
    judge: Any = None,
) -> RewardTable:
    """Score all rollouts of P groups with G rollouts each.

    `rewards` replaces those of `config` and may hold functions; `judge` replaces the one that `config.judge` names.

    Raises:
        RewardError: a reward cannot be loaded, the gate is no component, or a component failed and
            `reward_failure` is "stop".
    """
    config = config or RewardConfig()
    terms = components(rewards if rewards is not None else config.rewards)
    if config.reward_gate != "none" and config.reward_gate not in [term.name for term in terms]:
        raise RewardError(f"reward_gate {config.reward_gate!r} is not among the rewards: {[t.name for t in terms]}")
    columns: dict[str, Any] = dict(from_groups(groups))
    n = len(columns["completions"])
    columns["trainer_state"] = TrainerState(trainer_state)
    if judge is None and config.judge:
        from covo_rl.rewards.judge import judge_from_spec

        judge = judge_from_spec(config.judge)
    if judge is not None:
        columns["judge"] = judge
    outcomes = run_components(terms, columns, n, config.reward_timeout)
    _report(outcomes)
    if config.reward_failure == "stop":
        for outcome in outcomes:
            if failure := next((why for why in outcome.missing.values() if why.startswith("failed")), None):
                raise RewardError(f"{failure} (reward_failure is stop)")
    return make_table(terms, outcomes, len(groups), config.reward_gate)


def run_components(terms: Sequence[Component], columns: dict[str, Any], n: int, timeout: float) -> list[Outcome]:
    """One outcome per component, in order, after at most `timeout` seconds each (all run at the same time)."""
    jobs = [_Job(term, columns, n) for term in terms]
    for job in jobs:
        job.start()
    return [job.wait(timeout) for job in jobs]


class _Job:
    """One component in a daemon thread, which for plugins only talks to a worker process."""

    def __init__(self, term: Component, columns: dict[str, Any], n: int) -> None:
        self.term, self.columns, self.n = term, columns, n
        self.outcome: Outcome | None = None
        self.loaded, self.done = threading.Event(), threading.Event()
        self.worker = worker_for(term.reward)
        self.begun = time.perf_counter()

    def start(self) -> None:
        threading.Thread(target=self._run, name=f"reward {self.term.name}", daemon=True).start()

    def _run(self) -> None:
        try:
            if self.worker is not None:
                self.outcome = self.worker.call(self.columns, self.n, self.loaded)
            else:
                self.loaded.set()
                self.outcome = call(self.term.reward, self.columns, self.n)
        finally:
            self.loaded.set()
            self.done.set()

    def wait(self, timeout: float) -> Outcome:
        ready = self.loaded.wait(max(self.begun + LOAD_SECONDS - time.perf_counter(), 0))
        begun = time.perf_counter() if self.worker is not None else self.begun
        finished = ready and self.done.wait(max(begun + timeout - time.perf_counter(), 0))
        seconds = time.perf_counter() - self.begun
        if finished and self.outcome is not None:
            return self.outcome
        if self.worker is not None:
            self.worker.kill()
        what = "did not load" if not ready else "gave no result" if finished else "was stopped"
        limit = LOAD_SECONDS if not ready else timeout
        return Outcome.failed(self.n, f"{self.term.name} {what} after {limit:g} s", seconds)


def worker_for(reward: Reward) -> Worker | None:
    """The process that this reward runs in, or None if it runs in a thread."""
    target: Callable[..., Any] = getattr(reward.function, "func", reward.function)
    module = (getattr(target, "__module__", None) or type(target).__module__).split(".")[0]
    in_thread = getattr(reward.function, "isolation", None) == "thread"
    if reward.source.place == "object" or reward.source.trusted or module in _IN_PROCESS or in_thread:
        return None
    return _workers.setdefault(reward.source.spec, Worker(reward.source.spec))


def close() -> None:
    """End all worker processes."""
    while _workers:
        _workers.popitem()[1].kill()


_reported: set[str] = set()


def _report(outcomes: Sequence[Outcome]) -> None:
    """Every failure is logged once in its wording; the table holds all of them."""
    for outcome in outcomes:
        failures = [why for why in outcome.missing.values() if why.startswith("failed")]
        if failures and failures[0] not in _reported:
            _reported.add(failures[0])
            logger.warning("%s (%d of %d scores)", failures[0], len(failures), len(outcome.scores))
