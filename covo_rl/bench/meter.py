"""Seconds and peak memory of a phase, and what ran out of memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from covo_rl.bench.grpo import timed
from covo_rl.train.guard import is_out_of_memory

GIB = 2**30


@dataclass
class Meter:
    """Runs a phase: `PHASE_s` wall seconds and, on CUDA, `PHASE_peak_gib` into `figures`; both None out of memory."""

    device: torch.device
    figures: dict[str, Any] = field(default_factory=dict)
    out_of_memory: list[str] = field(default_factory=list)

    def __call__(self, phase: str, work: Callable[[], Any]) -> Any:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            _, seconds, result = timed(self.device, work)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.out_of_memory.append(phase)
            seconds, result = None, None
        peak = torch.cuda.max_memory_allocated() / GIB if cuda and seconds is not None else None
        self.figures |= {f"{phase}_s": seconds, f"{phase}_peak_gib": peak}
        return result


def medians(meters: Sequence[Meter]) -> dict[str, Any]:
    """Of every figure over the repetitions, and the phases that ran out of memory in any of them."""
    figures: dict[str, Any] = {}
    for name, value in meters[-1].figures.items():
        values = [meter.figures[name] for meter in meters]
        numbers = all(isinstance(value, float) for value in values)
        figures[name] = statistics.median(values) if numbers else value
    return figures | {"out_of_memory": sorted({phase for meter in meters for phase in meter.out_of_memory})}
