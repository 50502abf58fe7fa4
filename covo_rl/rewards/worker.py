"""A reward function in a process of its own, which can be killed.

A thread that holds the interpreter lock (a runaway regular expression, a C extension) cannot be stopped and stops
everything else with it; a process can. The worker is started once, loads the function by its name, and keeps its
state between steps. Protocol: pickles on stdin and on a private copy of stdout; prints of the plugin go to stderr.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import threading
import weakref
from typing import IO, Any

from covo_rl.rewards.call import Outcome, call
from covo_rl.rewards.specs import load_reward

LOAD_SECONDS = 60.0


class Worker:
    """The trainer's end. Not thread-safe; one call at a time."""

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.process: subprocess.Popen[bytes] | None = None
        self.parameters: frozenset[str] = frozenset()

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def call(self, columns: dict[str, Any], n: int, loaded: threading.Event) -> Outcome:
        """Start the process if need be, send the columns it takes, wait for the scores.

        `loaded` is set when the function is ready, so that loading does not count as running.
        """
        try:
            if not self.running:
                self._start()
            loaded.set()
            self._send(("call", _travelling(columns, self.parameters), n))
            return self._receive()
        except (EOFError, OSError) as error:
            return Outcome.failed(n, f"{self.spec}: its process ended ({self._ending(error)})")
        except (pickle.PickleError, TypeError, AttributeError) as error:
            return Outcome.failed(n, f"{self.spec}: a column does not pickle: {error}")

    def _start(self) -> None:
        self.kill()
        paths = [path or os.getcwd() for path in sys.path]
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from covo_rl.rewards.worker import main; main()", self.spec],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        weakref.finalize(self, _end, self.process)
        word, self.parameters = self._receive()
        if word != "ready":
            raise OSError(f"it said {word}")

    def _ending(self, error: Exception) -> str:
        code = None
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self.process.wait(timeout=1)
        return f"exit code {code}" if code is not None else str(error)

    def _send(self, message: Any) -> None:
        assert self.process is not None and self.process.stdin is not None
        _write(self.process.stdin, message)

    def _receive(self) -> Any:
        assert self.process is not None and self.process.stdout is not None
        return pickle.load(self.process.stdout)

    def kill(self) -> None:
        """End the process at once; the next call starts a new one."""
        if self.process is not None:
            _end(self.process)
            self.process = None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def _travelling(columns: dict[str, Any], parameters: frozenset[str]) -> dict[str, Any]:
    """Clips and the judge travel only to functions that name them."""
    return {
        name: value
        for name, value in columns.items()
        if name in parameters
        or (name not in ("clips", "judge") and "**" in parameters)
        or name in ("completions", "id")
    }


def _write(pipe: IO[bytes], message: Any) -> None:
    pipe.write(pickle.dumps(message))
    pipe.flush()


def main() -> None:
    """The worker's end."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    reward = load_reward(sys.argv[1])
    _write(answers, ("ready", reward.parameters))
    while True:
        try:
            _, columns, n = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        columns.setdefault("prompts", [""] * n)
        _write(answers, call(reward, columns, n))
