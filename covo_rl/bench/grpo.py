"""Measure a cell: both variants interleaved, medians over repetitions, by phase, with equality of the results."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from covo_rl.bench.case import Workload, workload_of
from covo_rl.bench.sizes import Cell, Sizes, flops
from covo_rl.bench.variants import VARIANTS, Ours, Stock, Variant
from covo_rl.run.speed import device_drained

PHASES = ("encode", "prefill", "decode", "old", "loss")
MIB = 2**20
M_MMAP_THRESHOLD = -3  # malloc.h


def timed(device: torch.device, function: Callable[[], Any]) -> tuple[float, float, Any]:
    """(CPU seconds of this process or, elsewhere, wall seconds with the device drained; wall seconds; result)."""
    now = time.process_time if device.type == "cpu" else time.perf_counter
    device_drained(device)
    start, wall = now(), time.perf_counter()
    result = function()
    device_drained(device)
    return now() - start, time.perf_counter() - wall, result


def phase_seconds(case: Workload, variant: Variant, advantages_N: torch.Tensor, seed: int) -> dict[str, float]:
    """Seconds by phase of one step, `step` and `wall` of the whole.

    `sample` is one call (encode, prefill, decode); the encoder and one-token runs beside it say how it splits.
    """
    clock = partial(timed, case.policy.device)
    encode, encode_wall, _ = clock(variant.encode)
    first, _, _ = clock(lambda: variant.sample(1, seed))
    sampled, wall_s, _ = clock(lambda: variant.sample(case.cell.completion, seed))
    groups = case.groups(seed)  # a random model may sample the audio placeholder, which the stock forward refuses
    old, wall_o, old_NC = clock(lambda: variant.old(groups))
    case.policy.model.zero_grad(set_to_none=True)
    loss, wall_l, _ = clock(lambda: variant.loss(groups, old_NC, advantages_N))
    phases = {"encode": encode, "prefill": first, "decode": sampled - first, "old": old, "loss": loss}
    whole = {"step": sampled + old + loss, "wall": wall_s + wall_o + wall_l}
    if isinstance(variant, Ours):
        return {**phases, "step": whole["step"] + encode, "wall": whole["wall"] + encode_wall}
    return {**phases, **whole, "prefill": first - encode}  # the stock sampling call encodes inside


def largest_differences(case: Workload) -> tuple[float, float]:
    """Largest differences of log-probs and (relative, by parameter) of gradients on the same random completions."""
    groups, results = case.groups(), []
    advantages_N = torch.randn(case.cell.rows, generator=torch.Generator().manual_seed(0)).to(case.policy.device)
    for variant in (Stock(case), Ours(case)):
        case.policy.model.zero_grad(set_to_none=True)
        logps_NC = variant.loss(groups, variant.old(groups), advantages_N)
        grads = {n: p.grad.float().clone() for n, p in case.policy.model.named_parameters() if p.grad is not None}
        results.append((logps_NC, grads))
    case.policy.model.zero_grad(set_to_none=True)
    (stock, stock_grads), (ours, our_grads) = results
    top = max(float(g.norm()) for g in stock_grads.values())
    relative = max(float((our_grads[n] - g).norm()) / max(float(g.norm()), 1e-3 * top) for n, g in stock_grads.items())
    return float((stock - ours).abs().max()), relative


def measured_cell(
    cell: Cell, sizes: Sizes, device: torch.device, dtype: torch.dtype, repeats: int, trl: bool = False
) -> dict[str, Any]:
    """One row of the table: medians of interleaved repetitions; `trl` adds those of TRL's own trainer."""
    case = workload_of(cell, sizes, device, dtype)
    logp_difference, gradient_difference = largest_differences(case)  # also the warm-up
    advantages_N = torch.randn(cell.rows, generator=torch.Generator().manual_seed(1)).to(device)
    variants: dict[str, Variant] = {"stock": Stock(case), "ours": Ours(case)}
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for repeat in range(repeats):
        for name, variant in variants.items():
            rows[name].append(phase_seconds(case, variant, advantages_N, seed=repeat))
    stock, ours = ({key: statistics.median(row[key] for row in rows[n]) for key in rows[n][0]} for n in rows)
    length = len(case.prompts[0].input_ids)
    stock_work, our_work = (flops(cell, sizes, length, stock=stock) for stock in (True, False))
    ratio, ceiling = stock["step"] / ours["step"], sum(stock_work.values()) / sum(our_work.values())
    against_trl: dict[str, Any] = {"trl_cpu_s": None, "ours_like_trl_cpu_s": None, "trl_ratio": None}
    if trl:
        from covo_rl.bench.trl_audio import compare_with_trl

        against_trl = compare_with_trl(case, partial(timed, device), repeats)
    return {
        "P": cell.positions, "G": cell.generations, "C": cell.completion, "mode": "lora", "clips": cell.clips,
        "prompt_positions": length, "device": str(device), "dtype": str(dtype).removeprefix("torch."),
        "repeats": repeats, "sizes": asdict(sizes),
        "stock_cpu_s": stock["step"], "ours_cpu_s": ours["step"],
        "stock_wall_s": stock["wall"], "ours_wall_s": ours["wall"],
        "ratio": ratio, "flop_ratio": ceiling, "share_of_ceiling": ratio / ceiling,
        "ratio_by_phase": {p: stock[p] / max(ours[p], 1e-9) for p in PHASES},
        "flop_ratio_by_phase": {p: stock_work[p] / max(our_work[p], 1.0) for p in PHASES},
        "phases_stock": {p: stock[p] for p in PHASES}, "phases_ours": {p: ours[p] for p in PHASES},
        "tokens_per_s_stock": cell.rows * cell.completion / stock["wall"],
        "tokens_per_s_ours": cell.rows * cell.completion / ours["wall"],
        "max_abs_logp_diff": logp_difference, "max_rel_grad_diff": gradient_difference,
        **against_trl, "peak_mb_stock": None, "peak_mb_stock_chunked": None, "peak_mb_ours": None,
        "peak_vocabulary": None,
    }  # fmt: skip


