"""GRPO over spoken replies: is what the codes of a reply say the text of that reply?

    spoken question -> G rollouts of text and codes, 5:15 -> R_spoken + R_accuracy -> advantages -> the model

Smoke test, a few CPU minutes (the tiny speaking Covo-Audio and the tokenizer, both shipped; rendered voices):

    accelerate launch recipes/grpo_spoken.py

The control, in which nothing pays for speech:

    accelerate launch recipes/grpo_spoken.py --config recipes/configs/spoken_control.yaml

Every option of grpo_mmau.py is one here; `--data rows.jsonl --eval_data others.jsonl` are your own spoken questions,
and `--policy_ids codes` trains on the codes alone. With a decoder, `spoken(recogniser='wave')` hears the sound itself.

Caveat: the recogniser is the tokenizer's CTC head, which reads the codes and not the sound.
"""

import sys

from covo_rl.config import ConfigError, flag_value, parse_options
from covo_rl.resolve import find
from covo_rl.run.commands.options_page import options_page, wants_page
from covo_rl.train.shutdown import exit_after


def main(words: list[str]) -> None:
    """Parse, run, and end with one clear message where the user has to act."""
    try:
        if wants_page(words):
            print(options_page(words))
            return
        if flag_value(words, "config") is None:
            words = ["--config", str(find("recipes", "configs/spoken.yaml")), *words]
        options = parse_options(words)
    except ConfigError as error:
        sys.exit(f"grpo_spoken: {error}")
    from covo_rl.run.python.grpo import complete  # after parsing, so that --help and typos answer at once
    from covo_rl.run.session import USER_ERRORS, Session

    try:
        complete(Session(options))
    except USER_ERRORS as error:
        sys.exit(f"grpo_spoken: {error}")


if __name__ == "__main__":
    exit_after(lambda: main(sys.argv[1:]))
