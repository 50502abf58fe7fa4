"""Ending whole runs in tests. torchrun gives every rank a session of its own, so a process group is not enough."""

from __future__ import annotations

import os
import signal
import subprocess


def children(pid: int) -> list[int]:
    """Process ids that `pid` started and that still run, oldest first."""
    listed = subprocess.run(["ps", "-axo", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    return sorted(int(row[0]) for row in rows if int(row[1]) == pid and not row[2].startswith("Z"))


def family(pid: int) -> list[int]:
    """`pid` and everything below it, parents before children."""
    return [pid, *(one for child in children(pid) for one in family(child))]


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to a run and all it started; no rank is left behind to write on in the same folder."""
    os.kill(process.pid, signal.SIGSTOP)  # from here on it starts nothing, and sees no rank die
    for pid in reversed(family(process.pid)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it ended by itself
    process.wait()
