"""All stages in order, from rows to the checkpoint folder."""

from __future__ import annotations

import copy
import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import yaml
from transformers import set_seed

from covo_rl import models
from covo_rl.config import ConfigError
from covo_rl.data.files import write_atomically, write_json
from covo_rl.models.base import AudioFamily
from covo_rl.prompt import messages
from covo_rl.records.lock import FolderLock
from covo_rl.supervised import rows as stage_rows
from covo_rl.supervised.config import ColdStartConfig, Stage
from covo_rl.supervised.trainer import fine_tune, train_tagging
from covo_rl.train.launch import process_state
from covo_rl.train.ranks import Ranks
from covo_rl.types import Example

STATISTICS_CLIPS = 500
SMALLEST_DEVIATION = 0.05  # log-mel units; a bin that never changes must not be blown up
TOKENIZER_ROWS = 2000
#: what tells that a folder holds a checkpoint, or a run
CHECKPOINT = ("cold_start.yaml", "config.json", "*.safetensors", "config.yaml", "run.json")


def run_stages(config: ColdStartConfig) -> Path:
    """Train every stage from `start_stage` on, in a folder that is this process's alone; returns it.

    Raises:
        TeacherError: rows lack what a stage's teacher needs.
        ConfigError: the folder is in use or taken; several sft stages under FSDP or ZeRO, where a model cannot be
            taken from one trainer to the next.
    """
    process_state()
    ranks, lock = Ranks.current(), FolderLock(config.output)
    if problem := ranks.from_main((taken(config) or lock.refusal()) if ranks.main else None):
        raise ConfigError([problem])
    sharded = "true" in (os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("ACCELERATE_USE_DEEPSPEED"))
    if sharded and [stage.kind for stage in config.stages[config.start_stage :]] != ["sft"]:
        count = len(config.stages) - config.start_stage
        raise ConfigError(
            [f"{count} stages under FSDP or ZeRO: give one sft stage, and start the next from its checkpoint"]
        )
    set_seed(config.seed)
    examples = stage_rows.examples(config)
    plan = _plan(config, examples)
    if problem := ranks.from_main(lock.hold() if ranks.main else None):
        raise ConfigError([problem])
    try:
        return _train(config, examples, plan)
    finally:
        lock.release()


def taken(config: ColdStartConfig) -> str | None:
    """Why the stages may not write to their folder, or None."""
    folder = Path(config.output)
    stages = [f"stage-{i}" for i in range(config.start_stage, len(config.stages)) if config.save_stages]
    there = [path.name for name in (*CHECKPOINT, *stages) for path in sorted(folder.glob(name))]
    own = (folder / "cold_start.yaml").is_file() or set(there) <= set(stages)
    if not there or (config.overwrite and own):
        return None
    whose = "an earlier cold start" if own else "something else"
    advice = ", or --overwrite" if own else ""
    return f"{folder} holds {whose} ({', '.join(there[:5])}): choose another --output{advice}"


def _plan(config: ColdStartConfig, examples: Sequence[Example]) -> list[tuple[int, Stage, slice, int, list[str]]]:
    """Number, stage, rows, seed and texts of every stage, drawn before anything trains: a bad row stops the run."""
    start, plan = stage_rows.used_rows(config)[0], []
    for i, stage in list(enumerate(config.stages))[config.start_stage :]:
        part = slice(stage.first_row - start, stage.rows and stage.first_row - start + stage.rows)
        seed = config.seed + 1000 * i
        sft = stage.kind == "sft"
        texts = stage_rows.completions(examples[part], stage, seed, config.completion_column) if sft else []
        plan.append((i, stage, part, seed, texts))
    return plan


