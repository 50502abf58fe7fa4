"""Cold start: chain-of-thought SFT of an audio language model before GRPO.

    rows -> [tagging] -> sft: perception -> sft: cold start -> checkpoint folder

Smoke (half a minute, CPU):    python recipes/sft_cot.py --config recipes/configs/sft_smoke.yaml
The shipped tiny checkpoint:   python recipes/sft_cot.py --config recipes/configs/sft_tiny.yaml --overwrite
Your rows and your model:      accelerate launch recipes/sft_cot.py --model PATH --data rows.json --audio-dir DIR

Your rows carry the target text, `<think>..</think><answer>..</answer>`, in a column (`--completion-column`).
The demo's teacher is weak on purpose: what GRPO regains of it is mostly recovery of what perception already knew.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from covo_rl.config import ConfigError
from covo_rl.data import DataError
from covo_rl.prompt import PromptError
from covo_rl.supervised import load_config
from covo_rl.supervised.rows import TeacherError
from covo_rl.train.shutdown import exit_after


def main(arguments: list[str] | None = None) -> Path:
    """Run all stages; returns the checkpoint folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML with the stages, see recipes/configs/sft_tiny.yaml")
    for name in ("model", "data", "audio-dir", "completion-column", "output"):
        parser.add_argument(f"--{name}")
    for name in ("seed", "rows", "start-stage"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("save-stages", "overwrite"):
        parser.add_argument(f"--{name}", action="store_true", default=None)
    overrides = vars(parser.parse_args(arguments))
    try:
        config = load_config(overrides.pop("config"), overrides)
        from covo_rl.supervised.stages import run_stages  # after parsing, so that --help and typos answer at once

        return run_stages(config)
    except (ConfigError, DataError, PromptError, TeacherError, OSError) as error:
        sys.exit(f"sft_cot: {error}")


if __name__ == "__main__":
    exit_after(main)
