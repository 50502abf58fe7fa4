"""One optimiser update of a generated batch: micro-batches of whole groups or of one's rollouts, loss, gradient, step.

Loss normalisers are counts over all micro-batches and ranks, so their number changes the memory, not the gradient.
An update that is not finite is skipped, dumped and counted; with `oom_retry` one that runs out of memory is repeated,
from the same random state, in micro-batches of half the size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from covo_rl.algo.loss import Normalizer, entropy_threshold, policy_loss, summarise
from covo_rl.algo.metrics import Metrics
from covo_rl.config import Options
from covo_rl.policy import Policy
from covo_rl.train.batch import Batch, Piece, group_piece, loss_mask, micro_batches, padded, sampling_logps
from covo_rl.train.checkpoint.state import load_random_state, random_state
from covo_rl.train.guard import (
    StepGuard,
    TrainingStopped,
    is_out_of_memory,
    memory_freed,
    not_finite_parameters,
    out_of_memory_advice,
)
from covo_rl.types import Group


def gathered(accelerator: Accelerator, values: list[Any]) -> list[Any]:
    """The lists of all ranks, joined in rank order."""
    return gather_object(values) if accelerator.num_processes > 1 else list(values)


def _finite_logps(batch: Batch, chosen: Sequence[int]) -> bool:
    """Whether sampling, old and reference log-probs of these groups are all finite."""
    sampled = all(math.isfinite(x) for p in chosen for r in batch.groups[p].rollouts for x in r.logps)
    stored = [logps[p] for logps in (batch.old_logps, batch.ref_logps) if logps is not None for p in chosen]
    return sampled and all(bool(torch.isfinite(logps_GC).all()) for logps_GC in stored)


class Updater:
    """Owns the gradient: everything between a generated batch and changed parameters.

    `spare` is a group that a rank without groups of its own passes through the model, masked, so that DDP's
    collectives find every rank.
    """

    def __init__(
        self,
        options: Options,
        policy: Policy,
        wrapped: torch.nn.Module,
        optimizer: Any,
        schedule: Any,
        accelerator: Accelerator,
        guard: StepGuard,
        spare: Group,
    ) -> None:
        self.options = options
        self.policy = policy
        self.wrapped = wrapped
        self.optimizer = optimizer
        self.schedule = schedule
        self.accelerator = accelerator
        self.guard = guard
        self.spare = spare
        self.applied = 0
        self.micro_batch_prompts = options.train.micro_batch_prompts
        self.micro_batch_rollouts = options.train.micro_batch_rollouts or options.rollout.num_generations

    def update(self, batch: Batch, chosen: list[int], step: int) -> dict[str, float]:
        """Update with the chosen groups of this rank; returns metrics over all ranks.

        Raises:
            TrainingStopped: memory ran out, or several updates in a row were not finite.
        """
        if not all(gathered(self.accelerator, [_finite_logps(batch, chosen)])):
            self.guard.failed(step, {"log_probs": math.nan}, lambda: self._details(batch, chosen))
            self.schedule.step()
            return {}
        normalizer = self._normalizer(batch, chosen)
        self.policy.train()
        parts = self._backward_within_memory(batch, chosen, normalizer)
        over_ranks = {f"reduce_{how}": partial(self._reduced, how=how) for how in ("sum", "max")}
        metrics = summarise(parts, **over_ranks)
        metrics["grad_norm"] = self._apply(batch, chosen, metrics, step) if parts else 0.0
        self.schedule.step()
        return metrics

    def _backward_within_memory(self, batch: Batch, chosen: list[int], normalizer: Normalizer) -> list[Metrics]:
        """All micro-batches, if need be again in smaller ones. One process only: ranks would wait for each other."""
        retry = self.options.train.oom_retry and self.accelerator.num_processes == 1
        before = random_state() if retry else None
        while True:
            try:
                return self._backward(batch, chosen, normalizer)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if before is None or self.micro_batch_prompts * self.micro_batch_rollouts == 1:
                    raise TrainingStopped(self.memory_advice()) from error
            if self.micro_batch_prompts > 1:
                self.micro_batch_prompts //= 2
            else:
                self.micro_batch_rollouts //= 2
            self.optimizer.zero_grad()
            load_random_state(*before)
            memory_freed()

    def memory_advice(self) -> str:
        """What to lower when a pass over completions runs out of memory."""
        one = self.accelerator.num_processes == 1
        return out_of_memory_advice(
            self.micro_batch_prompts, self.micro_batch_rollouts,
            can_retry=one and not self.options.train.oom_retry,
            no_retry=not one and self.options.train.oom_retry,
        )  # fmt: skip

    def _backward(self, batch: Batch, chosen: list[int], normalizer: Normalizer) -> list[Metrics]:
        if self.options.loss.top_entropy_quantile < 1:
            normalizer = self._with_entropy_threshold(batch, chosen, normalizer)
        micro = self._micro_batches([p for p in chosen if self._carries_gradient(batch, p)])
        passes = max(gathered(self.accelerator, [len(micro)]))
        parts: list[Metrics] = []
        for index in range(passes):
            last = index == passes - 1
            self.accelerator.sync_gradients = last
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                # a rank that has no work left still takes part: DDP wants a pass from every rank
                loss, part = (
                    self._loss(batch, micro[index], normalizer) if index < len(micro) else self._idle(normalizer)
                )
                # DDP averages over ranks, the normalizer already counts all of them
                self.accelerator.backward(loss * normalizer.world_size)
            parts.append(part)
        return parts

    def _with_entropy_threshold(self, batch: Batch, chosen: list[int], normalizer: Normalizer) -> Normalizer:
        """The quantile over every token of this update, on all ranks; takes a pass without gradient."""
        loss = self.options.loss
        micro = self._micro_batches(chosen)
        entropies: list[float] = []
        for index in range(max(gathered(self.accelerator, [len(micro)]))):
            groups = [group_piece(batch.groups, piece) for piece in micro[index]] if index < len(micro) else []
            with torch.no_grad():
                scored = self._scored(groups or [self.spare])
            if groups:
                mask_NC = loss_mask(groups, scored.mask_NC, loss.mask_truncated_completions)
                entropies += scored.entropy_NC[mask_NC].tolist()
        every = torch.tensor([gathered(self.accelerator, entropies)])
        threshold, tokens = entropy_threshold([every], [torch.ones_like(every)], loss.top_entropy_quantile)
        return replace(normalizer, entropy_threshold=threshold, entropy_tokens=tokens)

    def _micro_batches(self, groups: list[int]) -> list[list[Piece]]:
        generations = self.options.rollout.num_generations
        return micro_batches(groups, self.micro_batch_prompts, self.micro_batch_rollouts, generations)

    def _loss(self, batch: Batch, pieces: list[Piece], normalizer: Normalizer) -> tuple[torch.Tensor, Metrics]:
        groups = [group_piece(batch.groups, piece) for piece in pieces]
        scored = self._scored(groups)
        width, device = scored.logps_NC.shape[1], scored.logps_NC.device
        loss_config = self.options.loss
        sampler_logps = None
        if loss_config.sampler_correction:
            sampler_logps = padded({p: sampling_logps(batch.groups[p], device) for p, _ in pieces}, pieces, width)
        return policy_loss(
            scored.logps_NC,
            None if batch.old_logps is None else padded(batch.old_logps, pieces, width),
            torch.as_tensor(
                np.concatenate([batch.advantages.advantages_PG[p][rollouts] for p, rollouts in pieces]),
                device=device,
                dtype=torch.float32,
            ),
            loss_mask(groups, scored.mask_NC, loss_config.mask_truncated_completions),
            loss_config,
            normalizer=normalizer,
            ref_logps_NC=None if batch.ref_logps is None else padded(batch.ref_logps, pieces, width),
            entropy_NC=scored.entropy_NC,
            sampler_logps_NC=sampler_logps,
            max_completion_length=self.options.rollout.max_completion_length,
        )

    def _idle(self, normalizer: Normalizer) -> tuple[torch.Tensor, Metrics]:
        """A pass whose every token is masked: no gradient, and metrics of the same names."""
        scored = self._scored([self.spare])
        zeros_NC = torch.zeros_like(scored.logps_NC)
        return policy_loss(
            scored.logps_NC, None, zeros_NC[:, 0], zeros_NC, self.options.loss, normalizer=normalizer,
            ref_logps_NC=zeros_NC, entropy_NC=scored.entropy_NC, sampler_logps_NC=zeros_NC,
            max_completion_length=self.options.rollout.max_completion_length,
        )  # fmt: skip

    def _scored(self, groups: Sequence[Group]) -> Any:
        entropy = bool(self.options.loss.entropy_coef) or self.options.loss.top_entropy_quantile < 1
        features = self.policy.features([group.prompt for group in groups])
        return self.wrapped("logps", groups, features, temperature=self.options.rollout.temperature, entropy=entropy)

    def _apply(self, batch: Batch, chosen: list[int], metrics: dict[str, float], step: int) -> float:
        """Clip and step, unless loss or gradient are not finite."""
        limit = self.options.train.max_grad_norm or math.inf
        norm = float(self.accelerator.clip_grad_norm_(self.policy.parameters(), limit) or 0.0)
        try:
            if math.isfinite(norm) and math.isfinite(metrics["loss"]):
                self.optimizer.step()
                self.applied += 1
                self.guard.passed()
            else:
                self.guard.failed(step, {**metrics, "grad_norm": norm}, lambda: self._details(batch, chosen))
        finally:
            self.optimizer.zero_grad()
        return norm

    def _details(self, batch: Batch, chosen: list[int]) -> dict[str, Any]:
        rows = [
            {
                "id": batch.groups[p].prompt.example.id,
                "advantages": batch.advantages.advantages_PG[p].tolist(),
                "completions": [r.text for r in batch.groups[p].rollouts],
                "sampling_logps": [str(min(r.logps, default=0.0)) for r in batch.groups[p].rollouts],
            }
            for p in chosen
        ]
        return {"rows": rows, "not_finite_in": not_finite_parameters(self.policy)}

    def _carries_gradient(self, batch: Batch, p: int) -> bool:
        """A group whose rollouts all agree moves nothing, unless KL or entropy terms do."""
        return bool(batch.advantages.informative_P[p]) or bool(self.options.loss.beta or self.options.loss.entropy_coef)

    def _normalizer(self, batch: Batch, chosen: list[int]) -> Normalizer:
        """Counts over all ranks and micro-batches of this update, and of the generated batch."""
        masked = self.options.loss.mask_truncated_completions

        def lengths(groups: Sequence[Group]) -> list[int]:
            cut = [[masked and r.stop_reason == "length" for r in group.rollouts] for group in groups]
            return [0 if skip else len(r.completion_ids)
                    for group, skips in zip(groups, cut, strict=True)
                    for r, skip in zip(group.rollouts, skips, strict=True)]  # fmt: skip

        return Normalizer.from_lengths(
            gathered(self.accelerator, lengths([batch.groups[p] for p in chosen])),
            generation_tokens=sum(gathered(self.accelerator, lengths(batch.groups))),
            steps_per_generation=self.options.train.steps_per_generation,
            world_size=self.accelerator.num_processes,
        )

    def _reduced(self, values: torch.Tensor, how: str) -> torch.Tensor:
        """1-D float64 CPU tensor -> elementwise sum or maximum over ranks."""
        stacked = torch.tensor(gathered(self.accelerator, [values.tolist()]), dtype=values.dtype)
        return stacked.sum(0) if how == "sum" else stacked.amax(0)
