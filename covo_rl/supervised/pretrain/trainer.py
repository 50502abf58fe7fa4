"""The updates of pre-training: packed rows -> log-probs of what is taught -> gradient -> AdamW.

    python recipes/pretrain.py --config recipes/configs/pretrain_tiny.yaml --stage 1 --output runs/stage_1

The loss is a sum over the taught ids of all ranks and micro-batches, divided by their number; with `duplex_weights` sum
and number are by these weights, and those of metrics are not. How rows are split over ranks and passes changes the
rounding alone. An update depends on the state before it and the place in the stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from covo_rl.duplex.ids import DuplexIds
from covo_rl.duplex.supervised import LessonWeights, target_weights
from covo_rl.policy import Policy
from covo_rl.policy.sharding import reshard
from covo_rl.policy.trainable import adamw
from covo_rl.resolve import ConfigError
from covo_rl.speech.training import DivergedError
from covo_rl.supervised.pretrain.config import DUPLEX_KINDS, FLOORED_COSINE, PretrainConfig
from covo_rl.supervised.pretrain.figures import UpdateFigures
from covo_rl.supervised.pretrain.forward import Taught, check_isolation, packed_logps
from covo_rl.supervised.pretrain.freezing import decay_groups, frozen_digests, train_parts
from covo_rl.supervised.pretrain.stream_features import StreamFeatures
from covo_rl.supervised.pretrain.tasks import TASKS
from covo_rl.train.guard import memory_explained
from covo_rl.train.ranks import Ranks
from covo_rl.train.schedule import advance_schedule, schedule_of

if TYPE_CHECKING:
    from covo_rl.models.base import AudioFamily
    from covo_rl.supervised.pretrain.distill import Distiller
    from covo_rl.supervised.pretrain.packing import PackedBatch
    from covo_rl.supervised.pretrain.stream import PackedStream

STREAM_TASKS = [name for name, task in TASKS.items() if task.unit == "stream"]
#: updates in a row without a single label, after which the rows are taken to teach nothing
UNTAUGHT = 100
MEMORY = (
    "out of memory. Lower batch_size and raise gradient_accumulation_steps (same gradient), use "
    "gradient_checkpointing, with recompute: layer if need be, or share the parameters out over ranks "
    "(recipes/accelerate/fsdp2.yaml)"
)


class PretrainTrainer:
    """Owns model, optimiser and schedule; `step` updates are done.

    `policy` is the model as GRPO wraps it, for its packed attention and its hooks under DDP and FSDP2; `wrapped` what
    accelerate made of it. `frozen` are the digests of what does not train, before the first update.
    """

    def __init__(
        self, config: PretrainConfig, family: AudioFamily, stream: PackedStream, accelerator: Accelerator,
        distiller: Distiller | None = None,
    ) -> None:  # fmt: skip
        self.config, self.family, self.stream, self.accelerator = config, family, stream, accelerator
        self.ranks = Ranks(accelerator.process_index, accelerator.num_processes)
        self.trained = train_parts(family, config.train_parts)
        if any(parameter.dtype == torch.float16 for parameter in family.model.parameters()):
            raise ConfigError(["a float16 model cannot train, its gradients vanish: dtype bfloat16, float32 or auto"])
        self.policy = Policy(family, gradient_checkpointing=config.gradient_checkpointing, recompute=config.recompute)
        self.heard = StreamFeatures(self.policy)
        check_isolation(self.policy)
        optimizer = adamw(
            decay_groups(family, self.policy, config.weight_decay),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
        )
        self.wrapped, self.optimizer = accelerator.prepare(self.policy, optimizer)
        floor = {"min_lr_rate": config.final_learning_rate} if config.lr_scheduler_type == FLOORED_COSINE else {}
        self.schedule = schedule_of(
            config.lr_scheduler_type, optimizer, warmup_steps=config.warmup_steps, steps=config.steps, **floor
        )
        self.frozen = frozen_digests(family)
        if distiller is not None:
            distiller.follow(self.policy)
        self.distiller, self.step = distiller, 0
        self._untaught = 0  # updates in a row

    @property
    def rows_an_update(self) -> int:
        """Packed rows over all ranks."""
        return self.config.batch_size * self.config.gradient_accumulation_steps * self.ranks.world

    def next_batches(self) -> list[PackedBatch]:
        """The micro-batches of this rank's next update."""
        return [self.stream.next_batch() for _ in range(self.config.gradient_accumulation_steps)]

    def update(self, batches: Sequence[PackedBatch]) -> dict[str, Any]:
        """One optimiser update; its metrics over all ranks. Rows without a label move no weight: `taught` is 0 then.

        Raises:
            DivergedError: loss or gradient are not finite; the weights are those of before.
            ConfigError: none of the last UNTAUGHT updates, or of all, had a label.
            TrainingStopped: memory ran out.
        """
        self.policy.train()
        with memory_explained(MEMORY):
            line = self._backward(batches)
            for parameter in self.policy.parameters() if line["taught"] else ():
                # without a clip on any rank the adapter's is 0 under DDP: so everywhere, for AdamW still moves it
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            if self.distiller is not None:
                line |= self.distiller.backward(self.step)
            norm = float(self.accelerator.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm) or 0.0)
            line |= {"grad_norm": norm, "learning_rate": self.schedule.get_last_lr()[0]}
            loss = line.get("loss", 0.0)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise DivergedError(
                    f"step {self.step + 1}: loss {loss}, gradient {norm}: not finite. Lower learning_rate or "
                    "max_grad_norm, or raise warmup_steps, and go on from the last checkpoint in a new output"
                )
            self.optimizer.step()
        self.optimizer.zero_grad()
        advance_schedule(self.schedule)
        self.step += 1
        return {"step": self.step, **line}

    def _backward(self, batches: Sequence[PackedBatch]) -> dict[str, Any]:
        """Gradients of all micro-batches, and what was measured on the way."""
        taught = [Taught.of(batch) for batch in batches]
        weights = [self._weights(batch, part) for batch, part in zip(batches, taught, strict=True)]
        total = sum(self.ranks.gathered(sum(float(weight_M.sum()) for weight_M in weights)))
        self._count_untaught(total)
        figures = UpdateFigures(batches[0].tasks, self.family.code_ids)
        for index, (batch, part, weight_M) in enumerate(zip(batches, taught, weights, strict=True)):
            if not total:  # on no rank
                figures.add(batch, part, torch.zeros(0))
                continue
            last = index == len(batches) - 1
            self.accelerator.sync_gradients = last
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                logps_M = self.wrapped(packed_logps, batch, part, self.heard)
                if logps_M.requires_grad:  # of the adapter alone, rows without a clip ask for nothing
                    # DDP and FSDP average over ranks; the sum is over all of them
                    loss = -(logps_M * weight_M.to(logps_M.device)).sum()
                    self.accelerator.backward(loss * (self.ranks.world / total))
            figures.add(batch, part, logps_M)
        return figures.over(self.ranks)

    def _weights(self, batch: PackedBatch, part: Taught) -> torch.Tensor:
        """(M,) float32, what each taught id counts: 1, but for `duplex_weights`."""
        weight_M = torch.ones(len(part.targets))
        streams = [number for number, name in enumerate(batch.tasks) if name in STREAM_TASKS]
        if streams and self.config.duplex_weights:
            weights = LessonWeights(**{**dict.fromkeys(DUPLEX_KINDS, 1.0), **self.config.duplex_weights})
            here_M = torch.isin(part.task, torch.tensor(streams))
            weight_M[here_M] = target_weights(part.targets[here_M], DuplexIds.of(self.family), weights)
        return weight_M

    def _count_untaught(self, total: float) -> None:
        self._untaught = 0 if total else self._untaught + 1
        if self._untaught == min(UNTAUGHT, self.config.steps):
            raise ConfigError([f"step {self.step + 1}: the rows of the last {self._untaught} updates teach nothing: "
                               "every label is masked; covo-rl data inspect shows them"])  # fmt: skip

    @torch.no_grad()
    def measure(self, batches: Iterable[PackedBatch]) -> dict[str, Any]:
        """`eval_loss`, and by task and kind, on held-out rows over all ranks, which have as many batches each."""
        figures: UpdateFigures | None = None
        with self.policy.evaluating():
            for batch in batches:
                taught = Taught.of(batch)
                if figures is None:
                    figures = UpdateFigures(batch.tasks, self.family.code_ids)
                figures.add(batch, taught, self.wrapped(packed_logps, batch, taught, self.heard))
        assert figures is not None, "measured on no rows"
        return {f"eval_{name}": value for name, value in figures.over(self.ranks).items() if name.startswith("loss")}

    def changed_parts(self) -> list[str]:
        """Parts that do not train and are not bit for bit what they were, on any rank; none, if all is right."""
        reshard(self.policy)
        now = frozen_digests(self.family)
        changed = [part for part, digest in self.frozen.items() if now.get(part) != digest]
        return sorted(set(self.ranks.joined(changed)))
