"""What the user sees: summaries, a progress bar, the table before and after. No training logic."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Timer
from typing import Any

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column, Table
from rich.text import Text

from covo_rl.data.terminal import LAYOUT, Terminal
from covo_rl.types import visible

#: columns from which a long bar fits beside the figures of a step, and a short one
WIDE, NARROW = 140, 70
#: seconds between two plain lines of work that has no steps, and of work whose steps are slow
LINE_SECONDS, STEP_LINE_SECONDS = 10.0, 60.0
#: seconds for which work needs no word
SILENT_SECONDS = 3.0


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
    """Two columns: what, value; fractions rounded."""
    table = Table(title=title, show_header=False, title_justify="left", box=None, padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, f"{value:.3g}" if isinstance(value, float) else str(value))
    return table


class Figures(Sequence[tuple[str, str]]):
    """(name, value) pairs of one line, shown in as many columns as there are.

    Names are cut, to four letters at least, then pairs at the end are left out; never a number.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self.pairs = tuple((visible(name), visible(value)) for name, value in pairs)

    def __getitem__(self, index: Any) -> Any:
        return self.pairs[index]

    def __len__(self) -> int:
        return len(self.pairs)

    def __str__(self) -> str:
        return "  ".join(f"{name} {value}" for name, value in self.pairs)

    def within(self, width: int) -> str:
        """The text of at most `width` columns."""
        for count in range(len(self.pairs), 0, -1):
            for letters in (100, 8, 6, 5, 4):
                text = "  ".join(f"{set_cell_size(n, min(letters, cell_len(n)))} {v}" for n, v in self.pairs[:count])
                if cell_len(text) <= width:
                    return text
        return ""

    def __rich_console__(self, screen: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.within(options.max_width), no_wrap=True, overflow="ellipsis")

    def __rich_measure__(self, screen: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, max(1, cell_len(str(self))))


class _Text(ProgressColumn):
    """The text or the figures beside a bar, in the room that is left."""

    def render(self, task: Task) -> Any:
        text = task.fields["text"]
        return text if isinstance(text, Figures) else Text(visible(text, LAYOUT), no_wrap=True, overflow="ellipsis")


class _Left(ProgressColumn):
    """Time left by all that was done so far: rich's own forgets steps that are older than half a minute."""

    def render(self, task: Task) -> Text:
        done, total, (first, start), last = (
            int(task.completed),
            task.total or 0,
            task.fields["first"],
            task.fields["last"],
        )
        if done >= total or done <= first:
            return Text("0:00" if done >= total else "-:--")
        left = (total - done) * (last - start) / (done - first) - (time.monotonic() - last)
        return Text(clock(max(left, 0)))


#: bars on the screen, the outermost first: what begins beside one becomes a line of it
_OPEN: list[ProgressDisplay] = []


class ProgressDisplay:
    """How far long work is: a bar on a terminal; elsewhere a line every `steps` steps, or now and then with the time
    left. The work begins at `done` of `total`. One that is opened inside another is a second line of its bar."""

    def __init__(
        self, title: str, total: int, *, done: int = 0, active: bool = True, steps: int = 0, stderr: bool = False
    ) -> None:
        self.screen = Terminal(stderr=True) if stderr else console
        self.title, self.total, self.active, self.steps = visible(title), total, active, steps
        self.last = time.monotonic()
        self.first = (done, self.last)  # what was done before says nothing about the speed of this run
        width = self.screen.width
        fixed, rest = Column(no_wrap=True), Column(ratio=1, no_wrap=True, overflow="ellipsis")
        self.outer = _OPEN[-1] if _OPEN and _OPEN[-1].screen is self.screen else None
        self.bar = self.outer.bar if self.outer else Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, max_width=24)),
            *([BarColumn(bar_width=24 if width >= WIDE else 8)] if width >= NARROW else []),
            MofNCompleteColumn(table_column=fixed),
            _Left(table_column=fixed),
            _Text(table_column=rest),  # on a narrow screen this is cut, not the count
            expand=True,
            console=self.screen,
            disable=not (active and self.screen.is_terminal),
        )  # fmt: skip
        fields: dict[str, Any] = {"text": "", "first": self.first, "last": self.last}
        self.task = self.bar.add_task(self.title, total=total, completed=done, **fields)

    def __enter__(self) -> ProgressDisplay:
        if not self.outer:
            self.bar.start()
        _OPEN.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _OPEN.remove(self)
        if self.outer:
            self.bar.remove_task(self.task)
        else:
            self.bar.stop()

    def update(self, done: int, text: str | Figures) -> None:
        now = time.monotonic()
        self.bar.update(self.task, completed=done, text=text, last=now)
        if not self.active or self.screen.is_terminal:
            return
        late = now - self.last >= (STEP_LINE_SECONDS if self.steps else LINE_SECONDS)
        if late or done >= self.total or (self.steps and (done % self.steps == 0 or done == 1)):
            self.last = now
            name = f"step {done:>4}/{self.total}" if self.steps else f"{self.title}: {done}/{self.total}"
            line = f"{name}  {text}  {time_left(self.first, done, self.total, now)}"
            self.screen.print(line, soft_wrap=True)

    def rated(self, done: int, total: int, right: float) -> None:
        """What `evaluate(progress=...)` calls: rows answered, and the share of them that is right."""
        self.update(done, f"{percent(right)} % right")


