"""Speech decoder: a vocoder, and a flow from codes to its latents (docs/speech.md).

    rows -> codes, mel, F0 -> vocoder: mel and F0 to wave | flow matching: codes to mel and F0 -> token2wav folder

Tiny, nothing downloaded (9 CPU minutes):   python recipes/train_decoder.py --config recipes/configs/decoder_tiny.yaml
Your speech, the published size:            accelerate launch recipes/train_decoder.py \\
    --config recipes/configs/decoder_published.yaml --data rows.jsonl --tokenizer FOLDER

Rows have audio, and better a speaker: sequences are of one voice, which its other rows tell. `covo-rl speech encode`
adds their codes once. Of the published size single updates ran on an H200 (docs/performance.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from covo_rl.speech.decoder_training import DecoderTraining, read_decoder_training
from covo_rl.speech.training import recipe_parser
from covo_rl.train.shutdown import exit_after
from covo_rl.types import user_errors


def main(words: list[str] | None = None) -> Path:
    """Train; returns the decoder's folder."""
    options = vars(parser().parse_args(words))
    with user_errors("train_decoder", code=1):
        config = read_decoder_training(options.pop("config"), options)
        from covo_rl.speech.train_decoder import train_decoder  # after parsing: --help and typos answer at once

        return train_decoder(config)


def parser() -> argparse.ArgumentParser:
    """The options of the command, which are those of the YAML."""
    return recipe_parser(DecoderTraining, __doc__)


if __name__ == "__main__":
    exit_after(main)
