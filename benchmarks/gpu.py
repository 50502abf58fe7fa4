"""Everything there is to check and to measure on a GPU that is lent for minutes, into one JSON file.

    python benchmarks/gpu.py                                    # all parts at 7B: about 15 minutes on one 80 GB card
    python benchmarks/gpu.py --only environment,decode --limit 500
    python benchmarks/gpu.py --size tiny --json /tmp/gpu.json   # the same code on a CPU: try it before a GPU is there

Parts: environment (card, versions, commit, measured rates), decode (`covo-rl bench grpo --model-size 7b` at the three
shapes of docs/performance.md), profile (16 decode steps and a loss pass: what the device does), tests (those marked
gpu), speech (the published decoder's real-time factor, updates of both trainings), recipe (steps of
covo_audio_7b_lora.yaml by phase), lengths (rows that end early), runs (the small recipe with --full in bfloat16, FSDP2,
QLoRA, ZeRO; spoken replies). Each stands alone: what fails is recorded with its traceback, and the next begins. The
file, benchmarks/results/DATE-CARD.json if not named, is written after every result.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from covo_rl.bench.case import random_model, workload_on
from covo_rl.bench.full_size import device_name, sized_rows
from covo_rl.bench.parts import bounded_run, run_parts
from covo_rl.bench.profiling import device_profile
from covo_rl.bench.recipe import recipe_steps
from covo_rl.bench.sizes import MODEL_SIZES, Cell
from covo_rl.bench.speech import decoding, updates
from covo_rl.bench.variants import Ours
from covo_rl.records.folder import environment
from covo_rl.run.speed import measure_speed
from covo_rl.train.launch import device_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
#: cells of docs/performance.md (G, C), prompts of the recipe's step, by size
SHAPES = {"7b": ([(8, 256), (16, 256), (8, 1024)], 8, 256), "tiny": ([(2, 8), (4, 8), (2, 16)], 2, 8)}
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
MAIN, SPOKEN = ([f"recipes/{name}.py", "--evaluate", "false"] for name in ("grpo_mmau", "grpo_spoken"))
SMALL = [*MAIN, "--max_steps", "2", "--prompts_per_step", "4", "--micro_batch_prompts", "4", "--limit", "16",
         "--max_completion_length", "24"]  # fmt: skip
#: name -> (words for accelerate, recipe and its words, package it needs)
RUNS = {
    "lora_bf16": ([], [*SMALL, "--dtype", "bfloat16"], None),
    "ahead_bf16": ([], [*SMALL, "--dtype", "bfloat16", "--rollout_ahead", "1"], None),
    "full_bf16": (["--mixed_precision", "bf16"], [*SMALL, "--full"], None),
    "fsdp2_lora": (["--config_file", "recipes/accelerate/fsdp2.yaml"], SMALL, None),
    "fsdp2_full": (["--config_file", "recipes/accelerate/fsdp2.yaml"], [*SMALL, "--full"], None),
    "qlora": ([], [*SMALL, "--load_in_4bit", "true", "--dtype", "bfloat16"], "bitsandbytes"),
    "zero2": (["--config_file", "recipes/accelerate/zero2.yaml"], SMALL, "deepspeed"),
    "zero3": (["--config_file", "recipes/accelerate/zero3.yaml"], SMALL, "deepspeed"),
    "spoken": ([], [*SPOKEN, "--max_steps", "3", "--limit", "48"], None),
}
RUNS_AT_ONCE, FIRST_PORT = 4, 29_600


class Measurement:
    """The parts, for one size and device."""

    def __init__(self, size: str, device: torch.device, commit: str | None, *, stock: bool = True) -> None:
        self.size, self.device, self.commit, self.stock = size, device, commit, stock
        self.dtype = torch.bfloat16
        shapes, self.prompts, self.completion = SHAPES[size]
        self.cells = [Cell(188, g, c, clips=4 if size == "7b" else 2) for g, c in shapes]

    def environment(self, left: Callable[[], float]) -> Iterator[tuple[str, Any]]:
        yield "software", {**environment(), **({"commit": self.commit} if self.commit else {})}
        yield "device", {"name": device_name(self.device), "cuda": torch.version.cuda, "size": self.size}
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv"]
            yield "card", bounded_run(query, 30, ROOT)
        for dtype in ("bfloat16", "float32"):
            yield f"speed_{dtype}", measure_speed(str(self.device), dtype)._asdict()

    def decode(self, left: Callable[[], float]) -> Iterator[tuple[str, Any]]:
        longest_stock = min(cell.completion for cell in self.cells) if self.stock else 0
        rows = sized_rows(self.cells, self.size, self.device, self.dtype, stock_up_to=longest_stock)
        yield from ((f"G{row['G']}_C{row['C']}", row) for row in rows)

    def lengths(self, left: Callable[[], float]) -> Iterator[tuple[str, Any]]:
        rows = sized_rows(self.cells[1:2], self.size, self.device, self.dtype, stock_up_to=0, lengths="random")
        yield from (("sampling", row) for row in rows)

    def profile(self, left: Callable[[], float]) -> Iterator[tuple[str, Any]]:
        cell = replace(self.cells[0], completion=16)
        case = workload_on(*random_model(MODEL_SIZES[self.size], cell.positions, self.device, self.dtype), cell)
        ours, groups = Ours(case), case.groups()[:1]
        old_NC = torch.zeros(cell.generations, cell.completion, device=self.device)
        advantages_N = torch.linspace(-1, 1, cell.generations, device=self.device)
        for name, work in {
            "decode_16_steps": lambda: ours.sample(cell.completion, 0),
            "loss_of_one_group": lambda: ours.loss(groups, old_NC, advantages_N),
        }.items():
            work()  # the first call chooses kernels
            yield name, device_profile(self.device, work)

    def tests(self, left: Callable[[], float]) -> Iterator[tuple[str, Any]]:
        workers = ["-n", "6"] if importlib.util.find_spec("xdist") else []
        run = bounded_run([sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfE", *workers], min(left(), 300), ROOT)
        summary = run["last_lines"][-1] if run["last_lines"] else ""
        counts = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", summary)}
        yield "pytest", {**run, "counts": counts if "in" in summary else None}

    def speech(self, left: Callable[[], float]) -> Iterator[tuple[str, Any]]:
        shape, batches, seconds, clip = ("published", (1, 16), 10, 15) if self.size == "7b" else ("tiny", (2,), 0.4, 2)
        for dtype in (torch.float32, torch.bfloat16):
            rows = decoding(shape, self.device, dtype, batches, seconds)
            yield from ((f"{str(dtype).removeprefix('torch.')}_{name}", row) for name, row in rows)
        yield from updates(shape, self.device, clip)

    def recipe(self, left: Callable[[], float]) -> Iterator[tuple[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            steps = recipe_steps(self.size, prompts=self.prompts, completion=self.completion, folder=Path(folder))
            yield from ((f"step_{number}", step) for number, step in enumerate(steps, 1))

    def runs(self, left: Callable[[], float]) -> Iterator[tuple[str, Any]]:
        """Whether they end well; several at once, as most of their seconds are imports: no measure of speed."""

        def run(place: int, launch: list[str], recipe: list[str], package: str | None) -> dict[str, Any]:
            absent = package is not None and importlib.util.find_spec(package) is None
            if absent or left() <= 0:
                return {"rc": None, "why": f"{package} is not installed" if absent else "the limit was reached"}
            with tempfile.TemporaryDirectory() as folder:
                cpu = ["--cpu"] if self.device.type == "cpu" else []
                port = ["--main_process_port", str(FIRST_PORT + place)]
                return bounded_run([*LAUNCH, *port, *launch, *cpu, *recipe, "--output", f"{folder}/run"], left(), ROOT)

        with ThreadPoolExecutor(RUNS_AT_ONCE) as pool:
            pending = {name: pool.submit(run, place, *spec) for place, (name, spec) in enumerate(RUNS.items())}
            yield from ((name, future.result()) for name, future in pending.items())


def result_path(device: torch.device, size: str) -> Path:
    """A file that is not there yet: DATE-CARD.json, DATE-CARD-2.json ..."""
    card = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    stem = f"{date.today()}-{card}" + ("" if size == "7b" else f"-{size}")
    names = (f"{stem}{suffix}.json" for suffix in ["", *(f"-{n}" for n in range(2, 1000))])
    return next(RESULTS / name for name in names if not (RESULTS / name).exists())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SHAPES), default="7b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", default="", help="parts, separated by commas")
    parser.add_argument("--limit", type=float, default=840, help="seconds after which no part begins")
    parser.add_argument("--no-stock", action="store_true", help="leave out the stock rows of decode, 70 s of it at 7B")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--commit", help="commit of the code, where it is not a git checkout")
    args = parser.parse_args()
    device = device_of(args.device)
    measure = Measurement(args.size, device, args.commit, stock=not args.no_stock)
    names = ("environment", "decode", "profile", "tests", "speech", "recipe", "lengths", "runs")
    path = args.json or result_path(device, args.size)
    path.parent.mkdir(parents=True, exist_ok=True)
    only = [name for name in args.only.split(",") if name]
    try:
        record = run_parts({name: getattr(measure, name) for name in names}, path, only=only, limit_s=args.limit)
    except ValueError as error:
        parser.error(str(error))
    print(f"{path}: " + ", ".join(f"{name} {part['status']}" for name, part in record.items()))


if __name__ == "__main__":
    main()
