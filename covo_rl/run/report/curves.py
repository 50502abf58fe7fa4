"""Learning curves as a PNG: curves.png of a run folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from covo_rl.types import visible


def curves(metrics: Sequence[Mapping[str, Any]], target: str | Path | BinaryIO) -> str | Path | BinaryIO:
    """Draw the learning curves as a PNG, to a file or a stream; returns `target`.

    Raises:
        ImportError: matplotlib is missing (it is the extra `plots`).
    """
    try:
        from matplotlib.figure import Figure  # without pyplot, whose backend is the program's
    except ImportError as error:
        raise ImportError("curves need matplotlib: pip install 'covo-rl[plots]'") from error

    steps = [row.get("step") for row in metrics]
    rewards = dict.fromkeys(name for row in metrics for name in row if name.startswith("reward_"))
    panels = {
        "R_total": ["reward_total"],
        "components": [name for name in rewards if name != "reward_total"],
        "completion length": ["completion_length"],
        "shares": ["zero_variance_groups", "truncated"],
    }
    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    for axis, (title, keys) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for key in keys:
            values = [_plotted(row.get(key)) for row in metrics]
            axis.plot([_plotted(step) for step in steps], values, label=visible(key.removeprefix("reward_")))
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if len(keys) > 1:
            for label in axis.legend(fontsize="small").get_texts():
                label.set_parse_math(False)
    figure.savefig(target, dpi=110, format="png")
    return target


def _plotted(value: Any) -> float:
    """A gap where a step has no such number, or one that no axis has room for."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e30 else math.nan
