"""The bar of an evaluation: rows, running accuracy, time left; plain lines where the output is no terminal."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

#: Seconds between two plain lines.
EVERY = 10.0


class EvalProgress:
    """Call it with (done, total, right, graded) after every batch."""

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
        self.start = self.last = time.monotonic()
        self.first_done: int | None = None

    def __enter__(self) -> EvalProgress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, done: int, total: int, right: float, graded: int) -> None:
        accuracy = f"{100 * right / graded:.1f} % right" if graded else "not graded"
        self.bar.update(self.task, completed=done, total=total, accuracy=accuracy)
        now = time.monotonic()
        if not self.active or self.console.is_terminal or (now - self.last < EVERY and done < total):
            return
        self.last = now
        self.console.print(f"{self.title}: {done}/{total}  {accuracy}  {self.time_left(done, total, now)}")

    def time_left(self, done: int, total: int, now: float) -> str:
        """From the rows of this run alone: a resumed evaluation does not count the finished ones."""
        if self.first_done is None:
            self.first_done = done
            self.start = now
            return "time left: not known yet" if done < total else "done"
        fresh = done - self.first_done
        left = (total - done) * (now - self.start) / fresh if fresh else 0.0
        return "done" if done >= total else f"{left:.0f} s left"
