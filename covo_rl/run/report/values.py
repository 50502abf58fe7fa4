"""Values of files that a model, a data row or anybody wrote, as a page may show them; and the notes on them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from covo_rl.data.terminal import LAYOUT
from covo_rl.types import visible

#: characters of one text in the page; the file has all of them
MAX_TEXT = 100_000
_DEPTH = 6

#: is told how far a report is: part, steps or sounds of it that are done, all of them
Progress = Callable[[str, int, int], object]


class Notes:
    """What is damaged, missing or left out: lines, and counted lines that begin with their number."""

    def __init__(self) -> None:
        self._lines: dict[str, None] = {}
        self._counts: Counter[str] = Counter()

    def add(self, line: str) -> None:
        self._lines[readable(line)] = None

    def count(self, what: str, number: int = 1) -> None:
        if number:
            self._counts[readable(what)] += number

    def lines(self) -> list[str]:
        return [*self._lines, *(f"{number:,} {what}" for what, number in self._counts.items())]


def readable(value: object) -> str:
    """Text in which what does not print is escaped, but for line breaks and tabs; of each character by itself."""
    text = value if isinstance(value, str) else str(value)
    return text if text.replace("\n", "").replace("\t", "").isprintable() else visible(text, LAYOUT)


def readable_start(text: str) -> str:
    """`readable`, of at most MAX_TEXT characters; what is longer is cut and says so at its end."""
    if len(text) <= MAX_TEXT:
        return readable(text)
    return f"{readable(text[:MAX_TEXT])} [... {len(text) - MAX_TEXT:,} more characters are in the file]"


def finite(value: object) -> float | None:
    """A number that JSON and every reader can hold, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if abs(value) < 1e300 else None


def json_ready(value: Any, depth: int = _DEPTH) -> Any:
    """A copy of what a JSON or YAML file holds: text readable, NaN null, what lies deeper than `depth` as text."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        return finite(value)
    if isinstance(value, str):
        return readable_start(value)
    if isinstance(value, (Mapping, list, tuple)) and not depth:
        return f"({len(value)} values, nested too deep to be shown)"
    if isinstance(value, Mapping):
        return {readable(name): json_ready(item, depth - 1) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item, depth - 1) for item in value]
    return readable(value)  # a date of YAML


def mapping(value: object) -> Mapping[str, Any]:
    """The value where it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def texts(value: object) -> list[str]:
    """The texts of a list, readable; of anything else none."""
    return [readable(item) for item in value if isinstance(item, str)] if isinstance(value, (list, tuple)) else []


def compact(value: object) -> str:
    """A value of a row as text: numbers as they are, lists and mappings as JSON without quotes, nothing for None."""
    if value is None or isinstance(value, str):
        return readable_start(value or "")
    text = value if isinstance(value, (int, float)) else json.dumps(json_ready(value), ensure_ascii=False)
    return readable_start(str(text).replace('"', ""))
