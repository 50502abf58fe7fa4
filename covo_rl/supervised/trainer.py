"""Stages of kind `sft`: `fine_tune` teaches completions on any audio family.

It is TRL's SFTTrainer with a collator that carries the audio.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from covo_rl.config import AdapterConfig
from covo_rl.models.base import AudioFamily, ClipFeatures
from covo_rl.models.covo_audio.processing import interleave, make_labels
from covo_rl.models.text import text_ids
from covo_rl.policy.head import head_of
from covo_rl.policy.patterns import part_of
from covo_rl.policy.products import float32_head
from covo_rl.policy.rows import decoder_call
from covo_rl.policy.sharding import layer_classes
from covo_rl.policy.trainable import adamw, param_groups
from covo_rl.prompt import length_problem, position_limit
from covo_rl.records.console import ProgressDisplay
from covo_rl.supervised.checks import trained_parts
from covo_rl.supervised.config import Stage
from covo_rl.supervised.masks import Masks
from covo_rl.supervised.rows import Row, TeacherError, reply_codes
from covo_rl.train.launch import allow_tf32, computes_in_16_bits, on_cpus, process_state
from covo_rl.types import visible

IGNORED = -100
#: options of a stage that TRL has under the same name
SAME_NAME = (
    "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay",
    "max_grad_norm", "gradient_checkpointing",
)  # fmt: skip


class Progress(TrainerCallback):
    """How far a stage is, on the main process: a bar, or a line now and then."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.display = ProgressDisplay("sft", state.max_steps, active=state.is_world_process_zero).__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        losses = (float(entry["loss"]) for entry in reversed(state.log_history) if "loss" in entry)
        self.display.update(state.global_step, next((f"loss {loss:.3f}" for loss in losses), ""))

    def close(self) -> None:
        """Training ended, well or not."""
        if hasattr(self, "display"):
            self.display.__exit__()


class Collator:
    """Row numbers -> a batch, padded on the right: no position looks at padding, whatever the layers are made of.

    `input_ids`, `attention_mask`, `labels` (N, T) int64; labels are -100 on prompt, padding and what the stage does not
    supervise. `clips` are the tensors and slots of all clips one after the other; `masks` hides parts of them.

    Raises TeacherError for texts, and with `stage.speak` codes, that are no ids of this family.
    """

    def __init__(
        self, family: AudioFamily, rows: Sequence[Row], completions: Sequence[str], masks: Masks | None = None,
        stage: Stage | None = None,
    ) -> None:  # fmt: skip
        self.rows, self.pad, self.masks, self.end = rows, family.pad_token_id, masks, family.eos_token_ids[0]
        codes = family.code_ids
        self.first_code = codes.start if codes else family.embedded_ids
        self.supervise: Any = (stage or Stage()).supervise
        speaks = stage is not None and stage.speak
        spoken = reply_codes([row.example for row in rows], len(codes)) if speaks else [[]] * len(rows)
        self.completion_ids = []
        for row, text, said in zip(rows, completions, spoken, strict=True):
            try:
                written = text_ids(family.tokenizer, text)
            except ValueError as error:
                raise TeacherError(f"{visible(row.example.id)}: {error}") from error
            self.completion_ids.append([*interleave(written, said, self.first_code), self.end])
        limit = position_limit(family.model.config)
        lengths = zip(rows, self.completion_ids, strict=True)
        if problems := [
            problem for row, answer in lengths
            for problem in length_problem(row.example.id, len(row.prompt_ids), len(answer), limit)
        ]:  # fmt: skip
            raise TeacherError("\n".join([*problems[:10], f"{len(problems)} rows do not fit"]))

    def __call__(self, items: Sequence[Mapping[str, int]]) -> dict[str, Any]:
        def padded(sequences: list[list[int]], padding: int) -> Tensor:
            rows = [torch.tensor(sequence) for sequence in sequences]
            return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)

        rows = [self.rows[item["row"]] for item in items]
        pairs = [(row.prompt_ids, self.completion_ids[item["row"]]) for row, item in zip(rows, items, strict=True)]
        clips = [self.masks(clip) if self.masks else clip for row in rows for clip in row.clips]
        input_ids = padded([[*prompt, *answer] for prompt, answer in pairs], self.pad)
        mask = padded([[1] * (len(prompt) + len(answer)) for prompt, answer in pairs], 0)
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "labels": make_labels(
                input_ids,
                [len(prompt) for prompt, _ in pairs],
                self.first_code,
                supervise=self.supervise,
                attention_mask=mask,
                end_id=self.end,
            ),
            "clips": [(dict(clip.tensors), clip.slots) for clip in clips],  # what a wrapper of the model looks into
        }


