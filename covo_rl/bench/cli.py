"""`covo-rl bench grpo`: the table of our step against the stock one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from covo_rl.data.files import write_json
from covo_rl.data.terminal import say
from covo_rl.types import user_errors

app = typer.Typer(help="Measure covo_rl against the stock way.", add_completion=False)

CELLS = [f"{p},{g},{c}" for p in (188, 750) for g in (8, 16) for c in (64, 256)]


@app.callback()
def main() -> None:
    """Measure covo_rl against the stock way."""


@app.command()
def grpo(
    json_file: Annotated[Path | None, typer.Option("--json", help="write one object per cell to this file")] = None,
    cells: Annotated[
        list[str] | None, typer.Option(help="P,G,C; repeat, or several in one word; default: 8 cells")
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(help="further cells after --cells", metavar="[P,G,C ...]")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    clips: Annotated[int, typer.Option(help="unique clips (prompts) per step")] = 2,
    repeats: Annotated[int, typer.Option(help="interleaved repetitions; medians are reported")] = 3,
    vocabulary: Annotated[int, typer.Option(help="vocabulary of the timed model")] = 8192,
    trl: Annotated[bool, typer.Option(help="also time TRL's own GRPOTrainer, made to see audio")] = False,
    memory: Annotated[bool, typer.Option(help="also measure peak memory of the loss pass, in own processes")] = True,
    memory_vocabulary: Annotated[int, typer.Option(help="vocabulary of the memory runs")] = 152_064,
    memory_clips: Annotated[int, typer.Option(help="unique clips of the memory runs")] = 1,
) -> None:
    """Time stock and ours, interleaved: P audio positions, G rollouts, C completion ids."""
    import torch

    from covo_rl.bench.grpo import measured_cell, peak_memory
    from covo_rl.bench.sizes import Cell, Sizes
    from covo_rl.bench.variants import VARIANTS
    from covo_rl.export.exporting import torch_dtype
    from covo_rl.train.launch import device_of

    with user_errors("covo-rl bench"):
        where, precision = device_of(device), torch_dtype(dtype) or torch.float32
    rows: list[dict[str, Any]] = []
    for shape in [_shape(word) for word in [*(cells or []), *(more or [])] or CELLS]:
        cell, sizes = Cell(*shape, clips), Sizes(vocabulary=vocabulary)
        row = measured_cell(cell, sizes, where, precision, repeats, trl)
        if memory:
            cell, sizes = Cell(*shape, memory_clips), Sizes(vocabulary=memory_vocabulary)
            row |= {f"peak_mb_{name}": peak_memory(cell, sizes, where, name) for name in VARIANTS}
            row["peak_vocabulary"] = memory_vocabulary
        rows.append(row)
        say(_line(row))
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            write_json(json_file, rows)


@app.command()
def calls(
    json_file: Annotated[Path | None, typer.Option("--json", help="also by operation, to this file")] = None,
) -> None:
    """Count the aten calls of a decode step, views and shape queries left out: 28 layers, tiny widths, on a CPU."""
    import torch

    from covo_rl.bench.calls import decode_calls

    ways = {
        "bfloat16, LoRA beside the weights": decode_calls(torch.bfloat16),
        "float32, LoRA beside the weights": decode_calls(torch.float32),
        "float32, LoRA folded into them": decode_calls(torch.float32, folded=True),
    }
    for name, step in ways.items():
        say(f"{name}: {step.per_layer:.1f} a layer, {step.outside:.1f} beside the layers, {step.total:,.0f} a step")
    if json_file is not None:
        write_json(json_file, {name: {"layer": step.layer, "rest": step.rest} for name, step in ways.items()})


def _shape(word: str) -> tuple[int, int, int]:
    parts = word.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() for part in parts):
        raise typer.BadParameter(f"{word!r}: a cell is P,G,C, for example 188,16,64")
    return int(parts[0]), int(parts[1]), int(parts[2])


def _line(row: dict[str, Any]) -> str:
    phases = " ".join(f"{name} {ratio:.1f}x" for name, ratio in row["ratio_by_phase"].items())
    text = (
        f"P={row['P']} G={row['G']} C={row['C']}: stock {row['stock_cpu_s']:.2f} s, ours {row['ours_cpu_s']:.2f} s, "
        f"{row['ratio']:.2f}x of at most {row['flop_ratio']:.2f}x ({row['share_of_ceiling']:.0%}); {phases}; "
        f"log-probs differ by {row['max_abs_logp_diff']:.1e}, gradients by {row['max_rel_grad_diff']:.1e}"
    )
    if row["trl_ratio"] is not None:
        text += f"; TRL's trainer {row['trl_cpu_s']:.2f} s, ours {row['ours_like_trl_cpu_s']:.2f} s"
        text += f", {row['trl_ratio']:.2f}x"
    if row["peak_mb_stock"] is not None:
        text += f"; loss pass peak {row['peak_mb_stock']:.0f} MiB stock, {row['peak_mb_stock_chunked']:.0f} MiB stock "
        text += f"with a chunked head, {row['peak_mb_ours']:.0f} MiB ours"
    return text
