"""The GRPO loop: rows -> prompts -> groups of rollouts -> rewards -> advantages -> update -> the next policy.

`Trainer.train_step` is the whole of it; everything below that method hangs on one of its lines. Groups stay whole on
one rank. Loss normalisers are global counts, so the number of ranks and of micro-batches changes the memory, not the
gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from covo_rl.algo.advantage import Advantages, advantages, concatenated
from covo_rl.algo.correction import MISMATCH
from covo_rl.audio import ClipStore
from covo_rl.config import Options
from covo_rl.engines.base import EngineLost, RolloutEngine
from covo_rl.engines.own import OwnEngine
from covo_rl.policy import Policy
from covo_rl.policy.prefetch import Prefetch
from covo_rl.records.steps import Clock, StepShare, step_metrics
from covo_rl.rewards import RewardError, Scoring, components
from covo_rl.rewards.scoring import FailureWindow
from covo_rl.train.batch import Batch, hash_seed, refill
from covo_rl.train.checkpoint.saver import Saver
from covo_rl.train.guard import TrainingStopped
from covo_rl.train.launch import join
from covo_rl.train.learner import Learner
from covo_rl.train.pipeline import Order, Pipeline
from covo_rl.train.ranks import Ranks
from covo_rl.train.rows import TrainingRows
from covo_rl.train.sampler import share
from covo_rl.types import Example, Group, Prompt, RewardTable, Rollout

#: waits for the scores of all groups of this rank; a collective, so that an error on one rank is one on all
Scores = Callable[[], RewardTable]


class Trainer:
    """GRPO over a policy. `run` calls `on_step(metrics, batch)` after every step.

    Between two optimiser updates its state is: the counters of `state_dict`, and while a generated batch is in use
    that `batch`, with `update_index` of its updates done. A checkpoint can be taken at any such moment.
    """

    def __init__(
        self,
        options: Options,
        policy: Policy,
        clips: ClipStore,
        examples: Sequence[Example],
        accelerator: Accelerator | None = None,
        engine: RolloutEngine | None = None,
    ) -> None:
        self.options, self.policy, self.clips = options, policy, clips
        self.accelerator = accelerator or join()
        self.device: torch.device = self.accelerator.device
        self.ranks = Ranks(self.accelerator.process_index, self.accelerator.num_processes)
        self.rows = TrainingRows(examples, options, policy.family, clips, self.ranks)
        self.sampler = self.rows.sampler
        self.step = 0
        self.batch: Batch | None = None
        self.update_index = 0
        self.update_totals: dict[str, float] = {}
        self.terms = components(options.reward.rewards)  # once: a file that is edited meanwhile changes nothing
        self.prefetch = Prefetch(policy.store, active=self.device.type != "cpu")  # on a CPU nothing would wait less
        self.reward_failures = FailureWindow(options.reward.reward_failure_limit, options.train.max_steps)
        end = Rollout((policy.family.eos_token_ids[0],), (0.0,), "", "stop")
        idle_group = Group(self.prompt_of(examples[0].id), (end,))
        self.learner = self.new_learner(idle_group)
        self.optimizer, self.schedule, self.guard = self.learner.optimizer, self.learner.schedule, self.learner.guard
        self.engine: RolloutEngine = engine or OwnEngine(
            policy,
            self.learner.wrapped if self.learner.sharded else None,  # DDP's hooks have nothing to add to sampling
            # FSDP's mixed precision leaves float32 weights where the policy looks
            full_precision=self.accelerator.mixed_precision == "no",
            keep_prompts=self.learner.needs_old_logps,
            ahead=bool(options.engine.rollout_ahead),
        )
        together = idle_group.prompt if self.learner.sharded and engine is None else None
        self.pipeline = Pipeline(self.engine, options, self.ranks, self.ordered_prompts, together)
        self.figures: dict[str, float] = {}  # of the batch's rollouts

    def new_learner(self, idle_group: Group) -> Learner:
        """What owns the gradient."""
        return Learner(self.options, self.policy, self.accelerator, idle_group)

    def run(
        self, on_step: Callable[[dict[str, Any], Batch], float | None] | None = None, saver: Saver | None = None
    ) -> None:
        """Train until `max_steps`. `saver` writes checkpoints between updates, after steps, and at the end.

        What `on_step` returns, if anything, is the step's score for `keep_best`: higher is better.

        Raises:
            StoppedBySignal: a signal came, or no engine answers any more, and a checkpoint was saved.
        """
        self.pipeline.stop = saver.stop if saver else self.pipeline.stop
        self.engine.rest()  # whatever it was used for before, its memory is the update's
        with closing(self.prefetch):
            while self.step < self.options.train.max_steps:
                try:
                    metrics, batch = self.train_step(saver)
                    step_score = on_step(metrics, batch) if on_step else None
                except EngineLost as lost:
                    if saver is None:
                        raise
                    raise saver.stopped(self, f"the loss of the engine ({lost})") from lost
                if saver:
                    saver.after_step(self, step_score)
        if saver:
            saver.finish(self)

    def sync(self) -> None:
        """Have the engine sample with the policy as it is, for an evaluation between steps."""
        self.pipeline.sync(self.learner.applied, Clock())

    # -- the arrow -----------------------------------------------------------------------------------------------

    def train_step(self, saver: Saver | None = None) -> tuple[dict[str, Any], Batch]:
        """One generated batch and all its optimiser updates, or what is left of them after a resume."""
        clock = Clock()
        with self.policy.embedder.placed():
            if self.batch is None:
                self.batch = self.generate(clock)
            with clock("update"):
                self.update(self.batch, saver)
        batch, update = self.batch, self.update_means()
        self.batch, self.update_index, self.update_totals = None, 0, {}
        self.step += 1
        return self.metrics(batch, update, clock), batch

    def update_means(self) -> dict[str, float]:
        """Over the updates that are done; how engine and policy differ was measured in the first."""
        return {
            name: total / (1 if name.startswith(MISMATCH) else self.update_index)
            for name, total in self.update_totals.items()
        }

    def generate(self, clock: Clock | None = None) -> Batch:
        """Rows -> prompts -> groups -> rewards -> advantages, and the log-probs that the update compares with.

        The rewards are at work while the device makes log-probs, unless other rows depend on them.
        """
        clock = clock or Clock()
        order, applied = self.order(self.step), self.learner.applied
        self.pipeline.submit(order, applied, clock)
        groups = self.pipeline.collect(order, clock)
        if self.options.engine.rollout_ahead and self.step + 1 < self.options.train.max_steps:
            self.pipeline.submit(self.order(self.step + 1), applied, clock)  # by the policy as it is now
        self.figures = dict(order.figures)
        groups, scores = self.resample(groups, self.scores(groups, clock), clock)
        with clock("score"):
            old_logps = self.learner.old_logps(groups, exact=self.engine.exact)
            self.engine.rest()  # its memory is the update's now
            ref_logps = self.learner.ref_logps(groups)
        table = scores()
        if problem := self.reward_failures.add(self.ranks.gathered(table)):
            raise TrainingStopped(f"step {self.step}: {problem}")
        self.pipeline.orders.remove(order)
        return Batch(groups, table, self.advantages_of(groups, table), old_logps, ref_logps, applied)

    def order(self, step: int) -> Order:
        """The rollouts of a step, which may have been asked for one step ahead; else of the next rows."""
        if not any(order.step == step for order in self.pipeline.orders):
            rows = self.sampler.take(self.options.train.prompts_per_step)
            self.pipeline.orders.append(Order(step, rows, self.rows.share(rows)))
        return next(order for order in self.pipeline.orders if order.step == step)

    def ordered_prompts(self, order: Order) -> list[Prompt]:
        """Of an order's share; the clips that are needed next are made ready meanwhile."""
        if order.step == self.step:
            self.prefetch.turn(self.rows.following(order.step))
        prompts = self.rows.prompts(order.share, order.step)
        if order.step > self.step:
            self.prefetch.turn(order.share)  # scored in a step's time
        return prompts

    def scores(self, groups: list[Group], clock: Clock) -> Scores:
        """What the groups' rewards are, which are under way from now on."""
        with clock("reward"):
            scoring = Scoring(groups, self.options.reward, trainer_state={"step": self.step}, rewards=self.terms)

        def wait() -> RewardTable:
            with clock("reward"):
                return self.ranks.together(scoring.table, RewardError)

        return wait

    def resample(self, groups: list[Group], scores: Scores, clock: Clock) -> tuple[list[Group], Scores]:
        """Dynamic sampling (DAPO, arXiv 2503.14476): other rows in the places of groups without variance."""
        if not self.options.train.dynamic_sampling:
            return groups, scores
        table, position = scores(), self.sampler.state_dict()
        for attempt in range(1, self.options.train.dynamic_sampling + 1):
            keep_P = self.advantages_of(groups, table).informative_P
            counts = self.ranks.gathered(int((~keep_P).sum()))
            if not sum(counts):
                break
            rows, start = self.sampler.take(sum(counts)), sum(counts[: self.ranks.rank])
            order = Order(self.step, rows, rows[start : start + counts[self.ranks.rank]], attempt)
            try:
                self.pipeline.submit(order, self.learner.applied, clock)
                more = self.pipeline.collect(order, clock)
            except EngineLost:
                self.sampler.load_state_dict(position)  # a resumed run draws these rows again
                raise
            for name in {"engine/failed_groups", "engine/tokens"} & {*order.figures}:
                self.figures[name] += order.figures[name]
            groups, table = refill(groups, table, keep_P, more, self.scores(more, clock)())
        return groups, lambda: table

    def advantages_of(self, groups: Sequence[Group], table: RewardTable) -> Advantages:
        """Over the groups of all ranks, so that `scale_rewards: batch` means the whole batch; returns this rank's."""
        shape = table.rewards_PG.shape
        lengths_PG = np.array([[len(r.completion_ids) for r in group.rollouts] for group in groups]).reshape(shape)
        parts = self.ranks.gathered((table, lengths_PG))
        start = sum(len(lengths) for _, lengths in parts[: self.ranks.rank])
        filled = [lengths for _, lengths in parts if len(lengths)]  # a rank without groups does not know G
        result = advantages(
            concatenated([table for table, _ in parts]),
            self.options.loss,
            lengths_PG=np.concatenate(filled or [lengths_PG]),
            max_completion_length=self.options.rollout.max_completion_length,
        )
        return result.part(slice(start, start + shape[0]))

    def update(self, batch: Batch, saver: Saver | None = None) -> None:
        """The batch's updates that are not done yet: `num_iterations` passes of `steps_per_generation` updates.

        `update_totals` sums up their metrics; how engine and policy differ is the first one's, before which
        nothing has changed.
        """
        parts, updates = self.options.train.steps_per_generation, self.learner.updates_per_step
        seed = hash_seed(self.options.train.seed, self.step, "order")
        order = torch.randperm(len(batch.groups), generator=torch.Generator().manual_seed(seed)).tolist()
        while self.update_index < updates:
            members = sorted(share(order, self.update_index % parts, parts))
            for name, value in self.learner.update(batch, members, self.step).items():
                if name.startswith(MISMATCH):
                    self.update_totals.setdefault(name, value)
                else:
                    self.update_totals[name] = self.update_totals.get(name, 0.0) + value
            self.update_index += 1
            if saver and self.update_index < updates:
                saver.after_update(self)

    # -- records and state ---------------------------------------------------------------------------------------

    def prompt_of(self, example_id: str) -> Prompt:
        """The prompt of a training row."""
        return self.rows.prompt(self.rows.by_id[example_id])

    def metrics(self, batch: Batch, update: Mapping[str, float], clock: Clock) -> dict[str, Any]:
        """The step over all ranks, keyed as in metrics.jsonl."""
        shares = self.ranks.gathered(StepShare.of(batch.groups, batch.table, batch.advantages, batch.version))
        rewards = {f"reward_{name}": value for name, value in batch.table.seconds.items()}
        others = {
            "step": self.step,
            "epoch": self.sampler.epoch,
            **update,
            **self.figures,
            "learning_rate": self.schedule.get_last_lr()[0],
            "skipped_steps": self.guard.skipped,
            "skipped_rows": len(self.rows.skipped),
            "seconds": {"step": clock.total(), **clock.seconds, **rewards},
        }
        return step_metrics(shares, others)

    def state_dict(self) -> dict[str, Any]:
        """Counters and positions; weights, optimiser and the batch in use are saved beside it by the checkpoint."""
        return {
            "step": self.step,
            "update_index": self.update_index,
            "update_totals": self.update_totals,
            "optimizer_steps": self.learner.applied,
            "guard": self.guard.state_dict(),
            "skipped_rows": self.rows.skipped,
            "sampler": self.sampler.state_dict(),
            "figures": self.figures,
            "orders": self.pipeline.state_dict(),
        }

    def settle(self, patience: float | None) -> None:
        """Before a checkpoint: wait for what is sampled ahead, with `patience` at most so many seconds."""
        self.pipeline.settle(patience)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]
        self.update_index = state["update_index"]
        self.update_totals = dict(state["update_totals"])
        self.learner.applied = state["optimizer_steps"]
        self.guard.load_state_dict(state["guard"])
        self.rows.skipped = dict(state["skipped_rows"])
        self.sampler.load_state_dict(state["sampler"])
        self.figures = dict(state.get("figures", {}))
        self.pipeline.load_state_dict(state.get("orders", []), self.rows)
