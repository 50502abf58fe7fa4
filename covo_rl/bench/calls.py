"""aten calls of a decode step, counted on a CPU: what a GPU would be asked to launch, before any graph is captured.

Tiny widths and the published number of layers: calls depend on neither width nor rows. Views and shape queries launch
nothing and are left out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from covo_rl.bench.case import workload_of
from covo_rl.bench.sizes import MODEL_SIZES, Cell
from covo_rl.engines.own import sample

#: no view by its schema, and yet nothing is computed
UNCOMPUTED = {"_unsafe_view", "sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "is_same_size"}
#: one kernel on CUDA, several calls on a CPU: counted once where it is called by this name
ONE_ON_CUDA = {"_fused_rms_norm"}
#: the published decoder's depth
LAYERS = MODEL_SIZES["tiny"].decoder_layers
SHALLOW = 4
CALLS_CELL = Cell(94, 4, 16, clips=2)


class CallCounter(TorchDispatchMode):
    """Counts what reaches a device inside `with CallCounter() as counter`: `counter.calls` by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name not in ONE_ON_CUDA:
            with self:  # what is made of others arrives whole in inference mode: a cast, a reshape that copies
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        if not func.is_view and name not in UNCOMPUTED:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class StepCalls:
    """Calls of one decode step by operation: in one decoder layer, and in everything else (head, draw, embedding)."""

    layer: dict[str, float]
    rest: dict[str, float]

    @property
    def per_layer(self) -> float:
        return sum(self.layer.values())

    @property
    def outside(self) -> float:
        return sum(self.rest.values())

    @property
    def total(self) -> float:
        """Of a whole step of the published depth."""
        return LAYERS * self.per_layer + self.outside


def decode_calls(dtype: torch.dtype, *, folded: bool = False) -> StepCalls:
    """Count on the published 28 layers at tiny widths with LoRA, a mean over 8 steps.

    `folded` lets the adapters be folded into second weights while sampling, which only float32 allows.
    A layer's calls are what 28 layers make more than 4, over 24.
    """
    deep, shallow = (_step_calls(dtype, folded, layers) for layers in (LAYERS, SHALLOW))
    names = sorted({*deep, *shallow})
    layer = {name: (deep[name] - shallow[name]) / (LAYERS - SHALLOW) for name in names}
    rest = {name: deep[name] - LAYERS * layer[name] for name in names}
    return StepCalls(*({name: calls for name, calls in part.items() if calls} for part in (layer, rest)))


def _step_calls(dtype: torch.dtype, folded: bool, layers: int) -> defaultdict[str, float]:
    """Calls of one step by operation: those of completions of 16 ids less those of 8, over 8."""
    sizes = replace(MODEL_SIZES["tiny"], decoder_layers=layers)
    case = workload_of(CALLS_CELL, sizes, torch.device("cpu"), dtype)
    if not folded:
        case.policy.decode_weights_mb = 0
    features = case.policy.features(case.prompts)
    counts = []
    for length in (CALLS_CELL.completion, CALLS_CELL.completion // 2):
        config = replace(case.config, max_completion_length=length)
        with CallCounter() as counter:
            sample(case.policy, case.prompts, features, config, seed=1)
        counts.append(counter.calls)
    long, short = counts
    steps = CALLS_CELL.completion // 2
    return defaultdict(float, {name: (long[name] - short[name]) / steps for name in long})
