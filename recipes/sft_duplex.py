"""Teach a model to listen while it speaks, from simulated streams: the stage before recipes/grpo_duplex.py.

    python recipes/sft_duplex.py --output checkpoints/duplex
    python recipes/sft_duplex.py --output checkpoints/duplex --seed 3 --sft-steps 2000
    python recipes/sft_duplex.py --model PATH --sft-data DIR --output checkpoints/mine    (your own model and streams)

What comes out answers after a limit of silence: right after a turn, early in every long pause. A configuration of
grpo_duplex.py fits; what it says of RL has no effect here.
"""

import sys
from pathlib import Path

from covo_rl.config import ConfigError
from covo_rl.data.terminal import say
from covo_rl.duplex.config import duplex_options, read_layers
from covo_rl.resolve import find
from covo_rl.run.commands.duplex_page import TAUGHT_BY, duplex_page
from covo_rl.run.commands.options_page import wants_page
from covo_rl.train.shutdown import exit_after
from covo_rl.types import UserError


def main(words: list[str]) -> None:
    """Options, stage, figures."""
    try:
        if wants_page(words):
            print(duplex_page(str(__doc__), TAUGHT_BY))
            return
        options = duplex_options(read_layers(words, find("recipes", "configs/tiny_duplex.yaml")))
        folder = Path(options.train.output)
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError([f"--output {folder} is not empty: name another folder"])
        from covo_rl.supervised.duplex_stage import teach_duplex  # torch

        say(f"{folder}: {teach_duplex(options, folder)}")
    except (UserError, OSError) as error:
        sys.exit(f"sft_duplex: {error}")


if __name__ == "__main__":
    exit_after(lambda: main(sys.argv[1:]))
