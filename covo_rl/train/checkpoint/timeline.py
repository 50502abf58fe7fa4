"""What came after the checkpoint that a run goes back to: moved aside, so that none of it is used again or lost.

    RUN/abandoned/001/
      checkpoints/ exports/ rollouts/ debug/    what is later than that checkpoint
      metrics.jsonl                             the lines cut off
      adapter/ model/ result.json ...           the end that the run had come to
      moved.json                                back to which checkpoint, and what was moved

The list is written first, as moving.json, then worked off; whoever starts next finishes what a kill interrupted. So a
run folder is on the old timeline or on the new one, never on a mixture.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from covo_rl.train.checkpoint.manifest import CheckpointError, explained, flush, moment_of
from covo_rl.train.checkpoint.store import delete, read_values, write_values

ASIDE, PLAN, RECORD = "abandoned", "moving.json", "moved.json"
BY_STEP = ("checkpoints", "exports", "rollouts", "debug")
RESULTS = ("adapter/export.json", "model/export.json", "result.json", "curves.png", "report.html")
#: earlier than any checkpoint
START = (-1,)


def move_aside(
    run: Path, moment: Sequence[int] = START, metrics_bytes: int = 0, *, trains_on: bool = True
) -> list[str]:
    """Move what is later than `moment` ([step] or [step, update]), and what metrics.jsonl has beyond `metrics_bytes`.

    The results of an end that the run had come to go too, where something is later or it now trains on.

    Returns:
        a line for the log; none where nothing is later.

    Raises:
        CheckpointError: metrics.jsonl is shorter than that, or something cannot be moved.
    """
    size = logged_bytes(run, metrics_bytes)
    paths = [path for path in _entries(run) if _moment(path) > list(moment)]
    left = trains_on or paths or size > metrics_bytes
    # a folder is moved whole, if an export wrote it
    results = [run / name.split("/")[0] for name in RESULTS if left and (run / name).exists()]
    if not paths and not results and size == metrics_bytes:
        return []
    counts = Counter(path.parent.name for path in paths)
    numbers = [int(path.name) for path in (run / ASIDE).glob("[0-9]*") if path.name.isdigit()]
    place = run / ASIDE / f"{max(numbers, default=0) + 1:03d}"
    with explained("create", place):
        place.mkdir(parents=True)
    names = [path.relative_to(run).as_posix() for path in [*paths, *results]]
    write_values(place / PLAN, {"back_to": list(moment), "metrics_bytes": metrics_bytes, "paths": names})
    for folder in (place, place.parent, run):  # on disk before the first move
        flush(folder)
    finish_moving(run)
    parts = [f"{count} of {name}/" for name, count in counts.items()] + [path.name for path in results]
    parts += [f"the last {size - metrics_bytes} bytes of metrics.jsonl"] if size > metrics_bytes else []
    return [f"moved to {place}, because this run goes on from before it: {', '.join(parts)}"]


def logged_bytes(run: Path, least: int) -> int:
    """Size of metrics.jsonl; raises CheckpointError where it is shorter than the checkpoint knew it."""
    metrics = run / "metrics.jsonl"
    if (size := metrics.stat().st_size if metrics.is_file() else 0) < least:
        raise CheckpointError(
            f"{metrics} has {size} bytes, but had {least} when the checkpoint was saved: it was edited or replaced; "
            "put it back, or choose another --output"
        )
    return size


def finish_moving(run: Path) -> None:
    """Work off the lists under RUN/abandoned: the one just written, or one that a kill interrupted."""
    for plan in sorted((run / ASIDE).glob(f"*/{PLAN}")):
        place, content = plan.parent, read_values(plan)
        if not isinstance(content, dict) or not {"paths", "metrics_bytes"} <= content.keys():
            raise CheckpointError(f"{plan} is damaged: move what is later to {place} by hand, and remove it")
        with explained("move to", place):
            for name in content["paths"]:
                if os.path.lexists(run / name):
                    (place / name).parent.mkdir(exist_ok=True)
                    _move(run / name, place / name)
            _cut(run / "metrics.jsonl", place / "metrics.jsonl", content["metrics_bytes"])
            os.replace(plan, place / RECORD)
            flush(place)


def _entries(run: Path) -> list[Path]:
    return [path for room in BY_STEP for path in sorted((run / room).glob("step_*"))]


def _moment(path: Path) -> list[int]:
    """debug/step_N was dumped while N steps were finished, so it is of the next one."""
    step, *update = moment_of(path) or START
    return [step + (path.parent.name == "debug"), *update]


def _move(source: Path, target: Path) -> None:
    """Rename; where checkpoints/ is a link to another disk, copy whole before anything is deleted."""
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        if not target.exists():
            partial = target.with_name(f".partial-{target.name}")
            delete(partial)
            shutil.copytree(source, partial, symlinks=True)
            os.replace(partial, target)
        delete(source)


def _cut(log: Path, rest: Path, size: int) -> None:
    """Move what `log` has beyond `size` bytes into the file `rest`."""
    if not log.is_file() or log.stat().st_size <= size:
        return
    if not rest.exists():
        partial = rest.with_suffix(".partial")
        partial.write_bytes(log.read_bytes()[size:])
        flush(partial)
        os.replace(partial, rest)
    os.truncate(log, size)
    flush(log)
