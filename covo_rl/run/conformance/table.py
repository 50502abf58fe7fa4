"""The table of `covo-rl models check`: one row a point, with what it measured."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from covo_rl.run.conformance.outcome import PointOutcome

STYLES = {"passed": "green", "failed": "bold red", "in part": "yellow", "not run": "yellow"}


def outcome_table(title: str, outcomes: Sequence[PointOutcome]) -> Table:
    """Point, state, seconds, and every figure with its limit."""
    table = Table(title=title, title_justify="left", show_lines=True)
    for name in ("point", "result", "s"):
        table.add_column(name, justify="right" if name == "s" else "left", no_wrap=name != "point")
    table.add_column("figures", overflow="fold")
    for number, outcome in enumerate(outcomes, 1):
        table.add_row(f"{number} {outcome.point}", outcome.state, f"{outcome.seconds:.1f}", "\n".join(outcome.lines()),
                      style=STYLES[outcome.state] if outcome.state == "failed" else None)  # fmt: skip
    return table


def tally(outcomes: Sequence[PointOutcome]) -> str:
    """One line: how many points passed, in part, were not run, failed."""
    states = [outcome.state for outcome in outcomes]
    counts = {state: states.count(state) for state in STYLES}
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count) + f", of {len(states)} points"


def plain_text(outcomes: Sequence[PointOutcome]) -> str:
    """For messages of tests and logs."""
    return "\n".join(f"{number} {outcome.point}: {outcome.state}\n" + "\n".join(f"    {line}" for line in
                     outcome.lines()) for number, outcome in enumerate(outcomes, 1))  # fmt: skip
