"""Options of the cold start: one YAML, checked as a whole."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from covo_rl.config import ConfigError, PromptConfig

PARTS = ("encoder", "audio_adapter", "llm", "lm_head")


@dataclass
class Stage:
    """One pass over rows. `tagging` teaches encoder and adapter the facts of a clip; `sft` teaches completions.

    Teachers of `sft`: `evidence` writes the row's true evidence and a conclusion that is right with probability
    `right` (a wrong one is drawn evenly from the other options); with probability `broken` the format is damaged, with
    probability `inconsistent` the answer contradicts the conclusion. `column` takes the row's own completion.
    """

    kind: str = "sft"
    teacher: str = "evidence"
    right: float = 1.0
    broken: float = 0.0
    inconsistent: float = 0.0
    first_row: int = 0
    rows: int | None = None
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 32
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    train_parts: list[str] = field(default_factory=lambda: list(PARTS))


@dataclass
class ColdStartConfig:
    """`rows` questions are rendered from `synth_seed` where `data` is not given.

    With `save_stages` every stage leaves `output/stage-N`; `start_stage: N + 1` with `model: output/stage-N` goes on
    from there with the same rows and seeds. `overwrite` replaces the checkpoint of an earlier cold start in `output`.
    """

    output: str = "runs/cold_start"
    overwrite: bool = False
    seed: int = 0
    model: str | None = None
    dtype: str = "auto"
    save_dtype: str = "auto"
    tiny: dict[str, Any] | None = None
    data: str | None = None
    audio_dir: str | None = None
    completion_column: str = "completion"
    rows: int = 0
    synth_seed: int = 0
    prompt: PromptConfig = field(default_factory=PromptConfig)
    save_stages: bool = False
    start_stage: int = 0
    stages: list[Stage] = field(default_factory=lambda: [Stage(teacher="column")])


def load_config(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> ColdStartConfig:
    """YAML file and overrides (those that are None are left out) -> checked options.

    Raises:
        ConfigError: unknown names with the nearest valid one, impossible values, contradictions - all at once.
    """
    import yaml

    content: dict[str, Any] = {}
    if path is not None:
        if not Path(path).is_file():
            raise ConfigError([f"--config {path}: no such file (looked in {Path.cwd()})"])
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        if not isinstance(content, dict):
            raise ConfigError([f"{path}: expected a mapping of option: value, found {type(content).__name__}"])
    content.update({name: value for name, value in (overrides or {}).items() if value is not None})
    problems: list[str] = []
    stages = content.pop("stages", None)
    prompt = _options(PromptConfig, content.pop("prompt", {}), "prompt", problems)
    config = _options(ColdStartConfig, content, "cold start", problems)
    config.prompt = prompt
    if stages is not None:
        config.stages = [_options(Stage, stage, f"stages[{i}]", problems) for i, stage in enumerate(stages)]
    if problems := problems + _problems(config):
        raise ConfigError(problems)
    return config


def _options(kind: type, values: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(values, Mapping):
        problems.append(f"{where}: expected a mapping, found {type(values).__name__}")
        return kind()
    names = [f.name for f in fields(kind)]
    for name in [name for name in values if name not in names]:
        near = difflib.get_close_matches(str(name), names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        problems.append(f"{where}: unknown option {name!r}; {hint}")
    return kind(**{name: value for name, value in values.items() if name in names})


def _problems(config: ColdStartConfig) -> list[str]:
    """Contradictions and impossible values, each with what to do; empty when all is well."""
    start, count = config.start_stage, len(config.stages)
    rules = [
        (not count or 0 <= start < count, f"start_stage {start}: there are {count} stages"),
        (count > 0, "stages is empty: give at least one"),
        (not start or config.model is not None, "start_stage needs model, the folder of the stage before it"),
        (start or (config.model is None) != (config.tiny is None),
         "give either model (a path to start from) or tiny (sizes of a new small model)"),
        (config.data is not None or config.rows >= 1,
         "give data (a file of rows) or rows (how many built-in questions to render)"),
    ]  # fmt: skip
    for i, stage in enumerate(config.stages):
        own = [
            (stage.kind in ("tagging", "sft"), f"kind {stage.kind!r}; there are tagging, sft"),
            (stage.teacher in ("evidence", "column"), f"teacher {stage.teacher!r}; there are evidence, column"),
            (stage.teacher != "column" or stage.kind != "sft" or config.data is not None,
             f"teacher column needs data with a {config.completion_column!r} column"),
            *((0 <= getattr(stage, name) <= 1, f"{name} {getattr(stage, name)} is a probability")
              for name in ("right", "broken", "inconsistent")),
            *((part in PARTS, f"train_parts {part!r}; there are {', '.join(PARTS)}") for part in stage.train_parts),
            (stage.batch_size >= 1 and stage.learning_rate > 0,
             "batch_size must be at least 1 and learning_rate above 0"),
        ]  # fmt: skip
        rules += [(fine, f"stages[{i}]: {message}") for fine, message in own]
    return [message for fine, message in rules if not fine]
