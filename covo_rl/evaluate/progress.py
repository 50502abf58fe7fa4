"""The bar of an evaluation: rows, running accuracy, time left; plain lines where the output is no terminal."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

#: Seconds between two plain lines.
EVERY = 10.0


class EvalProgress:
    """Call it with (done, total, right, graded): once before and after every batch."""

    def __init__(self, title: str, *, active: bool = True, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.title, self.active = title, active
        self.bar = Progress(
            TextColumn(title),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[accuracy]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (active and self.console.is_terminal),
        )
        self.task = self.bar.add_task(title, total=None, accuracy="")
        self.last = time.monotonic()
        self.first: tuple[int, float] | None = None

    def __enter__(self) -> EvalProgress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, done: int, total: int, right: float, graded: int) -> None:
        accuracy = f"{100 * right / graded:.1f} % right" if graded else "not graded"
        now = time.monotonic()
        if self.first is None:  # rows of an earlier run say nothing about the speed of this one
            self.first = (done, now)
            self.bar.reset(self.task, total=total, completed=done, accuracy=accuracy)
        self.bar.update(self.task, completed=done, total=total, accuracy=accuracy)
        if not self.active or self.console.is_terminal or (now - self.last < EVERY and done < total):
            return
        self.last = now
        self.console.print(f"{self.title}: {done}/{total}  {accuracy}  {time_left(self.first, done, total, now)}")


def time_left(first: tuple[int, float], done: int, total: int, now: float) -> str:
    """From the rows done since `first` = (rows, time): 20 of 100 at 0 s and 40 at 10 s leave 30 s."""
    fresh, seconds = done - first[0], now - first[1]
    if done >= total:
        return "done"
    return f"{(total - done) * seconds / fresh:.0f} s left" if fresh else "time left: not known yet"
