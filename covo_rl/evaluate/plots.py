"""PNG plots of a report: accuracy per group with intervals, by audio length, and per audio condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class PlotsMissing(ImportError):
    """matplotlib is not installed; the message says how to get it."""


def draw(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write what the report has data for; returns the files.

    Raises:
        PlotsMissing: matplotlib, an optional dependency, is not there.
    """
    try:
        import matplotlib
    except ImportError:
        raise PlotsMissing("plots need matplotlib: pip install 'covo-rl[plots]' (or --no-plots)") from None
    matplotlib.use("Agg")
    written = []
    groups = {c: v for c, v in report["breakdown"].items() if c != "audio length"}
    bars = [(f"{column}: {value}", entry["strict"]) for column, v in groups.items() for value, entry in v.items()]
    lengths = [(value, entry["strict"]) for value, entry in report["breakdown"].get("audio length", {}).items()]
    audio = [(name, report["audio"][name]) for name in ("real", "swapped", "silent", "none") if name in report["audio"]]
    for name, title, rows in (
        ("accuracy.png", "strict accuracy", [("all", report["strict"]), *bars]),
        ("audio_length.png", "strict accuracy by audio length", lengths),
        ("listening.png", "strict accuracy by audio", audio if len(audio) > 1 else []),
    ):
        rows = [(label, block) for label, block in rows if block["accuracy"] is not None]
        if rows:
            written.append(_bars(rows, f"{report['title']}: {title}", folder / name))
    return written


def _bars(rows: Sequence[tuple[str, Mapping[str, Any]]], title: str, path: Path) -> Path:
    """Horizontal bars in percent with 95 % intervals and the number of rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 0.32 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    values = [100 * block["accuracy"] for _, block in rows]
    low = [max(0.0, v - 100 * block["ci95"][0]) for v, (_, block) in zip(values, rows, strict=True)]
    high = [max(0.0, 100 * block["ci95"][1] - v) for v, (_, block) in zip(values, rows, strict=True)]
    places = range(len(rows))
    axes.barh(places, values, xerr=[low, high], height=0.65, color="#4c72b0", ecolor="#333333", capsize=2)
    axes.set_yticks(places, [f"{label} (n={block['n_scored']})" for label, block in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("% right, 95 % interval")
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=120)
    return path
