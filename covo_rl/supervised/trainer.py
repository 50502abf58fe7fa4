"""Chain-of-thought SFT on any audio family, by TRL's SFTTrainer with a collator that carries the audio."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from covo_rl.models.base import AudioFamily
from covo_rl.supervised.config import Stage
from covo_rl.supervised.rows import Row
from covo_rl.train.launch import on_cpus

IGNORED = -100


class Collator:
    """Row numbers -> a batch, padded on the left so that every completion ends at the right edge.

    `input_ids`, `attention_mask`, `labels` (N, T) int64; labels are -100 on prompt and padding. Audio tensors keep the
    names the family's model takes, rows of all clips one after the other.
    """

    def __init__(self, family: AudioFamily, rows: Sequence[Row], completions: Sequence[str]) -> None:
        self.rows = rows
        self.pad = family.pad_token_id
        end = family.eos_token_ids[0]
        self.completion_ids = [[*_text_ids(family, text), end] for text in completions]

    def __call__(self, items: Sequence[Mapping[str, int]]) -> dict[str, torch.Tensor]:
        numbers = [item["row"] for item in items]
        prompts = [self.rows[i].prompt_ids for i in numbers]
        answers = [self.completion_ids[i] for i in numbers]
        width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids, mask, labels = [], [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            padding = width - len(prompt) - len(answer)
            ids.append([self.pad] * padding + [*prompt, *answer])
            mask.append([0] * padding + [1] * (width - padding))
            labels.append([IGNORED] * (width - len(answer)) + answer)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        tensors = {name: torch.tensor(values) for name, values in batch.items()}
        clips = [clip for i in numbers for clip in self.rows[i].clips]
        for name in clips[0].tensors if clips else ():
            tensors[name] = torch.cat([clip.tensors[name] for clip in clips])
        return tensors


def _text_ids(family: AudioFamily, text: str) -> list[int]:
    return family.tokenizer(text, add_special_tokens=False)["input_ids"]


def completion_loss(model: nn.Module, batch: Mapping[str, Any], num_items: Any = None) -> torch.Tensor:
    """Cross entropy over the completion tokens, summed and divided by `num_items` (default: their number).

    Logits are asked for at completion positions only, where the model can (`logits_to_keep`).
    """
    labels = batch["labels"]
    span = int((labels != IGNORED).sum(1).max()) + 1
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if "logits_to_keep" in inspect.signature(_unwrapped(model).forward).parameters:
        inputs["logits_to_keep"] = span
    logits = model(**inputs, use_cache=False).logits[:, -span:-1]
    targets = labels[:, -span + 1 :].to(logits.device)
    total = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / ((targets != IGNORED).sum() if num_items is None else num_items)


def _unwrapped(model: nn.Module) -> nn.Module:
    while hasattr(model, "module"):
        model = model.module  # type: ignore[assignment]  # a wrapper's inner module
    return getattr(model, "base_model", model) if hasattr(model, "peft_config") else model


class AudioSFTTrainer(SFTTrainer):
    """TRL's trainer, except that the loss is taken through the model's own forward.

    TRL's fused head calls the bare text backbone, which has no place for audio tensors.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = completion_loss(model, inputs, num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss


def set_trained_parts(family: AudioFamily, parts: Sequence[str]) -> None:
    """Only parameters of these parts (names of `family.parts`) ask for gradients."""
    prefixes = tuple(family.parts[part] for part in parts)
    for name, parameter in family.model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))


@dataclass(frozen=True)
class Trained:
    """`log` of the trainer; `state_dict`: the gathered weights where FSDP or ZeRO left `family.model` in shards."""

    log: list[dict]
    state_dict: Mapping[str, torch.Tensor] | None = None


def fine_tune(family: AudioFamily, rows: Sequence[Row], texts: Sequence[str], stage: Stage, seed: int) -> Trained:
    """Train `family.model` in place to write `texts[i]` after the prompt of `rows[i]`."""
    if stage.train_parts:
        set_trained_parts(family, stage.train_parts)
    with tempfile.TemporaryDirectory() as folder:
        trainer = AudioSFTTrainer(
            model=family.model,
            args=sft_config(stage, seed, folder),
            data_collator=Collator(family, rows, texts),  # type: ignore[arg-type]  # TRL asks for its own class
            train_dataset=Dataset.from_dict({"row": list(range(len(rows)))}),
            processing_class=family.tokenizer,
        )
        trainer.train()
    state_dict: Any = None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # a collective: every rank takes part
    family.model.requires_grad_(True)
    return Trained(trainer.state.log_history, state_dict)


def sft_config(stage: Stage, seed: int, folder: str) -> SFTConfig:
    """TRL's arguments for a stage; nothing is saved or reported by the trainer itself."""
    return SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=stage.batch_size,
        gradient_accumulation_steps=stage.gradient_accumulation_steps,
        max_steps=stage.steps or -1,
        num_train_epochs=stage.epochs,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=stage.lr_scheduler_type,
        warmup_steps=stage.warmup_steps,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        gradient_checkpointing=stage.gradient_checkpointing,
        seed=seed,
        data_seed=seed,
        use_cpu=on_cpus(),  # ranks without GPUs come together over gloo
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        logging_steps=50,
        logging_first_step=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
