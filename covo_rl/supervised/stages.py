"""All stages in order, from rows to the checkpoint folder."""

from __future__ import annotations

import dataclasses
import inspect
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from transformers import set_seed

from covo_rl import models
from covo_rl.audio import ClipStore
from covo_rl.config import ConfigError, unknown_names
from covo_rl.data import DataError
from covo_rl.data.files import write_atomically, write_json
from covo_rl.data.terminal import say
from covo_rl.export.exporting import torch_dtype
from covo_rl.export.merged import write_merged
from covo_rl.models.base import AudioFamily
from covo_rl.models.builtin import resolve_model
from covo_rl.models.text import special_token_notes
from covo_rl.models.tiny import fold_feature_statistics, tiny_covo_audio, tiny_tokenizer
from covo_rl.policy.products import HALF
from covo_rl.policy.trainable import training_dtype
from covo_rl.prompt import PromptError, messages, written_texts
from covo_rl.records.console import ProgressDisplay
from covo_rl.records.lock import FolderLock
from covo_rl.supervised import rows as stage_rows
from covo_rl.supervised.checks import fact_problems, trained_parts, unreadable
from covo_rl.supervised.config import ColdStartConfig, Stage, steps_of
from covo_rl.supervised.held_out import held_out_figures
from covo_rl.supervised.tagging import train_tagging
from covo_rl.supervised.trainer import Collator, fine_tune
from covo_rl.train.launch import check_precision, process_state
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
        ConfigError: the folder is in use or taken; a launch with DeepSpeed; several sft stages under FSDP, where a
            model cannot be taken from one trainer to the next.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise ConfigError(["supervised stages never ran under DeepSpeed: launch with recipes/accelerate/fsdp2.yaml"])
    check_precision()
    process_state()
    ranks, lock = Ranks.current(), FolderLock(config.output)
    problem = ranks.from_main((taken(config) or lock.refusal()) if ranks.main else None)
    if config.dry_run:
        _say(f"a start would be refused: {problem}" if problem else f"to {config.output}")
        return _run_stages(config)
    if problem := problem or ranks.from_main(lock.hold() if ranks.main else None):
        raise ConfigError([problem])
    try:
        return _run_stages(config)
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


def _run_stages(config: ColdStartConfig) -> Path:
    stages = list(enumerate(config.stages))[config.start_stage :]
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and [stage.kind for _, stage in stages] != ["sft"]:
        raise ConfigError(
            [f"{len(stages)} stages under FSDP: give one sft stage, and start the next from its checkpoint"]
        )
    check_model(config)
    if config.model is not None:
        dtype, notes = training_dtype(config.dtype, resolve_model(config.model), full=True)
        config = dataclasses.replace(config, dtype=dtype)
        for note in notes:
            _say(note)
    set_seed(config.seed)
    _say(f"reading {config.data or f'{config.rows} built-in questions'}")
    clips = ClipStore(memory_mb=64)
    examples, held_out = stage_rows.stage_examples(config, clips)
    plan = _plan(config, stages, examples, held_out)
    family = starting_family(config, examples, clips)
    parameters = sum(p.numel() for p in family.model.parameters())
    _say(f"{len(examples)} rows, {len(held_out)} held out, {parameters / 1e6:.2f} M parameters")
    if any(p.dtype in HALF for p in family.model.parameters()):
        _say(f"dtype {config.dtype}: updates below 1/256 of a weight are lost; auto or float32 keeps them")
    targets = [pair for step in plan for pair in zip((e.id for e in examples[step.part]), step.texts, strict=False)]
    for note in special_token_notes([*written_texts(examples, config.prompt), *targets], family.tokenizer):
        _say(note)
    used = examples[:8] if config.dry_run else examples
    rows = stage_rows.prepare_rows(used, family, config, partial(with_progress, "preparing clips"), clips)
    for step in plan:
        trained_parts(family, step.stage)
        if step.stage.kind == "sft":
            texts = step.texts[: len(rows[step.part])]
            Collator(family, rows[step.part], texts, stage=step.stage)  # what does not fit is said now
    if config.dry_run:
        for i, stage, part, *_ in plan:
            _say(f"stage {i} ({stage.kind}): {len(examples[part])} rows, {steps_of(stage, len(examples[part]))} steps")
        _say("dry run: rows, teachers and model are fine; nothing was trained or written")
        return Path(config.output)
    return _train(config, plan, family, rows, held_out, clips)


