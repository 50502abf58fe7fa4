"""A tiny model that speaks: it hears digits and says them again, in text and in codes of speech.

    questions and replies (synth) -> codes of the replies (tokenizer) -> sft: hear -> sft: speak -> checkpoint

Makes checkpoints/tiny_spoken:   python recipes/sft_spoken.py --overwrite
Other codes, a smaller try:      python recipes/sft_spoken.py --tokenizer FOLDER --rows 200 --output runs/spoken

Voices are rendered; the tokenizer heard none of them. Rows of your own need a column `codes` (covo-rl speech encode)
and go through recipes/sft_cot.py, with `speak: true` in a stage.
"""

import argparse
from pathlib import Path

from covo_rl.config import ConfigError
from covo_rl.data.files import read_json_lines
from covo_rl.data.terminal import say
from covo_rl.resolve import find
from covo_rl.speech.rows import write_speech_rows
from covo_rl.supervised import load_config
from covo_rl.synth.dialogue import write_dialogues
from covo_rl.train.shutdown import exit_after
from covo_rl.types import user_errors

BATCH = 64  # replies that are encoded at once


def write_rows(folder: Path, count: int, seed: int, tokenizer_folder: str) -> Path:
    """Dialogues with the text of the reply and its codes, as stages with `speak` read them."""
    from covo_rl.audio import decode
    from covo_rl.speech.tokenizer import SpeechTokenizer
    from covo_rl.types import Clip

    tokenizer = SpeechTokenizer.from_pretrained(tokenizer_folder)
    say(f"rendering {count} dialogues into {folder}")
    rows = list(read_json_lines(write_dialogues(folder, split="train", count=count, seed=seed)))
    for start in range(0, count, BATCH):
        batch = rows[start : start + BATCH]
        waves = [decode(Clip(path=str(folder / row.pop("reply"))))[0] for row in batch]
        for row, codes in zip(batch, tokenizer.encode(waves), strict=True):
            row |= {"completion": row["answer"], "codes": codes.tolist(), "tokenizer": tokenizer.digest()}
    path = folder / "spoken.jsonl"
    write_speech_rows(path, rows)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(find("recipes", "configs/sft_spoken.yaml")), help="YAML of the stages")
    parser.add_argument("--tokenizer", default="builtin:speech_tokenizer", help="folder of the speech tokenizer")
    parser.add_argument("--rows", type=int, default=3000, help="dialogues to render")
    parser.add_argument("--data", default="data/spoken", help="folder for them")
    parser.add_argument("--output", help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=1000, help="of the dialogues")
    parser.add_argument("--overwrite", action="store_true", default=None, help="replace an earlier cold start")
    options = parser.parse_args()
    with user_errors("sft_spoken", code=1):
        if options.rows < 1:
            raise ConfigError([f"--rows {options.rows}: render at least one dialogue"])
        data = Path(options.data) / "spoken.jsonl"
        config = load_config(options.config, {"data": str(data), "audio_dir": options.data,
                                              "output": options.output, "overwrite": options.overwrite})  # fmt: skip
        from covo_rl.supervised.stages import run_stages, taken  # torch

        if problem := taken(config):  # before minutes of rendering
            raise ConfigError([problem])
        write_rows(Path(options.data), options.rows, options.seed, options.tokenizer)
        run_stages(config)


if __name__ == "__main__":
    exit_after(main)
