"""`covo-rl bench grpo --model-size 7b`: a step by phase, ours and stock, against what memory and products allow.

Passes of scoring and update go prompt by prompt, as the 7B recipe does (micro_batch_prompts 1). What runs out of memory
is named in the row, and the next phase goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import psutil
import torch

from covo_rl.bench.case import Workload, model_config_of, random_model, workload_on
from covo_rl.bench.lengths import sampling_of_lengths
from covo_rl.bench.meter import GIB, Meter, medians
from covo_rl.bench.sizes import MODEL_SIZES, Cell, Sizes, flops
from covo_rl.bench.variants import Ours, Stock, Variant
from covo_rl.config import ConfigError, Options
from covo_rl.data.terminal import say
from covo_rl.policy import Policy
from covo_rl.policy.recompute import keep_activations
from covo_rl.run.doctor import plan
from covo_rl.run.sizes import Shape, shape_of
from covo_rl.run.speed import Speed, decode_bytes, measure_speed
from covo_rl.types import Group


def sized_rows(
    cells: Sequence[Cell], size: str, device: torch.device, dtype: torch.dtype, *, stock_up_to: int, repeats: int = 1,
    lengths: str = "equal", speed: Speed | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A row per cell, on one model of MODEL_SIZES[size]; stock is left out where C is above `stock_up_to`.

    `lengths` "random" measures only sampling of ours, with rows that end early.

    Raises:
        ConfigError: cells of more than one P, or a device without the memory for weights and sampling.
    """
    positions = {cell.positions for cell in cells}
    if len(positions) > 1:
        raise ConfigError(
            [f"cells of P {', '.join(map(str, sorted(positions)))}: a model has one P; run them one by one"]
        )
    sizes = MODEL_SIZES[size]
    shape = check_memory(cells, sizes, device, dtype)
    precision = str(dtype).removeprefix("torch.")
    speed = speed or measure_speed(str(device), precision)
    say(f"{shape.total / 1e9:,.3g} B random parameters in {precision} on {device_name(device)}; rows follow one by one")
    family, trained = random_model(sizes, cells[0].positions, device, dtype)
    for cell in cells:
        case = workload_on(family, trained, cell)
        if lengths == "random":
            yield sampling_of_lengths(case, repeats=repeats)
        else:
            stock = cell.completion <= stock_up_to
            yield sized_cell(case, sizes, shape, speed, stock=stock, repeats=repeats)


