"""Measure a cell: both variants interleaved, medians over repetitions, by phase, with equality of the results."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from covo_rl.bench.case import Case, Cell, Sizes, make
from covo_rl.bench.flops import flops
from covo_rl.bench.variants import Ours, Stock, Variant

PHASES = ("encode", "prefill", "decode", "old", "loss")


class Timer:
    """CPU seconds of this process, or on a GPU wall seconds with the device drained."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.now = time.perf_counter if self.cuda else time.process_time

    def __call__(self, function: Callable[[], Any]) -> tuple[float, float, Any]:
        """(CPU or device seconds, wall seconds, result)."""
        self._drain()
        start, wall = self.now(), time.perf_counter()
        result = function()
        self._drain()
        return self.now() - start, time.perf_counter() - wall, result

    def _drain(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def measure(case: Case, variant: Variant, timer: Timer, advantages_N: torch.Tensor, seed: int) -> dict[str, float]:
    """Seconds by phase of one step, `step` and `wall` of the whole.

    `sample` is one call (encode, prefill, decode); the encoder and one-token runs beside it say how it splits.
    """
    model = case.policy.model
    length = case.cell.completion
    ours = isinstance(variant, Ours)
    encode, encode_wall, _ = timer(variant.encode)
    first, _, _ = timer(lambda: variant.sample(1, seed))
    sampled, wall_s, _ = timer(lambda: variant.sample(length, seed))
    groups = case.groups(seed)  # a random model may sample the audio placeholder, which the stock forward refuses
    old, wall_o, old_NC = timer(lambda: variant.old(groups))
    model.zero_grad(set_to_none=True)
    loss, wall_l, _ = timer(lambda: variant.loss(groups, old_NC, advantages_N))
    # the stock sampling call encodes inside, ours before it
    inside = 0.0 if ours else encode
    phases = {"encode": encode, "prefill": first - inside, "decode": sampled - first, "old": old, "loss": loss}
    extra = (encode, encode_wall) if ours else (0.0, 0.0)
    step, wall = sampled + old + loss + extra[0], wall_s + wall_o + wall_l + extra[1]
    return {**phases, "step": step, "wall": wall}


def equality(case: Case) -> tuple[float, float]:
    """Largest differences of log-probs and (relative, by parameter) of gradients on the same random completions."""
    groups = case.groups()
    count = case.cell.clips * case.cell.generations
    advantages_N = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(case.policy.device)
    found = []
    for variant in (Stock(case), Ours(case)):
        case.policy.model.zero_grad(set_to_none=True)
        old_NC = variant.old(groups)
        logps_NC = variant.loss(groups, old_NC, advantages_N)
        grads = {n: p.grad.float().clone() for n, p in case.policy.model.named_parameters() if p.grad is not None}
        found.append((logps_NC, grads))
    case.policy.model.zero_grad(set_to_none=True)
    (stock, stock_grads), (ours, our_grads) = found
    top = max(float(g.norm()) for g in stock_grads.values())
    relative = max(float((our_grads[n] - g).norm()) / max(float(g.norm()), 1e-3 * top) for n, g in stock_grads.items())
    return float((stock - ours).abs().max()), relative


def run_cell(
    cell: Cell, sizes: Sizes, device: torch.device, dtype: torch.dtype, repeats: int, mode: str, trl: bool = False
) -> dict[str, Any]:
    """One row of the table: medians of interleaved repetitions; `trl` adds those of TRL's own trainer."""
    case = make(cell, sizes, device, dtype)
    timer = Timer(device)
    logp_difference, gradient_difference = equality(case)  # also the warm-up
    count = cell.clips * cell.generations
    advantages_N = torch.randn(count, generator=torch.Generator().manual_seed(1)).to(device)
    runs: dict[str, list[dict[str, float]]] = {"stock": [], "ours": []}
    variants: dict[str, Variant] = {"stock": Stock(case), "ours": Ours(case)}
    for repeat in range(repeats):
        for name, variant in variants.items():
            runs[name].append(measure(case, variant, timer, advantages_N, seed=repeat))
    medians = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in runs.items()
    }
    length = len(case.prompts[0].input_ids)
    work = {name: flops(cell, sizes, length, stock=name == "stock") for name in runs}
    ratio = medians["stock"]["step"] / medians["ours"]["step"]
    ceiling = work["stock"].total / work["ours"].total
    against_trl: dict[str, Any] = {"trl_cpu_s": None, "ours_like_trl_cpu_s": None, "trl_ratio": None}
    if trl:
        from covo_rl.bench.trl_audio import compare

        against_trl = compare(case, timer, repeats)
    return {
        "P": cell.positions, "G": cell.generations, "C": cell.completion, "mode": mode, "clips": cell.clips,
        "prompt_positions": length, "device": str(device), "dtype": str(dtype).removeprefix("torch."),
        "repeats": repeats, "sizes": asdict(sizes),
        "stock_cpu_s": medians["stock"]["step"], "ours_cpu_s": medians["ours"]["step"],
        "stock_wall_s": medians["stock"]["wall"], "ours_wall_s": medians["ours"]["wall"],
        "ratio": ratio, "flop_ratio": ceiling, "share_of_ceiling": ratio / ceiling,
        "ratio_by_phase": {p: medians["stock"][p] / max(medians["ours"][p], 1e-9) for p in PHASES},
        "flop_ratio_by_phase": {p: getattr(work["stock"], p) / max(getattr(work["ours"], p), 1.0) for p in PHASES},
        "phases_stock": {p: medians["stock"][p] for p in PHASES},
        "phases_ours": {p: medians["ours"][p] for p in PHASES},
        "tokens_per_s_stock": count * cell.completion / medians["stock"]["wall"],
        "tokens_per_s_ours": count * cell.completion / medians["ours"]["wall"],
        "max_abs_logp_diff": logp_difference, "max_rel_grad_diff": gradient_difference,
        **against_trl, "peak_mb_stock": None, "peak_mb_stock_chunked": None, "peak_mb_ours": None,
        "peak_vocabulary": None,
    }  # fmt: skip


def peak_memory(cell: Cell, sizes: Sizes, device: torch.device, variant: str) -> float:
    """MiB that the loss pass adds at its peak, in a process of its own.

    glibc keeps freed blocks of growing size (half as much again here); a fixed threshold shows what tensors need.
    """
    words = [f"{cell.positions},{cell.generations},{cell.completion}", str(cell.clips), str(device), variant]
    command = [sys.executable, "-m", "covo_rl.bench.memory", *words, json.dumps(asdict(sizes))]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("PEAK_MB ")]
    if done.returncode or not lines:
        raise RuntimeError(f"the memory run of {variant} at {words[0]} failed:\n{done.stderr[-2000:]}")
    return float(lines[-1].split()[1])
