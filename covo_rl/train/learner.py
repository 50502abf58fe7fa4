"""From a batch to changed parameters: old and reference log-probs, micro-batches, loss, gradient, step.

Loss normalisers are counts over all micro-batches and ranks, so their number changes the memory, not the gradient.
An update that is not finite is skipped, dumped and counted; with `oom_retry` whatever pass runs out of memory is
repeated, from the same random state, in micro-batches of half the size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from covo_rl.algo.correction import MISMATCH, mismatch
from covo_rl.algo.loss import policy_loss
from covo_rl.algo.metrics import Metrics, summarise
from covo_rl.algo.normalizer import Normalizer, entropy_threshold
from covo_rl.config import ConfigError, Options, corrects_sampler
from covo_rl.policy import LogProbs, Policy
from covo_rl.policy.trainable import adamw, param_groups
from covo_rl.train import zero
from covo_rl.train.batch import (
    Batch,
    Piece,
    check_policy_ids,
    finite_logps,
    group_piece,
    loss_mask,
    micro_batches,
    padded,
    sampling_logps,
    stacked,
    update_details,
)  # fmt: skip
from covo_rl.train.guard import StepGuard, memory_explained, out_of_memory_advice
from covo_rl.train.memory import MicroBatch, within_memory
from covo_rl.train.ranks import Ranks
from covo_rl.train.schedule import advance_schedule, schedule_of
from covo_rl.types import Group


class Learner:
    """Owns the gradient: optimiser, schedule, guard.

    `idle_group` is what a rank without groups of its own passes through the model, masked, so that the collectives of
    DDP and FSDP find every rank. `wrapped` is the policy as accelerate returned it, `applied` counts the optimiser
    updates so far.
    """

    def __init__(self, options: Options, policy: Policy, accelerator: Accelerator, idle_group: Group) -> None:
        self.options, self.policy, self.accelerator, self.idle_group = options, policy, accelerator, idle_group
        self.ranks = Ranks(accelerator.process_index, accelerator.num_processes)
        loss, engine = options.loss, options.engine
        corrects = corrects_sampler(loss.sampler_correction, engine.use_vllm, engine.rollout_ahead)
        self.loss = replace(loss, sampler_correction=corrects)
        train, self.code_ids = options.train, policy.family.code_ids
        check_policy_ids(loss, self.code_ids)
        if any(parameter.dtype == torch.float16 for parameter in policy.parameters()):
            raise ConfigError(["a float16 model cannot train, its gradients vanish: load it as bfloat16 or float32"])
        if accelerator.mixed_precision not in ("no", "bf16"):
            raise ConfigError([f"mixed_precision {accelerator.mixed_precision!r} of the Accelerator: use bf16 or no"])
        optimizer = adamw(
            param_groups(policy.model, options.adapter, train.learning_rate, train.weight_decay, family=policy.family),
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
        )
        self.zero = accelerator.distributed_type.name == "DEEPSPEED"
        if self.zero:
            zero.set_gradient_limit(accelerator, policy, train.max_grad_norm)
        self.wrapped, self.optimizer = accelerator.prepare(policy, optimizer)
        self.updates_per_step = train.num_iterations * train.steps_per_generation
        updates = train.max_steps * self.updates_per_step
        self.schedule = schedule_of(train.lr_scheduler_type, optimizer, warmup_steps=train.warmup_steps, steps=updates)
        self.guard = StepGuard(Path(train.output) / "debug", rank=self.ranks.rank)
        self.applied = 0
        generations = options.rollout.num_generations
        self.frozen_size = MicroBatch(train.micro_batch_prompts, generations)
        self.size = MicroBatch(train.micro_batch_prompts, train.micro_batch_rollouts or generations)
        # ranks that share out the parameters meet inside every pass, where one that starts over would be missed
        self.sharded = accelerator.distributed_type.name in ("FSDP", "DEEPSPEED")
        self.retries = train.oom_retry and not self.sharded
        # a pass that may be repeated must not meet other ranks: gradients are averaged after the last one
        self.scorer = policy if self.retries else self.wrapped

    # -- without gradient, once per batch ------------------------------------------------------------------------

    @property
    def needs_old_logps(self) -> bool:
        """Later updates of a batch, and corrections of the sampler, compare with the policy before the first one."""
        return self.updates_per_step > 1 or bool(self.loss.sampler_correction)

    def old_logps(self, groups: Sequence[Group], *, exact: bool) -> list[torch.Tensor] | None:
        """(G, C) of every group under the policy as it is, or None if nothing needs them.

        What sampling recorded, where that is `exact` and no rollout is of an older version on any rank. Otherwise a
        pass, for which the engine may have kept the prompts' keys.
        """
        if not self.needs_old_logps:
            return None
        if exact and all(self.ranks.gathered(all(self._is_fresh(group) for group in groups))):
            return [sampling_logps(group, self.accelerator.device) for group in groups]
        return self._frozen_pass("old_logps", groups)

    def _is_fresh(self, group: Group) -> bool:
        """Sampled by the policy as it is."""
        return all(rollout.version == self.applied for rollout in group.rollouts)

    def ref_logps(self, groups: Sequence[Group]) -> list[torch.Tensor] | None:
        """(G, C) of every group under the reference, or None without a KL term."""
        return self._frozen_pass("logps", groups, reference=True) if self.loss.beta else None

    def _frozen_pass(self, method: str, groups: Sequence[Group], **kwargs: Any) -> list[torch.Tensor]:
        """Every rank makes as many passes as the one with the most groups."""

        def work() -> list[torch.Tensor]:
            rows: list[list[torch.Tensor]] = [[] for _ in groups]
            micro = self._micro_batches(range(len(groups)), self.frozen_size)
            idle = max(self.ranks.gathered(len(micro))) - len(micro)
            for pieces in [*micro, *[[]] * idle]:
                part = [group_piece(groups, piece) for piece in pieces] or [self.idle_group]
                features = self.policy.features([group.prompt for group in part])
                scored = self.scorer(method, part, features, temperature=self.options.rollout.temperature, **kwargs)
                logps = scored.logps_NC.split([len(group.rollouts) for group in part])
                for (p, _), logps_GC in zip(pieces, logps, strict=False):
                    rows[p].append(logps_GC)
            return [stacked(some) for some in rows]

        with torch.no_grad():
            return self._within_memory(work, self.frozen_size)

    def _within_memory(self, work: Callable[[], Any], size: MicroBatch) -> Any:
        return within_memory(
            work, size, retry=self.retries, ranks=self.ranks, advice=lambda: self.memory_advice(size),
            undo=self.policy.zero_grad,  # accelerate's does nothing between micro-batches
        )  # fmt: skip

    def memory_advice(self, size: MicroBatch) -> str:
        """What to lower when a pass over completions runs out of memory."""
        wanted = self.options.train.oom_retry
        return out_of_memory_advice(
            size.prompts, size.rollouts, can_retry=not wanted and not self.sharded, no_retry=wanted and self.sharded
        )

    # -- the update ----------------------------------------------------------------------------------------------

    def update(self, batch: Batch, members: list[int], step: int) -> dict[str, float]:
        """One optimiser update with these groups of this rank; returns metrics over all ranks.

        Raises:
            TrainingStopped: memory ran out, or several updates in a row were not finite.
        """
        details = partial(update_details, batch, members, self.policy)
        if not all(self.ranks.gathered(finite_logps(batch, members))):
            self.guard.failed(step, {"log_probs": math.nan}, details)
            advance_schedule(self.schedule)
            return {}
        normalizer = self._normalizer(batch, members)
        self.policy.train()
        if self.loss.top_entropy_quantile < 1:
            normalizer = self._with_entropy_threshold(batch, members, normalizer)
        parts = self._within_memory(lambda: self._backward(batch, members, normalizer), self.size)
        if self.retries and parts:
            self.ranks.average_gradients(self.policy)
        over_ranks = {f"reduce_{how}": partial(self.ranks.reduced, how=how) for how in ("sum", "max")}
        measured = parts or [self._mismatch(batch, members, normalizer)]
        metrics = summarise(measured, **over_ranks) | mismatch(measured, self.loss, self.ranks.gathered)
        metrics["grad_norm"] = self.apply_gradient(metrics, step, details) if parts else 0.0
        advance_schedule(self.schedule)
        return metrics

    def _backward(self, batch: Batch, members: list[int], normalizer: Normalizer) -> list[Metrics]:
        micro = self._micro_batches([p for p in members if self._carries_gradient(batch, p)])
        passes = max(self.ranks.gathered(len(micro)))
        parts: list[Metrics] = []
        for index in range(passes):
            last = index == passes - 1
            self.accelerator.sync_gradients = last
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                # a rank that has no work left still takes part: DDP wants a pass from every rank
                pieces = micro[index] if index < len(micro) else None
                loss, part = self._idle(normalizer) if pieces is None else self._loss(batch, pieces, normalizer)
                # DDP averages over ranks, accelerate over its accumulation steps; the normalizer counts all of them
                loss = loss * normalizer.world_size * self.accelerator.gradient_accumulation_steps
                # under DeepSpeed accelerate's would update at once
                zero.backward(self.wrapped, loss, last=last) if self.zero else self.accelerator.backward(loss)
            parts.append(part)
        return parts

    def _mismatch(self, batch: Batch, members: list[int], normalizer: Normalizer) -> Metrics:
        """How engine and policy differ, of one group, where no group has anything to learn from."""
        with torch.no_grad():
            loss = self._loss(batch, [(members[0], slice(1))], normalizer) if members else self._idle(normalizer)
        return {name: value for name, value in loss[1].items() if name.startswith(MISMATCH)}

    def _carries_gradient(self, batch: Batch, p: int) -> bool:
        """A group whose rollouts all agree moves nothing, unless KL or entropy terms do."""
        return bool(batch.advantages.informative_P[p]) or bool(self.loss.beta or self.loss.entropy_coef)

    def _with_entropy_threshold(self, batch: Batch, members: list[int], normalizer: Normalizer) -> Normalizer:
        """The quantile over every token of this update, on all ranks; takes a pass without gradient."""
        loss = self.loss

        def work() -> np.ndarray:
            micro = self._micro_batches(members)
            entropies = [np.zeros(0, np.float32)]
            for index in range(max(self.ranks.gathered(len(micro)))):
                groups = [group_piece(batch.groups, piece) for piece in micro[index]] if index < len(micro) else []
                with torch.no_grad():
                    scored = self._scored(groups or [self.idle_group])
                if groups and scored.entropy_NC is not None:
                    mask_NC = loss_mask(groups, scored.mask_NC, loss, self.code_ids)
                    entropies.append(scored.entropy_NC[mask_NC].cpu().numpy())
            return np.concatenate(entropies)

        every = torch.from_numpy(np.concatenate(self.ranks.gathered(self._within_memory(work, self.size))))
        threshold, tokens = entropy_threshold([every], [torch.ones_like(every)], loss.top_entropy_quantile)
        return replace(normalizer, entropy_threshold=threshold, entropy_tokens=tokens)

    def _micro_batches(self, members: Sequence[int], size: MicroBatch | None = None) -> list[list[Piece]]:
        size = size or self.size
        return micro_batches(members, size.prompts, size.rollouts, self.options.rollout.num_generations)

    def _loss(self, batch: Batch, pieces: list[Piece], normalizer: Normalizer) -> tuple[torch.Tensor, Metrics]:
        config = self.loss
        groups = [group_piece(batch.groups, piece) for piece in pieces]
        scored = self._scored(groups)
        width, device = scored.logps_NC.shape[1], scored.logps_NC.device
        advantages_N = np.concatenate([batch.advantages.advantages_PG[p][rollouts] for p, rollouts in pieces])
        old_NC = None if batch.old_logps is None else padded(batch.old_logps, pieces, width)
        sampler_NC = padded({p: sampling_logps(batch.groups[p], device) for p, _ in pieces}, pieces, width)
        return policy_loss(
            scored.logps_NC,
            old_NC,
            torch.as_tensor(advantages_N, device=device, dtype=torch.float32),
            loss_mask(groups, scored.mask_NC, config, self.code_ids),
            config,
            normalizer=normalizer,
            ref_logps_NC=None if batch.ref_logps is None else padded(batch.ref_logps, pieces, width),
            entropy_NC=scored.entropy_NC,
            sampler_logps_NC=sampler_NC,
            # old log-probs that sampling recorded cannot show how far it is off
            on_policy=all(self._is_fresh(group) for group in groups) and (old_NC is None or old_NC.equal(sampler_NC)),
            max_completion_length=self.options.rollout.max_completion_length,
        )

    def _idle(self, normalizer: Normalizer) -> tuple[torch.Tensor, Metrics]:
        """A pass whose every token is masked: no gradient, and metrics of the same names."""
        scored = self._scored([self.idle_group])
        zeros_NC = torch.zeros_like(scored.logps_NC)
        return policy_loss(
            scored.logps_NC, None, zeros_NC[:, 0], zeros_NC, self.loss, normalizer=normalizer,
            ref_logps_NC=zeros_NC, entropy_NC=scored.entropy_NC, sampler_logps_NC=zeros_NC,
            max_completion_length=self.options.rollout.max_completion_length,
        )  # fmt: skip

    def _scored(self, groups: Sequence[Group]) -> LogProbs:
        entropy = bool(self.loss.entropy_coef) or self.loss.top_entropy_quantile < 1
        features = self.policy.features([group.prompt for group in groups])
        return self.scorer("logps", groups, features, temperature=self.options.rollout.temperature, entropy=entropy)

    def apply_gradient(self, metrics: Mapping[str, float], step: int, details: Callable[[], dict[str, Any]]) -> float:
        """Clip and step, unless `loss` among the metrics or the gradient are not finite; the gradient's norm.

        `details` are what a dump of a skipped update says.
        """
        limit = self.options.train.max_grad_norm or math.inf
        if self.zero:  # clips and updates in one go, and `self.optimizer` then does nothing
            with memory_explained(self.memory_advice(self.size)):
                norm = zero.step(self.wrapped)
        else:
            norm = float(self.accelerator.clip_grad_norm_(self.policy.parameters(), limit) or 0.0)
        try:
            if math.isfinite(norm) and math.isfinite(metrics["loss"]):
                with memory_explained(self.memory_advice(self.size)):
                    self.optimizer.step()
                self.applied += 1
                self.guard.passed()
                return norm
            self.guard.failed(step, {**metrics, "grad_norm": norm}, details)
        finally:
            self.optimizer.zero_grad()
        return norm

    def _normalizer(self, batch: Batch, members: list[int]) -> Normalizer:
        """Counts over all ranks and micro-batches of this update, and of the generated batch."""

        def lengths(groups: Sequence[Group]) -> list[int]:
            counts_N = np.array([len(r.completion_ids) for group in groups for r in group.rollouts], dtype=int)
            mask_NC = torch.from_numpy(np.arange(counts_N.max(initial=0)) < counts_N[:, None])
            return loss_mask(groups, mask_NC, self.loss, self.code_ids).sum(1).tolist()

        return Normalizer.from_lengths(
            self.ranks.joined(lengths([batch.groups[p] for p in members])),
            generation_tokens=sum(self.ranks.joined(lengths(batch.groups))),
            steps_per_generation=self.options.train.steps_per_generation,
            world_size=self.ranks.world,
        )
