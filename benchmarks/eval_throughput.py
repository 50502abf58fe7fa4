"""How fast is an evaluation: one row at a time, batches in file order, and ours (similar lengths together).

    python benchmarks/eval_throughput.py                          # the shipped tiny model, CPU
    python benchmarks/eval_throughput.py --model PATH --rows 256 --batch-size 32 --longest 30

Rows are noise clips with log-uniform lengths, two questions a clip, shuffled. The three ways take turns within one
process, each time with a new feature store, greedy and with the same limit, so that machine load hits all alike.
Prints the median rows per second of wall time, the ratios of wall and of CPU time (the one to trust on a busy machine
without a GPU), and how many clips were encoded.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time

import numpy as np

from covo_rl.config import PromptConfig
from covo_rl.evaluate.answer import PolicyAnswerer, plan_batches
from covo_rl.evaluate.runner import Request, load_answerer
from covo_rl.types import Clip, Example

RATE = 16000
#: way -> (batch size or None for the option's, similar lengths together)
WAYS = {"one row at a time": (1, False), "batches in file order": (None, False), "ours": (None, True)}


def make_rows(count: int, longest: float, seed: int) -> tuple[list[Example], list[float]]:
    """Questions of varied length over noise clips of 0.5 to `longest` seconds, and those lengths."""
    rng = np.random.default_rng(seed)
    rows, seconds = [], []
    for i in range((count + 1) // 2):
        length = float(np.exp(rng.uniform(np.log(0.5), np.log(longest))))
        clip = Clip(array=(0.1 * rng.standard_normal(int(length * RATE))).astype(np.float32), sampling_rate=RATE)
        for q in range(2):
            text = "What do you hear " + "in the background " * int(rng.integers(0, 6)) + "?"
            rows.append(Example(f"{i}-{q}", (clip,), text, ("rain", "a dog", "two people", "an engine"), "rain"))
            seconds.append(length)
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return [rows[i] for i in order], [seconds[i] for i in order]


def run_once(answerer: PolicyAnswerer, rows: list[Example], seconds: list[float], size: int, bucket: bool) -> dict:
    """Wall seconds of answering all rows, and how many clips were encoded."""
    from covo_rl.policy import Policy

    policy = Policy(answerer.policy.family, clips=answerer.clips)
    policy.eval()
    fresh = PolicyAnswerer(policy, answerer.clips, PromptConfig(), answerer.rollout_config)
    start, start_cpu = time.perf_counter(), time.process_time()
    for batch in plan_batches(rows, seconds, size, bucket=bucket):
        fresh.answer([rows[i] for i in batch], greedy=True, num_generations=1, seed=0)
    wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    return {"seconds": wall, "cpu_seconds": cpu, "encoded": policy.store.encoded_clips}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--longest", type=float, default=3.0, help="seconds")
    parser.add_argument("--max-completion-length", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows, seconds = make_rows(args.rows, args.longest, args.seed)
    answerer = load_answerer(Request(model=args.model, max_completion_length=args.max_completion_length))
    timings: dict[str, list[dict]] = {way: [] for way in WAYS}
    run_once(answerer, rows[:4], seconds[:4], 4, True)  # first calls allocate
    for _ in range(args.rounds):
        for way, (size, bucket) in WAYS.items():
            timings[way].append(run_once(answerer, rows, seconds, size or args.batch_size, bucket))
    report(timings, len(rows))
    print(json.dumps({"runs": timings, **vars(args)}))


def report(timings: dict[str, list[dict]], count: int) -> None:
    """One line per way: medians over the rounds."""
    wall, cpu = (
        {way: statistics.median(r[k] for r in runs) for way, runs in timings.items()}
        for k in ("seconds", "cpu_seconds")
    )
    for way, runs in timings.items():
        print(
            f"{way:<22} {count / wall[way]:7.2f} rows/s; ours is faster by {wall[way] / wall['ours']:5.2f} (wall), "
            f"{cpu[way] / cpu['ours']:5.2f} (CPU); {runs[0]['encoded']} clips encoded"
        )


if __name__ == "__main__":
    main()