def _train(
    config: ColdStartConfig, examples: Sequence[Example], plan: Sequence[tuple[int, Stage, slice, int, list[str]]]
) -> Path:
    family = starting_family(config, examples)
    parameters = sum(p.numel() for p in family.model.parameters())
    _say(f"{len(examples)} rows, {parameters / 1e6:.2f} M parameters")
    rows = stage_rows.prepare_rows(examples, family, config)
    log, weights, folder = [], None, Path(config.output)
    for i, stage, part, seed, texts in plan:
        begun = time.perf_counter()
        if stage.kind == "tagging":
            history = train_tagging(family, rows[part], stage, seed)
        else:
            history, weights = fine_tune(family, rows[part], texts, stage, seed)
        count, seconds = len(rows[part]), time.perf_counter() - begun
        log.append({"stage": i, "kind": stage.kind, "rows": count, "seconds": seconds, "log": history})
        _say(f"stage {i} ({stage.kind}, {count} rows): {seconds:.0f} s")
        if config.save_stages:
            save_checkpoint(family, folder / f"stage-{i}", dataclasses.replace(config, save_dtype="auto"), weights)
    save_checkpoint(family, folder, config, weights)
    if process_state().is_main_process:
        write_json(folder / "training_log.json", log, indent=1)
    _say(f"checkpoint: {folder}")
    return folder


def _say(line: str) -> None:
    if process_state().is_main_process:
        print(line, flush=True)


def starting_family(config: ColdStartConfig, rows: Sequence[Example]) -> AudioFamily:
    """The model at `config.model`, or a new small Covo-Audio whose tokenizer is trained on the rows' text.

    A new model starts from `config.seed`; the mean and deviation of its log-mel features are folded into its first
    convolution, so that the front end stays as specified.
    """
    if config.model is not None:
        return models.load_family(config.model, dtype=config.dtype)
    from covo_rl.models.tiny import fold_feature_statistics, tiny_covo_audio, tiny_tokenizer

    texts = ["user", "assistant", "system"]  # everything that a prompt or a completion can say
    for row in rows[:TOKENIZER_ROWS]:
        for message in messages(row, config.prompt):
            texts += [part["text"] for part in message["content"] if part["type"] == "text"]
        texts += row.choices
        texts += [f"{row.columns.get('evidence', '')} So the answer is {choice}." for choice in row.choices]
    sizes = dict(config.tiny or {})
    tokenizer = tiny_tokenizer(texts, sizes.pop("vocab_size", 600))
    model, processor = tiny_covo_audio(tokenizer, **{"seed": config.seed, **sizes})
    family = models.family_class(model.config.model_type)(model, processor)
    sample = [clip for row in rows[:STATISTICS_CLIPS] for clip in row.clips]
    # rows of a cold start from scratch are rendered or read whole, so their clips hold arrays
    features = [family.clip_features(clip.array, clip.sampling_rate) for clip in sample]  # type: ignore[arg-type]
    mels_FM = torch.cat([f.tensors["input_features"] for f in features]).transpose(1, 2).flatten(0, 1)
    fold_feature_statistics(model, mels_FM.mean(0), mels_FM.std(0).clamp(min=SMALLEST_DEVIATION))
    return family


def save_checkpoint(
    family: AudioFamily, folder: Path, config: ColdStartConfig, state_dict: Mapping[str, torch.Tensor] | None
) -> None:
    """Weights (in `save_dtype`), processor, `prompt.yaml` for later stages and `cold_start.yaml`, what was run.

    `state_dict` replaces the model's own weights where those are shards. The main process writes.
    """
    if not process_state().is_main_process:
        return
    weights = family.model.state_dict() if state_dict is None else state_dict
    dtype = next(iter(weights.values())).dtype if config.save_dtype == "auto" else getattr(torch, config.save_dtype)
    weights = {name: w.to(dtype) if w.is_floating_point() else w for name, w in weights.items()}
    family.model.save_pretrained(folder, state_dict=weights)
    model_config = copy.deepcopy(family.model.config)
    model_config.dtype = dtype  # save_pretrained names the model's own
    model_config.save_pretrained(folder)
    family.processor.save_pretrained(folder)
    for name, options in (("prompt.yaml", config.prompt), ("cold_start.yaml", config)):
        text = yaml.safe_dump(dataclasses.asdict(options), sort_keys=False)
        write_atomically(folder / name, lambda file, text=text: file.write(text))
