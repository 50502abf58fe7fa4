"""What the user sees: summaries, a progress bar, the table before and after. No training logic."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from covo_rl.data.terminal import LAYOUT, Terminal
from covo_rl.types import visible

#: columns from which a bar fits beside the figures of a step
WIDE = 140
#: Seconds between two plain lines of work that has no steps.
LINE_SECONDS = 10.0


def _console() -> Terminal:
    """As wide as the terminal; in a log file wide enough for the tables."""
    wide = Terminal()
    return wide if wide.is_terminal else Terminal(width=120)


console = _console()


def number(value: float | None, digits: int = 2) -> str:
    """A number for a table; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def interval(summary: Mapping[str, Any]) -> str:
    """`62.5 [55.1, 69.3]`: percent with its 95 % Wilson interval; a dash where nothing was scored."""
    if summary["accuracy"] is None:
        return "-"
    low, high = summary["ci95"]
    return f"{percent(summary['accuracy'])} [{percent(low)}, {percent(high)}]"


def summary_table(title: str, rows: Sequence[tuple[str, Any]]) -> Table:
    """Two columns: what, value."""
    table = Table(title=title, show_header=False, title_justify="left", box=None, padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, str(value))
    return table


class ProgressDisplay:
    """How far long work is: a bar on a terminal; elsewhere a line every `steps` steps, or now and then with the time
    left. The work begins at `done` of `total`."""

    def __init__(
        self, title: str, total: int, *, done: int = 0, active: bool = True, steps: int = 0, stderr: bool = False
    ) -> None:
        self.screen = Terminal(stderr=True) if stderr else console
        title = visible(title)
        self.title, self.total, self.active, self.steps = title, total, active, steps
        wide = self.screen.width >= WIDE
        fixed, cut = Column(no_wrap=True), Column(ratio=1, no_wrap=True, overflow="ellipsis")
        self.bar = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, max_width=24)),
            *([BarColumn(bar_width=24)] if wide else []),
            MofNCompleteColumn(table_column=fixed),
            # on a narrow screen this is cut, not the count
            TextColumn("{task.fields[text]}", markup=False, table_column=cut),
            *([TimeElapsedColumn()] if wide else []),
            TimeRemainingColumn(table_column=fixed, compact=not wide),
            expand=True,
            console=self.screen,
            disable=not (active and self.screen.is_terminal),
        )
        self.task = self.bar.add_task(title, total=total, completed=done, text="")
        self.last = time.monotonic()
        self.first = (done, self.last)  # what was done before says nothing about the speed of this run

    def __enter__(self) -> ProgressDisplay:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def update(self, done: int, text: str) -> None:
        self.bar.update(self.task, completed=done, text=visible(text, LAYOUT))
        if not self.active or self.screen.is_terminal:
            return
        now = time.monotonic()
        if self.steps:
            if done % self.steps == 0 or done in (1, self.total):
                self.screen.print(f"step {done:>4}/{self.total}  {text}")
        elif now - self.last >= LINE_SECONDS or done >= self.total:
            self.last = now
            left = time_left(self.first, done, self.total, now)
            self.screen.print(f"{self.title}: {done}/{self.total}  {text}  {left}")


def time_left(first: tuple[int, float], done: int, total: int, now: float) -> str:
    """From what was done since `first` = (done, time): 20 of 100 at 0 s and 40 at 10 s leave 30 s."""
    fresh, seconds = done - first[0], now - first[1]
    if done >= total:
        return "done"
    return f"{(total - done) * seconds / fresh:.0f} s left" if fresh else "time left: not known yet"


def step_line(metrics: Mapping[str, Any]) -> str:
    """R_total, each component, completion length, share of groups without variance."""
    parts = [f"R {number(metrics['reward_total'])}"]
    parts += [
        f"{name.removeprefix('reward_')} {number(value)}"
        for name, value in metrics.items()
        if name.startswith("reward_") and name != "reward_total"
    ]
    parts += [f"length {metrics['completion_length']:.0f}", f"same {percent(metrics['zero_variance_groups'])}%"]
    return "  ".join(parts)


def before_after_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> Table:
    """Held-out accuracy per task, greedy and sampled, and the mean rewards of the sampled replies."""
    table = Table(title="held-out, before and after", title_justify="left")
    for column in ("", "n", "before", "after", "change"):
        table.add_column(column, justify="right" if column else "left")
    for mode in ("greedy", "sampled"):
        first, second = before[mode], after[mode]
        _accuracy_row(table, f"accuracy, {mode} %", second["n"], first, second)
        for column in ("task", "category"):
            for name, part in second["breakdown"].get(column, {}).items():
                earlier = first["breakdown"].get(column, {}).get(name, {"strict": {"accuracy": None}})
                _accuracy_row(table, f"  {name}", part["n"], earlier["strict"], part["strict"])
        table.add_section()
    for name in [name for name in after["sampled"] if name.startswith("reward_")]:
        first, second = before["sampled"].get(name), after["sampled"][name]
        change = "-" if first is None or second is None else f"{second - first:+.2f}"
        table.add_row(f"{name}, sampled", "", number(first), number(second), change)
    return table


def _accuracy_row(table: Table, name: str, n: int, first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    earlier, later = first["accuracy"], second["accuracy"]
    change = "-" if earlier is None or later is None else f"{100 * (later - earlier):+.1f}"
    table.add_row(name, str(n), interval(first), interval(second), change)
