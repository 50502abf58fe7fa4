"""A run in the terminal while it goes on: `covo-rl watch RUN`; `--page` as a local page in the browser.

progress, time left; curves of R and its components; seconds by phase; the last advice; the latest rollouts
"""

from __future__ import annotations

import math
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.text import Text

from covo_rl.data.terminal import say
from covo_rl.records import console
from covo_rl.records.console import Figures, clock, column_names, number
from covo_rl.records.folder import Run
from covo_rl.records.follow import RECENT, RunFollower, common_steps, phases
from covo_rl.records.monitor import Advice
from covo_rl.records.samples import sample_text, three_of
from covo_rl.resolve import meant
from covo_rl.types import visible

BLOCKS, PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", ".:-=+*%#"
#: columns of a curve's name, and of a number beside it
NAME, NUMBER = 13, 7
#: figures that are drawn below R and its components, where a run has them: key of metrics.jsonl -> name
DRAWN = {"eval_accuracy": "held-out", "completion_length": "length", "zero_variance_groups": "same",
         "truncated": "truncated", "kl": "KL", "entropy": "entropy"}  # fmt: skip
#: pieces of advice that are shown, the latest
LAST = 2
#: seconds between two looks
EVERY = 1.0


def watch_command(
    run: Annotated[Path, typer.Argument(help="run folder; it may not have begun yet")],
    page: Annotated[
        bool, typer.Option("--page", help="serve the report at http://127.0.0.1, made anew as it grows")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="with --page; 0 takes a free one")] = 0,
    open_: Annotated[bool, typer.Option("--open", help="with --page: open it in the browser")] = False,
    once: Annotated[bool, typer.Option("--once", help="show how it stands now, and end")] = False,
) -> None:
    """Follow a run: progress, curves, rollouts. q or Ctrl-C ends the watching, never the run."""
    if run.exists() and not run.is_dir():
        raise typer.BadParameter(f"{visible(run)} is a file: give the folder of a run")
    if page and once:
        raise typer.BadParameter("--page serves until it is stopped, --once ends at once: choose one")
    if (port or open_) and not page:
        raise typer.BadParameter("--port and --open need --page")
    if once and not run.is_dir():
        raise typer.BadParameter(f"{visible(run)}: no such folder{visible(meant(run))}")
    try:
        if page:
            from covo_rl.run.watch.page import serve_page

            serve_page([run], port=port, browser=open_)
        else:
            _watch(RunFollower(run), once=once)
    except KeyboardInterrupt:
        say("")


def _watch(run: RunFollower, *, once: bool, every: float = EVERY) -> None:
    screen = console.console
    run.read()
    if once or run.status == "finished":
        screen.print(Group(*frame(run, screen.width)))
    elif screen.is_terminal:
        _watch_screen(run, every)
    else:
        _watch_lines(run, every)


def _watch_screen(run: RunFollower, every: float) -> None:
    """Until the run is finished, or q."""
    screen = console.console

    def picture() -> Group:
        return Group(*frame(run, screen.width, screen.height - 1))

    with _keys() as pressed, Live(picture(), console=screen, auto_refresh=False) as live:
        while run.status != "finished" and pressed(every) not in ("q", "Q"):
            run.read()
            live.update(picture(), refresh=True)


def _watch_lines(run: RunFollower, every: float) -> None:
    """How it stands, then a line for every step, until the run is finished."""
    screen = console.console
    screen.print(Group(*frame(run, screen.width)))
    shown, status = run.metrics, run.status
    while run.status != "finished":
        time.sleep(every)
        run.read()
        for row in run.metrics[common_steps(shown, run.metrics) :]:  # a resume begins again at an earlier step
            left = "" if run.seconds_left is None else f"  {clock(run.seconds_left)} left"
            screen.print(f"step {row['step']}/{run.total or '?'}  {_figures(row)}{left}", soft_wrap=True)
            for piece in run.advice:
                if piece.step == row["step"]:
                    screen.print(_advice(piece), soft_wrap=True)
        shown = run.metrics
        if run.status != status:
            status = run.status
            screen.print(f"{run.folder}: {status}", soft_wrap=True)


def _figures(row: Mapping[str, Any]) -> Figures:
    """R and components of a step, however little its line says."""
    names = column_names(_components([row]))
    pairs = [("R", number(_value(row, "reward_total"))),
             *((short, number(_value(row, f"reward_{name}"))) for name, short in names.items())]  # fmt: skip
    return Figures(pairs)


# -- one picture -------------------------------------------------------------------------------------------------------


