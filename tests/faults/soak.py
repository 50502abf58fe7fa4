"""A thousand steps of the smallest real run: memory, step time and file handles must stay flat.

    python tests/faults/soak.py [--steps 1000] [--json FILE]

The real trainer on a tiny Covo-Audio: two prompts of six rows, two rollouts of eight tokens, the four shipped rewards
and one that pays random text, a checkpoint every 50 steps, metrics and rollouts logged at every step. Samples are taken
after every step; time is CPU time, which other work on the machine does not stretch. Exit code 0 only if, after step
100, the resident memory grows by less than 3 %, the median step of the last tenth takes less than 1.25 times that of
the first tenth, and no more file handles are open than at step 100.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

WARM = 100
OPTIONS = {"prompts_per_step": 2, "num_generations": 2, "max_completion_length": 8, "learning_rate": 1e-4,
           "checkpoint_every": 50}  # fmt: skip
REWARDS = ("accuracy", "format", "consistency", "thinking")


def resident_mib() -> float:
    """Memory of this process that lies in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


def soak(folder: Path, steps: int) -> list[tuple[float, float, int]]:
    """(CPU seconds, resident MiB, open files) after each step."""
    import torch
    import train_cases

    from covo_rl.records.folder import Run
    from covo_rl.records.steps import rollout_rows
    from covo_rl.train.checkpoint.saver import Saver

    torch.set_num_threads(1)
    rewards = {train_cases.vowels: 1.0, **dict.fromkeys(REWARDS, 1.0)}
    settings = train_cases.options(folder, max_steps=steps, rewards=rewards, **OPTIONS)
    trainer = train_cases.trainer(settings)
    saver, record = Saver(settings, folder), Run(folder)
    samples: list[tuple[float, float, int]] = []
    last = time.process_time()

    def on_step(metrics, batch):
        nonlocal last
        record.log_metrics(metrics)
        record.log_rollouts(metrics["step"], rollout_rows(batch.groups, batch.table, batch.advantages))
        now = time.process_time()
        samples.append((now - last, resident_mib(), handles()))
        last = now

    trainer.run(on_step, saver)
    return samples


def verdict(samples: list[tuple[float, float, int]]) -> dict[str, float]:
    """The figures, and `ok`."""
    warm, part = min(WARM, len(samples) // 5), max(len(samples) // 10, 1)
    seconds = [sample[0] for sample in samples[warm:]]
    memory = [sample[1] for sample in samples]
    files = [sample[2] for sample in samples]
    first, last = statistics.median(seconds[:part]), statistics.median(seconds[-part:])
    # the level, not a single sample: a checkpoint's copies come and go
    before, after = statistics.median(memory[warm : warm + part]), statistics.median(memory[-part:])
    figures = {
        "steps": len(samples), "resident_mib_start": before, "resident_mib_end": after,
        "growth_percent": 100 * (after / before - 1), "step_ms_start": 1000 * first, "step_ms_end": 1000 * last,
        "handles_start": files[warm], "handles_end": files[-1], "handles_most": max(files[warm:]),
    }  # fmt: skip
    return {**figures, "ok": figures["growth_percent"] < 3 and last < 1.25 * first and files[-1] <= files[warm]}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="write the figures and every sample here")
    arguments = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="soak_") as folder:
        samples = soak(Path(folder), arguments.steps)
    figures = verdict(samples)
    for name, value in figures.items():
        print(f"{name:<20} {value:.2f}" if isinstance(value, float) else f"{name:<20} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps({**figures, "samples": samples}))
    return 0 if figures["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
