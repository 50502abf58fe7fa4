"""`python -m covo_rl.synth OUT`: render the built-in question set."""

import argparse

from covo_rl.synth import render_set

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m covo_rl.synth", description=render_set.__doc__)
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, default=0)
    for split, default in (("train", 2000), ("validation", 300), ("test", 400)):
        parser.add_argument(f"--{split}", type=int, default=default, metavar="N")
    for split, path in render_set(**vars(parser.parse_args())).items():
        print(f"{split}: {path}")