def compared_cells(
    cells: Sequence[Cell], sizes: Sizes, device: torch.device, dtype: torch.dtype, *, repeats: int, trl: bool,
    memory: tuple[int, int] | None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The table's rows; `memory` are clips and vocabulary of the memory runs, None without."""
    for cell in cells:
        row = measured_cell(cell, sizes, device, dtype, repeats, trl)
        if memory:
            small, large = replace(cell, clips=memory[0]), replace(sizes, vocabulary=memory[1])
            row |= {f"peak_mb_{name}": peak_memory(small, large, device, name) for name in VARIANTS}
            row["peak_vocabulary"] = large.vocabulary
        yield row


def peak_memory(cell: Cell, sizes: Sizes, device: torch.device, variant: str) -> float:
    """MiB that the loss pass adds at its peak, in a process of its own; raises RuntimeError where that fails."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(_loss_peak, cell, sizes, device, variant).result()
    except (RuntimeError, MemoryError) as error:  # also a process that was killed
        shape = f"{cell.positions},{cell.generations},{cell.completion}"
        raise RuntimeError(f"the memory run of {variant} at {shape} failed: {error}") from error


def _loss_peak(cell: Cell, sizes: Sizes, device: torch.device, name: str) -> float:
    """Run the loss pass once on random completions and return what it added at its peak, MiB."""
    cuda = device.type == "cuda"
    if not cuda:
        # glibc keeps freed blocks of growing size (half as much again here); a fixed threshold shows what tensors need
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
    case = workload_of(cell, sizes, device)
    variant, groups = VARIANTS[name](case), case.groups()
    if isinstance(variant, Ours):
        variant.encode()
    old_NC, advantages_N = torch.zeros(cell.rows, cell.completion, device=device), torch.ones(cell.rows, device=device)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else _resident("VmRSS")
    variant.loss(groups, old_NC, advantages_N)
    return round(((torch.cuda.max_memory_allocated() if cuda else _resident("VmHWM")) - before) / MIB, 1)


def _resident(field: str) -> int:
    """Resident memory of this process, bytes: VmRSS now, VmHWM at its highest.

    Not getrusage's ru_maxrss, which a process inherits from the one that started it.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field + ":"))
