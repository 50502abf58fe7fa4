"""`covo-rl bench grpo`: the table of our step against the stock one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from covo_rl.data.files import write_json
from covo_rl.data.terminal import say
from covo_rl.types import user_errors

app = typer.Typer(help="Measure covo_rl against the stock way.", add_completion=False)

CELLS = [f"{p},{g},{c}" for p in (188, 750) for g in (8, 16) for c in (64, 256)]
#: of other model sizes: those measured on a GPU, docs/performance.md
SIZED_CELLS = ["188,8,256", "188,16,256", "188,8,1024"]


@app.callback()
def main() -> None:
    """Measure covo_rl against the stock way."""


@app.command()
def grpo(
    json_file: Annotated[Path | None, typer.Option("--json", help="write one object per cell to this file")] = None,
    cells: Annotated[
        list[str] | None, typer.Option(help="P,G,C; repeat, or several in one word; default: 8 cells, or 3 of a size")
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(help="further cells after --cells", metavar="[P,G,C ...]")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: float32, 7b bfloat16")] = None,
    clips: Annotated[int | None, typer.Option(min=1, help="unique clips per step; default: 2, of a size 4")] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="interleaved repetitions; medians are reported; default: 3, of a size 1")
    ] = None,
    vocabulary: Annotated[int, typer.Option(help="vocabulary of the timed model")] = 8192,
    trl: Annotated[bool, typer.Option(help="also time TRL's own GRPOTrainer, made to see audio")] = False,
    memory: Annotated[bool, typer.Option(help="also measure peak memory of the loss pass, in own processes")] = True,
    memory_vocabulary: Annotated[int, typer.Option(help="vocabulary of the memory runs")] = 152_064,
    memory_clips: Annotated[int, typer.Option(help="unique clips of the memory runs")] = 1,
    model_size: Annotated[
        str | None,
        typer.Option(help="small, tiny (28 layers, tiny widths) or 7b (Covo-Audio as published): by phase"),
    ] = None,
    random_weights: Annotated[bool, typer.Option(help="needed for 7b, which has no other weights here")] = False,
    lengths: Annotated[str, typer.Option(help="of a size: equal, or random for sampling with rows that end early")] = (
        "equal"
    ),
    stock_up_to: Annotated[int, typer.Option(help="of a size: longest C that stock is measured at")] = 256,
) -> None:
    """Time stock and ours, interleaved: P audio positions, G rollouts, C completion ids."""
    import torch

    from covo_rl.bench.full_size import sized_rows, sized_text
    from covo_rl.bench.grpo import compared_cells
    from covo_rl.bench.sizes import Cell, Sizes
    from covo_rl.export.exporting import torch_dtype
    from covo_rl.train.launch import device_of

    _check_size(model_size, random_weights, lengths)
    words = [*(cells or []), *(more or [])] or (SIZED_CELLS if model_size else CELLS)
    with user_errors("covo-rl bench"):
        shapes = [Cell(*_shape(word), clips or (4 if model_size else 2)) for word in words]
        precision = torch_dtype(dtype or ("bfloat16" if model_size == "7b" else "float32")) or torch.float32
        rows = compared_cells(
            shapes, Sizes(vocabulary=vocabulary), device_of(device), precision, repeats=repeats or 3, trl=trl,
            memory=(memory_clips, memory_vocabulary) if memory else None,
        ) if model_size is None else sized_rows(
            shapes, model_size, device_of(device), precision, stock_up_to=stock_up_to, repeats=repeats or 1,
            lengths=lengths,
        )  # fmt: skip
        _report(rows, sized_text if model_size else _line, json_file)


def _check_size(model_size: str | None, random_weights: bool, lengths: str) -> None:
    from covo_rl.bench.sizes import MODEL_SIZES

    if model_size not in (None, *MODEL_SIZES):
        raise typer.BadParameter(f"--model-size {model_size}: write {', '.join(MODEL_SIZES)}")
    if model_size == "7b" and not random_weights:
        raise typer.BadParameter("--model-size 7b: add --random-weights; speed and memory do not depend on the values")
    if lengths not in ("equal", "random"):
        raise typer.BadParameter(f"--lengths {lengths}: write equal or random")


def _report(rows: Iterable[dict[str, Any]], text: Callable[[dict[str, Any]], str], json_file: Path | None) -> None:
    """Say every row, and write those so far."""
    done: list[dict[str, Any]] = []
    for row in rows:
        done.append(row)
        say(text(row))
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            write_json(json_file, done)


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
        json_file.parent.mkdir(parents=True, exist_ok=True)
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
