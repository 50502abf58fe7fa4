"""Servers that answer over HTTP: which are up, what a failure means, who is asked next, and when to give up.

A request is tried three times on a server (after 1 s and 4 s again), then the server counts as down and another one is
asked. What is down is looked at every 10 s and comes back when the engine has brought it up to date (`restore`). A
request that fails wherever it is tried, while servers answer others, has failed; while none answers, it waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from covo_rl.data.terminal import say
from covo_rl.engines.base import EngineError, EngineLost
from covo_rl.engines.server_calls import Caller, Server, Unanswered

T = TypeVar("T")

PAUSES = (0.0, 1.0, 4.0)  # seconds before each try on a server
LIVES = 3  # servers, or lives of one, that a request is tried on: one that kills them must not kill all
HEALTH_EVERY = 10.0  # seconds between two looks at a server that is down
HEALTH_SECONDS = 5.0  # that such a look may take


class RequestFailed(EngineError):
    """A request that no server has answered, while they answer others."""


class Servers(Caller):
    """`restore(server)` makes one that was down fit to answer, or raises Unanswered. `first`: whom to ask first.

    `timeout` and `patience` in seconds. Safe to use from several threads.
    """

    def __init__(
        self, urls: Sequence[str], restore: Callable[[Server], None], *, first: int = 0, timeout: float = 240.0,
        patience: float = 600.0,
    ) -> None:  # fmt: skip
        start = first % len(urls)
        self.all = [Server(url) for url in urls]
        self.order = self.all[start:] + self.all[:start]
        super().__init__(timeout)
        self.restore, self.patience = restore, patience
        self.retries = 0
        self.fatal: Exception | None = None  # of a server that came back
        self.lock = threading.Lock()
        self.over = threading.Event()

    @property
    def up(self) -> list[Server]:
        return [server for server in self.all if server.up]

    @property
    def problems(self) -> list[str]:
        """Of each server, "" of those that are up."""
        return ["" if server.up else server.problem or "down" for server in self.all]

    # -- a request, wherever it is answered ------------------------------------------------------------------------

    def ask(self, request: Callable[[Server], T]) -> T:
        """What `request(server)` returns on the first server where it does not raise Unanswered.

        Raises:
            RequestFailed: it failed wherever it was tried, and a server is up.
            EngineLost: no server is up, nor was for `patience` seconds.
            EngineError: whatever else `request` raises.
        """
        tried: set[tuple[str, int]] = set()
        problem, stale = "", False
        while True:
            up = self.wait_for_one()
            fresh = [server for server in up if (server.url, server.life) not in tried]
            if not fresh or len(tried) == LIVES:
                raise RequestFailed(problem)
            server, life = fresh[0], fresh[0].life
            tried.add((server.url, life))
            try:
                return self.insist(server, request)
            except Unanswered as error:
                if error.stale and stale:
                    raise EngineError(f"asked twice: {error}") from None
                problem, stale = str(error), stale or error.stale
                self.retries += 1
                if error.is_down:
                    self.take_down(server, life, problem, poisoned=error.poisoned)

    def insist(self, server: Server, request: Callable[[Server], T]) -> T:
        """The same on one server, tried as often as there are PAUSES. Raises Unanswered: of the last try."""
        life, last = server.life, Unanswered("the engine was closed")
        for pause in PAUSES:
            if self.over.wait(pause) or (pause and not (server.up and server.life == life)):
                break  # another request has found it down
            self.retries += pause > 0
            try:
                return request(server)
            except Unanswered as error:
                last = error
                if not error.again:
                    break
        raise last

    def wait_for_one(self) -> list[Server]:
        """Servers that are up, at least one. Raises EngineLost: none was for `patience` seconds."""
        deadline = time.monotonic() + self.patience
        while True:
            if self.fatal is not None:
                raise self.fatal
            if self.over.is_set():
                raise EngineLost("the engine was closed")
            self.look()
            if up := [server for server in self.order if server.up]:
                return up
            if time.monotonic() >= deadline:
                waited, problems = f"engine_patience = {self.patience:g} s", "; ".join(self.problems)
                raise EngineLost(f"no rollout server has answered for {waited}: {problems}")
            self.over.wait(min(0.2, max(0.0, deadline - time.monotonic())))

    # -- up and down -----------------------------------------------------------------------------------------------

    def take_down(self, server: Server, life: int, problem: str, *, poisoned: bool = False) -> None:
        """It is not asked any more until `look` finds it well; not if it came back since that `life`."""
        with self.lock:
            if server.life != life or not server.up:
                return
            server.up, server.problem, server.poisoned = False, problem, poisoned
            server.look_at = time.monotonic()
        advice = ". Its encoder cache is damaged: restart it" if poisoned else ""
        say(f"rollout server down: {problem}{advice}", err=True)

    def bring_up(self, server: Server) -> None:
        with self.lock:
            server.up, server.poisoned, server.problem, server.life = True, False, "", server.life + 1
        say(f"rollout server up again: {server.url}", err=True)

    def look(self) -> None:
        """Bring back what is down, and is well: each at most every 10 s, beside what else is done."""
        for server in self.all:
            if not server.up and time.monotonic() >= server.look_at and server.turn.acquire(blocking=False):
                threading.Thread(target=self._revive, args=(server,), daemon=True).start()

    def _revive(self, server: Server) -> None:
        try:
            self.call(server, "/health", seconds=min(HEALTH_SECONDS, self.timeout))
            self.restore(server)
            self.bring_up(server)
        except (Unanswered, EngineError) as error:  # of another key, say: the others go on
            server.problem, server.look_at = str(error), time.monotonic() + HEALTH_EVERY
        except Exception as error:  # for whoever waits
            self.fatal = error
        finally:
            server.turn.release()

    def close(self) -> None:
        self.over.set()
