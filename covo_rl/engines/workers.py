"""Threads for work that waits on others: many at a time, and none that keeps the process."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any


class Workers:
    """At most `count` daemon threads, started when there is work."""

    def __init__(self, count: int) -> None:
        self.count, self.started = count, 0
        self.waiting: queue.SimpleQueue[tuple[Future, Callable[[], Any]]] = queue.SimpleQueue()

    def submit(self, works: Sequence[Callable[[], Any]]) -> Future[list[Future]]:
        """One future for all: it is done when the futures in it are, in the order of `works`, each one's own."""
        futures: list[Future] = [Future() for _ in works]
        every: Future[list[Future]] = Future()
        left, lock = len(works), threading.Lock()

        def ended(_: Future) -> None:
            nonlocal left
            with lock:
                left -= 1
                last = not left
            if last:
                every.set_result(futures)

        for future, work in zip(futures, works, strict=True):
            future.add_done_callback(ended)
            self.waiting.put((future, work))
            if self.started < self.count:
                self.started += 1
                threading.Thread(target=self._run, daemon=True).start()
        if not works:
            every.set_result(futures)
        return every

    def _run(self) -> None:
        while True:
            future, work = self.waiting.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:  # whoever asks for the result gets it
                    future.set_exception(error)
