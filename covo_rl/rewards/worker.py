"""Reward functions called at the same time, each with its time limit; whatever one does, the caller gets an outcome.

Our own rewards run in daemon threads, plugins in worker processes: a thread that holds the interpreter lock (a runaway
regular expression, a C extension) cannot be stopped and would hold up every rank. A worker is started once, loads the
function by its name, says which columns it takes, and keeps its state between steps; keeper.py ends it with all that
it started. The trainer never imports a plugin, which could change its folder, environment, signals or random state.
They talk by pickles over a socket, each with the number of its request: a late reply is never taken for that of the
next step. A pool of `multiprocessing` would import the user's script again in each process, and fail where it has no
`__main__` guard.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import logging
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from covo_rl.data.files import file_sha256
from covo_rl.rewards.call import Outcome, call_reward
from covo_rl.rewards.functions import FunctionReward, interrupt
from covo_rl.rewards.specs import LOAD_SECONDS, PACKAGES, Reward, RewardError, Source, load_reward, source_of
from covo_rl.types import SHOWN, shown

logger = logging.getLogger("covo_rl.rewards")
REPLY_BYTES = 64 << 20  # of a plugin's scores and of what it logs for a step
TICK = 1.0  # seconds; how exactly time is known in which this process was stopped


def run_components(rewards: Sequence[Reward], columns: dict[str, Any], timeout: float) -> list[Outcome]:
    """One outcome per reward, in order, after at most `timeout` seconds each (all run at the same time)."""
    jobs = [_Job(reward, columns, min(timeout, threading.TIMEOUT_MAX)) for reward in rewards]
    return [job.wait() for job in jobs]


def reward_of(spec: str) -> Reward:
    """The reward of this name: ours and TRL's loaded; others, and ours with models, as their worker describes them.

    Raises:
        RewardError: it does not exist or does not load.
    """
    source = source_of(spec)
    ours = source.trusted or (source.place == "import" and source.location.split(".")[0] in PACKAGES)
    if ours and (reward := load_reward(spec)).in_thread:
        return reward
    about = _worker(spec).describe()
    return load_reward(spec) if about["in_thread"] else PluginReward(source, about)


class PluginReward(Reward):
    """A reward that lives in its worker process; whoever calls it directly imports it after all."""

    def __init__(self, source: Source, about: Mapping[str, Any]) -> None:
        self.source, self.about, self.parameters = source, about, about["parameters"]
        self.__name__, self.__doc__ = source.name, about["doc"]

    @property
    def in_thread(self) -> bool:
        return False

    @property
    def sha256(self) -> str | None:
        return self.about["sha256"]

    def __call__(self, *args: Any, **columns: Any) -> Any:
        return load_reward(self.source.spec)(*args, **columns)

    def __reduce__(self) -> tuple[Any, ...]:
        return reward_of, (self.source.spec,)


def waited(event: threading.Event, seconds: float) -> bool:
    """`event.wait(seconds)`; time in which this process was stopped (Ctrl-Z, then fg) does not count."""
    while seconds > 0 and not event.is_set():
        start = time.monotonic()
        event.wait(min(seconds, TICK))
        seconds -= min(time.monotonic() - start, 2 * TICK)
    return event.is_set()


class _Job(threading.Thread):
    """One component in a daemon thread, which for plugins only talks to a worker process."""

    def __init__(self, reward: Reward, columns: dict[str, Any], timeout: float) -> None:
        super().__init__(name=f"reward {reward.source.spec}", daemon=True)
        self.reward, self.columns, self.timeout = reward, columns, timeout
        self.outcome: Outcome | None = None
        self.done = threading.Event()
        self.begun = time.perf_counter()
        self.start()

    def run(self) -> None:
        try:
            if self.reward.in_thread:
                self.outcome = call_reward(self.reward, self.columns, self.timeout)
            else:
                self.outcome = _worker(self.reward.source.spec).ask(_wanted(self.reward, self.columns), self.timeout)
        finally:
            self.done.set()

    def wait(self) -> Outcome:
        # a worker keeps to the limit by itself: it may first have to be loaded, or to finish another's request
        waited(self.done, self.begun + self.timeout - time.perf_counter() if self.reward.in_thread else math.inf)
        if self.outcome is not None:
            return self.outcome
        if isinstance(self.reward, FunctionReward):
            interrupt(self)
        what = f"{'was stopped' if self.is_alive() else 'gave no result'} after {self.timeout:g} s"
        seconds = time.perf_counter() - self.begun
        return Outcome.failed(len(self.columns["completions"]), f"{self.reward.source.spec} {what}", seconds)


def _wanted(reward: Reward, columns: dict[str, Any]) -> dict[str, Any]:
    """The columns that a plugin names; clips and the judge travel only to functions that name them."""
    names = reward.parameters | {"completions", "prompts", "id"}
    if "**" in names:
        names |= columns.keys() - {"clips", "judge"}
    return {name: value for name, value in columns.items() if name in names}


class _Worker:
    """A plugin's process, started when it is needed; one request at a time."""

    def __init__(self, spec: str) -> None:
        self.spec, self.turn, self.numbers = spec, threading.Lock(), itertools.count()
        self.process: Any = None  # Popen of keeper.py
        self.line: Any = None  # our socket, and a Connection over it
        self.pipe: Any = None
        self.about: dict[str, Any] = {}  # what it said of the function when it was loaded

    def describe(self) -> dict[str, Any]:
        """`parameters`, `in_thread`, `doc`, `file` and `sha256` of its code; loaded anew if that file has changed.

        Raises:
            RewardError: it does not load.
        """
        with self.turn:
            file = Path(self.about.get("file") or "")
            if self.running and (not file.is_file() or file_sha256(file) == self.about["sha256"]):
                return self.about
            self.end()
            self._load()
            return self.about

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def ask(self, columns: dict[str, Any], timeout: float) -> Outcome:
        """The outcome after at most `timeout` seconds; waiting for another request and loading do not count."""
        with self.turn:
            start = time.perf_counter()
            try:
                if not self.running:
                    self._load()
                start = time.perf_counter()
                with self._limit(timeout):
                    return self._answer(next(self.numbers), columns, timeout)
            except TimeoutError:
                why = f"was stopped after {timeout:g} s"
            except RewardError as error:
                why = f"did not load: {error}"
            except (EOFError, OSError) as error:
                why = f"its process ended ({self._exit() or error})"
            except Exception as error:  # whatever classes of the user's raise while they are pickled
                why = f"columns or reply do not pickle: {type(error).__name__}: {shown(error)}"
            self.end()
        return Outcome.failed(len(columns["completions"]), f"{self.spec}: {why}", time.perf_counter() - start)

    def _load(self) -> None:
        """Start the process and read what it says of the function. Raises RewardError: it does not load."""
        try:
            with self._limit(LOAD_SECONDS):
                return self._start()
        except TimeoutError:
            why = f"did not load within {LOAD_SECONDS:g} s"
        except RewardError as error:
            why = str(error)
        except Exception as error:  # whatever a plugin does to the line between us
            why = f"its process ended while it was loaded ({self._exit() or shown(error)})"
        self.end()
        raise RewardError(why if self.spec in why else f"reward {self.spec}: {why}")

    def _start(self) -> None:
        self.line, theirs = socket.socketpair()
        self.pipe = Connection(os.dup(self.line.fileno()))
        keeper = str(Path(__file__).with_name("keeper.py"))
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-P", keeper, self.spec, str(theirs.fileno()),
                 os.pathsep.join(str(path or os.getcwd()) for path in sys.path)],
                stdin=subprocess.PIPE, stdout=2, pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip
        about = pickle.loads(self.pipe.recv_bytes(REPLY_BYTES))
        if "problem" in about:
            raise RewardError(about["problem"])
        if self.about and about["sha256"] != self.about["sha256"]:
            logger.warning("reward %s: its file has changed, and from now on the new one counts", self.spec)
        self.about = about

    def _answer(self, number: int, columns: dict[str, Any], timeout: float) -> Outcome:
        self.pipe.send_bytes(pickle.dumps((number, timeout, columns)))
        while True:
            asked, outcome = pickle.loads(self.pipe.recv_bytes(REPLY_BYTES))
            if asked == number:
                return outcome

    @contextlib.contextmanager
    def _limit(self, seconds: float) -> Iterator[None]:
        """End the process, and with it whatever waits for it, after so many seconds. Raises TimeoutError then."""
        late, done = threading.Event(), threading.Event()

        def stop() -> None:
            if not waited(done, seconds):
                late.set()
                self.end()

        timer = threading.Thread(target=stop, daemon=True)
        timer.start()
        try:
            yield
        except (EOFError, OSError) as error:
            raise TimeoutError if late.is_set() else error from None
        finally:
            done.set()
            timer.join()  # it has ended this process, or will end none: never that of a later request

    def _exit(self) -> str:
        """The exit code in words, if the process is about to end."""
        with contextlib.suppress(subprocess.TimeoutExpired, AttributeError):
            return f"exit code {self.process.wait(timeout=0.5)}"
        return ""

    def end(self) -> None:
        """End the process with all that it started; the next request starts a new one."""
        with contextlib.suppress(OSError, AttributeError):
            self.process.stdin.close()
            for number in (signal.SIGCONT, signal.SIGQUIT):  # a fork of this process may hold that stdin too
                self.process.send_signal(number)
            try:
                self.process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.line.shutdown(socket.SHUT_RDWR)  # wakes who waits, though a process we cannot kill holds the other end


