"""Components at the same time, each with its time limit; a reward function in a process of its own can be killed.

Our own rewards run in daemon threads. Plugins run in worker processes, so that no plugin can hold up a rank while the
others wait: a thread that holds the interpreter lock (a runaway regular expression, a C extension) cannot be stopped
and stops everything else with it. `my_function.isolation = "thread"` opts out, for a function that needs live objects
of this process. A worker is started once, loads the function by its name, and keeps its state between steps.

They talk by pickles over a pipe; prints of the plugin go to stderr. A pool of `multiprocessing` would import the
user's script again in each process, and fail where it has no `__main__` guard.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from typing import Any

from covo_rl.rewards.call import Outcome, call
from covo_rl.rewards.specs import Reward, load_reward

LOAD_SECONDS = 60.0
_workers: dict[str, Worker] = {}


def run_components(rewards: Sequence[Reward], columns: dict[str, Any], timeout: float) -> list[Outcome]:
    """One outcome per reward, in order, after at most `timeout` seconds each (all run at the same time)."""
    jobs = [_Job(reward, columns) for reward in rewards]
    return [job.wait(timeout) for job in jobs]


@atexit.register
def close() -> None:
    """End all worker processes."""
    while _workers:
        _workers.popitem()[1].kill()


class _Job(threading.Thread):
    """One component in a daemon thread, which for plugins only talks to a worker process."""

    def __init__(self, reward: Reward, columns: dict[str, Any]) -> None:
        super().__init__(name=f"reward {reward.source.spec}", daemon=True)
        self.reward, self.columns = reward, columns
        self.worker = None if reward.in_thread else _workers.setdefault(reward.source.spec, Worker(reward))
        self.outcome: Outcome | None = None
        self.loaded = threading.Event()
        self.begun = time.perf_counter()
        self.start()

    def run(self) -> None:
        try:
            if self.worker is not None:
                self.outcome = self.worker.call(self.columns, self.loaded)
            else:
                self.outcome = call(self.reward, self.columns)
        finally:
            self.loaded.set()

    def wait(self, timeout: float) -> Outcome:
        begun = self.begun
        if self.worker is not None and not self.loaded.wait(max(begun + LOAD_SECONDS - time.perf_counter(), 0)):
            what = f"did not load after {LOAD_SECONDS:g} s"
        else:
            if self.worker is not None:
                begun = time.perf_counter()  # loading is not running
            self.join(max(begun + timeout - time.perf_counter(), 0))
            if self.outcome is not None:
                return self.outcome
            what = f"{'was stopped' if self.is_alive() else 'gave no result'} after {timeout:g} s"
        seconds = time.perf_counter() - self.begun
        if self.worker is not None:
            self.worker.kill()
        return Outcome.failed(len(self.columns["completions"]), f"{self.reward.source.spec} {what}", seconds)


class Worker:
    """The trainer's end. Not thread-safe; one call at a time."""

    pipe: Connection

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.process: subprocess.Popen[bytes] | None = None

    def call(self, columns: dict[str, Any], loaded: threading.Event) -> Outcome:
        """Start the process if need be, send the columns it takes, wait for the scores.

        `loaded` is set when the function is ready, so that loading does not count as running.
        """
        spec, n = self.reward.source.spec, len(columns["completions"])
        names = self.reward.parameters | {"completions", "prompts", "id"}
        if "**" in names:  # clips and the judge travel only to functions that name them
            names |= columns.keys() - {"clips", "judge"}
        try:
            if self.process is None or self.process.poll() is not None:
                self._start()
                self.pipe.recv_bytes()
            loaded.set()
            self.pipe.send_bytes(pickle.dumps({name: value for name, value in columns.items() if name in names}))
            return pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError) as error:
            end, process = str(error), self.process
            with contextlib.suppress(subprocess.TimeoutExpired):
                end = f"exit code {process.wait(timeout=1)}" if process is not None else end
            return Outcome.failed(n, f"{spec}: its process ended ({end})")
        except (pickle.PickleError, TypeError, AttributeError) as error:
            return Outcome.failed(n, f"{spec}: a column does not pickle: {error}")

    def _start(self) -> None:
        self.pipe, theirs = Pipe()
        code = "from covo_rl.rewards.worker import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, self.reward.source.spec, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=2,
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )
        theirs.close()

    def kill(self) -> None:
        """End the process at once; the next call starts a new one."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()


def main() -> None:
    """The worker's end; its arguments are the spec and the pipe."""
    pipe = Connection(int(sys.argv[2]))
    reward = load_reward(sys.argv[1])
    pipe.send_bytes(b"loaded")
    with contextlib.suppress(EOFError):
        while True:
            pipe.send_bytes(pickle.dumps(call(reward, pickle.loads(pipe.recv_bytes()))))
