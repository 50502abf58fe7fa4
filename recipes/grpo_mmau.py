"""GRPO with chain-of-thought on audio multiple-choice questions in the MMAU schema.

    rows -> prompt + audio -> G rollouts -> R_accuracy + R_format + R_consistency + R_thinking
         -> advantages in the group -> clipped loss -> LoRA adapter -> table before / after

Smoke test, about three CPU minutes (a tiny Covo-Audio and rendered clips, both shipped):

    accelerate launch recipes/grpo_mmau.py

Your own rows (MMAU, AVQA, AudioMCQ or our field names), the same way:

    accelerate launch recipes/grpo_mmau.py --data questions.json --audio-dir clips/ --output runs/mine

Your own model, with the settings of configs/own_model.yaml (a folder's prompt.yaml says its wording):

    accelerate launch recipes/grpo_mmau.py --model PATH --data questions.json --audio-dir clips/

Covo-Audio 7B on four GPUs:

    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/grpo_mmau.py \
        --config recipes/configs/covo_audio_7b_lora.yaml

Caveat: most of what the smoke test gains is recovery of what the tiny model could do before a deliberately
weak cold start; `--config recipes/configs/tiny_zero.yaml` is the variant in which GRPO alone teaches the
step from evidence to answer.
"""

import sys

from covo_rl.config import ConfigError, parse_options
from covo_rl.run.commands.options_page import options_page, wants_page
from covo_rl.run.defaults import with_defaults
from covo_rl.train.shutdown import exit_after


def main(words: list[str]) -> None:
    """Parse, run, and end with one clear message where the user has to act."""
    try:
        if wants_page(words):
            print(options_page(words))
            return
        options = parse_options(with_defaults(words))
    except ConfigError as error:
        sys.exit(f"grpo_mmau: {error}")
    from covo_rl.run.python.grpo import complete  # after parsing, so that --help and typos answer at once
    from covo_rl.run.session import USER_ERRORS, Session

    try:
        complete(Session(options))
    except USER_ERRORS as error:
        sys.exit(f"grpo_mmau: {error}")


if __name__ == "__main__":
    exit_after(lambda: main(sys.argv[1:]))
