"""Prompts of text rows, read and checked once, drawn in a seeded order that is the same on any number of ranks.

    {"id": "a", "prompt": "Why is the sky blue?", "system": "Answer briefly."}
    {"id": "b", "turns": [{"role": "user", "text": "Hi."}, {"role": "assistant", "text": "Hello."},
                          {"role": "user", "text": "Tell me a joke."}]}

What follows is the student's to write: the last turn is the user's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from covo_rl.audio import ClipStore
from covo_rl.data.read import DataError, Problem, Row, printable
from covo_rl.data.shards import ShardedRows
from covo_rl.prompt import PromptError, chat_prompt, length_problem
from covo_rl.types import Example, Prompt

if TYPE_CHECKING:
    from covo_rl.models.base import AudioFamily

ROLES = ("user", "assistant")


class PromptRows:
    """The prompts of `data`: JSONL or parquet files, a folder or a pattern; only their places are in memory.

    Args:
        shared: ids that a prompt may hold.
        room: positions that a reply may take; `limits`: model -> positions that it takes, None where it does not say.
        seed: of the order.

    Raises:
        DataError: every problem of every row.
    """

    def __init__(
        self, data: str | Path | Sequence[str | Path], family: AudioFamily, *, shared: Collection[int], room: int,
        limits: Mapping[str, int | None], seed: int = 0,
    ) -> None:  # fmt: skip
        self.rows, self.family, self.seed = ShardedRows(data), family, seed
        self._clips = ClipStore(memory_mb=1)  # of no clip: text rows have none
        self._order: tuple[int, np.ndarray] = -1, np.zeros(0, np.int64)
        check = _Check(frozenset(shared), room, limits, self._prompt)
        problems = [problem for where, row, faults in self.rows.scan() for problem in check(where, row, faults)]
        if not len(self.rows):
            problems.append(Problem("data", "it holds no rows"))
        if problems:
            raise DataError(self.rows.name, problems)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """Of the content of all rows."""
        return self.rows.fingerprint

    def at(self, place: int) -> Prompt:
        """The prompt at a place of the endless order: each epoch has every row once.

        Raises:
            DataError: its file is another now.
        """
        epoch, place = divmod(place, len(self))
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self))
        index = int(self._order[1][place])
        # the noise of a reply belongs to the name of its prompt: another one in every epoch
        return self._prompt(self.rows[index], f"row {index + 1}", f" (epoch {epoch + 1})" if epoch else "")

    def _prompt(self, row: Row, name: str, note: str = "") -> Prompt:
        """Raises PromptError for a row that makes none."""
        name = str(row["id"]) if _is_id(row.get("id")) else name
        try:
            chat = _messages(row)
        except ValueError as error:
            raise PromptError(f"row {name}: {error}") from error
        question = chat[-1]["content"][0]["text"]
        return chat_prompt(Example(name + note, (), question), chat, self.family, self._clips)


class _Check:
    """What is wrong with each row, one after the other."""

    def __init__(
        self, shared: frozenset[int], room: int, limits: Mapping[str, int | None], made: Callable[[Row, str], Prompt]
    ) -> None:
        self.shared, self.room, self.limits, self.made = shared, room, limits, made
        self.seen: set[int] = set()

    def __call__(self, where: str, row: Row | None, faults: Sequence[str]) -> list[Problem]:
        if row is None or faults:
            return [Problem(f"row {where}", fault) for fault in faults]
        if not _is_id(row.get("id")):
            return [Problem(f"row {where}", f"its id is {printable(row.get('id'))}, not a text or whole number")]
        name = str(row["id"])
        wrong = ["another row has this id"] if hash(name) in self.seen else []
        self.seen.add(hash(name))
        try:
            ids = self.made(row, name).input_ids
        except PromptError as error:
            return [Problem(name, what) for what in (*wrong, str(error).removeprefix(f"row {name}: "))]
        if others := sorted(set(ids) - self.shared):
            wrong.append(f"its prompt has ids {others[:5]}, which the teacher does not have as the same token")
        for whose, limit in self.limits.items():
            found = length_problem(name, len(ids), self.room, limit)
            wrong += [f"{whose}: {text.removeprefix(f'row {name}: ')}" for text in found]
        return [Problem(name, what) for what in wrong]


def _is_id(value: Any) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool) and bool(str(value).strip())


def _messages(row: Row) -> list[dict[str, Any]]:
    """The conversation of a row. Raises ValueError that says what is wrong with it."""
    prompt, turns, system = row.get("prompt"), row.get("turns"), row.get("system")
    if (prompt is None) == (turns is None):
        raise ValueError("it has " + ("no prompt and no turns" if prompt is None else "both a prompt and turns"))
    if system is not None and not isinstance(system, str):
        raise ValueError(f"its system message is {printable(system)}, not a text")
    turns = [{"role": "user", "text": prompt}] if turns is None else turns
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError(f"its turns are {printable(turns)}, not a list of {{role, text}}")
    chat = [_message("system", system)] if system and system.strip() else []
    for number, turn in enumerate(turns, 1):
        role, text = turn.get("role"), turn.get("text")
        if role not in ROLES:
            raise ValueError(f"its turn {number} has the role {printable(role)}; there are {', '.join(ROLES)}")
        if not isinstance(text, str) or not text.strip():
            what = "prompt" if prompt is not None else f"turn {number}"
            raise ValueError(f"its {what} is {printable(text)}, not a text")
        if any(turn.get(key) is not None for key in ("audio", "codes")):
            raise ValueError(f"its turn {number} is spoken: the teacher reads text alone")
        chat.append(_message(role, text))
    if turns[-1]["role"] != "user":
        raise ValueError("its last turn is the assistant's: what follows a user's turn is asked for")
    return chat


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}
