"""Teach a model to listen while it speaks, from simulated streams: the stage before recipes/grpo_duplex.py.

    python recipes/sft_duplex.py --output checkpoints/duplex
    python recipes/sft_duplex.py --output checkpoints/duplex --seed 3 --sft-steps 2000
    python recipes/sft_duplex.py --model PATH --sft-data DIR --output checkpoints/mine    (your own model and streams)

What comes out answers after a limit of silence: right after a turn, early in every long pause. A configuration of
grpo_duplex.py fits; what it says of RL has no effect here.
"""

import os
import sys
from pathlib import Path

from covo_rl.config import ConfigError, TrainConfig
from covo_rl.data.terminal import say
from covo_rl.duplex.config import duplex_options, read_layers
from covo_rl.records.lock import FolderLock
from covo_rl.resolve import find
from covo_rl.run.commands.duplex_page import TAUGHT_BY, duplex_page
from covo_rl.run.commands.options_page import wants_page
from covo_rl.train.shutdown import exit_after
from covo_rl.types import UserError


def problems(train: TrainConfig, folder: Path) -> list[str]:
    """What is in the way of the stage, before anything is loaded."""
    found = [f"{name}: it has no effect here; leave it out" for name in ("dry_run", "resume", "overwrite")
             if getattr(train, name)]  # fmt: skip
    if (world := os.environ.get("WORLD_SIZE", "1")) != "1":
        found.append(f"{world} processes were started: this stage runs in one (`python recipes/sft_duplex.py`)")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        return [*found, f"--output {folder} is there and no empty folder: name another"]
    return [*found, *([why] if (why := FolderLock(folder).refusal()) else [])]


def main(words: list[str]) -> None:
    """Options, stage, figures."""
    try:
        if wants_page(words):
            print(duplex_page(str(__doc__), TAUGHT_BY))
            return
        options = duplex_options(read_layers(words, find("recipes", "configs/tiny_duplex.yaml")))
        folder = Path(options.train.output)
        if found := problems(options.train, folder):
            raise ConfigError(found)
        from covo_rl.export.exporting import staging  # torch
        from covo_rl.supervised.duplex_stage import teach_duplex

        if folder.is_dir():
            folder.rmdir()  # it is empty, and only one that is not there is filled
        with staging(folder, replace=False) as stage:  # whole or not at all
            figures = teach_duplex(options, stage)
        say(f"{folder}: {figures}")
    except (UserError, OSError) as error:
        sys.exit(f"sft_duplex: {error}")


if __name__ == "__main__":
    exit_after(lambda: main(sys.argv[1:]))
