"""What a run says at its end: the evaluated part of result.json, and the tables on the screen.

Summaries are those of `Session.evaluate`, by mode: greedy, sampled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from covo_rl.records import console
from covo_rl.records.folder import Run
from covo_rl.run.page import curves

#: of a run without held-out rows
UNEVALUATED: dict[str, Any] = {"before": None, "after": None}


def evaluated(before: dict, after: dict, silent: dict, swapped: dict) -> dict[str, Any]:
    """The figures that result.json promises, and every summary under `details`."""
    return {
        "before": _figures(before),
        "after": _figures(after),
        "after_silent_audio": {"accuracy_sampled": silent["sampled"]["accuracy"]},
        "after_swapped_audio": {"accuracy_sampled": swapped["sampled"]["accuracy"]},
        "details": {"before": before, "after": after, "silent": silent, "swapped": swapped},
    }


def _figures(summaries: dict[str, Any]) -> dict[str, Any]:
    sampled = summaries["sampled"]
    return {
        "accuracy_greedy": summaries["greedy"]["accuracy"],
        "accuracy_sampled": sampled["accuracy"],
        **{name: value for name, value in sampled.items() if name.startswith("reward_")},
        "n": sampled["n"],
    }


def show(run: Run, details: dict[str, dict], seconds: float, exported: Path, result: Path) -> None:
    """Print before and after, silent and swapped audio, and where everything is; draw the curves."""
    console.console.print(console.before_after_table(details["before"], details["after"]))
    rows: list[tuple[str, Any]] = [
        ("silent audio, sampled", console.interval(details["silent"]["sampled"])),
        ("swapped audio, sampled", console.interval(details["swapped"]["sampled"])),
        ("training", f"{seconds:.0f} s"),
        ("exported", exported),
        ("result", result),
    ]
    try:
        rows.append(("curves", curves(run.metrics(), run.folder / "curves.png")))
    except ImportError as error:
        rows.append(("curves", f"not drawn: {error}"))
    console.console.print(console.summary_table("after training", rows))
