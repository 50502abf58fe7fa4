"""Servers that answer over HTTP: which are up, what a failure means, who is asked next, and when to give up.

A request is tried three times on a server (after 1 s and 4 s again), then the server counts as down and another one is
asked. What is down is looked at every 10 s and comes back when the engine has brought it up to date (`restore`). A
request that fails wherever it is tried, while servers answer others, has failed; while none answers, it waits.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
import urllib.error
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from covo_rl.data.transport import MAX_BYTES, OriginError, exchange, key_in
from covo_rl.engines.base import EngineError, EngineLost
from covo_rl.types import shown, visible

T = TypeVar("T")

KEY_VARIABLE = "VLLM_API_KEY"
PAUSES = (0.0, 1.0, 4.0)  # seconds before each try on a server
LIVES = 3  # servers, or lives of one, that a request is tried on: one that kills them must not kill all
HEALTH_EVERY = 10.0  # seconds between two looks at a server that is down
HEALTH_SECONDS = 5.0  # that such a look may take
RETRIED = frozenset((408, 409, 425, 429))  # and all from 500 on
#: what vLLM 0.31 says once its encoder cache lacks what its scheduler counts on; only a restart mends that
POISONED = "Encoder cache miss"


class Unanswered(Exception):
    """No answer that can be used. `status` of HTTP, if there was one; `again`: the next one may be better."""

    def __init__(self, problem: str, status: int | None = None, *, again: bool = True) -> None:
        super().__init__(problem)
        self.status, self.again = status, again


class RequestFailed(EngineError):
    """A request that no server has answered, while they answer others."""


@dataclass
class Server:
    """`life` counts how often it came back. `poisoned`: it answers, and must be restarted all the same."""

    url: str
    up: bool = True
    life: int = 0
    problem: str = ""
    poisoned: bool = False
    look_at: float = 0.0  # time.monotonic() of the next look, while it is down
    turn: threading.Lock = field(default_factory=threading.Lock)  # one thread looks at a time


def server_key() -> str:
    """The servers' key, or "". Raises EngineError: no header can hold it; the message does not show it."""
    try:
        return key_in(os.environ.get(KEY_VARIABLE, ""), KEY_VARIABLE)
    except ValueError as error:
        raise EngineError(str(error)) from None


