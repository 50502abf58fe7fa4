"""Options of the cold start: one YAML, checked as a whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from covo_rl.config import SCHEDULES, ConfigError, PromptConfig, typed_values, value_problems
from covo_rl.resolve import read_yaml
from covo_rl.types import Supervise

HELD_OUT = 0.05
PARTS = ("encoder", "audio_adapter", "llm", "lm_head")
TEACHERS = ("evidence", "answer", "column")
DTYPES = ("auto", "float32", "bfloat16")  # to train in
#: interval -> numbers of a stage that must lie in it
STAGE_LIMITS = {
    "[1, inf)": "rows steps batch_size gradient_accumulation_steps",
    "(0, inf)": "epochs learning_rate",
    "[0, inf)": "first_row warmup_steps weight_decay max_grad_norm mask_bins mask_frames",
}


@dataclass
class Stage:
    """One pass over rows. `tagging` teaches encoder and adapter the facts of a clip; `sft` teaches completions.

    Teachers of `sft`: `evidence` writes the row's true evidence and a conclusion that is right with probability
    `right` (a wrong one is drawn evenly from the other options); with probability `broken` the format is damaged, with
    probability `inconsistent` the answer contradicts the conclusion. `answer` writes `<answer>..</answer>` without any
    reasoning, right with probability `right`. `column` takes the row's own completion.

    `part_learning_rates` (audio_adapter=1e-5, or a mapping) gives parts of the model a rate of their own.

    With `speak` the codes in the row's column `codes` follow the text, 5 text ids to 15 codes; `supervise` says what of
    a completion is taught: all, text, codes, or spoken, which is codes and the end of the turn.
    """

    kind: str = "sft"
    teacher: str = "evidence"
    right: float = 1.0
    broken: float = 0.0
    inconsistent: float = 0.0
    speak: bool = False
    supervise: str = "all"
    first_row: int = 0
    rows: int | None = None
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 32
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    part_learning_rates: str | None = None
    lr_scheduler_type: str = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    mask_bins: int = 0
    mask_frames: int = 0
    train_parts: list[str] = field(default_factory=lambda: list(PARTS))


@dataclass
class ColdStartConfig:
    """`rows` questions are rendered from `synth_seed` where `data` is not given.

    `family` is one of your own (`./mine.py:Class`); by default the checkpoint's `model_type` says which.
    `trust_remote_code` runs code that ships with the checkpoint.

    `dtype: auto` is the checkpoint's, but float32 where that has 16 bits: whole parts train. `feature_memory_mb` bounds
    the audio features that each process keeps; others are made again in every epoch.

    With `save_stages` every stage leaves `output/stage-N`; `start_stage: N + 1` with `model: output/stage-N` goes on
    from there with the same rows and seeds. `overwrite` replaces the checkpoint of an earlier cold start in `output`.
    `held_out` is the share of `data` (default 0.05), by clip, that no stage
    sees and that every stage is measured on; of the built-in set nothing is held out unless asked for. `eval_data`,
    a file of rows with clips in `eval_audio_dir` (default `audio_dir`), takes its place: speakers or devices that no
    row of `data` has. `columns` (`question=prompt,answer=label`) names the fields of rows that use others, and
    `eval_columns` those of `eval_data` (default `columns`). `dry_run` checks rows, teachers and model, and trains
    nothing.
    """

    output: str = "runs/cold_start"
    overwrite: bool = False
    seed: int = 0
    model: str | None = None
    family: str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    save_dtype: str = "auto"
    tiny: dict[str, Any] | None = None
    data: str | None = None
    audio_dir: str | None = None
    completion_column: str = "completion"
    rows: int = 0
    held_out: float | None = None
    eval_data: str | None = None
    eval_audio_dir: str | None = None
    columns: str | None = None
    eval_columns: str | None = None
    feature_memory_mb: float = 2048
    synth_seed: int = 0
    prompt: PromptConfig = field(default_factory=PromptConfig)
    save_stages: bool = False
    start_stage: int = 0
    dry_run: bool = False
    stages: list[Stage] = field(default_factory=lambda: [Stage(teacher="column")])

    @property
    def held_out_share(self) -> float:
        own = self.data is not None and self.eval_data is None
        return (HELD_OUT if own else 0.0) if self.held_out is None else self.held_out


def load_config(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> ColdStartConfig:
    """YAML file and overrides (those that are None are left out) -> checked options.

    Raises:
        ConfigError: unknown names with the nearest valid one, impossible values, contradictions - all at once.
    """
    content = {} if path is None else read_yaml(path)
    content.update({name: value for name, value in (overrides or {}).items() if value is not None})
    problems: list[str] = []
    stages, prompt = content.pop("stages", None), content.pop("prompt", {})
    config = _options(ColdStartConfig, content, "cold start", problems)
    config.prompt = _options(PromptConfig, prompt, "prompt", problems)
    if isinstance(stages, list):
        config.stages = [_options(Stage, stage, f"stages[{i}]", problems) for i, stage in enumerate(stages)]
    elif stages is not None:
        problems.append(f"stages: expected a list, found {type(stages).__name__}")
    if problems := problems + _problems(config):
        raise ConfigError(problems)
    return config


def _options(kind: type, values: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(values, Mapping):
        problems.append(f"{where}: expected a mapping, found {type(values).__name__}")
        return kind()
    config = kind(**typed_values(get_type_hints(kind), values, problems, where))
    limits = {"[0, inf)": "rows start_stage"} if kind is ColdStartConfig else STAGE_LIMITS
    problems += [f"{where}: {problem}" for problem in value_problems(config, limits)]
    return config


def _problems(config: ColdStartConfig) -> list[str]:
    """Contradictions and impossible values, each with what to do; empty when all is well."""
    start, count = config.start_stage, len(config.stages)
    rules = [
        (not count or 0 <= start < count, f"start_stage {start}: there are {count} stages"),
        (count > 0, "stages is empty: give at least one"),
        *((value in names, f"{name} {value!r}: choose one of {', '.join(names)}") for name, value, names in (
            ("dtype", config.dtype, DTYPES), ("save_dtype", config.save_dtype, (*DTYPES, "float16")))),
        (not start or config.model is not None, "start_stage needs model, the folder of the stage before it"),
        (start or (config.model is None) != (config.tiny is None),
         "give either model (a path to start from) or tiny (sizes of a new small model)"),
        (0 <= config.held_out_share < 1, f"held_out {config.held_out}: must be in [0, 1)"),
        (config.eval_data is None or not config.held_out,
         f"held_out {config.held_out} and eval_data {config.eval_data!r}: give one of them"),
        *((getattr(config, name) is None or config.eval_data is not None, f"{name} needs eval_data")
          for name in ("eval_audio_dir", "eval_columns")),
        (config.columns is None or config.data is not None, "columns needs data"),
        *((isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9,
           f"tiny: {name} {value!r}: expected a number") for name, value in (config.tiny or {}).items()),
        (config.data is not None or config.rows >= 1,
         "give data (a file of rows) or rows (how many built-in questions to render)"),
    ]  # fmt: skip
    for i, stage in enumerate(config.stages):
        own = [
            (stage.kind in ("tagging", "sft"), f"kind {stage.kind!r}; there are tagging, sft"),
            (stage.teacher in TEACHERS, f"teacher {stage.teacher!r}; there are {', '.join(TEACHERS)}"),
            (stage.teacher != "column" or stage.kind != "sft" or config.data is not None,
             f"teacher column needs data with a {config.completion_column!r} column"),
            *((0 <= getattr(stage, name) <= 1, f"{name} {getattr(stage, name):g} is a probability")
              for name in ("right", "broken", "inconsistent")),
            *((part in PARTS, f"train_parts {part!r}; there are {', '.join(PARTS)}") for part in stage.train_parts),
            (stage.supervise in get_args(Supervise),
             f"supervise {stage.supervise!r}; there are {', '.join(get_args(Supervise))}"),
            (stage.speak or stage.supervise in ("all", "text"), f"supervise {stage.supervise} needs speak: true"),
            (stage.kind == "sft" or not stage.part_learning_rates,
             f"part_learning_rates has no meaning for kind {stage.kind}"),
            (stage.kind == "sft" or not stage.speak, f"speak has no meaning for kind {stage.kind}"),
            (stage.lr_scheduler_type in SCHEDULES,
             f"lr_scheduler_type {stage.lr_scheduler_type!r}; there are {', '.join(SCHEDULES)}"),
        ]  # fmt: skip
        rules += [(fine, f"stages[{i}]: {message}") for fine, message in own]
    return [message for fine, message in rules if not fine]


def steps_of(stage: Stage, rows: int) -> int:
    """Optimiser steps of a stage over so many rows, in one process."""
    batch = stage.batch_size * (stage.gradient_accumulation_steps if stage.kind == "sft" else 1)
    return stage.steps or math.ceil(stage.epochs * rows / batch)
