"""Reward functions called at the same time, each with its time limit; whatever one does, the caller gets an outcome.

Our own rewards run in daemon threads, plugins in worker processes: a thread that holds the interpreter lock (a runaway
regular expression, a C extension) cannot be stopped and would hold up every rank. A worker is started once, loads the
function by its name, and keeps its state between steps. They talk by pickles over a pipe; prints of the plugin go to
stderr. A pool of `multiprocessing` would import the user's script again in each process, and fail where it has no
`__main__` guard.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import inspect
import math
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from typing import Any

from covo_rl.rewards.specs import Reward, load_reward

LOAD_SECONDS = 60.0
LOCATE_SECONDS = 1.0  # spent on finding the row that a function raises on
_workers: dict[str, tuple[subprocess.Popen[bytes], Connection]] = {}


@dataclass
class Outcome:
    """Scores of one component, NaN where there is none; `missing` says why, by completion."""

    scores: list[float]
    missing: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0
    extras: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def failed(cls, n: int, why: str, seconds: float = 0.0) -> Outcome:
        """Nothing could be scored."""
        return cls([math.nan] * n, dict.fromkeys(range(n), f"failed: {why}"), seconds)

    @property
    def failures(self) -> list[str]:
        """The reasons that are faults of the function, not of a completion."""
        return [why for why in self.missing.values() if why.startswith("failed")]


def run_components(rewards: Sequence[Reward], columns: dict[str, Any], timeout: float) -> list[Outcome]:
    """One outcome per reward, in order, after at most `timeout` seconds each (all run at the same time)."""
    jobs = [_Job(reward, columns) for reward in rewards]
    return [job.wait(timeout) for job in jobs]


@atexit.register
def close() -> None:
    """End all worker processes."""
    for spec in list(_workers):
        _end_worker(spec)


def _end_worker(spec: str) -> None:
    """End the process at once; the next call starts a new one."""
    if worker := _workers.pop(spec, None):
        worker[0].kill()
        worker[0].wait()


def _call(reward: Reward, columns: dict[str, Any]) -> Outcome:
    """Scores of the completions in `columns`; an exception, even SystemExit, is an outcome."""
    start = time.perf_counter()
    spec, n = reward.source.spec, len(columns["completions"])
    outcome = Outcome([math.nan] * n)
    try:
        result = _invoke(reward, columns, outcome)
    except BaseException as error:  # SystemExit would end the thread without a word
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return Outcome.failed(n, f"{spec} raised {what}{_locate(reward, columns)}", time.perf_counter() - start)
    reasons, outcome.missing = outcome.missing, {}
    values = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(values, (list, tuple)):
        kind = type(result).__name__
        outcome.missing = dict.fromkeys(range(n), f"failed: {spec} returned {kind}, not a list of {n} numbers")
    elif len(values) != n:
        outcome.missing = dict.fromkeys(range(n), f"failed: {spec} returned {len(values)} scores for {n} completions")
    else:
        for i, value in enumerate(values):
            if value is None:
                outcome.missing[i] = reasons.get(i, "not gradeable")
            elif not isinstance(value, (int, float)) or not math.isfinite(value):
                outcome.missing[i] = f"failed: {spec} returned {value!r}{_row(columns, i)}"
            else:
                outcome.scores[i] = float(value)
    outcome.seconds = time.perf_counter() - start
    return outcome


def _invoke(reward: Reward, columns: dict[str, Any], outcome: Outcome) -> Any:
    """What the function returns; what it logs goes to `outcome`."""

    def log_extra(name: str, values: Any) -> None:
        values = list(values)
        if len(values) != len(outcome.scores):
            raise ValueError(f"log_extra({name!r}): {len(values)} values for {len(outcome.scores)} completions")
        outcome.extras[name] = values

    def log_metric(name: str, value: float) -> None:
        outcome.metrics[name] = float(value)

    def log_missing(index: int, why: str) -> None:
        outcome.missing[index] = why

    arguments = {**columns, "log_extra": log_extra, "log_metric": log_metric, "log_missing": log_missing}
    if "clips" not in reward.parameters:
        arguments.pop("clips", None)
    if reward.conversational:
        for name, role in (("completions", "assistant"), ("prompts", "user")):
            arguments[name] = [[{"role": role, "content": text}] for text in columns[name]]
    result = reward(**arguments)

    async def awaited() -> Any:
        return await result

    return asyncio.run(awaited()) if inspect.isawaitable(result) else result


def _locate(reward: Reward, columns: dict[str, Any]) -> str:
    """Which completion does it raise on? Called one by one, for a second; only for the message."""
    deadline = time.perf_counter() + LOCATE_SECONDS
    n = len(columns["completions"])
    for i in range(n):
        if time.perf_counter() > deadline:
            return " (on a batch; no single row was found)"
        one = {k: [v[i]] if isinstance(v, list) and len(v) == n else v for k, v in columns.items()}
        try:
            _invoke(reward, one, Outcome([math.nan]))
        except BaseException:  # the one we look for
            return _row(columns, i)
    return " (only on the whole batch, not on any single row)"


def _row(columns: dict[str, Any], i: int) -> str:
    text = columns["completions"][i]
    return f" for row {columns['id'][i]}, completion {text if len(text) <= 80 else text[:77] + '...'!r}"


class _Job(threading.Thread):
    """One component in a daemon thread, which for plugins only talks to a worker process."""

    def __init__(self, reward: Reward, columns: dict[str, Any]) -> None:
        super().__init__(name=f"reward {reward.source.spec}", daemon=True)
        self.reward, self.columns = reward, columns
        self.outcome: Outcome | None = None
        self.loaded = threading.Event()
        self.begun = time.perf_counter()
        self.start()

    def run(self) -> None:
        try:
            if self.reward.in_thread:
                self.outcome = _call(self.reward, self.columns)
            else:
                self.outcome = _call_worker(self.reward, self.columns, self.loaded)
        finally:
            self.loaded.set()

    def wait(self, timeout: float) -> Outcome:
        spec, apart, begun = self.reward.source.spec, not self.reward.in_thread, self.begun
        if apart and not self.loaded.wait(max(begun + LOAD_SECONDS - time.perf_counter(), 0)):
            what = f"did not load after {LOAD_SECONDS:g} s"
        else:
            if apart:
                begun = time.perf_counter()  # loading is not running
            self.join(max(begun + timeout - time.perf_counter(), 0))
            if self.outcome is not None:
                return self.outcome
            what = f"{'was stopped' if self.is_alive() else 'gave no result'} after {timeout:g} s"
        seconds = time.perf_counter() - self.begun
        if apart:
            _end_worker(spec)
        return Outcome.failed(len(self.columns["completions"]), f"{spec} {what}", seconds)


def _call_worker(reward: Reward, columns: dict[str, Any], loaded: threading.Event) -> Outcome:
    """Start the process if need be, send the columns it takes, wait for the scores; one call of a reward at a time.

    `loaded` is set when the function is ready, so that loading does not count as running.
    """
    spec, n = reward.source.spec, len(columns["completions"])
    names = reward.parameters | {"completions", "prompts", "id"}
    if "**" in names:  # clips and the judge travel only to functions that name them
        names |= columns.keys() - {"clips", "judge"}
    process, pipe = _workers.get(spec, (None, None))
    try:
        if process is None or pipe is None or process.poll() is not None:
            pipe, theirs = Pipe()
            code = "from covo_rl.rewards.worker import main; main()"
            process = subprocess.Popen(
                [sys.executable, "-c", code, spec, str(theirs.fileno())],
                stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            )  # fmt: skip
            _workers[spec] = process, pipe
            theirs.close()
            pipe.recv_bytes()
        loaded.set()
        pipe.send_bytes(pickle.dumps({name: value for name, value in columns.items() if name in names}))
        return pickle.loads(pipe.recv_bytes())
    except (EOFError, OSError) as error:
        end = str(error)
        with contextlib.suppress(subprocess.TimeoutExpired):
            end = f"exit code {process.wait(timeout=1)}" if process is not None else end
        return Outcome.failed(n, f"{spec}: its process ended ({end})")
    except (pickle.PickleError, TypeError, AttributeError) as error:
        return Outcome.failed(n, f"{spec}: a column does not pickle: {error}")


def main() -> None:
    """The worker's end; its arguments are the spec and the pipe."""
    pipe = Connection(int(sys.argv[2]))
    reward = load_reward(sys.argv[1])
    pipe.send_bytes(b"loaded")
    with contextlib.suppress(EOFError):
        while True:
            pipe.send_bytes(pickle.dumps(_call(reward, pickle.loads(pipe.recv_bytes()))))