def frame(run: RunFollower, width: int, height: int | None = None) -> list[Text]:
    """The state of a run in lines of at most `width` columns; of the rollouts those that `height` has room for."""
    parts = [_header(run, width), *_curves(run, width), *_seconds(run)]
    if not run.metrics:
        parts.append(Text("no step is recorded yet"))
    for text in parts:
        text.no_wrap, text.overflow = True, "ellipsis"
    parts += [_advice(piece) for piece in run.advice[-LAST:]]
    parts += [Text(f"note: {visible(note)}", style="yellow") for note in run.notes]
    path = Run(run.folder).rollouts_path(run.step)
    samples = [sample_text(name, row, path, width=width) for name, row in three_of(run.rollouts())]
    room = math.inf if height is None else height - _lines(parts, width) - 1
    shown = [text for i, text in enumerate(samples) if _lines(samples[: i + 1], width) <= room]
    if samples:
        hidden = len(samples) - len(shown)
        more = f" ({hidden} more on a higher screen)" if hidden else ""
        parts.append(Text(f"rollouts of step {run.step}{more}", style="bold"))
    return [*parts, *shown]


def _advice(piece: Advice) -> Text:
    return Text(visible(piece), style="yellow")


def _lines(texts: Sequence[Text], width: int) -> int:
    return sum((len(line) - 1) // width + 1 for text in texts for line in text.plain.split("\n"))


def _header(run: RunFollower, width: int) -> Text:
    total = run.total
    share = min(run.step / total, 1.0) if total else 0.0
    left = "" if run.seconds_left is None else f"  {clock(run.seconds_left)} left"
    text = Text(visible(run.status), style="bold")  # a long path is cut, this not
    text.append("".join(f"  {visible(part)}" for part in (run.config.get("model", ""), run.folder) if part) + "\n",
                style="not bold")  # fmt: skip
    count = f"step {run.step}/{total or '?'}{left}"
    full = max(width - len(count) - 2, 4)
    done, rest = ("━", "─") if _unicode() else ("#", ".")
    text.append(done * round(full * share), style="green not bold")
    text.append(rest * (full - round(full * share)), style="dim not bold")
    text.append(f"  {count}", style="not bold")
    return text


def _curves(run: RunFollower, width: int) -> Iterator[Text]:
    """A line each for R, its components and what else the run has: first value, curve, last value."""
    names = column_names(_components(run.metrics))
    lines = {"reward_total": "R", **{f"reward_{name}": short for name, short in names.items()}, **DRAWN}
    for key, name in lines.items():
        values = [value for row in run.metrics if (value := _value(row, key)) is not None]
        if values and (key != "truncated" or any(values)):
            room = max(width - NAME - 2 * NUMBER - 2, 4)
            text = Text(f"{visible(name)[: NAME - 1]:<{NAME}}{_short(values[0]):>{NUMBER}} ")
            text.append(sparkline(values, room), style="cyan")
            text.append(f" {_short(values[-1]):<{NUMBER}}".rstrip())
            yield text


def _seconds(run: RunFollower) -> Iterator[Text]:
    """Mean seconds of the last steps, and the share of each phase."""
    rows = [phases(row) for row in run.metrics[-RECENT:]]
    if whole := [row["step"] for row in rows if row.get("step")]:
        names = [name for name in rows[-1] if name != "step" and not name.startswith("reward_")]
        shares = {name: sum(row.get(name, 0.0) for row in rows) / sum(whole) for name in names}
        order = sorted(shares, key=lambda name: -shares[name])
        pairs = [("a step", f"{fmean(whole):.2g} s"), *((name, f"{100 * shares[name]:.0f}%") for name in order)]
        yield Text(f"{'seconds':<{NAME}}{Figures(pairs)}")


def sparkline(values: Sequence[float], width: int) -> str:
    """One character per value, lowest to highest of them; several values become their mean where there is no room.

    >>> sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8), sparkline([1, 1], 8), sparkline([0, 0, 7, 7], 2)
    ('▁▂▃▄▅▆▇█', '▄▄', '▁█')
    """
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [fmean(values[a:b]) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    blocks = BLOCKS if _unicode() else PLAIN_BLOCKS
    if high == low:
        return blocks[3] * count
    return "".join(blocks[round((value - low) / (high - low) * (len(blocks) - 1))] for value in means)


def _unicode() -> bool:
    return (console.console.encoding or "").startswith("utf")


def _components(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("reward_"))
    return [name.removeprefix("reward_") for name in names if name != "reward_total"]


def _value(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}"


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """A function that waits so many seconds for a key and returns it; "" for none, or where there is no keyboard."""
    try:
        before = termios.tcgetattr(sys.stdin)
    except (OSError, ValueError, termios.error):  # no terminal that can be asked
        yield lambda seconds: time.sleep(seconds) or ""
        return
    tty.setcbreak(sys.stdin)

    def pressed(seconds: float) -> str:
        ready, _, _ = select.select([sys.stdin], [], [], seconds)
        return os.read(sys.stdin.fileno(), 1).decode(errors="replace") if ready else ""

    try:
        yield pressed
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
