"""Reinforcement learning of when to speak: a full-duplex model that answers too early in long pauses learns to wait.

    streams -> one forward over each -> hazards of SHIFT and BREAK -> six rewards -> policy gradient

From nothing, minutes on two CPU cores (a supervised stage first, which answers early; then RL):

    python recipes/grpo_duplex.py --config recipes/configs/tiny_duplex.yaml --seed 0 --output runs/turns

What is said after each stop is rewarded too with content among --rewards, and --timing-estimator sampled.
What it is compared with:  --control shuffled | gold | no_cue,  --timing-estimator sampled | exact | trunk
A model of your own that has a duplex section (covo-rl duplex prepare), and streams of your own
(covo-rl data simulate-duplex):  --model PATH --rl-data DIR --test-data DIR

OUTPUT/result.json has the figures before and after, those of a moved threshold, and the AUC of a probe for the end of
turns (docs/turns.md). A run that was stopped goes on with --resume auto; --dry-run checks all and starts nothing.
"""

import sys

from covo_rl.config import ConfigError
from covo_rl.duplex.config import duplex_options, read_layers
from covo_rl.resolve import find
from covo_rl.run.commands.duplex_page import duplex_page
from covo_rl.run.commands.options_page import wants_page
from covo_rl.train.shutdown import exit_after


def main(words: list[str]) -> None:
    """Parse, run, and end with one clear message where the user has to act."""
    try:
        if wants_page(words):
            print(duplex_page(str(__doc__)))
            return
        options = duplex_options(read_layers(words, find("recipes", "configs/tiny_duplex.yaml")))
    except ConfigError as error:
        sys.exit(f"grpo_duplex: {error}")
    from covo_rl.run.session import USER_ERRORS  # after parsing, so that --help and typos answer at once
    from covo_rl.run.timing import dry_timing, run_timing

    try:
        dry_timing(options) if options.train.dry_run else run_timing(options)
    except USER_ERRORS as error:
        sys.exit(f"grpo_duplex: {error}")


if __name__ == "__main__":
    exit_after(lambda: main(sys.argv[1:]))
