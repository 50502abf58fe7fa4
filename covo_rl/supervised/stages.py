"""All stages in order, from rows to the checkpoint folder."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import set_seed

from covo_rl.config import ConfigError
from covo_rl.supervised import model, tagging, trainer
from covo_rl.supervised import rows as stage_rows
from covo_rl.supervised.config import ColdStartConfig
from covo_rl.supervised.teacher import completions
from covo_rl.train.launch import process_state
from covo_rl.types import Example


def run_stages(config: ColdStartConfig) -> Path:
    """Train every stage from `start_stage` on; returns the checkpoint folder.

    Raises:
        TeacherError: rows lack what a stage's teacher needs.
        ConfigError: several sft stages under FSDP or ZeRO, where a model cannot be taken from one trainer to the next.
    """
    _check_launch(config)
    set_seed(config.seed)
    examples = stage_rows.examples(config)
    first, _ = stage_rows.used_rows(config)
    targets = _targets(config, examples, first)
    family = model.starting_family(config, examples)
    parameters = sum(p.numel() for p in family.model.parameters())
    _say(f"{len(examples)} rows, {parameters / 1e6:.2f} M parameters")
    rows = stage_rows.prepare(examples, family, config)
    log, weights, folder = [], None, Path(config.output)
    for number, stage in enumerate(config.stages):
        if number < config.start_stage:
            continue
        seed = _seed(config, number)
        chosen = rows[stage.first_row - first :][: stage.rows]
        start = time.perf_counter()
        if stage.kind == "tagging":
            history = tagging.train_tagging(family, chosen, stage, seed)
        else:
            trained = trainer.fine_tune(family, chosen, targets[number], stage, seed)
            history, weights = trained.log, trained.state_dict
        entry: dict[str, Any] = {"stage": number, "kind": stage.kind, "rows": len(chosen)}
        log.append({**entry, "seconds": time.perf_counter() - start, "log": history})
        _say(f"stage {number} ({stage.kind}, {len(chosen)} rows): {log[-1]['seconds']:.0f} s")
        if config.save_stages:
            model.save_checkpoint(
                family, folder / f"stage-{number}", dataclasses.replace(config, save_dtype="auto"), weights
            )
    model.save_checkpoint(family, folder, config, weights)
    if process_state().is_main_process:
        (folder / "training_log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    _say(f"checkpoint: {folder}")
    return folder


def _seed(config: ColdStartConfig, number: int) -> int:
    return config.seed + 1000 * number


def _targets(config: ColdStartConfig, examples: Sequence[Example], first: int) -> dict[int, list[str]]:
    """What every sft stage teaches, drawn before anything trains, so that a bad row stops the run at once."""
    return {
        number: completions(
            examples[stage.first_row - first :][: stage.rows], stage, _seed(config, number), config.completion_column
        )
        for number, stage in enumerate(config.stages)
        if number >= config.start_stage and stage.kind == "sft"
    }


def _check_launch(config: ColdStartConfig) -> None:
    sharded = "true" in (os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("ACCELERATE_USE_DEEPSPEED"))
    left = config.stages[config.start_stage :]
    if sharded and (len(left) > 1 or left[0].kind != "sft"):
        raise ConfigError(
            [f"{len(left)} stages under FSDP or ZeRO: give one sft stage, and start the next from its checkpoint"]
        )


def _say(line: str) -> None:
    if process_state().is_main_process:
        print(line, flush=True)