@contextmanager
def working(title: str, *, active: bool = True) -> Iterator[None]:
    """Around work that has no steps: on a terminal a line that counts the seconds, elsewhere the title; both only
    where it takes longer than a few seconds."""
    title = visible(title)
    if active and console.is_terminal and not _OPEN:
        bar = Progress(
            SpinnerColumn(), TextColumn(title, markup=False), TimeElapsedColumn(), console=console, transient=True
        )
        with bar:
            bar.add_task("")
            yield
        return
    timer = Timer(SILENT_SECONDS, lambda: console.print(f"{title} ...", soft_wrap=True))
    timer.daemon = True
    if active:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def clock(seconds: float) -> str:
    """0:42, 12:05, 3:00:10."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def time_left(first: tuple[int, float], done: int, total: int, now: float) -> str:
    """From what was done since `first` = (done, time): 20 of 100 at 0 s and 40 at 10 s leave 30 s."""
    fresh, seconds = done - first[0], now - first[1]
    if done >= total:
        return "done"
    if not fresh:
        return "time left: not known yet"
    left = (total - done) * seconds / fresh
    return f"{left:.0f} s left" if left < 100 else f"{clock(left)} left"


def column_names(names: Iterable[str]) -> dict[str, str]:
    """Component name -> what its column is called: `score` of ./mine.py:score, all of it where two end alike."""
    short = {name: name.partition("(")[0].rpartition(":")[2] or name for name in names}
    ends = list(short.values())
    return {name: end if ends.count(end) == 1 else name for name, end in short.items()}


def step_figures(metrics: Mapping[str, Any]) -> Figures:
    """R_total, each component, completion length, share of groups without variance, and held-out accuracy if any."""
    components = [name.removeprefix("reward_") for name in metrics if name.startswith("reward_")]
    names = column_names(name for name in components if name != "total")
    pairs = [("R", number(metrics["reward_total"]))]
    pairs += [(short, number(metrics[f"reward_{name}"])) for name, short in names.items()]
    if metrics.get("eval_accuracy") is not None:
        pairs.append(("held-out", f"{100 * metrics['eval_accuracy']:.0f}%"))
    for name, value in metrics.items():  # of the sets that are measured beside them
        if name.startswith("eval/") and name.endswith("/accuracy") and value is not None:
            pairs.append((name.removeprefix("eval/").removesuffix("/accuracy"), f"{100 * value:.0f}%"))
    pairs += [
        ("length", f"{metrics['completion_length']:.0f}"),
        ("same", f"{100 * metrics['zero_variance_groups']:.0f}%"),
    ]
    return Figures(pairs)


def legend(components: Iterable[str]) -> Table:
    """What each column of a step says, once before the first."""
    names = list(column_names(components).values())
    rows = [("R", f"mean reward of a completion: sum of its {len(names)} components"),
            (f"{names[0]} ...", "mean of that component, 0 to 1; - where none could be graded"),
            ("length", "tokens of a completion, mean"),
            ("same", "groups whose completions all got one reward: they teach nothing")]  # fmt: skip
    return summary_table("columns of a step", rows)


def before_after_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> Table:
    """Held-out accuracy per task, greedy and sampled, and the mean rewards of the sampled replies."""
    table = Table(title="held-out, before and after", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
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
