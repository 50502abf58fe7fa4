"""Speech tokenizer: WavLM and one vector quantiser, trained to tell words, sound and pitch (docs/speech.md).

    rows -> WavLM -> 25 codes a second -> CTC words + log-mel given the voice + pitch contour

Tiny, nothing downloaded:    python recipes/train_tokenizer.py --config recipes/configs/tokenizer_tiny.yaml
Your speech on WavLM-large:  accelerate launch recipes/train_tokenizer.py --data rows.jsonl --wavlm FOLDER \\
    --config recipes/configs/tokenizer_published.yaml

Expect of the tiny one, after 5 CPU minutes and on unseen speakers: 1 % of digits are read wrongly from its codes, and
their pitch contour is off by 0.4 semitones. Of the published shape single updates ran on an H200 (0.45 s, 28.5 GiB);
what it learns is not known.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from covo_rl.speech.training import TokenizerTraining, read_training, recipe_parser
from covo_rl.train.shutdown import exit_after
from covo_rl.types import user_errors


def main(words: list[str] | None = None) -> Path:
    """Train; returns the tokenizer's folder."""
    options = vars(parser().parse_args(words))
    with user_errors("train_tokenizer", code=1):
        config = read_training(options.pop("config"), options)
        from covo_rl.speech.train_tokenizer import train_tokenizer  # after parsing: --help and typos answer at once

        return train_tokenizer(config)


def parser() -> argparse.ArgumentParser:
    """The options of the command, which are those of the YAML."""
    return recipe_parser(TokenizerTraining, __doc__)


if __name__ == "__main__":
    exit_after(main)