_workers: dict[str, _Worker] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_workers.clear)  # a fork of the trainer has none, and ends none


def _worker(spec: str) -> _Worker:
    return _workers.setdefault(spec, _Worker(spec))


@atexit.register
def close() -> None:
    """End all worker processes."""
    for worker in list(_workers.values()):
        worker.end()


def serve(spec: str, fd: int) -> None:
    """The worker's side: load the function, then scores for columns until the trainer hangs up."""
    pipe, pid = Connection(fd), os.getpid()
    try:
        reward, about = load_reward(spec, alone=True), {}
        about = {name: getattr(reward, name) for name in ("parameters", "in_thread", "file", "sha256")}
        about["doc"] = reward.__doc__
    except BaseException as error:
        name = "" if isinstance(error, RewardError) else f"{type(error).__name__}: "
        reward, about = None, {"problem": name + shown(error, 10 * SHOWN)}
    if os.getpid() == pid:
        pipe.send_bytes(pickle.dumps(about))
    loop = asyncio.Runner()  # for all steps: a session or lock that a coroutine function keeps belongs to it
    with contextlib.suppress(EOFError):
        while reward is not None and os.getpid() == pid:
            number, timeout, columns = pickle.loads(pipe.recv_bytes())
            outcome = call_reward(reward, columns, timeout, loop.run)
            if os.getpid() == pid:  # else the function forked, and returned a second time in the child
                pipe.send_bytes(pickle.dumps((number, outcome)))
    os._exit(0)  # threads of the function would go on
