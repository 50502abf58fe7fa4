"""A run as it goes on, read from its folder: not yet begun, training, stopped, resumed from an earlier step, finished.

Reads what is new in metrics.jsonl, waits for the rest of half a line, and begins again where a resume cut the file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from statistics import fmean
from typing import Any

from covo_rl.data.files import RecordError, json_values, read_record, whole_lines
from covo_rl.records.lock import FolderLock
from covo_rl.records.monitor import Advice, Monitor

#: steps that the time left is told from
RECENT = 20
#: bytes before the place that was read to, by which a file that was cut and grew again is told
TAIL = 64


class GrowingLines:
    """The objects of a JSON-lines file that another process appends to, and may cut."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.damaged = 0
        self._end, self._tail, self._file = 0, b"", None

    def read(self) -> bool:
        """Read what is new; whether anything changed."""
        try:
            file = open(self.path, "rb")  # noqa: SIM115 - closed below
        except OSError:
            changed = bool(self.rows)
            self._forget()
            return changed
        with file:
            status = os.fstat(file.fileno())
            file.seek(max(self._end - TAIL, 0))
            before = file.read(min(self._end, TAIL))
            cut = (status.st_dev, status.st_ino) != self._file or before != self._tail
            if cut:
                self._forget()
                self._file = (status.st_dev, status.st_ino)
            file.seek(self._end)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]  # half a line waits for its end
        for _, _, value, problem in json_values(whole.splitlines(keepends=True)):
            if problem or not isinstance(value, dict):
                self.damaged += 1
            else:
                self.rows.append(value)
        self._end += len(whole)
        self._tail = (self._tail + whole)[-TAIL:]
        return cut or bool(whole)


class RunFollower:
    """What a run's folder says now: `read` it again and again."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._lines = GrowingLines(self.folder / "metrics.jsonl")
        self._rollouts: tuple[tuple[int, int] | None, list[Mapping[str, Any]]] = (None, [])
        self.config: Mapping[str, Any] = {}
        self.metrics: list[Mapping[str, Any]] = []
        self.advice: list[Advice] = []
        self.status, self.notes = "", []

    def read(self) -> bool:
        """Bring everything up to date; whether there are other steps than before, or another status."""
        changed = self._lines.read()
        notes = [f"{self._lines.damaged} damaged lines of metrics.jsonl are left out"] * (self._lines.damaged > 0)
        try:
            self.config = read_record(self.folder / "config.yaml")
        except RecordError as error:
            notes.append(str(error))
        if changed:
            self._go_on(latest_timeline(self._lines.rows))
        earlier, self.notes, self.status = self.status, notes, self._status()
        return changed or self.status != earlier

    def _go_on(self, metrics: list[Mapping[str, Any]]) -> None:
        shared = common_steps(self.metrics, metrics)
        if shared < len(self.metrics) or not self.metrics:  # another timeline
            self._monitor, self.advice, shared = Monitor(self.config), [], 0
        self.metrics = metrics
        self.advice += [piece for row in metrics[shared:] for piece in self._monitor.see(row)]

    def _status(self) -> str:
        if holder := FolderLock(self.folder).holder():
            return f"running, {holder}"
        if (self.folder / "result.json").is_file():
            return "finished"
        return "stopped: no process has the folder" if self.metrics or self.config else "not begun yet"

    @property
    def running(self) -> bool:
        return self.status.startswith("running")

    @property
    def step(self) -> int:
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def total(self) -> int | None:
        """Steps that the run is to have."""
        steps = self.config.get("max_steps")
        return steps if type(steps) is int and steps > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """By the wall time of the last steps; None where there is none, or nothing runs."""
        seconds = [value for row in self.metrics[-RECENT:] if (value := phases(row).get("step"))]
        if not (self.running and self.total and seconds):
            return None
        return max(self.total - self.step, 0) * fmean(seconds)

    def rollouts(self) -> list[Mapping[str, Any]]:
        """Rows of the last step that wrote some; empty where none did."""
        for row in reversed(self.metrics[-RECENT:]):
            path = self.folder / "rollouts" / f"step_{row['step']:05d}.jsonl"
            try:
                key = (row["step"], path.stat().st_mtime_ns)
            except OSError:
                continue
            if key != self._rollouts[0]:
                self._rollouts = (key, list(whole_lines(path)[0]))
            return self._rollouts[1]
        return []


def latest_timeline(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The steps in order: where a step comes again, after a resume, what was logged from it on is dropped."""
    steps: list[Mapping[str, Any]] = []
    for row in rows:
        if type(row.get("step")) is int:
            while steps and steps[-1]["step"] >= row["step"]:
                steps.pop()
            steps.append(row)
    return steps


def common_steps(earlier: Sequence[Mapping[str, Any]], later: Sequence[Mapping[str, Any]]) -> int:
    """How many steps two timelines begin with together."""
    pairs = zip(earlier, later, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] is pair[1] or pair[0] == pair[1], pairs))


def phases(row: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a step by phase, of what a line of metrics.jsonl says."""
    seconds = row.get("seconds")
    pairs = seconds.items() if isinstance(seconds, Mapping) else ()
    return {str(name): float(value) for name, value in pairs if isinstance(value, int | float)}
