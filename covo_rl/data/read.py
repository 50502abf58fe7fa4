"""Rows of a JSON file as dictionaries, and what everything that reads rows says of them."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from covo_rl.data.files import json_values
from covo_rl.types import Example, UserError, visible

Row = dict[str, Any]
#: So many problems are spelled out in one message.
SHOWN = 50
_LISTS = ("data", "rows", "questions", "examples")
_URL = re.compile(r"\s*(?:[a-z][a-z0-9+.-]+:/|data:|www\.)", re.IGNORECASE)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one row. `row_id` is its id, or `row N` (from 1) where it has none."""

    row_id: str
    what: str

    def __str__(self) -> str:
        return visible(f"{self.row_id}: {self.what}")


@dataclass(eq=False)
class DataError(UserError, ValueError):
    """Every problem of a data file, with row ids. `problems` has them all, the message the first 50.

    `examples` are the rows that could be read nevertheless, for looking at them further; none where no row could.
    """

    source: str
    problems: Sequence[Problem]
    examples: Sequence[Example] = ()

    def __str__(self) -> str:
        count, shown = len(self.problems), self.problems[:SHOWN]
        lines = [f"{self.source}: {count} problem{'s' * (count != 1)}", *(f"  {problem}" for problem in shown)]
        if count > SHOWN:
            lines.append(f"  ... and {count - SHOWN} more")
        return "\n".join(lines)


class DataNote(UserWarning):
    """What is worth knowing about rows that can be used."""


@contextmanager
def data_notes() -> Iterator[list[str]]:
    """What `load_examples` warns of meanwhile, for a command to say in its own place; other warnings are shown."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always", DataNote)
        try:
            yield notes
        finally:
            notes += [str(record.message) for record in records if issubclass(record.category, DataNote)]
    for record in records:
        if not issubclass(record.category, DataNote):
            warnings.showwarning(record.message, record.category, record.filename, record.lineno)


def printable(value: object, limit: int = 80) -> str:
    """repr of a value from a file, cut."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first names and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def is_url(reference: str) -> bool:
    """Whether a reference names something to be fetched (`https://`, `s3://`, `file://`, `data:`) and no path."""
    return "://" in reference or _URL.match(reference) is not None


def broken(source: str | Path, what: str) -> DataError:
    return DataError(str(source), [Problem("file", what)])


def read_text(path: Path, hint: str) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
        DataError: it is in another encoding, or cannot be read.
    """
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        is_utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        what = "but UTF-16: save it as UTF-8" if is_utf16 else f"{error}; save it as UTF-8 if it is text"
        raise broken(path, f"not UTF-8 text{', ' if is_utf16 else ': '}{what}; {hint}") from error
    except OSError as error:
        raise broken(path, f"cannot be read: {error}") from error


def json_rows(path: Path) -> list[Row]:
    """The rows of a JSON or JSON lines file, which its suffix or its start tells.

    Raises:
        DataError: not UTF-8 or damaged, no list of rows; every damaged line is named.
    """
    text = read_text(path, "JSON, JSONL, CSV, TSV and parquet are read")
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return _lines(path, text)
    try:
        content = _parse(text)
    except (ValueError, RecursionError) as error:
        if _looks_like_lines(text):
            return _lines(path, text)
        if path.suffix.lower() not in (".json", ".jsonl", ".ndjson"):
            what = f"a file that ends in {path.suffix!r} is read as JSON, which it is not: {error}"
            raise broken(path, f"{what}; .json, .jsonl, .csv, .tsv and .parquet are read") from error
        raise broken(path, f"not valid JSON: {error}; is it half-written?") from error
    lists = [content]
    if isinstance(content, dict):  # the only one of its fields that is a list of rows
        lists = [content[name] for name in _LISTS if isinstance(content.get(name), list)]
    if len(lists) != 1 or not isinstance(lists[0], list):
        expected = f"a list of rows is expected, or an object with one of {', '.join(_LISTS)}"
        raise broken(path, f"{expected}; got {printable(content)}")
    outer = content if isinstance(content, dict) else {}
    faults = [("file", f"the key {printable(outer.key)} occurs twice")] if isinstance(outer, _Repeated) else []
    faults += [("file", what) for name in outer if outer[name] is not lists[0] for what in _faults({name: outer[name]})]
    faults += [(row_name(number, row), what) for number, row in enumerate(lists[0], 1) for what in _faults(row)]
    if faults:
        raise DataError(str(path), [Problem(*fault) for fault in faults])
    return lists[0]


class _Constant(str):
    """NaN or an infinity, which Python writes into JSON and JSON does not have."""


class _Repeated(dict):
    """An object with a key that occurs twice, of which Python would take the last."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)


def _parse(text: str) -> Any:
    """JSON whose faults `_faults` finds in their rows."""

    def of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        return content if len(content) == len(pairs) else _Repeated(pairs)

    return json.loads(text, parse_constant=_Constant, object_pairs_hook=of_pairs)


def _faults(value: Any) -> Iterator[str]:
    """What is no JSON in a parsed value, and where in it."""
    stack = [("", value)]
    while stack:
        where, item = stack.pop()
        if isinstance(item, _Repeated):
            yield f"{where}the key {printable(item.key)} occurs twice"
        if isinstance(item, _Constant):
            yield f"{where}it holds {item}, which is no JSON; write null or the text"
        elif isinstance(item, (dict, list)):
            parts = reversed(item.items() if isinstance(item, dict) else [(None, part) for part in item])
            stack += [
                (where if name is None else f"{where}{printable(name, 40)}: ", part)
                for name, part in parts
                if isinstance(part, (dict, list, _Constant))
            ]


def row_name(number: int, row: Any) -> str:
    """`row 3`, with its id where it has one."""
    name = row.get("id") if isinstance(row, dict) else None
    return f"row {number}" + (f" (id {printable(name, 40)})" if name is not None else "")


def _looks_like_lines(text: str) -> bool:
    """Without a telling suffix: JSONL starts with a whole object on its first line and has more lines."""
    first, _, rest = text.lstrip().partition("\n")
    try:
        return isinstance(json.loads(first), dict) and bool(rest.strip())
    except (ValueError, RecursionError):
        return False


def checked_lines(lines: Iterable[str | bytes]) -> Iterator[tuple[int, Any, list[str]]]:
    """(line number, value, what is wrong with it) of every JSON line that is not blank."""
    for number, line, value, error in json_values(lines, _parse):
        faults = [f"not valid JSON: {error}; it starts {printable(line, 60)}"] if error else [*_faults(value)]
        yield number, value, faults


def _lines(path: Path, text: str) -> list[Row]:
    # Not splitlines(): JSON strings may hold U+2028 and its kin.
    lines = list(checked_lines(text.split("\n")))
    if problems := [Problem(f"line {number}", what) for number, _, faults in lines for what in faults]:
        raise DataError(str(path), problems)
    return [value for _, value, _ in lines]
