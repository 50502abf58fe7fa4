"""A tiny world of pre-training, from nothing to a voice without dialogues, with its figures (docs/pretraining.md).

    rendered speech and text -> text model + encoder -> stage 1 -> stage 2 -> a new voice -> figures.json

The chain, about 17 CPU minutes:  python recipes/pretrain_demo.py runs/pretrain_demo
Its controls too:                 python recipes/pretrain_demo.py runs/pretrain_demo --controls

The encoder is that of builtin:tiny_spoken, which knows digits, as a published one would be Whisper's; all else starts
from random weights. A part that is finished is not repeated; a run that was ended goes on with the next.
"""

import argparse
from pathlib import Path

from covo_rl.train.shutdown import exit_after
from covo_rl.types import user_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="folder of the world, the models and figures.json")
    parser.add_argument("--seed", type=int, default=0, help="of the world and of every training")
    parser.add_argument("--controls", action="store_true", help="train and measure the controls too")
    options = parser.parse_args()
    with user_errors("pretrain_demo", code=1):
        from covo_rl.supervised.pretrain.demo import run_pretrain_demo  # torch

        run_pretrain_demo(Path(options.output), seed=options.seed, controls=options.controls)


if __name__ == "__main__":
    exit_after(main)
