"""The GRPO loop. It owns accelerate and the optimiser, and reads as the way of the data:

    examples -> prompts -> rollouts -> rewards -> advantages -> loss -> step

Groups stay whole on one rank. Loss normalisers are global counts, so the number of ranks and of
micro-batches changes the memory, not the gradient.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from covo_rl.algo.advantage import Advantages, advantages, concatenated
from covo_rl.audio import AudioError, ClipStore
from covo_rl.config import Options
from covo_rl.engines.own import sample, samples_exactly
from covo_rl.policy import Policy
from covo_rl.policy.trainable import param_groups
from covo_rl.prompt import PromptError, build_prompt
from covo_rl.rewards import score as run_rewards
from covo_rl.train.batch import Batch, chunks, hash_seed, replace, sampling_logps, step_metrics, sums
from covo_rl.train.checkpoint.saver import Saver
from covo_rl.train.clock import Clock
from covo_rl.train.guard import StepGuard, TrainingStopped, memory_explained, sampling_advice
from covo_rl.train.launch import join
from covo_rl.train.learner import Updater, gathered
from covo_rl.train.sampler import PromptSampler, share
from covo_rl.train.schedule import schedule_of
from covo_rl.types import Example, Group, Prompt, RewardTable, Rollout


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
    ) -> None:
        self.options = options
        self.accelerator = accelerator or join()
        self.clips = clips
        self.sampler = PromptSampler(examples, options.train.seed)
        self.step = 0
        self.batch: Batch | None = None
        self.update_index = 0
        self.update_totals: dict[str, float] = {}
        self.skipped_rows: dict[str, str] = {}
        self.policy = policy
        train = options.train
        optimizer = torch.optim.AdamW(
            param_groups(policy.model, options.adapter, train.learning_rate, train.weight_decay, family=policy.family),
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
        )
        self.wrapped, self.optimizer = self.accelerator.prepare(policy, optimizer)
        self.updates_per_step = train.num_iterations * train.steps_per_generation
        updates = train.max_steps * self.updates_per_step
        self.schedule = schedule_of(train.lr_scheduler_type, optimizer, warmup_steps=train.warmup_steps, steps=updates)
        self.guard = StepGuard(Path(train.output) / "debug", rank=self.accelerator.process_index)
        spare = Group(self.prompt_of(examples[0].id), (Rollout((policy.family.eos_token_ids[0],), (0.0,), "", "stop"),))
        self.updater = Updater(
            options, policy, self.wrapped, self.optimizer, self.schedule, self.accelerator, self.guard, spare
        )

    # -- the step ------------------------------------------------------------------------------------------------

    def run(
        self, on_step: Callable[[dict[str, Any], Batch], float | None] | None = None, saver: Saver | None = None
    ) -> None:
        """Train until `max_steps`. `saver` writes checkpoints between updates, after steps, and at the end.

        What `on_step` returns, if anything, is the step's score for `keep_best`: higher is better.
        """
        while self.step < self.options.train.max_steps:
            metrics, batch = self.train_step(saver)
            score = on_step(metrics, batch) if on_step else None
            if saver:
                saver.after_step(self, score)
        if saver:
            saver.finish(self)

    def train_step(self, saver: Saver | None = None) -> tuple[dict[str, Any], Batch]:
        """One generated batch and all its optimiser updates, or what is left of them after a resume."""
        clock = Clock()
        start = time.perf_counter()
        if self.batch is None:
            self.batch = self.generate(clock)
        with clock("update"):
            self.update(self.batch, saver)
        batch, update = self.batch, self.update_totals
        self.batch, self.update_index, self.update_totals = None, 0, {}
        self.step += 1
        metrics = self.gathered_metrics(batch, update)
        by_reward = {f"reward_{name}": value for name, value in batch.table.seconds.items()}
        metrics["seconds"] = {"step": time.perf_counter() - start, **clock.seconds, **by_reward}
        return metrics, batch

    def generate(self, clock: Clock) -> Batch:
        """Rows -> prompts -> rollouts -> rewards -> advantages, with dynamic sampling if asked for."""
        groups, table = self._rollouts(self.options.train.prompts_per_step, clock, attempt=0)
        for attempt in range(1, self.options.train.dynamic_sampling + 1):
            keep = self._advantages(groups, table).informative_P
            missing = int(len(keep) - keep.sum())
            wanted = gathered(self.accelerator, [missing])
            if not sum(wanted):
                break
            more, more_table = self._rollouts(sum(wanted), clock, attempt=attempt, counts=wanted)
            groups, table = replace(groups, table, keep, more, more_table)
        self._check_reward_failures(table)
        batch = Batch(groups, table, self._advantages(groups, table))
        with clock("score"):
            self._frozen_passes(batch)
        return batch

    def _rollouts(
        self, count: int, clock: Clock, attempt: int, counts: list[int] | None = None
    ) -> tuple[list[Group], RewardTable]:
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        rows = self.sampler.take(count)
        if counts is None:
            mine: list[Example] = share(rows, rank, world)
        else:
            mine = rows[sum(counts[:rank]) : sum(counts[: rank + 1])]
        with clock("prompt"):
            prompts = self._prompts(mine)
        with memory_explained(sampling_advice(len(prompts), self.options.rollout)):
            groups = self._sample(prompts, clock, hash_seed(self.options.train.seed, self.step, attempt))
        with clock("reward"):
            table = run_rewards(groups, self.options.reward, trainer_state={"step": self.step})
        return groups, table

    def _sample(self, prompts: list[Prompt], clock: Clock, seed: int) -> list[Group]:
        """G rollouts of each prompt; a sharded rank without prompts samples one for nothing, to stay in step."""
        asked = prompts or ([self.updater.spare.prompt] if self.sharded else [])
        with clock("encode"), torch.no_grad():
            features = self.policy.features(asked)
        with clock("sample"):
            policy = self.wrapped if self.sharded else self.policy
            groups = sample(policy, asked, features, self.options.rollout, seed=seed, keep_prompts=self._needs_old_pass)
        return groups[: len(prompts)]

    def _prompts(self, rows: Sequence[Example]) -> list[Prompt]:
        """Prompts of the rows whose audio can be read; the others are counted, and too many of them stop the run."""
        prompts = []
        for row in rows:
            try:
                prompts.append(build_prompt(row, self.policy.family, self.clips, self.options.prompt))
            except (AudioError, PromptError) as error:
                self.skipped_rows[row.id] = str(error)
        for part in gathered(self.accelerator, [dict(self.skipped_rows)]):
            self.skipped_rows |= part
        limit, rows_in_all = self.options.data.skipped_rows_limit, len(self.sampler.examples)
        if len(self.skipped_rows) > limit * rows_in_all:
            shown = "; ".join(f"row {name}: {why}" for name, why in list(self.skipped_rows.items())[:5])
            raise TrainingStopped(
                f"step {self.step}: {len(self.skipped_rows)} of {rows_in_all} rows were skipped because their audio "
                f"could not be read, above skipped_rows_limit {limit}. The first: {shown}"
            )
        return prompts

    def prompt_of(self, example_id: str) -> Prompt:
        """The prompt of a training row."""
        row = next(row for row in self.sampler.examples if row.id == example_id)
        return build_prompt(row, self.policy.family, self.clips, self.options.prompt)

    def _advantages(self, groups: Sequence[Group], table: RewardTable) -> Advantages:
        """Over the groups of all ranks, so that `scale_rewards: batch` means the whole batch; returns this rank's."""
        shape = table.rewards_PG.shape
        lengths_PG = np.array([[len(r.completion_ids) for r in group.rollouts] for group in groups]).reshape(shape)
        parts = gathered(self.accelerator, [(table, lengths_PG)])
        start = sum(len(lengths) for _, lengths in parts[: self.accelerator.process_index])
        known = [lengths for _, lengths in parts if len(lengths)]  # a rank without groups does not know G
        result = advantages(
            concatenated([table for table, _ in parts]),
            self.options.loss,
            lengths_PG=np.concatenate(known or [lengths_PG]),
            max_completion_length=self.options.rollout.max_completion_length,
        )
        return result.part(slice(start, start + shape[0]))

    def _frozen_passes(self, batch: Batch) -> None:
        """Old and reference log-probs, once per generated batch, without gradient."""
        if self._needs_old_logps:
            # the sampling step's prompt keys serve this pass, so prompts are not computed again
            old = self._score("old_logps", batch.groups) if self._needs_old_pass else None
            batch.old_logps = old or [sampling_logps(group, self.accelerator.device) for group in batch.groups]
        self.policy.release()
        if self.options.loss.beta:
            batch.ref_logps = self._score("logps", batch.groups, reference=True)

    @property
    def _needs_old_logps(self) -> bool:
        """Later updates of a batch, and corrections of the sampler, compare with the policy that sampled."""
        return self.updates_per_step > 1 or self.options.loss.sampler_correction

    @property
    def _needs_old_pass(self) -> bool:
        # FSDP's mixed precision leaves float32 weights where the policy looks
        exact = samples_exactly(self.policy) and self.accelerator.mixed_precision == "no"
        return self._needs_old_logps and not exact

    def _score(self, method: str, groups: Sequence[Group], **kwargs: Any) -> list[torch.Tensor]:
        """Log-probs (G, C) of every group. Every rank makes as many passes as the one with the most groups."""
        scores: list[torch.Tensor] = []
        micro = chunks(groups, self.options.train.micro_batch_prompts)
        idle = max(gathered(self.accelerator, [len(micro)])) - len(micro)
        with torch.no_grad(), memory_explained(self.updater.memory_advice()):
            for some in [*micro, *[[self.updater.spare]] * idle]:
                features = self.policy.features([group.prompt for group in some])
                result = self.wrapped(method, some, features, temperature=self.options.rollout.temperature, **kwargs)
                scores += result.logps_NC.split([len(group.rollouts) for group in some])
        return scores[: len(groups)]

    # -- the update ----------------------------------------------------------------------------------------------

    def update(self, batch: Batch, saver: Saver | None = None) -> None:
        """The batch's updates that are not done yet: `num_iterations` passes of `steps_per_generation` updates.

        `update_totals` sums up the means of their metrics.
        """
        parts = self.options.train.steps_per_generation
        seed = hash_seed(self.options.train.seed, self.step, "order")
        order = torch.randperm(len(batch.groups), generator=torch.Generator().manual_seed(seed)).tolist()
        while self.update_index < self.updates_per_step:
            chosen = sorted(share(order, self.update_index % parts, parts))
            for name, value in self.updater.update(batch, chosen, self.step).items():
                self.update_totals[name] = self.update_totals.get(name, 0.0) + value / self.updates_per_step
            self.update_index += 1
            if saver and self.update_index < self.updates_per_step:
                saver.after_update(self)

    # -- ranks and records ---------------------------------------------------------------------------------------

    @property
    def sharded(self) -> bool:
        """Parameters live in pieces on several ranks (FSDP, ZeRO-3), so sampling must go through the wrapper."""
        return self.accelerator.distributed_type.name in ("FSDP", "DEEPSPEED")

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def _check_reward_failures(self, table: RewardTable) -> None:
        graded, limit = max(table.rewards_PGR.size, 1), self.options.reward.reward_failure_limit
        failed = [why for why in table.missing.values() if why.startswith("failed")]
        if len(failed) / graded > limit:
            raise TrainingStopped(
                f"step {self.step}: {len(failed)} of {graded} reward scores failed, above reward_failure_limit "
                f"{limit}. The first: {failed[0]}"
            )

    def gathered_metrics(self, batch: Batch, update: Mapping[str, float]) -> dict[str, Any]:
        """The step over all ranks, keyed as in metrics.jsonl."""
        parts = gathered(self.accelerator, [(sums(batch), batch.table)])
        metrics: dict[str, Any] = {"step": self.step, "epoch": self.sampler.epoch, **step_metrics(parts)}
        metrics |= dict(update)
        metrics |= {"learning_rate": self.schedule.get_last_lr()[0], "skipped_steps": self.guard.skipped,
                    "skipped_rows": len(self.skipped_rows)}  # fmt: skip
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Counters and positions; weights, optimiser and the batch in use are saved beside it by the checkpoint."""
        return {
            "step": self.step,
            "update_index": self.update_index,
            "update_totals": self.update_totals,
            "optimizer_steps": self.updater.applied,
            "guard": self.guard.state_dict(),
            "skipped_rows": self.skipped_rows,
            "sampler": self.sampler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]
        self.update_index = state["update_index"]
        self.update_totals = dict(state["update_totals"])
        self.updater.applied = state["optimizer_steps"]
        self.guard.load_state_dict(state["guard"])
        self.skipped_rows = dict(state["skipped_rows"])
        self.sampler.load_state_dict(state["sampler"])
