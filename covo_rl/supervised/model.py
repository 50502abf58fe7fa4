"""The model that a cold start begins with, and the folder that it ends in."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import yaml

from covo_rl.models.base import AudioFamily
from covo_rl.prompt import messages
from covo_rl.supervised.config import ColdStartConfig
from covo_rl.train.launch import process_state
from covo_rl.types import Example

STATISTICS_CLIPS = 500
SMALLEST_DEVIATION = 0.05  # log-mel units; a bin that never changes must not be blown up
TOKENIZER_ROWS = 2000


def starting_family(config: ColdStartConfig, rows: Sequence[Example]) -> AudioFamily:
    """The model at `config.model`, or a new small Covo-Audio whose tokenizer is trained on the rows' text.

    A new model starts from `config.seed`; the mean and deviation of its log-mel features are folded into its first
    convolution, so that the front end stays as specified.
    """
    from covo_rl import models

    if config.model is not None:
        return models.load_family(config.model, dtype=config.dtype)
    from covo_rl.models.tiny import fold_feature_statistics, tiny_covo_audio, tiny_tokenizer

    sizes = dict(config.tiny or {})
    tokenizer = tiny_tokenizer(tokenizer_texts(config, rows), sizes.pop("vocab_size", 600))
    model, processor = tiny_covo_audio(tokenizer, **{"seed": config.seed, **sizes})
    built = models.family_class(model.config.model_type)(model, processor)
    sample = [clip for row in rows[:STATISTICS_CLIPS] for clip in row.clips]
    # rows of a cold start from scratch are rendered or read whole, so their clips hold arrays
    features = [built.clip_features(clip.array, clip.sampling_rate) for clip in sample]  # type: ignore[arg-type]
    mels_FM = torch.cat([f.tensors["input_features"] for f in features]).transpose(1, 2).flatten(0, 1)
    fold_feature_statistics(model, mels_FM.mean(0), mels_FM.std(0).clamp(min=SMALLEST_DEVIATION))
    return built


def tokenizer_texts(config: ColdStartConfig, rows: Sequence[Example]) -> list[str]:
    """What the tokenizer of a new model is trained on: everything a prompt or a completion can say."""
    found = ["user", "assistant", "system"]
    for row in rows[:TOKENIZER_ROWS]:
        for message in messages(row, config.prompt):
            found += [part["text"] for part in message["content"] if part["type"] == "text"]
        found += row.choices
        found += [f"{row.columns.get('evidence', '')} So the answer is {choice}." for choice in row.choices]
    return found


def save_checkpoint(
    built: AudioFamily,
    folder: str | Path,
    config: ColdStartConfig,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Weights (in `save_dtype`), processor, `prompt.yaml` for later stages and `cold_start.yaml`, what was run.

    `state_dict` replaces the model's own weights where those are shards. The main process writes.
    """
    if not process_state().is_main_process:
        return
    folder = Path(folder)
    weights = built.model.state_dict() if state_dict is None else state_dict
    dtype = next(iter(weights.values())).dtype if config.save_dtype == "auto" else getattr(torch, config.save_dtype)
    weights = {name: w.to(dtype) if w.is_floating_point() else w for name, w in weights.items()}
    built.model.save_pretrained(folder, state_dict=weights)
    saved = copy.deepcopy(built.model.config)
    saved.dtype = dtype  # save_pretrained names the model's own
    saved.save_pretrained(folder)
    built.processor.save_pretrained(folder)
    for name, content in (
        ("prompt.yaml", dataclasses.asdict(config.prompt)),
        ("cold_start.yaml", dataclasses.asdict(config)),
    ):
        (folder / name).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
