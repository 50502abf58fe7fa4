"""The fields of one row of an official file, each checked as it is taken.

RowFields(reader, row, place).text("prompt")    the value, or a problem "FILE, line 3: no prompt"
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

from covo_rl.data.folder import LONE_SURROGATE
from covo_rl.data.read import printable
from covo_rl.speech.listeners import MOST_SECONDS
from covo_rl.types import Clip

if TYPE_CHECKING:
    from covo_rl.evaluate.speech.reading import SetReader


def is_finite(value: Any) -> bool:
    """A number that a float holds, neither NaN nor infinite, and no truth value."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max


def is_time(value: Any) -> TypeGuard[float]:
    """Seconds from the beginning of a sound, which lasts a week at most."""
    return is_finite(value) and 0 <= value <= MOST_SECONDS


class RowFields:
    """The fields of one row as they are taken. What is wrong goes to the reader, and `failed` says so."""

    def __init__(self, reader: SetReader, values: Any, place: str, index: int = 0, above: RowFields | None = None):
        self.reader, self.place, self.index, self.above = reader, place, index, above
        self.failed = False
        self.values: Mapping[str, Any] = values if isinstance(values, Mapping) else {}
        if not isinstance(values, Mapping):
            self.wrong(f"expected an object, found {printable(values)}")

    def wrong(self, what: str) -> None:
        """Note a problem of this row."""
        self.reader.problems.append(f"{self.place}: {what}")
        row: RowFields | None = self
        while row is not None:
            row.failed, row = True, row.above

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def text(self, name: str) -> str:
        """A text, or a number as one; "" after a problem."""
        value = self.maybe(name)
        if value is None and not self.has(name):
            self.wrong(f"no {name}")
        return value or ""

    def maybe(self, name: str) -> str | None:
        """A text, or None where there is none."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, str) and not is_finite(value):
            self.wrong(f"{name} is {printable(value)}, not a text")
            return None
        if LONE_SURROGATE.search(str(value)):
            self.wrong(f"{name} {printable(value)} has a lone surrogate: not valid Unicode")
            return None
        return str(value)

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts; () where there is none."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, (list, tuple)):
            self.wrong(f"{name} is {printable(value)}, not a list")
            return ()
        items = list(value or ())
        if not_texts := [item for item in items if not isinstance(item, str)]:
            self.wrong(f"{name} holds {printable(not_texts[0])}, not a text")
        return tuple(map(str, items))

    def number(self, name: str) -> float | None:
        """A finite number, or None where there is none."""
        value = self.values.get(name)
        if value is None:
            return None
        if not is_finite(value):
            self.wrong(f"{name} is {printable(value)}, not a number")
            return None
        return float(value)

    def parts(self, name: str, *, required: bool = True) -> list[RowFields]:
        """The objects of a list."""
        value = self.values.get(name)
        if value is None and not required:
            return []
        if not isinstance(value, list) or not value:
            self.wrong(f"{name} is {printable(value)}, not a list of objects" if value is not None else f"no {name}")
            return []
        return [RowFields(self.reader, item, f"{self.place}, {name}[{i}]", above=self) for i, item in enumerate(value)]

    def clip(self, name: str, *others: str) -> tuple[Clip, ...]:
        """The clip whose path the field holds; `others` are further paths at which it may lie. () after a problem."""
        reference = self.values.get(name)
        if not isinstance(reference, str):
            self.wrong(f"no {name}" if reference is None else f"{name} is {printable(reference)}, not a path")
            return ()
        return self._clip(name, others or (reference,))

    def maybe_clip(self, name: str) -> tuple[Clip, ...]:
        return self.clip(name) if self.has(name) else ()

    def clips(self, name: str) -> tuple[Clip, ...]:
        """One path or a list of them; at least one."""
        if not isinstance(self.values.get(name), (list, tuple)):
            return self.clip(name)
        references = self.texts(name)
        if not references and not self.failed:
            self.wrong(f"{name} is an empty list")
        return tuple(clip for reference in references for clip in self._clip(name, (reference,)))

    def _clip(self, name: str, references: Sequence[str]) -> tuple[Clip, ...]:
        try:
            return (Clip(path=self.reader.audio_path(references)),)
        except ValueError as error:
            self.wrong(f"{name}: {error}")
            return ()
