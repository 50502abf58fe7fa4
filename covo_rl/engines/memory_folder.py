"""A folder for what engines of other memory read: in RAM where there is room, removed also after a SIGKILL."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError

from covo_rl.engines.base import EngineError
from covo_rl.policy.sharding import every_rank

MEMORY = Path("/dev/shm")
FOLDER_PREFIX = "covo-rl-engine-"
LOCK = "lock"


class MemoryFolder:
    """A new folder with `room` bytes free, below `parent` (default: RAM, or where temporary files go), on every rank.

    Rank 0 makes and fills it; with `each_machine` one rank of every machine does, at the same path. A collective. What
    killed processes left in RAM is removed: a lock that another process holds says that it lives.
    """

    def __init__(self, parent: str | Path | None, room: int, *, each_machine: bool = False) -> None:
        main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        self.writes = main or (each_machine and os.environ.get("LOCAL_RANK") == "0")
        self.path = Path(agreed(partial(_new_folder, parent, room) if main else None))
        self._end: weakref.finalize | None = None  # also at the end of a process that failed
        agreed(self._hold if self.writes else None)

    def close(self) -> None:
        """Remove it and all in it."""
        if self._end is not None:
            self._end()

    def _hold(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)  # on machines other than rank 0's
        begun = self.path / f"{LOCK}.partial"
        lock = open(begun, "w", encoding="utf-8")  # noqa: SIM115 (held until the end)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.replace(begun, self.path / LOCK)
        self._end = weakref.finalize(self, _remove, self.path, lock, os.getpid())


def _new_folder(parent: str | Path | None, room: int) -> str:
    if parent is None:
        _remove_abandoned()
        enough = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > room
        parent = MEMORY if enough else tempfile.gettempdir()
    Path(parent).mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(parent).free) < room:
        raise EngineError(f"{parent} has {free / 1e6:,.0f} MB free, {room / 1e6:,.0f} MB are needed: give another "
                          "vllm_adapter_dir")  # fmt: skip
    folder = tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=Path(parent).resolve())
    os.chmod(folder, 0o755)  # mkdtemp gives 700, and servers may run as another user
    return folder


def _remove(folder: Path, lock: IO[str], owner: int) -> None:
    if os.getpid() == owner:  # not in a forked child
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()


def _remove_abandoned() -> None:
    for lock in MEMORY.glob(f"{FOLDER_PREFIX}*/{LOCK}"):
        with suppress(OSError), open(lock, "r+", encoding="utf-8") as file:  # in use, or another user's
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent)


def agreed(action: Callable[[], Any] | None) -> Any:
    """What `action` returns on the first rank that has one.

    Raises:
        EngineError: on every rank, where it failed on one.
    """
    value = problem = None
    try:
        value = action() if action else None
    except (OSError, SafetensorError, EngineError) as error:
        problem = str(error)
    every = every_rank((value, problem))
    if problems := [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(every) if problem]:
        raise EngineError(f"what the engine reads cannot be written: {'; '.join(problems)}")
    return next((value for value, _ in every if value is not None), None)