def check_memory(cells: Sequence[Cell], sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Shape:
    """The model's shape, if the device has room for its weights and the largest sampling.

    Raises:
        ConfigError: with what is needed and what is there.
    """
    config = model_config_of(sizes, cells[0].positions)
    options = Options()
    options.model.dtype = str(dtype).removeprefix("torch.")
    options.adapter.lora_r = sizes.lora_r
    needed = 0.0
    for cell in cells:
        options.train.prompts_per_step, options.rollout.num_generations = cell.clips, cell.generations
        options.rollout.max_completion_length = cell.completion
        planned = plan(config, options, prompt_positions=cell.positions + 26)
        needed = max(needed, sum(planned.memory.values()) + sum(planned.sampling.values()))
    cuda = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if cuda else psutil.virtual_memory().available
    if needed > free:
        kind = device_name(device) if cuda else f"this machine's memory ({device})"
        raise ConfigError([f"a model of {shape_of(config).total / 1e9:.2f} B parameters in {options.model.dtype} needs "
                           f"{needed / GIB:.1f} GiB for weights and sampling; {kind} has {free / GIB:.1f} GiB free"]
                          )  # fmt: skip
    return shape_of(config, options.adapter)


def device_name(device: torch.device) -> str:
    """The card's name; of others their type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def sized_cell(
    case: Workload, sizes: Sizes, shape: Shape, speed: Speed, *, stock: bool = True, repeats: int = 1
) -> dict[str, Any]:
    """One row: `ours` and `stock` (None where left out) by phase, medians of interleaved repetitions.

    Seconds; `decode_ms` per step after the first ids; `floor_ms` is the reading of what a step of ours needs at the
    measured bandwidth; `loss_tflops` counts the operations that the pass needs, without those done again.
    """
    cell, device = case.cell, case.policy.device
    variants: dict[str, Variant] = {"ours": Ours(case), **({"stock": Stock(case)} if stock else {})}
    runs: dict[str, list[Meter]] = {name: [] for name in variants}
    old_NC: dict[str, torch.Tensor | None] = {}
    for variant in variants.values():
        _warm_up(variant)
    for seed in range(repeats):
        for name, variant in variants.items():
            meter = Meter(device)
            old_NC[name] = _step(variant, meter, seed)
            runs[name].append(meter)
    length = len(case.prompts[0].input_ids)
    dtype = next(case.policy.family.lm_head.parameters()).dtype
    read = decode_bytes(
        shape, prompt_positions=cell.clips * length, rows=cell.rows, completion=cell.completion, size=dtype.itemsize
    )
    row: dict[str, Any] = {
        "P": cell.positions, "G": cell.generations, "C": cell.completion, "clips": cell.clips,
        "prompt_positions": length, "sizes": asdict(sizes), "parameters": shape.total, "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."), "repeats": repeats,
        "speed": speed._asdict(), "decode_bytes": read, "floor_ms": 1000 * read / speed.bandwidth,
        "ours": None, "stock": None, "ratio": None, "logp_difference": None,
    }  # fmt: skip
    for name, meters in runs.items():
        row[name] = medians(meters)
        _derive(row[name], row, flops(cell, sizes, length, stock=name == "stock")["loss"])
    steps = [row[name] and row[name]["step_s"] for name in ("stock", "ours")]
    if None not in steps:
        row["ratio"] = steps[0] / steps[1]
    if len(old_NC) == 2 and all(logps is not None for logps in old_NC.values()):
        row["logp_difference"] = _difference(old_NC["ours"], old_NC["stock"])
    return row


def _warm_up(variant: Variant) -> None:
    """The first calls choose kernels and allocate."""
    case = variant.case
    groups = case.groups()[:1]
    meter = Meter(case.policy.device)
    meter("sample", lambda: variant.sample(min(4, case.cell.completion), 0))
    meter("loss", lambda: _losses(variant, groups, None))


def _step(variant: Variant, meter: Meter, seed: int) -> torch.Tensor | None:
    """Every phase of a step; returns old log-probs (N, C) of completions that are the same in all variants."""
    case, policy = variant.case, variant.case.policy
    ours = variant if isinstance(variant, Ours) else None
    if ours:
        meter("encode", ours.encode)
    meter("first", lambda: variant.sample(1, seed))
    sampled = meter("sample", lambda: variant.sample(case.cell.completion, seed))
    if ours and getattr(policy, "decode_graphs", False) and policy.device.type == "cuda":
        eager: Any = policy
        eager.decode_graphs = False
        meter("sample_eager", lambda: variant.sample(case.cell.completion, seed))
        eager.decode_graphs = True
    groups = case.groups(seed)  # a random model may sample the audio placeholder, which the stock forward refuses
    if ours and sampled:
        logps_NC = torch.tensor([rollout.logps for group in sampled for rollout in group.rollouts])
        meter.figures["sampling_difference"] = _difference(torch.cat([ours.old([g]).cpu() for g in sampled]), logps_NC)
    old_NC = meter("old", lambda: torch.cat([variant.old([group]) for group in groups]))
    policy.release()
    if ours:
        meter("reference", lambda: [ours.reference([group]) for group in groups])
    meter("loss", lambda: _losses(variant, groups, old_NC))
    if ours:
        with checkpointed(case) as twin:
            again = Ours(twin)
            again.encode()
            meter("loss_checkpointed", lambda: _losses(again, groups, old_NC))
    return old_NC


def _losses(variant: Variant, groups: Sequence[Group], old_NC: torch.Tensor | None) -> None:
    """Forward and backward of one group after the other; the gradients are dropped."""
    cell, model = variant.case.cell, variant.case.policy.model
    device = variant.case.policy.device
    advantages_G = torch.linspace(-1, 1, cell.generations, device=device)
    olds = [torch.zeros(cell.generations, cell.completion, device=device)] * len(groups)
    model.zero_grad(set_to_none=True)
    try:
        for group, old_GC in zip(groups, olds if old_NC is None else old_NC.split(cell.generations), strict=True):
            variant.loss([group], old_GC, advantages_G)
    finally:
        model.zero_grad(set_to_none=True)


@contextmanager
def checkpointed(case: Workload) -> Iterator[Workload]:
    """The same workload with gradient checkpointing, which is off again afterwards."""
    policy = case.policy
    twin = Policy(policy.family, policy.model, clips=policy.clips, gradient_checkpointing=True)
    try:
        yield replace(case, policy=twin)
    finally:
        keep_activations(policy.family.decoder)


def _difference(a_NC: torch.Tensor | None, b_NC: torch.Tensor | None) -> dict[str, float]:
    """Mean and largest absolute difference in nats."""
    assert a_NC is not None and b_NC is not None
    difference_NC = (a_NC.float() - b_NC.float()).abs()
    return {"mean": float(difference_NC.mean()), "max": float(difference_NC.max())}


def _derive(figures: dict[str, Any], row: dict[str, Any], loss_flops: float) -> None:
    """Rates and shares of one variant from its seconds; None where those are missing."""
    rows = row["clips"] * row["G"]
    first, sample, loss = figures["first_s"], figures["sample_s"], figures["loss_s"]
    decode_ms = 1000 * (sample - first) / (row["C"] - 1) if sample and first and row["C"] > 1 else None
    before = [figures.get("encode_s", 0.0), sample, figures["old_s"]]
    figures |= {
        "decode_ms": decode_ms,
        "share_of_floor": row["floor_ms"] / decode_ms if decode_ms else None,
        "tokens_per_s": rows * row["C"] / sample if sample else None,
        "loss_tflops": loss_flops / loss / 1e12 if loss else None,
        "loss_share": loss_flops / loss / row["speed"]["flops"] if loss else None,
    }
    for name in ("", "_checkpointed"):
        phases = [*before, figures.get(f"loss{name}_s")]
        figures[f"step{name}_s"] = None if None in phases else sum(phases)


def sized_text(row: dict[str, Any]) -> str:
    """The row for a reader."""
    head = f"P={row['P']} G={row['G']} C={row['C']}, {row['clips']} clips"
    if "random" in row:
        parts = [head]
        for name, figures in row.items():
            if not isinstance(figures, dict):
                continue
            parts.append(f"  {name} lengths: sampling {_number(figures['sample_s'])} s, " + (
                f"{figures['tokens']:,} ids, {figures['tokens_per_s']:,.0f} a second; median length "
                f"{figures['median_length']:.0f}, longest {figures['longest']}" if figures["sample_s"] else "no memory"
            ))  # fmt: skip
        return "\n".join(parts)
    lines = [f"{head} of {row['prompt_positions']} ids, {row['parameters'] / 1e9:.2f} B parameters, {row['dtype']}, "
             f"{row['device']}"]  # fmt: skip
    lines += [f"  {name}: {_phases(row[name])}" for name in ("ours", "stock") if row[name]]
    if row["stock"] is None:
        lines.append("  stock: left out at this length (--stock-up-to)")
    speed, ours = row["speed"], row["ours"]
    share = ours["share_of_floor"]
    share = f": {1 / share:.1f} times that, share {share:.1%}" if share else ""
    lines.append(f"  a decode step reads {row['decode_bytes'] / 1e9:,.3g} GB, at least {row['floor_ms']:.2f} ms at "
                 f"{speed['bandwidth'] / 1e9:,.0f} GB/s{share}")  # fmt: skip
    if ours["loss_s"]:
        lines.append(f"  loss pass {ours['loss_tflops']:.3g} TFLOP/s, {ours['loss_share']:.0%} of the measured "
                     f"{speed['flops'] / 1e12:.3g}")  # fmt: skip
    if row["ratio"]:
        lines.append(f"  stock / ours {row['ratio']:.2f}")
    return "\n".join(lines)


def _phases(figures: dict[str, Any]) -> str:
    """One variant's seconds, and GiB where they are measured."""

    def phase(name: str, label: str) -> str:
        peak = figures[f"{name}_peak_gib"]
        return f"{label} {_number(figures[f'{name}_s'])} s" + (f" ({peak:.1f} GiB)" if peak else "")

    labels = {"encode": "encode", "first": "first ids", "sample": "sampling",
              "sample_eager": "without graphs", "old": "old", "reference": "reference",
              "loss": "loss", "loss_checkpointed": "loss checkpointed"}  # fmt: skip
    parts = [phase(name, label) for name, label in labels.items() if f"{name}_s" in figures]
    parts += [f"{_number(figures['decode_ms'])} ms a decode step", f"{_number(figures['tokens_per_s'])} ids/s"]
    parts.append(f"step {_number(figures['step_s'])} s")
    if figures["step_checkpointed_s"]:
        parts.append(f"checkpointed {_number(figures['step_checkpointed_s'])} s")
    parts += [f"out of memory: {', '.join(figures['out_of_memory'])}"] if figures["out_of_memory"] else []
    return ", ".join(parts)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