class Servers:
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
        self.restore, self.timeout, self.patience = restore, timeout, patience
        self.key = server_key()
        self.retries = 0
        self.lock = threading.Lock()
        self.over = threading.Event()

    @property
    def up(self) -> list[Server]:
        return [server for server in self.all if server.up]

    # -- one exchange ----------------------------------------------------------------------------------------------

    def call(
        self, server: Server, path: str, body: Any = None, *, seconds: float | None = None, limit: int = MAX_BYTES
    ) -> bytes:
        """What one server answers to a GET, or to a POST of `body` as JSON.

        Raises:
            Unanswered: it did not, or not within `seconds` (default: `timeout`) and `limit` bytes, or with an error.
            EngineError: it wants another key, or sends us elsewhere.
        """
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        data = None if body is None else json.dumps(body).encode()
        if data is not None:
            headers["Content-Type"] = "application/json"
        try:
            return exchange(server.url + path, data, headers, seconds or self.timeout, limit)
        except urllib.error.HTTPError as error:
            said, status = self._text(server, f"HTTP {error.code}: {error.msg}"), error.code
            if status in (401, 403):
                raise EngineError(f"{said}; is {KEY_VARIABLE} the key that it was started with?") from None
            again = (status in RETRIED or status >= 500) and POISONED not in said
            raise Unanswered(said, status, again=again) from None
        except OriginError as error:
            raise EngineError(self._text(server, str(error))) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise Unanswered(self._text(server, shown(reason) or type(error).__name__)) from None

    def call_json(self, server: Server, path: str, body: Any = None, **options: Any) -> dict[str, Any]:
        """The same where the answer must be an object. Raises Unanswered also where it is none, cut short say."""
        content = self.call(server, path, body, **options)
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise Unanswered(f"{server.url}{path}: not JSON: {shown(error)}") from None
        if not isinstance(value, dict):
            raise Unanswered(f"{server.url}{path}: {type(value).__name__} where an object was to be")
        return value

    def _text(self, server: Server, problem: str) -> str:
        """For a message: a server may repeat the key, and write what a terminal obeys."""
        return f"{server.url}: {visible(problem.replace(self.key or chr(0), '***'))}"

    # -- a request, wherever it is answered ------------------------------------------------------------------------

    def ask(self, request: Callable[[Server], T]) -> T:
        """What `request(server)` returns on the first server where it does not raise Unanswered.

        Raises:
            RequestFailed: it failed wherever it was tried, and a server is up.
            EngineLost: no server is up, nor was for `patience` seconds.
            EngineError: whatever else `request` raises.
        """
        tried: set[tuple[str, int]] = set()
        problem = ""
        while True:
            server = self._next(tried)
            if server is None:
                raise RequestFailed(problem)
            life = server.life
            tried.add((server.url, life))
            for pause in PAUSES:
                if self.over.wait(pause) or (pause and (not server.up or server.life != life)):
                    break
                self.retries += len(tried) > 1 or pause > 0
                try:
                    return request(server)
                except Unanswered as error:
                    problem = str(error)
                    if POISONED in problem:
                        problem += "; its encoder cache is damaged: restart it"
                        self.take_down(server, life, problem, poisoned=True)
                    if not error.again:
                        break
            else:
                self.take_down(server, life, problem)

    def _next(self, tried: set[tuple[str, int]]) -> Server | None:
        """A server that is up and has not failed this request in this life; None where there is no such one.

        While none is up, it waits.
        """
        deadline = time.monotonic() + self.patience
        while True:
            if self.over.is_set():
                raise EngineLost("the engine was closed")
            self.look()
            up = [server for server in self.order if server.up]
            fresh = [server for server in up if (server.url, server.life) not in tried]
            if up:
                return fresh[0] if fresh and len(tried) < LIVES else None
            if time.monotonic() >= deadline:
                raise EngineLost(
                    f"no rollout server has answered for engine_patience = {self.patience:g} s: "
                    + "; ".join(server.problem for server in self.all)
                )
            self.over.wait(min(0.2, max(0.0, deadline - time.monotonic())))

    def take_down(self, server: Server, life: int, problem: str, *, poisoned: bool = False) -> None:
        """It is not asked any more until `look` finds it well; not if it came back since that `life`."""
        with self.lock:
            if server.life == life and server.up:
                server.up, server.problem, server.look_at = False, problem, time.monotonic()
            server.poisoned |= poisoned and server.life == life

    def look(self) -> None:
        """Bring back what is down, and is well: each at most every 10 s, by one thread."""
        for server in self.all:
            if server.up or time.monotonic() < server.look_at or not server.turn.acquire(blocking=False):
                continue
            try:
                self.revive(server)
            except Unanswered as error:
                server.problem, server.look_at = str(error), time.monotonic() + HEALTH_EVERY
            finally:
                server.turn.release()

    def revive(self, server: Server) -> None:
        """Raises Unanswered where it is not well; EngineError where it does not run the policy."""
        self.call(server, "/health", seconds=min(HEALTH_SECONDS, self.timeout))
        self.restore(server)
        with self.lock:
            server.up, server.poisoned, server.problem, server.life = True, False, "", server.life + 1

    def together(self, action: Callable[[Server], T], servers: Sequence[Server]) -> list[T | Unanswered]:
        """What `action` returns, or the Unanswered it raised, on each of the servers at the same time.

        Raises:
            EngineError: of the first server where it did.
        """
        results: dict[str, Any] = {}

        def work(server: Server) -> None:
            try:
                results[server.url] = action(server)
            except (Unanswered, EngineError) as error:
                results[server.url] = error

        threads = [threading.Thread(target=work, args=(server,), daemon=True) for server in servers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for server in servers:
            if isinstance(results[server.url], EngineError):
                raise results[server.url]
        return [results[server.url] for server in servers]

    def figures(self, servers: Sequence[Server], names: Sequence[str]) -> dict[str, float]:
        """Counters of /metrics by name (`vllm:prefix_cache_hits`), over these servers; what one lacks counts 0."""
        totals = dict.fromkeys(names, 0.0)
        for text in self.together(lambda server: self.call(server, "/metrics", seconds=HEALTH_SECONDS), servers):
            for line in text.decode(errors="replace").splitlines() if isinstance(text, bytes) else ():
                name = line.partition("{")[0].removesuffix("_total")
                with suppress(ValueError):
                    if name in totals:
                        totals[name] += float(line.rpartition(" ")[2])
        return totals

    def close(self) -> None:
        self.over.set()
