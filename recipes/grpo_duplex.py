"""Reinforcement learning of when to speak: a full-duplex model that answers too early in long pauses learns to wait.

    streams -> one forward over each -> hazards of SHIFT and BREAK -> six rewards -> policy gradient

From nothing, minutes on two CPU cores (a supervised stage first, which answers early; then RL):

    python recipes/grpo_duplex.py --config recipes/configs/tiny_duplex.yaml --seed 0 --output runs/duplex

What it is compared with:  --control shuffled | gold | no_cue,  --timing-estimator sampled | exact | trunk
A model of your own that has a duplex section (covo-rl duplex prepare), and streams of your own
(covo-rl data simulate-duplex):  --model PATH --rl-data DIR --test-data DIR

Every option of grpo_mmau.py that has a meaning here is one; docs/duplex.md lists the others. OUTPUT/result.json has
the figures before and after, those of a moved threshold, and the AUC of a probe for the end of turns.
"""

import sys

from covo_rl.config import ConfigError
from covo_rl.duplex.config import duplex_options, words_of
from covo_rl.resolve import find
from covo_rl.train.shutdown import exit_after


def main(words: list[str]) -> None:
    """Parse, run, and end with one clear message where the user has to act."""
    if {"-h", "--help"} & {*words}:
        print(__doc__)
        return
    try:
        options = duplex_options(words_of(words, find("recipes", "configs/tiny_duplex.yaml")))
    except ConfigError as error:
        sys.exit(f"grpo_duplex: {error}")
    from covo_rl.run.session import USER_ERRORS  # after parsing, so that --help and typos answer at once
    from covo_rl.run.timing import run_timing

    try:
        run_timing(options)
    except USER_ERRORS as error:
        sys.exit(f"grpo_duplex: {error}")


if __name__ == "__main__":
    exit_after(lambda: main(sys.argv[1:]))