class Planned(NamedTuple):
    """A stage, the rows that it takes, its seed and the texts that it teaches."""

    number: int
    stage: Stage
    part: slice
    seed: int
    texts: list[str]


def _plan(
    config: ColdStartConfig,
    stages: Sequence[tuple[int, Stage]],
    examples: Sequence[Example],
    held_out: Sequence[Example],
) -> list[Planned]:
    """Texts are drawn before anything trains, so that a bad row stops the run at once."""
    start = stage_rows.used_rows(config)[0]
    plan, problems = [], []
    for i, stage in stages:
        part = slice(stage.first_row - start, stage.rows and stage.first_row - start + stage.rows)
        seed = config.seed + 1000 * i
        sft = stage.kind == "sft"
        texts = stage_rows.completions(examples[part], stage, seed, config.completion_column) if sft else []
        problems += [] if sft else [*fact_problems(examples[part]), *fact_problems(held_out)]
        if odd := unreadable(examples[part], texts, stage) if sft else []:
            _say(f"note: {len(odd)} of {len(texts)} completions do not follow the grammar, for example {odd[0]}")
        plan.append(Planned(i, stage, part, seed, texts))
    if problems:
        raise DataError(config.data or "built-in questions", problems)
    return plan


def _train(
    config: ColdStartConfig, plan: Sequence[Planned], family: AudioFamily, rows: Sequence[stage_rows.Row],
    held_out: Sequence[Example], clips: ClipStore,
) -> Path:  # fmt: skip
    """All stages, each measured on the held-out rows; the checkpoint is written before the last is."""
    log: list[dict[str, Any]] = []
    weights, folder, measured = None, Path(config.output), None
    taught = [text for step in plan for text in step.texts]
    for i, stage, part, seed, texts in plan:
        begun = time.perf_counter()
        count = len(rows[part])
        _say(f"stage {i} ({stage.kind}): {count} rows, {steps_of(stage, count)} steps")
        if stage.kind == "tagging":
            unseen = stage_rows.prepare_rows(held_out, family, config, clips=clips)
            history = train_tagging(family, rows[part], stage, seed, unseen)
        else:
            history, weights = fine_tune(family, rows[part], texts, stage, seed)
        seconds = time.perf_counter() - begun
        log.append({"stage": i, "kind": stage.kind, "rows": count, "seconds": seconds, "log": history})
        _say(f"stage {i} ({stage.kind}, {count} rows): {seconds:.0f} s")
        last = i == plan[-1].number
        if config.save_stages:
            save_checkpoint(family, folder / f"stage-{i}", dataclasses.replace(config, save_dtype="auto"), weights)
        if last:
            save_checkpoint(family, folder, config, weights)
        if facts := history[-1].get("held_out") if stage.kind == "tagging" else None:
            _say(f"stage {i}, held out: facts named {facts}")
        # of sharded weights there is no whole model here; before any text was taught there are no answers
        if held_out and weights is None and (stage.kind == "sft" or last) and process_state().is_main_process:
            measured = log[-1]["held_out"] = _measured(family, held_out, taught, config, clips, f"stage {i}, ")
    if process_state().is_main_process:
        if measured is not None:
            log.append({"held_out": measured})
        write_json(folder / "training_log.json", log, indent=1)
    _say(f"checkpoint: {folder}")
    return folder


def _measured(
    family: AudioFamily, held_out: Sequence[Example], texts: Sequence[str], config: ColdStartConfig, clips: ClipStore,
    stage: str,
) -> dict[str, float | int | str | None]:  # fmt: skip
    """What the model makes of the held-out rows, with twice the room of the longest text that it was taught; said."""
    longest = max((len(family.tokenizer(text)["input_ids"]) for text in texts), default=0)
    try:
        figures = held_out_figures(family, held_out, config.prompt, clips, length=2 * longest or 64)
    except PromptError as error:  # a clip has changed since it was held out; the checkpoint is none the worse
        _say(f"{stage}held out: not measured: {error}")
        return {"rows": len(held_out), "error": str(error)}
    _say(f"{stage}held out: {figures['rows']} rows, answers right {figures['accuracy']}, format {figures['format']}")
    return {**figures}


