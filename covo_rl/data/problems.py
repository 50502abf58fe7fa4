"""What is wrong with rows, all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from covo_rl.types import Example

#: So many problems are spelled out in one message.
SHOWN = 50


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one row. `row_id` is its id, or `row N` (from 1) where it has none."""

    row_id: str
    what: str

    def __str__(self) -> str:
        return f"{self.row_id}: {self.what}"


class DataError(ValueError):
    """Every problem of a data file, with row ids. `problems` has them all, the message the first 50.

    `examples` are the rows that could be read nevertheless, for looking at them further; none where no row could.
    """

    def __init__(self, source: str, problems: Sequence[Problem], examples: Sequence[Example] = ()) -> None:
        self.source, self.problems, self.examples = source, tuple(problems), tuple(examples)
        lines = [f"  {problem}" for problem in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            lines.append(f"  ... and {len(self.problems) - SHOWN} more")
        count = len(self.problems)
        super().__init__(f"{source}: {count} problem{'s' * (count != 1)}\n" + "\n".join(lines))

    def __reduce__(self) -> tuple[type, tuple[str, tuple[Problem, ...], tuple[Example, ...]]]:
        return type(self), (self.source, self.problems, self.examples)


def printable(value: object, limit: int = 80) -> str:
    """repr of a value from a file, cut."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
