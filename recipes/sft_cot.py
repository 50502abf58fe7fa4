"""Cold start: chain-of-thought SFT of an audio language model before GRPO.

    rows -> [tagging] -> sft: perception -> sft: cold start -> checkpoint folder

Smoke (half a minute, CPU):    python recipes/sft_cot.py --config recipes/configs/sft_smoke.yaml
The shipped tiny checkpoint:   python recipes/sft_cot.py --config recipes/configs/sft_tiny.yaml
Your rows and your model:      accelerate launch recipes/sft_cot.py --model PATH --data rows.json --audio-dir DIR

Your rows carry the target text, `<think>..</think><answer>..</answer>`, in a column (`--completion-column`).
The demo's teacher is weak on purpose: what GRPO regains of it is mostly recovery of what perception already knew.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

from covo_rl.coldstart import load_config
from covo_rl.config import ConfigError


def parse(arguments: list[str] | None = None) -> tuple[str | None, dict]:
    """Command line -> (YAML file, overrides)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML with the stages, see recipes/configs/sft_tiny.yaml")
    for name in ("model", "data", "audio-dir", "completion-column", "output"):
        parser.add_argument(f"--{name}")
    for name in ("seed", "rows", "start-stage"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--save-stages", action="store_true", default=None)
    parsed = vars(parser.parse_args(arguments))
    return parsed.pop("config"), parsed


def main(arguments: list[str] | None = None) -> Path:
    """Run all stages; returns the checkpoint folder."""
    path, overrides = parse(arguments)
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        sys.exit(str(error))
    from transformers import set_seed

    from covo_rl.coldstart import build, data, supervised, tagging

    start = time.perf_counter()
    set_seed(config.seed)
    examples = data.examples(config)
    first, _ = data.used_rows(config)
    family = build.family(config, examples)
    parameters = sum(p.numel() for p in family.model.parameters())
    print(f"{len(examples)} rows, {parameters / 1e6:.2f} M parameters", flush=True)
    rows = data.prepare(examples, family, config)
    print(f"features ready after {time.perf_counter() - start:.0f} s", flush=True)
    log = []
    for number, stage in enumerate(config.stages):
        if number < config.start_stage:
            continue
        seed = config.seed + 1000 * number
        chosen = rows[stage.first_row - first :][: stage.rows]
        began = time.perf_counter()
        if stage.kind == "tagging":
            history = tagging.run(family, chosen, stage, seed)
        else:
            history = supervised.run(family, chosen, stage, config, seed)
        seconds = time.perf_counter() - began
        log.append({"stage": number, "kind": stage.kind, "rows": len(chosen), "seconds": seconds, "log": history})
        print(f"stage {number} ({stage.kind}, {len(chosen)} rows): {seconds:.0f} s", flush=True)
        if config.save_stages:
            build.save(family, Path(config.output) / f"stage-{number}", dataclasses.replace(config, save_dtype="auto"))
    folder = Path(config.output)
    build.save(family, folder, config)
    (folder / "training_log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    print(f"checkpoint: {folder}")
    return folder


if __name__ == "__main__":
    main()
