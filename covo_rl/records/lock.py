"""One process at a time owns a folder that a run, a cold start or an evaluation writes.

The owner holds a kernel lock on FOLDER/lock.json, which names it. The kernel drops the lock when that process ends,
even by SIGKILL, and a later process with the same pid does not have it: what a killed owner leaves is taken over. An
owner on another host is not guessed about, as a shared file system may not share its locks; but an earlier attempt of
the same job of Slurm has ended.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

_HELD: dict[Path, FolderLock] = {}  # by this process


class FolderLock:
    """The lock of `folder`, until `release` or the end of the process.

    A process that owns the folder already hands it on: its second run follows the first.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "lock.json"
        self._file: IO[str] | None = None
        self._made = False

    def refusal(self) -> str | None:
        """Why the folder cannot be had now, or None; changes nothing."""
        if self.path.resolve() in _HELD:
            return None
        if why := self._unwritable():
            return why
        try:
            with open(self.path, "r+", encoding="utf-8") as file:
                return self._refusal(file)
        except FileNotFoundError:
            return None
        except OSError as error:
            return f"{self.path} cannot be opened: {error}"

    def _unwritable(self) -> str | None:
        there = next(path for path in [self.folder, *self.folder.absolute().parents] if path.exists())
        if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
            return None
        return f"{self.folder} cannot be written: {there} is no folder that you may write to"

    def content(self) -> str | None:
        """The text of the file, which names the owner; None where there is none."""
        try:
            return self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def holder(self) -> str | None:
        """The process that has the folder now, in words, or None; changes nothing."""
        try:
            with open(self.path, encoding="utf-8") as file:
                return _words(_owner(file)) if self._refusal(file) else None
        except OSError:
            return None

    def hold(self) -> str | None:
        """Take the lock, making the folder where there is none; returns why it cannot be had, or None."""
        try:
            if earlier := _HELD.get(self.path.resolve()):
                earlier.release()
            if why := self._unwritable():
                return why
            self._made = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            while True:
                file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115 - held until `release`
                if why := self._refusal(file):
                    file.close()
                    return why
                if self._is(file):
                    break
                file.close()  # its owner ended, and removed it, between our opening and our locking it
            self._file, _HELD[self.path.resolve()] = file, self
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": since, **_attempt()}
            file.truncate(0)
            file.write(json.dumps(owner) + "\n")
            file.flush()
        except OSError as error:
            self.release()
            return f"{self.folder} cannot be locked: {error}"
        return None

    def release(self) -> None:
        """Give the folder back, and leave none where there was none and nothing was written; nothing if not held."""
        if self._file is None:
            return
        _HELD.pop(self.path.resolve(), None)
        if self._is(self._file):
            self.path.unlink(missing_ok=True)
        self._file.close()
        self._file = None
        if self._made:
            with suppress(OSError):  # not empty: it is kept
                self.folder.rmdir()

    def _is(self, file: IO[str]) -> bool:
        """Whether the open file is the one under this name."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _refusal(self, file: IO[str]) -> str | None:
        locked = True
        for attempt in range(3):  # who only looks, or is just being killed, has it for an instant
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if attempt == 2:
                    owner = _words(_owner(file))
                    return f"{self.folder} is in use by {owner}: wait for its end, or choose another --output"
                time.sleep(0.05)
            except OSError:
                locked = False  # a file system without locks: only the owner's name tells
                break
        owner = _owner(file)
        here = owner.get("host") == socket.gethostname()
        if not owner or _follows(owner) or (here and (locked or not _is_alive(owner["pid"]))):
            return None
        reason = "which may still run" if here else "which this machine cannot ask whether it still runs"
        return f"{self.folder} is locked by {_words(owner)}, {reason}: if it has ended, remove {self.path}"


@atexit.register
def _release_all() -> None:
    for lock in list(_HELD.values()):
        lock.release()


def _disown() -> None:
    """In a forked child: the lock is its parent's, and must end with it."""
    for lock in _HELD.values():
        if lock._file is not None:
            lock._file.close()
            lock._file = None
    _HELD.clear()


os.register_at_fork(after_in_child=_disown)


def _owner(file: IO[str]) -> dict[str, Any]:
    """Who wrote the file; empty where it is damaged, or nobody did."""
    file.seek(0)
    try:
        owner = json.loads(file.read())
        return owner if isinstance(owner["pid"], int) and isinstance(owner["host"], str) else {}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


def _attempt() -> dict[str, str]:
    """The job of Slurm that this process belongs to, and how often that has been queued again."""
    job = os.environ.get("SLURM_JOB_ID")
    return {"job": job, "attempt": os.environ.get("SLURM_RESTART_COUNT", "0")} if job else {}


def _follows(owner: dict[str, Any]) -> bool:
    """Whether this is a later attempt of the owner's job, which begins when the earlier one has ended on all hosts."""
    now = _attempt()
    return bool(now) and owner.get("job") == now["job"] and owner.get("attempt") != now["attempt"]


def _words(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    return f"process {owner['pid']} on {owner['host']} since {owner.get('since', 'an unknown time')}"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)  # another user's process may not be signalled, and lives
    return True
