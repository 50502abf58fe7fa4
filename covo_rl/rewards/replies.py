"""What a judge is, and replies, kept in files so that ranks and runs ask once."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self
from uuid import uuid4

from covo_rl.audio import AudioError, content_key
from covo_rl.types import Clip, UserError

logger = logging.getLogger("covo_rl.rewards")
MAX_TOKENS = 400  # of a reply, where nothing else is said


class AnswerError(UserError, RuntimeError):
    """Whoever was asked gave no result; the message says why."""


class JudgeError(AnswerError):
    """The judge gave no reply; the message says after what."""


class Judge(Protocol):
    """Whatever answers prompts: one reply or error per prompt, in order; never raises for a single prompt.

    One with a true attribute `hears` is asked `ask(prompts, clips)`, with the clips (types.Clip) of each prompt.
    """

    name: str

    def ask(self, prompts: Sequence[str]) -> list[str | JudgeError]: ...


class ReplyCache:
    """Replies of one `engine` (its name and version), each in a file of its own, so that ranks and runs can share a
    folder; None: nothing is kept.

    A file is the reply after a line with its checksum. One that is damaged, or that cannot be read or written, costs
    a request, not a reply; they are counted in `faults`, and the first is logged.
    """

    def __init__(self, folder: Path | None, engine: str) -> None:
        self.folder, self.engine, self._failed = folder, engine, Counter[str]()

    @property
    def faults(self) -> int:
        return self._failed.total()

    def of(self, engine: str) -> ReplyCache:
        """Replies of another engine, whose faults are counted with these."""
        other = copy.copy(self)
        other.engine = engine
        return other

    def get(self, asked: str) -> str | None:
        """What was replied to this, if it is there and whole."""
        with self._file(asked) as path, suppress(FileNotFoundError):
            if path:
                checksum, _, reply = path.read_bytes().decode().partition("\n")
                if checksum == _checksum(reply):
                    return reply
                raise ValueError(f"{path.name} is damaged, or of an earlier version")
        return None

    def put(self, asked: str, reply: str) -> None:
        """Write the reply under a name of its own, then rename: another rank may write the same."""
        with self._file(asked) as path:
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_suffix(f".{uuid4().hex}")
                try:
                    partial.write_bytes(f"{_checksum(reply)}\n{reply}".encode())
                    os.replace(partial, path)
                finally:
                    partial.unlink(missing_ok=True)

    def drop(self, asked: str) -> None:
        """Forget a reply that was of no use, so that the next run asks again."""
        with self._file(asked) as path:
            if path:
                path.unlink(missing_ok=True)

    @contextmanager
    def _file(self, asked: str) -> Iterator[Path | None]:
        digest = hashlib.sha256(f"{self.engine}\x00{asked}".encode()).hexdigest()
        try:
            yield self.folder and self.folder / digest[:2] / f"{digest}.txt"
        except (OSError, ValueError) as error:
            self._failed[type(error).__name__] += 1
            if self.faults == 1:
                logger.warning("judge cache %s: %s; such replies are asked for again (said once)", self.folder, error)


class Asked(NamedTuple):
    """A prompt with the clips that go with it, and the key under which its reply is kept: prompt and sounds."""

    prompt: str
    clips: Sequence[Clip] = ()
    key: str = ""

    @classmethod
    def of(cls, prompt: str, clips: Sequence[Clip] = ()) -> Asked:
        """Raises AudioError: a clip cannot be read."""
        prompt = whole_text(prompt)
        return cls(prompt, clips, "\x00".join([prompt, *map(content_key, clips)]))


class CachedJudge:
    """Asks equal prompts, about equal clips, once and keeps every reply. `sampling` is how a reply is drawn."""

    def __init__(self, name: str, cache: Path | None) -> None:
        self.name, self.kept, self.number = name, ReplyCache(cache, name), 0
        self.sampling: dict[str, Any] = {"temperature": 0, "max_tokens": MAX_TOKENS}

    @property
    def cache_faults(self) -> int:
        return self.kept.faults

    def vote(self, number: int, **sampling: Any) -> Self:
        """The same judge drawing with `sampling` (temperature, top_p, max_tokens); each `number` is another draw."""
        other = copy.copy(self)
        other.number, other.sampling = number, {**self.sampling, **sampling}
        drawn = json.dumps([number, other.sampling], sort_keys=True)
        other.kept = self.kept.of(f"{self.name} {drawn}")
        return other

    def ask(self, prompts: Sequence[str], clips: Sequence[Sequence[Clip]] = ()) -> list[str | JudgeError]:
        """Replies; `clips` of each prompt, for a judge that hears."""
        asked: list[Asked | JudgeError] = []
        for prompt, sounds in zip(prompts, clips or [()] * len(prompts), strict=True):
            try:
                asked.append(Asked.of(prompt, sounds))
            except AudioError as error:
                asked.append(JudgeError(f"judge {self.name}: {error}"))
        replies: dict[str, Any] = {one.key: self.kept.get(one.key) for one in asked if isinstance(one, Asked)}
        new = {one.key: one for one in asked if isinstance(one, Asked) and replies[one.key] is None}
        replies.update(zip(new, self.answers(list(new.values())), strict=True))
        return [one if isinstance(one, JudgeError) else replies[one.key] for one in asked]

    def answers(self, asked: list[Asked]) -> list[str | JudgeError]:
        """Replies to what is in no cache, each another key; calls `kept.put` for each as soon as it is there."""
        raise NotImplementedError

    def forget(self, prompt: str, clips: Sequence[Clip] = ()) -> None:
        """Drop a reply that was no verdict, so that it is asked for again."""
        with suppress(AudioError):  # it was never asked
            self.kept.drop(Asked.of(prompt, clips).key)


def whole_text(text: str) -> str:
    """Without lone surrogates, which no file and no request can hold."""
    return text.encode("utf-8", "replace").decode()


def _checksum(reply: str) -> str:
    return hashlib.sha256(reply.encode()).hexdigest()
