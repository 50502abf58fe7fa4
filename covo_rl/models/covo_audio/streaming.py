"""An answer while it is generated: work in a thread, whose results come one by one; new ids; the text of ids."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

T = TypeVar("T")
LOOK_SECONDS = 0.1  # between two looks of a producer that waits for room


class NobodyListens(Exception):
    """Ends work whose results nobody takes any more."""


class Outlet(Generic[T]):
    """Where work in a thread puts its results: waits while `room` of them are not taken.

    Once it is `closed` nobody takes any more: what comes is dropped, and the work should end.
    """

    def __init__(self, room: int) -> None:
        self.results: queue.Queue[Any] = queue.Queue(room)
        self.closed = False

    def check(self) -> None:
        """Raise NobodyListens once it is closed."""
        if self.closed:
            raise NobodyListens

    def put(self, result: T) -> None:
        while not self.closed:
            try:
                return self.results.put(result, timeout=LOOK_SECONDS)
            except queue.Full:
                continue


_END = object()


def in_background(work: Callable[[Outlet[T]], None], room: int) -> Iterator[T]:
    """What `work` puts into its outlet, which it does in a thread of its own, at most `room` results ahead.

    An error of the work is raised here, after the results before it. Closing this iterator closes the outlet and waits
    until the work has ended.
    """
    outlet: Outlet[Any] = Outlet(room)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work(outlet)
        except BaseException as error:  # raised where the results are taken
            errors.append(error)
        outlet.put(_END)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while (result := outlet.results.get()) is not _END:
            yield result
    finally:
        outlet.closed = True
        thread.join()
    if errors:
        raise errors[0]


class IdOutlet(BaseStreamer, StoppingCriteria):
    """Both sides of `generate` for one row: puts every new id into the outlet, and stops once that is closed."""

    def __init__(self, outlet: Outlet[int]) -> None:
        self.outlet = outlet
        self.in_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """transformers sends the prompt's ids first, then those of each step."""
        if not self.in_prompt:
            self.outlet.put(int(value))
        self.in_prompt = False

    def end(self) -> None:
        """The outlet is told by the end of the work."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # pyright: ignore
        return torch.full((len(input_ids),), self.outlet.closed, dtype=torch.bool, device=input_ids.device)


class TextPieces:
    """Text of ids that come one by one: "" while a character is not whole; joined, the text of all ids."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.pending: list[int] = []

    def push(self, token_id: int) -> str:
        self.pending.append(token_id)
        text = self._text()
        if text.endswith("\ufffd"):  # the first bytes of a character
            return ""
        self.pending = []
        return text

    def rest(self) -> str:
        """What never became whole."""
        text, self.pending = self._text(), []
        return text

    def _text(self) -> str:
        return self.tokenizer.decode(self.pending, skip_special_tokens=True)
