"""Pictures and one HTML page from a run folder: `covo-rl report RUN`.

Everything a model wrote is escaped: completions are untrusted input.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
import yaml

from covo_rl.records.folder import Run

app = typer.Typer(add_completion=False, help=__doc__)


def curves(metrics: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Draw the learning curves as a PNG.

    Raises:
        ImportError: matplotlib is missing (it is the extra `plots`).
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("curves need matplotlib: pip install 'covo-rl[plots]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [row["step"] for row in metrics]
    names = [name for name in (metrics[0] if metrics else {}) if name.startswith("reward_") and name != "reward_total"]
    panels: list[tuple[str, list[str]]] = [
        ("R_total", ["reward_total"]),
        ("components", names),
        ("completion length", ["completion_length"]),
        ("shares", ["zero_variance_groups", "truncated"]),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), layout="constrained")
    for axis, (title, keys) in zip(axes, panels, strict=True):
        for key in keys:
            values = [float("nan") if row.get(key) is None else row[key] for row in metrics]
            axis.plot(steps, values, label=key.removeprefix("reward_"))
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if len(keys) > 1:
            axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return Path(path)


def _table(rows: Sequence[Sequence[Any]], head: Sequence[str]) -> str:
    def cells(row: Sequence[Any], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row)

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<table><tr>{cells(head, 'th')}</tr>{body}</table>"


def _last_rollouts(folder: Path, limit: int) -> list[dict[str, Any]]:
    files = sorted((folder / "rollouts").glob("step_*.jsonl"))
    if not files:
        return []
    with open(files[-1], encoding="utf-8") as file:
        return [json.loads(line) for _, line in zip(range(limit), file, strict=False)]


def report_page(folder: str | Path, limit: int = 40) -> str:
    """The HTML text of a run's report."""
    folder = Path(folder)
    run = Run(folder, active=False)
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    parts = [f"<h1>{html.escape(folder.name)}</h1>"]
    if (folder / "result.json").is_file():
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        rows = [(k, result["before"][k], v) for k, v in result["after"].items() if k in result.get("before", {})]
        parts.append("<h2>held-out</h2>" + _table(rows, ("", "before", "after")))
    metrics = run.metrics()
    if metrics:
        picture = curves(metrics, folder / "curves.png").read_bytes()
        parts.append(f'<img alt="learning curves" src="data:image/png;base64,{base64.b64encode(picture).decode()}">')
    rollouts = _last_rollouts(folder, limit)
    if rollouts:
        rows = [(r["id"], r["completion"], r["answer"], r["reward_total"], r["advantage"]) for r in rollouts]
        parts.append("<h2>last rollouts</h2>" + _table(rows, ("row", "completion", "key", "R_total", "advantage")))
    parts.append("<h2>configuration</h2>" + _table(list(config.items()), ("option", "value")))
    style = (
        "body{font:14px/1.5 system-ui;max-width:75rem;margin:2rem auto;padding:0 1rem}img{max-width:100%}"
        "table{border-collapse:collapse}td,th{border:1px solid #ddd;padding:.2rem .6rem;text-align:left;"
        "vertical-align:top;overflow-wrap:anywhere}"
    )
    head = f'<meta charset="utf-8"><title>{html.escape(folder.name)}</title><style>{style}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>"


@app.command()
def report_command(run: str = typer.Argument(..., help="run folder"), output: str | None = None) -> None:
    """Write RUN/report.html (or OUTPUT): results, curves, last rollouts, configuration."""
    if not (Path(run) / "config.yaml").is_file():
        raise typer.BadParameter(f"{run} is no run folder: it has no config.yaml")
    path = Path(output) if output else Path(run) / "report.html"
    path.write_text(report_page(run), encoding="utf-8")
    typer.echo(str(path))
