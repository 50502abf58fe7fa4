"""The GRPO loop. It owns accelerate and the optimiser, and reads as the way of the data:

    examples -> prompts -> rollouts -> rewards -> advantages -> loss -> step

Groups stay whole on one rank. Loss normalisers are global counts, so the number of ranks and of
micro-batches changes the memory, not the gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import get_scheduler

from covo_rl.advantage import Advantages, advantages, concatenated
from covo_rl.audio import ClipStore
from covo_rl.batch import Batch, chunks, hash_seed, loss_mask, padded, replace, sampling_logps, sums
from covo_rl.config import Options
from covo_rl.loss import Normalizer, policy_loss, summarise
from covo_rl.loss_metrics import Metrics
from covo_rl.policy import Policy
from covo_rl.policy.modes import param_groups
from covo_rl.prompt import build
from covo_rl.rewards import run as run_rewards
from covo_rl.rollout import sample
from covo_rl.sampler import PromptSampler, share
from covo_rl.types import Example, Group, RewardTable


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


class Clock:
    """Wall seconds by phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


class Trainer:
    """GRPO over a policy. `run` yields nothing and calls `on_step(metrics, batch)` after every step."""

    def __init__(
        self,
        options: Options,
        policy: Policy,
        clips: ClipStore,
        examples: Sequence[Example],
        accelerator: Accelerator | None = None,
    ) -> None:
        self.options = options
        self.accelerator = accelerator or Accelerator()
        self.clips = clips
        self.sampler = PromptSampler(examples, options.train.seed)
        self.step = 0
        self.optimizer_steps = 0
        self.skipped_steps = 0
        self.policy = policy
        train = options.train
        optimizer = torch.optim.AdamW(
            param_groups(policy.model, options.adapter, train.learning_rate, train.weight_decay, family=policy.family),
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
        )
        self.wrapped, self.optimizer = self.accelerator.prepare(policy, optimizer)
        self.updates_per_step = train.num_iterations * train.steps_per_generation
        self.schedule = get_scheduler(
            train.lr_scheduler_type,
            optimizer,
            num_warmup_steps=train.warmup_steps,
            num_training_steps=train.max_steps * self.updates_per_step,
        )

    # -- the step ------------------------------------------------------------------------------------------------

    def run(self, on_step: Callable[[dict[str, Any], Batch], None] | None = None) -> None:
        """Train until `max_steps`."""
        while self.step < self.options.train.max_steps:
            metrics, batch = self.train_step()
            if on_step:
                on_step(metrics, batch)

    def train_step(self) -> tuple[dict[str, Any], Batch]:
        """One generated batch and all its optimiser steps; returns the step's global metrics."""
        clock = Clock()
        start = time.perf_counter()
        batch = self.generate(clock)
        with clock("update"):
            update = self.update(batch)
        self.step += 1
        metrics = self.gathered_metrics(batch, update)
        metrics["seconds"] = {"step": time.perf_counter() - start, **clock.seconds}
        return metrics, batch

    def generate(self, clock: Clock) -> Batch:
        """Rows -> prompts -> rollouts -> rewards -> advantages, with dynamic sampling if asked for."""
        groups, table = self._rollouts(self.options.train.prompts_per_step, clock, attempt=0)
        for attempt in range(1, self.options.train.dynamic_sampling + 1):
            keep = advantages(table, self.options.loss).informative_P
            missing = int(len(keep) - keep.sum())
            wanted = self._gathered([missing])
            if not sum(wanted):
                break
            more, more_table = self._rollouts(sum(wanted), clock, attempt=attempt, counts=wanted)
            groups, table = replace(groups, table, keep, more, more_table)
        self._check_reward_failures(table)
        batch = Batch(groups, table, self._advantages(table))
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
            prompts = [build(row, self.policy.family, self.clips, self.options.prompt) for row in mine]
        with clock("encode"), torch.no_grad():
            features = self.policy.features(prompts)
        with clock("sample"):
            seed = hash_seed(self.options.train.seed, self.step, attempt)
            groups = sample(self.wrapped if self.sharded else self.policy, prompts, features,
                            self.options.rollout, seed=seed)  # fmt: skip
        with clock("reward"):
            table = run_rewards(groups, self.options.reward, trainer_state={"step": self.step})
        return groups, table

    def _advantages(self, table: RewardTable) -> Advantages:
        """Over the groups of all ranks, so that `scale_rewards: batch` means the whole batch; returns this rank's."""
        tables = self._gathered([table])
        start = sum(len(other.rewards_PG) for other in tables[: self.accelerator.process_index])
        return advantages(concatenated(tables), self.options.loss).part(slice(start, start + len(table.rewards_PG)))

    def _frozen_passes(self, batch: Batch) -> None:
        """Old and reference log-probs, once per generated batch, without gradient."""
        if self.updates_per_step > 1 or self.options.loss.sampler_correction:
            exact = self.policy.sampling_is_exact
            old = None if exact else self._score(batch.groups)
            batch.old_logps = old or [sampling_logps(group, self.accelerator.device) for group in batch.groups]
        if self.options.loss.beta:
            batch.ref_logps = self._score(batch.groups, reference=True)

    def _score(self, groups: Sequence[Group], reference: bool = False) -> list[torch.Tensor]:
        scores: list[torch.Tensor] = []
        with torch.no_grad():
            for some in chunks(groups, self.options.train.micro_batch_prompts):
                features = self.policy.features([group.prompt for group in some])
                result = self.wrapped("logps", some, features, temperature=self.options.rollout.temperature,
                                      reference=reference)  # fmt: skip
                scores += result.logps_NC.split([len(group.rollouts) for group in some])
        return scores

    # -- the update ----------------------------------------------------------------------------------------------

    def update(self, batch: Batch) -> dict[str, float]:
        """`num_iterations` passes of `steps_per_generation` optimiser steps; returns summed loss metrics."""
        totals: dict[str, float] = {}
        order = torch.randperm(
            len(batch.groups),
            generator=torch.Generator().manual_seed(hash_seed(self.options.train.seed, self.step, "order")),
        ).tolist()
        for _ in range(self.options.train.num_iterations):
            for part in range(self.options.train.steps_per_generation):
                chosen = share(order, part, self.options.train.steps_per_generation)
                for name, value in self._optimizer_step(batch, sorted(chosen)).items():
                    totals[name] = totals.get(name, 0.0) + value / self.updates_per_step
        return totals

    def _optimizer_step(self, batch: Batch, chosen: list[int]) -> dict[str, float]:
        normalizer = self._normalizer([batch.groups[p] for p in chosen])
        useful = [p for p in chosen if self._carries_gradient(batch, p)]
        micro = chunks(useful, self.options.train.micro_batch_prompts)
        passes = max(self._gathered([len(micro)]))
        parts: list[Metrics] = []
        self.policy.train()
        for index in range(passes):
            last = index == passes - 1
            idle = index >= len(micro)  # this rank has no work left, but DDP wants a pass from every rank
            members = (chosen[:1] or [0]) if idle else micro[index]
            self.accelerator.sync_gradients = last
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                loss, part = self._loss(batch, members, normalizer, idle)
                # DDP averages over ranks, the normalizer already counts all of them
                self.accelerator.backward(loss * normalizer.world_size)
            parts.append(part)
        over_ranks = {f"reduce_{how}": partial(self._reduced, how=how) for how in ("sum", "max")}
        metrics = summarise(parts, **over_ranks)
        metrics["grad_norm"] = self._step_optimizer() if passes else 0.0
        self.schedule.step()
        return metrics

    def _loss(
        self, batch: Batch, members: list[int], normalizer: Normalizer, idle: bool
    ) -> tuple[torch.Tensor, Metrics]:
        groups = [batch.groups[p] for p in members]
        loss_config = self.options.loss
        features = self.policy.features([group.prompt for group in groups])
        entropy = bool(loss_config.entropy_coef) or loss_config.top_entropy_quantile < 1
        temperature = self.options.rollout.temperature
        scored = self.wrapped("logps", groups, features, temperature=temperature, entropy=entropy)
        width = scored.logps_NC.shape[1]
        old = scored.logps_NC.detach() if batch.old_logps is None else padded(batch.old_logps, members, width)
        sampler_logps = None
        if loss_config.sampler_correction:
            sampler_logps = padded([sampling_logps(g, old.device) for g in groups], range(len(groups)), width)
        return policy_loss(
            scored.logps_NC,
            old,
            torch.as_tensor(batch.advantages.advantages_PG[members], device=old.device, dtype=torch.float32).flatten(),
            loss_mask(groups, scored.mask_NC, loss_config.mask_truncated_completions) * (not idle),
            loss_config,
            normalizer=normalizer,
            ref_logps_NC=None if batch.ref_logps is None else padded(batch.ref_logps, members, width),
            entropy_NC=scored.entropy_NC,
            sampler_logps_NC=sampler_logps,
            max_completion_length=self.options.rollout.max_completion_length,
        )

    def _step_optimizer(self) -> float:
        """Clip and step; a gradient that is not finite skips the step and is counted."""
        limit = self.options.train.max_grad_norm or math.inf
        norm = float(self.accelerator.clip_grad_norm_(self.policy.parameters(), limit) or 0.0)
        if math.isfinite(norm):
            self.optimizer.step()
            self.optimizer_steps += 1
        else:
            self.skipped_steps += 1
        self.optimizer.zero_grad()
        return norm

    def _carries_gradient(self, batch: Batch, p: int) -> bool:
        """A group whose rollouts all agree moves nothing, unless KL or entropy terms do."""
        return bool(batch.advantages.informative_P[p]) or bool(self.options.loss.beta or self.options.loss.entropy_coef)

    def _normalizer(self, groups: Sequence[Group]) -> Normalizer:
        """Counts over all ranks and micro-batches of one optimiser step."""
        lengths = [
            0 if self.options.loss.mask_truncated_completions and r.stop_reason == "length" else len(r.completion_ids)
            for group in groups
            for r in group.rollouts
        ]
        return Normalizer.from_lengths(self._gathered(lengths), world_size=self.accelerator.num_processes)

    # -- ranks and records ---------------------------------------------------------------------------------------

    @property
    def sharded(self) -> bool:
        """Parameters live in pieces on several ranks (FSDP, ZeRO-3), so sampling must go through the wrapper."""
        return self.accelerator.distributed_type.name in ("FSDP", "DEEPSPEED")

    def _reduced(self, values: torch.Tensor, how: str) -> torch.Tensor:
        """1-D float64 CPU tensor -> elementwise sum or maximum over ranks."""
        stacked = torch.tensor(self._gathered([values.tolist()]), dtype=values.dtype)
        return stacked.sum(0) if how == "sum" else stacked.amax(0)

    def _gathered(self, values: list[Any]) -> list[Any]:
        return gather_object(values) if self.accelerator.num_processes > 1 else list(values)

    def _check_reward_failures(self, table: RewardTable) -> None:
        graded = max(table.rewards_PGR.size, 1)
        failed = sum(1 for reason in table.missing.values() if reason.startswith("failed"))
        limit = self.options.reward.reward_failure_limit
        if failed / graded > limit:
            first = next(reason for reason in table.missing.values() if reason.startswith("failed"))
            raise TrainingStopped(
                f"step {self.step}: {failed} of {graded} reward scores failed, above reward_failure_limit {limit}. "
                f"The first: {first}"
            )

    def gathered_metrics(self, batch: Batch, update: Mapping[str, float]) -> dict[str, Any]:
        """Means over all ranks, weighted by rollouts, keyed as in metrics.jsonl."""
        totals: dict[str, float] = {}
        for part in self._gathered([sums(batch)]):
            for name, value in part.items():
                totals[name] = totals.get(name, 0.0) + value
        n = max(totals.pop("rollouts"), 1.0)
        prompts = max(totals.pop("prompts"), 1.0)
        metrics: dict[str, Any] = {"step": self.step, "epoch": self.sampler.epoch}
        for name in batch.table.names:
            graded = totals.pop(f"graded_{name}")
            metrics[f"reward_{name}"] = totals.pop(f"reward_{name}") / graded if graded else None
            metrics[f"none_{name}"] = 1.0 - graded / n
        metrics["reward_total"] = totals.pop("reward_total") / n
        metrics["zero_variance_groups"] = totals.pop("zero_variance_groups") / prompts
        metrics |= {name: value / n for name, value in totals.items()}
        metrics |= dict(update)
        metrics |= {"learning_rate": self.schedule.get_last_lr()[0], "skipped_steps": self.skipped_steps}
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Counters and positions; weights and optimiser are saved beside it by the checkpoint."""
        return {
            "step": self.step,
            "optimizer_steps": self.optimizer_steps,
            "skipped_steps": self.skipped_steps,
            "sampler": self.sampler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]
        self.optimizer_steps = state["optimizer_steps"]
        self.skipped_steps = state["skipped_steps"]
        self.sampler.load_state_dict(state["sampler"])
