"""What a judge is, and its replies, kept in files so that ranks and runs ask once."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from covo_rl.types import Clip, UserError

logger = logging.getLogger("covo_rl.rewards")


class JudgeError(UserError, RuntimeError):
    """The judge gave no reply; the message says after what."""


class Judge(Protocol):
    """Whatever answers prompts: one reply or error per prompt, in order; never raises for a single prompt.

    One with a true attribute `hears` is asked `ask(prompts, clips)`, with the clips (types.Clip) of each prompt.
    """

    name: str

    def ask(self, prompts: Sequence[str]) -> list[str | JudgeError]: ...


class CachedJudge:
    """Asks equal prompts once and keeps every reply in a file of its own, so that ranks and runs can share a folder.

    A file is the reply after a line with its checksum. One that is damaged, or that cannot be read or written, costs
    a request, not a reply; they are counted in `cache_faults`, and the first is logged.
    """

    def __init__(self, name: str, cache: Path | None) -> None:
        self.name, self.cache, self.cache_faults = name, cache, 0

    def ask(self, prompts: Sequence[str], clips: Sequence[Sequence[Clip]] = ()) -> list[str | JudgeError]:
        """Replies; `clips` of each prompt, for a judge that hears. A prompt names its clips' contents by its nonce."""
        prompts = [whole_text(prompt) for prompt in prompts]
        replies: dict[str, Any] = {prompt: self._remembered(prompt) for prompt in prompts}
        new = [prompt for prompt, reply in replies.items() if reply is None]
        attached = dict(zip(prompts, clips, strict=True)) if clips else {}
        replies.update(zip(new, self.answers(new, attached), strict=True))
        return [replies[prompt] for prompt in prompts]

    def answers(self, prompts: list[str], attached: Mapping[str, Sequence[Clip]]) -> list[str | JudgeError]:
        """Replies to different prompts that are in no cache; calls `remember` for each as soon as it is there."""
        raise NotImplementedError

    def remember(self, prompt: str, reply: str) -> None:
        """Write the reply under a name of its own, then rename: another rank may write the same."""
        with self._cached(prompt) as path:
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_suffix(f".{uuid4().hex}")
                try:
                    partial.write_bytes(f"{_checksum(reply)}\n{reply}".encode())
                    os.replace(partial, path)
                finally:
                    partial.unlink(missing_ok=True)

    def forget(self, prompt: str) -> None:
        """Drop a reply that was no verdict, so that the next run asks again."""
        with self._cached(prompt) as path:
            if path:
                path.unlink(missing_ok=True)

    def _remembered(self, prompt: str) -> str | None:
        with self._cached(prompt) as path, suppress(FileNotFoundError):
            if path:
                checksum, _, reply = path.read_bytes().decode().partition("\n")
                if checksum == _checksum(reply):
                    return reply
                raise ValueError(f"{path.name} is damaged, or of an earlier version")
        return None

    @contextmanager
    def _cached(self, prompt: str) -> Iterator[Path | None]:
        digest = hashlib.sha256(f"{self.name}\x00{whole_text(prompt)}".encode()).hexdigest()
        try:
            yield self.cache and self.cache / digest[:2] / f"{digest}.txt"
        except (OSError, ValueError) as error:
            self.cache_faults += 1
            if self.cache_faults == 1:
                logger.warning("judge cache %s: %s; such replies are asked for again (said once)", self.cache, error)


def whole_text(text: str) -> str:
    """Without lone surrogates, which no file and no request can hold."""
    return text.encode("utf-8", "replace").decode()


def _checksum(reply: str) -> str:
    return hashlib.sha256(reply.encode()).hexdigest()
