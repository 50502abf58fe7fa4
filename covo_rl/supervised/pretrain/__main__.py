"""`python -m covo_rl.supervised.pretrain OUT`: render the world that the tiny configurations read."""

import argparse
from pathlib import Path

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m covo_rl.supervised.pretrain", description=__doc__)
    parser.add_argument(
        "folder", type=Path, help="where the rows and their recordings go; the configurations say data/world"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    from covo_rl.speech import SHIPPED_TOKENIZER
    from covo_rl.speech.tokenizer import SpeechTokenizer
    from covo_rl.supervised.pretrain.world import write_world

    for name, path in write_world(
        options.folder, SpeechTokenizer.from_pretrained(SHIPPED_TOKENIZER), options.seed
    ).items():
        print(f"{name}: {path}")
