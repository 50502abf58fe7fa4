"""What learning when to speak reaches on a tiny model, and what it is compared with.

    python benchmarks/duplex.py runs/duplex --seeds 30 31 32 --output benchmarks/results/DATE-duplex-cpu.json

Of every seed a supervised stage, then from its model GRPO (`mix`) and its controls; of the first the other estimators
too. Runs that are finished are read, not repeated. Two lanes of half the runs: --lane 0/2 and --lane 1/2.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

FIGURES = (
    "early_long_pause", "long_pause_success", "single_turn_success", "delay_p50", "delay_p90", "back_channel_ignored",
    "barge_in_success", "barge_in_delay_p50", "floor_held", "early_by_pause", "early_by_cue",
)  # fmt: skip
VARIANTS = {
    "mix": [], "shuffled": ["--control", "shuffled"], "gold": ["--control", "gold"], "no_cue": ["--control", "no_cue"],
    "exact": ["--timing-estimator", "exact"], "trunk": ["--timing-estimator", "trunk"],
    "sampled": ["--timing-estimator", "sampled"],
}  # fmt: skip
ON_ALL = ("mix", "shuffled", "gold", "no_cue")


def plan(seeds, variants):
    """(seed, variant) of all runs, the compared ones first."""
    runs = [(seed, name) for name in ON_ALL if name in variants for seed in seeds]
    return runs + [(seeds[0], name) for name in variants if name not in ON_ALL]


def run(folder, seed, name, more):
    """result.json of one run; all of a seed begin with the model of its supervised stage."""
    output = folder / f"{name}-{seed}"
    if not (output / "result.json").is_file():
        start = [] if name == "mix" else ["--model", str(folder / f"mix-{seed}" / "sft")]
        command = [sys.executable, "recipes/grpo_duplex.py", "--seed", str(seed), "--output", str(output)]
        subprocess.run([*command, *start, *VARIANTS[name], *more, "--overwrite", "true"], check=True)
    return json.loads((output / "result.json").read_text())


def summary(result):
    """What is kept of a run."""
    threshold = [{"b": row["b"], **{name: row[name] for name in FIGURES[:3]}} for row in result["threshold"]]
    parts = {when: {name: result[when][name] for name in FIGURES} for when in ("before", "after")}
    expected = {name: result["after"]["expected"][name] for name in FIGURES[:3]}
    names = ("steps", "seconds", "stages", "probe_auc", "threshold_single_at_equal_early")
    return {**{name: result[name] for name in names}, **parts, "after_expected": expected,
            "calibration_error": [result[when]["calibration"]["error"] for when in ("before", "after")],
            "threshold": threshold}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[30, 31, 32])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--lane", default="0/1", help="which of how many parts of the plan")
    parser.add_argument("--output", type=Path)
    options, more = parser.parse_known_args()
    lane, lanes = map(int, options.lane.split("/"))
    results = {
        f"{name}-{seed}": summary(run(options.folder, seed, name, more))
        for place, (seed, name) in enumerate(plan(options.seeds, options.variants)) if place % lanes == lane
    }  # fmt: skip
    if options.output:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        about = {"torch": torch.__version__, "python": platform.python_version(), "commit": commit, "options": more}
        options.output.write_text(json.dumps({"about": about, "runs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
