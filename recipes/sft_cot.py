"""Cold start: chain-of-thought SFT of an audio language model before GRPO.

    rows -> [tagging] -> sft: perception -> sft: cold start -> checkpoint folder

Smoke (half a minute, CPU):    python recipes/sft_cot.py --config recipes/configs/sft_smoke.yaml
The shipped tiny checkpoint:   python recipes/sft_cot.py --config recipes/configs/sft_tiny.yaml --overwrite
Your rows and your model:      accelerate launch recipes/sft_cot.py --model PATH --data rows.json --audio-dir DIR
Your rows, a new tiny model:   python recipes/sft_cot.py --config tiny_of_mine.yaml, see docs/supervised.md

Your rows carry the target text, `<think>..</think><answer>..</answer>`, in a column (`--completion-column`).
The demo's teacher is weak on purpose: what GRPO regains of it is mostly recovery of what perception already knew.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import NoReturn

from covo_rl.config import ConfigError, unknown_names
from covo_rl.data.terminal import say
from covo_rl.supervised import load_config
from covo_rl.train.shutdown import exit_after
from covo_rl.types import user_errors, visible


def main(arguments: list[str] | None = None) -> Path:
    """Run all stages; returns the checkpoint folder."""
    words = sys.argv[1:] if arguments is None else arguments  # --held_out is --held-out, as in the other recipes
    words = [re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), word) for word in words]
    options, unknown = parser().parse_known_args(words)
    overrides = vars(options)
    with user_errors("sft_cot", code=1):
        if unknown:
            names = [name.replace("_", "-") for name in overrides]
            raise ConfigError(unknown_names([unknown[0].removeprefix("--")], names, "command line"))
        config = load_config(overrides.pop("config"), overrides)
        if os.environ.get("RANK", "0") == "0":
            say("loading torch and the model classes")  # which takes seconds in which nothing else is said
        from covo_rl.supervised.stages import run_stages  # after parsing, so that --help and typos answer at once

        return run_stages(config)


class Parser(argparse.ArgumentParser):
    """Shows wrong words as text."""

    def error(self, message: str) -> NoReturn:
        super().error(visible(message))


def parser() -> Parser:
    """The options of the command; all others are in the YAML."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", help="YAML with the stages, see recipes/configs/sft_tiny.yaml")
    for name in ("model", "data", "audio-dir", "eval-data", "eval-audio-dir", "columns", "eval-columns",
                 "completion-column", "output"):  # fmt: skip
        parser.add_argument(f"--{name}")
    parser.add_argument("--family", help="a family of your own: ./mine.py:Class, package.module:Class")
    parser.add_argument("--trust-remote-code", action="store_true", default=None, help="run the checkpoint's code")
    for name in ("seed", "rows", "start-stage"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--held-out", type=float, help="share of the data that no stage sees (default 0.05)")
    parser.add_argument("--save-stages", action="store_true", default=None)
    parser.add_argument("--overwrite", action="store_true", default=None, help="replace an earlier cold start")
    parser.add_argument("--dry-run", action="store_true", default=None, help="check everything, train nothing")
    return parser


if __name__ == "__main__":
    exit_after(main)