def predicted_logits(
    family: AudioFamily, input_ids: Tensor, attention_mask: Tensor, clips: Sequence[tuple[dict, int]], places: Tensor
) -> Tensor:
    """Logits (M, V) float32 at `places` (N, T) bool of rows (N, T), whose clips are encoded as they are for rollouts.

    Not by the model's own forward: that of many a class pads the clips of a batch to one length, which changes them.
    """
    embeds_NTD = family.embed_tokens(family.embeddable(input_ids))
    if clips:
        audio_SD = torch.cat(family.encode([ClipFeatures(*clip) for clip in clips]))
        slots_NT1 = (input_ids == family.audio_token_id)[..., None]
        embeds_NTD = embeds_NTD.masked_scatter(slots_NT1, audio_SD.to(embeds_NTD))
    positions_NT = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    hidden_NTD = decoder_call(
        family, input_ids, embeds_NTD, attention_mask=attention_mask, position_ids=positions_NT, use_cache=False
    )
    with float32_head(family.model.get_output_embeddings()):
        return head_of(family)(hidden_NTD[places]).float()


@contextmanager
def family_forward(family: AudioFamily) -> Iterator[nn.Module]:
    """Inside, `predicted_logits` is the model's forward, so that whatever wraps the model sees a call of it."""
    family.model.forward = partial(predicted_logits, family)
    try:
        yield family.model
    finally:
        del family.model.forward  # also what accelerate put around it


def completion_loss(model: nn.Module, batch: Mapping[str, Any], num_items: Any = None) -> Tensor:
    """Cross entropy over the completion tokens, summed and divided by `num_items` (default: their number).

    `model` is one inside `family_forward`. Logits are made at the places that predict completion tokens only.
    """
    targets_NT = batch["labels"].roll(-1, 1)  # the first label, of a prompt, is none
    places_NT = targets_NT != IGNORED
    targets_M = targets_NT[places_NT]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "clips")}
    logits_MV = model(**inputs, places=places_NT)
    total = functional.cross_entropy(logits_MV, targets_M.to(logits_MV.device), reduction="sum")
    return total / (len(targets_M) if num_items is None else num_items)


class AudioSFTTrainer(SFTTrainer):
    """TRL's trainer, except that the loss is ours: TRL's calls the bare text backbone, which has no place for audio.

    `groups`, where it is set, makes the optimiser's groups of a model: parts with a learning rate of their own.
    """

    groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None

    def create_optimizer(self, *args, **kwargs):
        if self.groups is not None and self.optimizer is None and self.model is not None:
            self.optimizer = adamw(self.groups(self.model))
        return super().create_optimizer(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = completion_loss(model, inputs, num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss


def fine_tune(
    family: AudioFamily, rows: Sequence[Row], texts: Sequence[str], stage: Stage, seed: int
) -> tuple[list[dict], Mapping[str, Tensor] | None]:
    """Train `stage.train_parts` of `family.model` in place to write `texts[i]` after the prompt of `rows[i]`.

    Returns the trainer's log, and the gathered weights where FSDP left `family.model` in shards.
    """
    parts = trained_parts(family, stage)
    for name, parameter in family.model.named_parameters():
        parameter.requires_grad_(part_of(name, family) in parts)
    device: Any = process_state().device
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(  # nothing is saved or reported by the trainer itself
            output_dir=folder, save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=50,
            logging_first_step=True, per_device_train_batch_size=stage.batch_size, max_steps=stage.steps or -1,
            num_train_epochs=stage.epochs, seed=seed, data_seed=seed, max_length=None,
            use_cpu=on_cpus(),  # ranks without GPUs come together over gloo
            bf16=device.type == "cuda" and torch.cuda.is_bf16_supported(), dataloader_pin_memory=False,
            remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True},
            **{name: getattr(stage, name) for name in SAME_NAME},
        )  # fmt: skip
        # one process on several GPUs would cut ids and audio into equal shares: clips of other rows
        config._n_gpu = min(config.n_gpu, 1)
        family.model._no_split_modules = layer_classes(family.model)  # what FSDP2 wraps
        trainer = AudioSFTTrainer(
            model=family.model,
            args=config,
            data_collator=Collator(family, rows, texts, Masks(stage, seed), stage),  # type: ignore[arg-type]  # TRL asks for its own class
            train_dataset=Dataset.from_dict({"row": list(range(len(rows)))}),
            processing_class=family.tokenizer,
            callbacks=[progress := Progress()],
        )
        if stage.part_learning_rates:
            rates = AdapterConfig(part_learning_rates=stage.part_learning_rates)
            base = {"base_lr": stage.learning_rate, "weight_decay": stage.weight_decay}
            trainer.groups = partial(param_groups, config=rates, family=family, **base)
        trainer.remove_callback(PrinterCallback)  # a dictionary a line
        narrow = computes_in_16_bits(trainer.accelerator, family.model)
        allow_tf32(trainer.accelerator.device, narrow, family.model)
        try:
            with family_forward(family):
                trainer.train()
        finally:
            progress.close()
    state_dict: Any = None
    if trainer.is_fsdp_enabled:
        state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # a collective: every rank takes part
    family.model.requires_grad_(True)
    return trainer.state.log_history, state_dict
