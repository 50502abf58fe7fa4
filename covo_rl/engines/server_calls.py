"""One server over HTTP: what it answers, and what it means that it does not."""

from __future__ import annotations

import http.client
import json
import math
import os
import queue
import threading
import urllib.error
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from covo_rl.data.transport import MAX_BYTES, OriginError, exchange, key_in
from covo_rl.engines.base import EngineError
from covo_rl.types import shown, visible

T = TypeVar("T")

KEY_VARIABLE = "VLLM_API_KEY"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"  # of vLLM
FIGURE_SECONDS = 5.0  # for counters that only inform
RETRIED = frozenset((408, 409, 425, 429))  # and all from 500 on
#: what vLLM 0.31 says once its encoder cache lacks what its scheduler counts on; only a restart mends that
POISONED = "Encoder cache miss"


class Unanswered(Exception):
    """No answer that can be used. `status` of HTTP, if there was one.

    `again`: the next one may be better. `stale`: it is another version's. `poisoned`: the server must be restarted.
    """

    def __init__(self, problem: str, status: int | None = None, *, stale: bool = False) -> None:
        super().__init__(problem)
        self.status, self.stale, self.poisoned = status, stale, POISONED in problem
        self.again = not (stale or self.poisoned) and (status is None or status in RETRIED or status >= 500)

    @property
    def is_down(self) -> bool:
        """The server must be made fit first; a refusal (4xx) is the request's fault, but not of what is lost (404)."""
        return self.again or self.stale or self.poisoned or self.status == 404


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


class Workers:
    """At most `count` threads for work that waits on others, started when there is work; none keeps the process."""

    def __init__(self, count: int) -> None:
        self.count, self.started = count, 0
        self.waiting: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None] = queue.SimpleQueue()

    def submit(self, works: Sequence[Callable[[], Any]]) -> list[Future]:
        """The future of each of the works."""
        futures: list[Future] = [Future() for _ in works]
        for each in zip(futures, works, strict=True):
            self.waiting.put(each)
            if self.started < self.count:
                self.started += 1
                threading.Thread(target=self._run, daemon=True).start()
        return futures

    def close(self) -> None:
        """End the threads, each after the work that it has."""
        for _ in range(self.started):
            self.waiting.put(None)
        self.started = 0

    def _run(self) -> None:
        while (each := self.waiting.get()) is not None:
            future, work = each
            try:
                future.set_result(work())
            except BaseException as error:  # whoever asks for the result gets it
                future.set_exception(error)


class Caller:
    """Asks servers, with the key of the environment; `timeout` in seconds. Safe to use from several threads."""

    def __init__(self, timeout: float = 240.0) -> None:
        self.timeout, self.key = timeout, server_key()

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
            raise Unanswered(said, status) from None
        except OriginError as error:
            raise EngineError(self._text(server, str(error))) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            advice = "; vllm_server_timeout gives it more" if isinstance(reason, TimeoutError) else ""
            raise Unanswered(self._text(server, (shown(reason) or type(error).__name__) + advice)) from None

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

    def together(self, action: Callable[[Server], T], servers: Sequence[Server]) -> list[T | Unanswered]:
        """What `action` returns, or the Unanswered it raised, on each of the servers at the same time.

        Raises:
            EngineError: of the first server where it did.
        """
        workers = Workers(len(servers))
        futures = workers.submit([partial(action, server) for server in servers])
        workers.close()
        wait(futures)
        errors = [future.exception() for future in futures]
        for error in errors:
            if error is not None and not isinstance(error, Unanswered):
                raise error
        return [
            error if isinstance(error, Unanswered) else future.result()
            for error, future in zip(errors, futures, strict=True)
        ]

    def figures(self, server: Server, names: Sequence[str]) -> dict[str, float]:
        """Counters of /metrics by name (`vllm:prefix_cache_hits`); 0 is what it lacks, or keeps to itself."""
        totals, text = dict.fromkeys(names, 0.0), b""
        with suppress(Unanswered, EngineError):  # they only inform
            text = self.call(server, "/metrics", seconds=FIGURE_SECONDS)
        for line in text.decode(errors="replace").splitlines():
            name, number = line.partition("{")[0].removesuffix("_total"), line.rpartition(" ")[2]
            with suppress(ValueError):
                if name in totals and math.isfinite(float(number)):
                    totals[name] += float(number)
        return totals
