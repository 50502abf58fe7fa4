"""Rows of a file as dictionaries: JSON, JSONL, parquet, a datasets folder, a folder of parquet shards, the hub."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from covo_rl.data.files import json_values
from covo_rl.resolve import meant
from covo_rl.types import Example, UserError, visible

Row = dict[str, Any]
#: So many problems are spelled out in one message.
SHOWN = 50
_LISTS = ("data", "rows", "questions", "examples")
#: The end of an Arrow stream, and a numbered piece of a table.
_ARROW_END, _SHARD = b"\xff\xff\xff\xff\0\0\0\0", re.compile(r"(.+)-(\d+)-of-(\d+)\.parquet")
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


def read_rows(source: str | Path) -> list[Row]:
    """All rows of `source`: a file, a folder, or `hf:NAME:SPLIT` for the hub (fetched only when so named).

    Raises:
        DataError: it is missing, of an unknown kind, damaged, or rows are not objects; every damaged line is named.
    """
    name = str(source)
    if name.startswith("hf:"):
        return _hub(name)
    path = Path(source)
    if os.path.isdir(path):
        rows = _folder(path)
    elif os.path.isfile(path):
        rows = _file(path)
    else:
        fetch = "nothing is fetched from a URL: download it, or name a set of the hub as hf:OWNER/NAME:SPLIT; "
        raise _broken(name, f"{fetch * is_url(name)}no such file or folder (looked in {Path.cwd()}){meant(path)}")
    others = {f"row {number}": row for number, row in enumerate(rows, start=1) if not isinstance(row, dict)}
    if others:
        what = "is {}, not an object with fields"
        raise DataError(name, [Problem(row, what.format(printable(value))) for row, value in others.items()])
    if not rows:
        raise _broken(name, "it holds no rows")
    return rows


def _broken(source: str | Path, what: str) -> DataError:
    return DataError(str(source), [Problem("file", what)])


def _file(path: Path) -> list[Row]:
    if path.suffix == ".parquet":
        return _parquet(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _broken(path, f"not UTF-8 text: {error}; JSON, JSONL and parquet are read") from error
    except OSError as error:
        raise _broken(path, f"cannot be read: {error}") from error
    if path.suffix in (".jsonl", ".ndjson"):
        return _lines(path, text)
    try:
        content = _parse(text)
    except (ValueError, RecursionError) as error:
        if _looks_like_lines(text):
            return _lines(path, text)
        hint = "CSV is not read, write JSON lines" if path.suffix in (".csv", ".tsv") else "is it half-written?"
        raise _broken(path, f"not valid JSON: {error}; {hint}") from error
    lists = [content]
    if isinstance(content, dict):  # the only one of its fields that is a list of rows
        lists = [content[name] for name in _LISTS if isinstance(content.get(name), list)]
    if len(lists) != 1 or not isinstance(lists[0], list):
        expected = f"a list of rows is expected, or an object with one of {', '.join(_LISTS)}"
        raise _broken(path, f"{expected}; got {printable(content)}")
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


def _lines(path: Path, text: str) -> list[Row]:
    # Not splitlines(): JSON strings may hold U+2028 and its kin.
    lines = list(json_values(text.split("\n"), _parse))
    faults = [
        (number, what)
        for number, line, value, error in lines
        for what in ([f"not valid JSON: {error}; it starts {printable(line, 60)}"] if error else _faults(value))
    ]
    if faults:
        raise DataError(str(path), [Problem(f"line {number}", what) for number, what in faults])
    return [value for _, _, value, _ in lines]


def _parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path).read().to_pylist()
    # ArrowException covers damage of every kind; OSError the file, ValueError values that Python cannot hold.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise _broken(path, f"not a readable parquet file: {error}") from error


def _folder(path: Path) -> list[Row]:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        import datasets

        try:
            dataset = datasets.load_from_disk(str(path))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _broken(path, f"not a readable datasets folder: {error}") from error
        if isinstance(dataset, datasets.DatasetDict):
            raise _broken(path, f"it holds several splits; name one: {', '.join(str(path / str(n)) for n in dataset)}")
        # a cut stream of whole batches is read without a word
        for name in {entry["filename"] for entry in dataset.cache_files}:
            with open(name, "rb") as file:
                file.seek(-len(_ARROW_END), os.SEEK_END)
                is_whole = file.read() == _ARROW_END
            if not is_whole:
                raise _broken(path, f"{name} is cut: it lacks the end of its stream; write or copy the folder again")
        # Audio stays {path, bytes}: datasets itself decodes with torchcodec only.
        return dataset.to_list()
    if (path / "metadata.jsonl").is_file():
        return _file(path / "metadata.jsonl")
    shards = sorted(path.rglob("*.parquet"))
    if not shards:
        raise _broken(path, "a folder needs a saved dataset (state.json), metadata.jsonl, or parquet files")
    matches = filter(None, (_SHARD.fullmatch(shard.name) for shard in shards))
    names = {(match[1], int(match[2]), int(match[3])) for match in matches}
    for stem, _, count in names:
        if missing := [n for n in range(count) if (stem, n, count) not in names]:
            raise _broken(path, f"of the {count} shards of {stem} these are missing: {', '.join(map(str, missing))}")
    return [row for shard in shards for row in _parquet(shard)]


def _hub(name: str) -> list[Row]:
    import datasets

    parts = name.removeprefix("hf:").split(":")
    if len(parts) != 2 or not all(parts):
        raise _broken(name, "a data set of the hub is named hf:OWNER/NAME:SPLIT")
    try:
        return datasets.load_dataset(parts[0], split=parts[1]).to_list()
    except (OSError, ValueError) as error:
        raise _broken(name, f"cannot be loaded: {error}") from error
