"""Speech decoder: a vocoder, and a flow from codes to its latents (docs/speech.md).

    rows -> codes, mel, F0 -> vocoder: mel and F0 to wave | flow matching: codes to mel and F0 -> token2wav folder

Tiny, nothing downloaded (9 CPU minutes):   python recipes/train_decoder.py --config recipes/configs/decoder_tiny.yaml
Your speech, the published size:            accelerate launch recipes/train_decoder.py \\
    --config recipes/configs/decoder_published.yaml --data rows.jsonl --tokenizer FOLDER

Rows have audio, and better a speaker: sequences are of one voice, which its other rows tell. `covo-rl speech encode`
adds their codes once. The published size never ran here: its memory and time are estimates.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from covo_rl.speech.decoder_training import read_decoder_training
from covo_rl.train.shutdown import exit_after
from covo_rl.types import user_errors


def main(arguments: list[str] | None = None) -> Path:
    """Train; returns the decoder's folder."""
    options = vars(parser().parse_args(arguments))
    with user_errors("train_decoder", code=1):
        config = read_decoder_training(options.pop("config"), options)
        from covo_rl.speech.train_decoder import train_decoder  # after parsing: --help and typos answer at once

        return train_decoder(config)


def parser() -> argparse.ArgumentParser:
    """The options of the command; all others are in the YAML."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", help="YAML of options, see recipes/configs/decoder_tiny.yaml")
    parser.add_argument("--data", help="rows of speech (JSONL with audio, speaker, codes); default: built-in digits")
    for name in ("audio-dir", "tokenizer", "start", "output"):
        parser.add_argument(f"--{name}")
    for name in ("seed", "flow-steps", "vocoder-steps"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("resume", "overwrite"):
        parser.add_argument(f"--{name}", action="store_true", default=None)
    return parser


if __name__ == "__main__":
    exit_after(main)
