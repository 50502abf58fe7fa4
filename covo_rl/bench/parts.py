"""Independent parts of a long measurement: each result is on disk at once, and a part that fails ends itself alone."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from covo_rl.data.files import write_json
from covo_rl.data.terminal import say

#: yields (name, JSON value) whenever something is measured; its argument says how many seconds are left
Part = Callable[[Callable[[], float]], Iterator[tuple[str, Any]]]
TAIL_LINES = 30
#: seconds that a launcher gets to end its processes
GRACE_S = 20


def run_parts(
    parts: Mapping[str, Part], path: Path, *, only: Sequence[str] = (), limit_s: float = 1e9
) -> dict[str, Any]:
    """Run the parts in order and write `path` after every result; a part ends ok, failed or skipped, with the reason.

    A part that begins within `limit_s` is not stopped by it; it is told how much is left.

    Raises:
        ValueError: `only` names a part that does not exist.
    """
    if unknown := [name for name in only if name not in parts]:
        raise ValueError(f"no part is named {', '.join(unknown)}; there are {', '.join(parts)}")
    start = time.monotonic()
    record: dict[str, dict[str, Any]] = {}

    def left() -> float:
        return limit_s - (time.monotonic() - start)

    for name, part in parts.items():
        if (only and name not in only) or left() <= 0:
            why = "not asked for" if only and name not in only else f"the limit of {limit_s:.0f} s was reached"
            record[name] = {"status": "skipped", "why": why}
            say(f"{name}: skipped, {why}")
            continue
        began = time.monotonic()
        entry: dict[str, Any] = {"status": "cut off", "results": {}}  # what stands there if this process is killed
        record[name] = entry
        write_json(path, record)
        try:
            for key, value in part(left):
                entry["results"][key] = value
                write_json(path, record)
                say(f"{name}/{key}: {value}"[:400])
            entry["status"] = "ok"
        except Exception:  # whatever it is, it is recorded, and the next part goes on
            entry |= {"status": "failed", "traceback": portable(traceback.format_exc())}
            say(f"{name} failed\n{entry['traceback']}")
        entry["seconds"] = round(time.monotonic() - began, 1)
        write_json(path, record)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    write_json(path, record)
    return record


def bounded_run(command: Sequence[str], limit_s: float, folder: Path) -> dict[str, Any]:
    """Run a command in `folder` for at most `limit_s`: exit code (None where it was stopped), seconds, last lines.

    It is stopped with its process group, which is asked first, so that a launcher can end what it started elsewhere.
    """
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:  # no pipe, which a process that outlives its launcher would hold open
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, cwd=folder)
        code = _waited(process, limit_s)
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                os.killpg(process.pid, number)
                _waited(process, GRACE_S)
        output.seek(0)
        lines = portable(output.read().decode(errors="replace")).splitlines()
    return {
        "command": portable(" ".join(command)), "rc": code, "seconds": round(time.monotonic() - start, 1),
        "stopped_after_s": round(limit_s) if code is None else None, "last_lines": lines[-TAIL_LINES:],
    }  # fmt: skip


def portable(text: str) -> str:
    """Without where this machine keeps the code and its packages: results are handed round."""
    for folder in (Path(__file__).parents[2], sys.prefix):
        text = text.replace(f"{folder}{os.sep}", "")
    return text


def _waited(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(timeout=max(0.1, seconds))
    except subprocess.TimeoutExpired:
        return None
