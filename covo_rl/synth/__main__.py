"""`python -m covo_rl.synth OUT`: render the built-in question set."""

from __future__ import annotations

import argparse

from covo_rl.synth import render_set


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m covo_rl.synth", description=render_set.__doc__)
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, default=0)
    for split, default in (("train", 2000), ("validation", 300), ("test", 400)):
        parser.add_argument(f"--{split}", type=int, default=default, metavar="N")
    args = parser.parse_args()
    for split, path in render_set(args.folder, args.seed, args.train, args.validation, args.test).items():
        print(f"{split}: {path}")


if __name__ == "__main__":
    main()
