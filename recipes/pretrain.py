"""Pre-training: a decoder of text learns to hear, read, speak and go on, in text and in codes (docs/pretraining.md).

    rows -> documents of tasks -> a mixture by tokens -> packed rows -> updates -> a model's folder

Stage 1, adapter alone:  python recipes/pretrain.py --config recipes/configs/pretrain_tiny.yaml --stage 1 --output A
Stage 2, the mixture:    python recipes/pretrain.py --config recipes/configs/pretrain_tiny.yaml --stage 2 --model A \\
    --output B
Your rows, your model:   accelerate launch recipes/pretrain.py --config recipes/configs/pretrain_7b_stage2.yaml \\
    --model FOLDER --data 'speech/*.jsonl' --text-data 'text/*.jsonl' --output B

`tasks`, `eval_tasks`, `distill` and the sections `stage_1` and `stage_2` are options of the file alone.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from covo_rl.data.terminal import say
from covo_rl.speech.training import recipe_parser
from covo_rl.supervised.pretrain.config import PretrainConfig, read_pretrain
from covo_rl.train.shutdown import exit_after
from covo_rl.types import user_errors


def main(words: list[str] | None = None) -> Path:
    """Train; returns the model's folder."""
    options = vars(parser().parse_args(words))
    with user_errors("pretrain", code=1):
        config = read_pretrain(options.pop("config"), options)
        if os.environ.get("RANK", "0") == "0":
            say("loading torch and the model classes")  # which takes seconds in which nothing else is said
        from covo_rl.supervised.pretrain.run import run_pretraining  # after parsing: --help and typos answer at once

        return run_pretraining(config)


def parser() -> argparse.ArgumentParser:
    """The options of the command, which are those of the YAML."""
    return recipe_parser(PretrainConfig, __doc__)


if __name__ == "__main__":
    exit_after(main)
