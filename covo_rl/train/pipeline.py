"""Rollouts of a step's rows: asked of an engine, under way, here; one step ahead where `rollout_ahead` says so.

collect(k)               sampled by the policy before the last update
sync, submit(k + 1)      runs beside everything below
rewards, old pass, update
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from covo_rl.config import Options
from covo_rl.data.terminal import say
from covo_rl.engines.base import EngineError, EngineLost, Failed, Pending, RolloutEngine
from covo_rl.engines.own import OwnEngine
from covo_rl.records.steps import Clock
from covo_rl.train.batch import hash_seed
from covo_rl.train.checkpoint.state import pack_groups, unpack_groups
from covo_rl.train.guard import SIGNAL_PATIENCE, StopSignals, TrainingStopped, memory_explained, sampling_advice
from covo_rl.train.ranks import Ranks
from covo_rl.train.rows import TrainingRows
from covo_rl.types import Example, Group, Prompt, visible


@dataclass
class Order:
    """Rollouts that a step needs, of `rows` (those of all ranks), of which this rank samples `share`.

    Without `pending` and `groups` they are still to be asked for. `version` is the policy they were asked of, `times`
    when they were begun and done, `figures` what they add to the step's metrics.
    """

    step: int
    rows: list[Example]
    share: list[Example]
    attempt: int = 0
    prompts: list[Prompt] = field(default_factory=list)
    pending: Pending | None = None
    groups: list[Group] | None = None
    version: int = 0
    times: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


class Pipeline:
    """An engine and what it was asked for. Every method is a collective; an engine that fails on one rank has failed
    on all.

    `prompts_of` builds the prompts of an order's share. `idle` is what a rank without any samples, where ranks that
    share out the parameters sample together.
    """

    def __init__(
        self, engine: RolloutEngine, options: Options, ranks: Ranks, prompts_of: Callable[[Order], list[Prompt]],
        idle: Prompt | None,
    ) -> None:  # fmt: skip
        self.engine, self.options, self.ranks = engine, options, ranks
        self.prompts_of, self.idle = prompts_of, idle
        self.in_line = isinstance(engine, OwnEngine)  # nobody waits for it: its work is in the seconds of the step
        self.orders: list[Order] = []  # of this step, until its batch is made, and of the next
        self.version: int | None = None
        self.sent: dict[str, float] = {}  # how the last sync went
        self.stop = StopSignals()  # which nobody sends, until a run listens for them
        self._done: float | None = None  # since when the engine has nothing to do

    def sync(self, version: int, clock: Clock) -> None:
        """From now on the engine samples with the policy as it is, which is called `version`."""
        if version != self.version:
            report = self.ranks.together(lambda: self.engine.sync(version), EngineError)
            figures = {"engine/probe_abs": report.probe_abs, "engine/lora_rounding": report.rounding}
            self.version, self.sent = version, {name: value for name, value in figures.items() if value is not None}
            for phase, seconds in report.seconds.items():
                clock.add(f"sync_{phase}", seconds)

    def submit(self, order: Order, version: int, clock: Clock) -> None:
        """Ask for the rollouts, of the policy as it is, unless they are asked for already."""
        if order.pending is not None or order.groups is not None:
            return
        self.sync(version, clock)
        with clock("prompt"):
            order.prompts = self.prompts_of(order)
        rollout, seed = self.options.rollout, hash_seed(self.options.train.seed, order.step, order.attempt)
        prompts = order.prompts or ([self.idle] if self.idle else [])
        order.version, order.times = version, {"begun": time.perf_counter()}
        with memory_explained(sampling_advice(len(order.prompts), rollout)):
            pending: Pending = self.ranks.together(
                lambda: self.engine.submit(prompts, rollout, seed=seed, generations=rollout.num_generations),
                EngineError,
            )
        order.pending, order.times["idle"] = pending, order.times["begun"] - (self._done or order.times["begun"])
        if isinstance(pending.work, Future):
            pending.work.add_done_callback(lambda _: order.times.setdefault("done", time.perf_counter()))

    def collect(self, order: Order, clock: Clock) -> list[Group]:
        """The rollouts of an order; waits for them.

        Raises:
            EngineLost: nothing answers any more; the order is to be asked for anew.
            EngineError: what came is not of this policy.
            TrainingStopped: more groups failed than `failed_groups_limit` allows.
        """
        if order.pending is not None:
            pending, order.pending, start = order.pending, None, time.perf_counter()
            with memory_explained(sampling_advice(len(order.prompts), self.options.rollout)):
                groups, failed = self.ranks.together(lambda: self._collected(pending), EngineError)
            order.times["waited"] = time.perf_counter() - start
            self._done = order.times.setdefault("done", time.perf_counter())
            order.groups, figures = groups[: len(order.prompts)], self.engine.metrics()
            for name, value in figures.items():
                if name.endswith("_s"):
                    clock.add(name.removesuffix("_s"), value)
            order.figures = {f"engine/{name}": value for name, value in figures.items() if not name.endswith("_s")}
            order.figures |= {} if self.in_line else self._figures(order, failed)
        assert order.groups is not None
        return order.groups

    def _collected(self, pending: Pending) -> tuple[list[Group], tuple[Failed, ...]]:
        """Waits no longer than that where a signal comes: launchers kill soon after it, and rows can be kept."""
        while not pending.ready(0.5):
            if self.stop.received and not pending.ready(SIGNAL_PATIENCE):
                raise EngineLost(f"{self.stop.received} came before the rollouts")
        return self.engine.collect(pending), tuple(self.engine.failed)

    def _figures(self, order: Order, failed: Sequence[Failed]) -> dict[str, float]:
        """Over all ranks; stops the run where too many groups failed."""
        times, groups = order.times, order.groups or []
        tokens = sum(len(rollout.completion_ids) for group in groups for rollout in group.rollouts)
        busy = times["done"] - times["begun"]
        parts = self.ranks.gathered((len(order.prompts), tokens, busy, times["waited"], times["idle"], failed))
        counts, tokens, busy, waited, idle, failures = zip(*parts, strict=True)
        asked, failures = sum(counts), [one for part in failures for one in part]
        limit = self.options.engine.failed_groups_limit
        if order.attempt:  # rows in the places of others: a few of the step, which goes on without them
            asked = self.options.train.prompts_per_step
        if len(failures) > limit * asked or 0 < len(failures) == asked:
            raise TrainingStopped(
                f"step {order.step}: {len(failures)} of {asked} groups could not be sampled, above failed_groups_limit "
                f"{limit}. The first: row {visible(failures[0].row)}: {visible(failures[0].reason)}"
            )
        return {
            "engine/tokens": sum(tokens),
            "engine/tokens_per_s": sum(tokens) / max(*busy, 1e-9),
            "engine/failed_groups": len(failures),
            "time/idle_trainer": max(waited),
            "time/idle_engine": max(idle),
            **self.sent,
        }

    # -- in a checkpoint -----------------------------------------------------------------------------------------

    def settle(self, patience: float | None) -> None:
        """Wait for the rollouts under way, with `patience` at most so many seconds.

        An order whose rollouts do not come is in a checkpoint as its rows alone: a resumed run asks for them anew.
        """
        for order in self.orders:
            late = order.pending is not None and patience is not None and not order.pending.ready(patience)
            try:
                if any(self.ranks.gathered(late)):
                    raise EngineLost(f"not there within {patience:g} s")
                if order.pending is not None:
                    self.collect(order, Clock())
            except EngineLost as lost:
                if self.ranks.main:
                    say(f"step {order.step}: the checkpoint holds its rows without rollouts: {lost}", err=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """The rows that were taken for each order, of all ranks, and their groups where they are here."""
        return [
            {"step": order.step, "rows": [row.id for row in order.rows], "version": order.version,
             "groups": None if order.groups is None else self.ranks.joined(pack_groups(order.groups)),
             "figures": order.figures}
            for order in self.orders
        ]  # fmt: skip

    def load_state_dict(self, state: Sequence[Mapping[str, Any]], rows: TrainingRows) -> None:
        """This rank's share of the orders and of their groups, by whatever ranks they were saved."""
        self.orders = []
        for saved in state:
            every = [rows.by_id[name] for name in saved["rows"]]
            order = Order(
                saved["step"], every, rows.share(every), version=saved["version"], figures=dict(saved["figures"])
            )
            if saved["groups"] is not None:
                here, groups = set(rows.share(range(len(every)))), iter([*saved["groups"], None])
                following, packed = next(groups), []
                for place, row in enumerate(every):  # groups are in the order of the rows; of some there is none
                    if following is not None and following["example"] == row.id:
                        packed += [following] if place in here else []
                        following = next(groups)
                order.groups = unpack_groups(packed, lambda name: rows.prompt(rows.by_id[name]))
            self.orders.append(order)
