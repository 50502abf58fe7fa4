"""All stages in order, from rows to the checkpoint folder."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import set_seed

from covo_rl.coldstart import build, data, supervised, tagging
from covo_rl.coldstart.config import ColdStartConfig
from covo_rl.config import ConfigError


def run(config: ColdStartConfig) -> Path:
    """Train every stage from `start_stage` on; returns the checkpoint folder.

    Raises:
        ConfigError: several sft stages under FSDP or ZeRO, where a model cannot be taken from one trainer to the next.
    """
    _check_launch(config)
    set_seed(config.seed)
    examples = data.examples(config)
    family = build.family(config, examples)
    parameters = sum(p.numel() for p in family.model.parameters())
    _say(f"{len(examples)} rows, {parameters / 1e6:.2f} M parameters")
    rows = data.prepare(examples, family, config)
    first, _ = data.used_rows(config)
    log, weights, folder = [], None, Path(config.output)
    for number, stage in enumerate(config.stages):
        if number < config.start_stage:
            continue
        seed = config.seed + 1000 * number
        chosen = rows[stage.first_row - first :][: stage.rows]
        start = time.perf_counter()
        if stage.kind == "tagging":
            history = tagging.run(family, chosen, stage, seed)
        else:
            trained = supervised.run(family, chosen, stage, config, seed)
            history, weights = trained.log, trained.state_dict
        entry: dict[str, Any] = {"stage": number, "kind": stage.kind, "rows": len(chosen)}
        log.append({**entry, "seconds": time.perf_counter() - start, "log": history})
        _say(f"stage {number} ({stage.kind}, {len(chosen)} rows): {log[-1]['seconds']:.0f} s")
        if config.save_stages:
            build.save(family, folder / f"stage-{number}", dataclasses.replace(config, save_dtype="auto"), weights)
    build.save(family, folder, config, weights)
    if PartialState().is_main_process:
        (folder / "training_log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    _say(f"checkpoint: {folder}")
    return folder


def _check_launch(config: ColdStartConfig) -> None:
    sharded = "true" in (os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("ACCELERATE_USE_DEEPSPEED"))
    left = config.stages[config.start_stage :]
    if sharded and (len(left) > 1 or left[0].kind != "sft"):
        raise ConfigError(
            [f"{len(left)} stages under FSDP or ZeRO: give one sft stage, and start the next from its checkpoint"]
        )


def _say(line: str) -> None:
    if PartialState().is_main_process:
        print(line, flush=True)
