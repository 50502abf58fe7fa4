"""Chain-of-thought SFT on any audio family, by TRL's SFTTrainer with a collator that carries the audio."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
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
        ids = [family.tokenizer(text, add_special_tokens=False)["input_ids"] for text in completions]
        self.completion_ids = [[*text, family.eos_token_ids[0]] for text in ids]

    def __call__(self, items: Sequence[Mapping[str, int]]) -> dict[str, torch.Tensor]:
        rows = [self.rows[item["row"]] for item in items]
        answers = [self.completion_ids[item["row"]] for item in items]
        pairs = list(zip((row.prompt_ids for row in rows), answers, strict=True))
        tensors = {
            "input_ids": _left_padded([[*prompt, *answer] for prompt, answer in pairs], self.pad),
            "attention_mask": _left_padded([[1] * len(prompt) + [1] * len(answer) for prompt, answer in pairs], 0),
            "labels": _left_padded([[IGNORED] * len(prompt) + answer for prompt, answer in pairs], IGNORED),
        }
        clips = [clip for row in rows for clip in row.clips]
        for name in clips[0].tensors if clips else ():
            tensors[name] = torch.cat([clip.tensors[name] for clip in clips])
        return tensors


def _left_padded(sequences: list[list[int]], padding: int) -> torch.Tensor:
    tensors = [torch.tensor(sequence) for sequence in sequences]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=padding, padding_side="left")


def completion_loss(model: nn.Module, batch: Mapping[str, Any], num_items: Any = None) -> torch.Tensor:
    """Cross entropy over the completion tokens, summed and divided by `num_items` (default: their number).

    Logits are asked for at completion positions only, where the model can (`logits_to_keep`).
    """
    labels = batch["labels"]
    span = int((labels != IGNORED).sum(1).max()) + 1
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if "logits_to_keep" in inspect.signature(extract_model_from_parallel(model).forward).parameters:
        inputs["logits_to_keep"] = span
    logits = model(**inputs, use_cache=False).logits[:, -span:-1]
    targets = labels[:, -span + 1 :].to(logits.device)
    total = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / ((targets != IGNORED).sum() if num_items is None else num_items)


class AudioSFTTrainer(SFTTrainer):
    """TRL's trainer, except that the loss is taken through the model's own forward.

    TRL's fused head calls the bare text backbone, which has no place for audio tensors.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = completion_loss(model, inputs, num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss


def fine_tune(
    family: AudioFamily, rows: Sequence[Row], texts: Sequence[str], stage: Stage, seed: int
) -> tuple[list[dict], Mapping[str, torch.Tensor] | None]:
    """Train `stage.train_parts` of `family.model` in place to write `texts[i]` after the prompt of `rows[i]`.

    Returns the trainer's log, and the gathered weights where FSDP or ZeRO left `family.model` in shards.
    """
    prefixes = tuple(family.parts[part] for part in stage.train_parts)
    for name, parameter in family.model.named_parameters():
        parameter.requires_grad_(not prefixes or name.startswith(prefixes))
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
    return trainer.state.log_history, state_dict


#: options of a stage that TRL has under the same name
SAME_NAME = (
    "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay",
    "max_grad_norm", "gradient_checkpointing",
)  # fmt: skip


def sft_config(stage: Stage, seed: int, folder: str) -> SFTConfig:
    """TRL's arguments for a stage; nothing is saved or reported by the trainer itself."""
    return SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=stage.batch_size,
        max_steps=stage.steps or -1,
        num_train_epochs=stage.epochs,
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
        **{name: getattr(stage, name) for name in SAME_NAME},
    )
