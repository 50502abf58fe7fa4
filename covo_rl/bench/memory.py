"""Peak memory of one loss pass, in a process of its own.

python -m covo_rl.bench.memory P,G,C CLIPS DEVICE ours|stock|stock_chunked SIZES_AS_JSON
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from covo_rl.bench.case import Cell, Sizes, make
from covo_rl.bench.variants import VARIANTS, Ours

MIB = 2**20


def resident(field: str = "VmRSS") -> float:
    """Resident memory of this process, bytes: now, or at its highest with VmHWM.

    Not getrusage's ru_maxrss, which a process inherits from the one that started it.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024.0 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field + ":"))


def main(words: list[str]) -> float:
    """Run the loss pass once on random completions and return what it added at its peak, MiB."""
    shape, clips, device_name, name, sizes = words
    device = torch.device(device_name)
    positions, generations, completion = (int(n) for n in shape.split(","))
    case = make(Cell(positions, generations, completion, int(clips)), Sizes(**json.loads(sizes)), device)
    variant = VARIANTS[name](case)
    groups = case.groups()
    if isinstance(variant, Ours):
        variant.encode()
    count = len(case.prompts) * generations
    old_NC = torch.zeros(count, completion, device=device)
    advantages_N = torch.ones(count, device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = float(torch.cuda.memory_allocated())
        variant.loss(groups, old_NC, advantages_N)
        return (torch.cuda.max_memory_allocated() - before) / MIB
    before = resident()
    variant.loss(groups, old_NC, advantages_N)
    return (resident("VmHWM") - before) / MIB


if __name__ == "__main__":
    print(f"PEAK_MB {main(sys.argv[1:]):.1f}")