def _say(line: str) -> None:
    if process_state().is_main_process:
        say(line)


def check_model(config: ColdStartConfig) -> None:
    """Raises ConfigError or OSError for a model that is not there, or sizes that a new one does not have."""
    path = None if config.model is None else resolve_model(config.model)
    models.use_family(config.family, path)
    if path is not None:
        models.model_config(path)
        if Path(path).resolve() == Path(config.output).resolve():
            raise ConfigError([f"output {config.output} is the model that the stages start from: choose another"])
        return
    known = ["vocab_size", *list(inspect.signature(tiny_covo_audio).parameters)[1:]]
    if problems := unknown_names([name for name in config.tiny or {} if name not in known], known, "tiny"):
        raise ConfigError(problems)


def with_progress(title: str, rows: Sequence[Example]) -> Iterator[Example]:
    """The rows, one after the other, with a bar or lines that say how far it is."""
    with ProgressDisplay(title, len(rows), active=process_state().is_main_process) as display:
        for done, row in enumerate(rows, 1):
            yield row
            display.update(done, "")


def starting_family(config: ColdStartConfig, rows: Sequence[Example], clips: ClipStore) -> AudioFamily:
    """The model at `config.model`, or a new small Covo-Audio whose tokenizer is trained on the rows' text.

    A new model starts from `config.seed`; the mean and deviation of its log-mel features are folded into its first
    convolution, so that the front end stays as specified.
    """
    if config.model is not None:
        allowed = config.trust_remote_code
        return models.load_family(resolve_model(config.model), dtype=config.dtype, trust_remote_code=allowed)
    texts = ["user", "assistant", "system"]  # everything that a prompt or a completion can say
    for row in rows[:TOKENIZER_ROWS]:
        for message in messages(row, config.prompt):
            texts += [part["text"] for part in message["content"] if part["type"] == "text"]
        texts += row.choices
        texts += [text for text in [row.columns.get(config.completion_column)] if isinstance(text, str)]
        texts += [f"{row.columns.get('evidence', '')} So the answer is {choice}." for choice in row.choices]
    sizes = dict(config.tiny or {})
    try:
        tokenizer = tiny_tokenizer(texts, sizes.pop("vocab_size", 600))
        model, processor = tiny_covo_audio(tokenizer, **{"seed": config.seed, **sizes})
    except ValueError as error:  # sizes that do not go together
        raise ConfigError([f"tiny: {error}"]) from error
    family = models.family_class(model.config.model_type)(model, processor)
    sample = [clip for row in rows[:STATISTICS_CLIPS] for clip in row.clips]
    features = [family.clip_features(*clips.waveform(clips.key(clip))) for clip in sample]
    if not features:
        raise ConfigError(["a new tiny model needs rows with audio: the mean of its features is taken from them"])
    mels_FM = torch.cat([f.tensors["input_features"] for f in features]).transpose(1, 2).flatten(0, 1)
    fold_feature_statistics(model, mels_FM.mean(0), mels_FM.std(0).clamp(min=SMALLEST_DEVIATION))
    return family


def save_checkpoint(
    family: AudioFamily, folder: Path, config: ColdStartConfig, state_dict: Mapping[str, torch.Tensor] | None
) -> None:
    """The model (in `save_dtype`), `prompt.yaml` for later stages and `cold_start.yaml`, what was run.

    `state_dict` replaces the model's own weights where those are shards. The main process writes.
    """
    if not process_state().is_main_process:
        return
    folder.mkdir(parents=True, exist_ok=True)
    dtype = torch_dtype(config.save_dtype) or next(family.model.parameters()).dtype
    write_merged(family, folder, dtype, state=state_dict)
    for name, options in (("prompt.yaml", config.prompt), ("cold_start.yaml", config)):
        text = yaml.safe_dump(dataclasses.asdict(options), sort_keys=False)
        write_atomically(folder / name, lambda file, text=text: file.write(text))
