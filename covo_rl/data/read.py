"""Rows of a file as dictionaries: JSON, JSONL, parquet, a datasets folder, a folder of parquet shards, the hub."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from covo_rl.data.files import json_values
from covo_rl.types import Example, UserError, visible

Row = dict[str, Any]
#: So many problems are spelled out in one message.
SHOWN = 50
_LISTS = ("data", "rows", "questions", "examples")


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
        raise _broken(name, f"no such file or folder (looked in {Path.cwd()})")
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
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if _looks_like_lines(text):
            return _lines(path, text)
        raise _broken(path, f"not valid JSON: {error}; is it half-written?") from error
    lists = [content]
    if isinstance(content, dict):  # the only one of its fields that is a list of rows
        lists = [content[name] for name in _LISTS if isinstance(content.get(name), list)]
    if len(lists) != 1 or not isinstance(lists[0], list):
        expected = f"a list of rows is expected, or an object with one of {', '.join(_LISTS)}"
        raise _broken(path, f"{expected}; got {printable(content)}")
    return lists[0]


def _looks_like_lines(text: str) -> bool:
    """Without a telling suffix: JSONL starts with a whole object on its first line and has more lines."""
    first, _, rest = text.lstrip().partition("\n")
    try:
        return isinstance(json.loads(first), dict) and bool(rest.strip())
    except (ValueError, RecursionError):
        return False


def _lines(path: Path, text: str) -> list[Row]:
    # Not splitlines(): JSON strings may hold U+2028 and its kin.
    lines = list(json_values(text.split("\n")))
    if problems := [
        Problem(f"line {number}", f"not valid JSON: {error}; it starts {printable(line, 60)}")
        for number, line, _, error in lines
        if error
    ]:
        raise DataError(str(path), problems)
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
        # Audio stays {path, bytes}: datasets itself decodes with torchcodec only.
        return dataset.to_list()
    if (path / "metadata.jsonl").is_file():
        return _file(path / "metadata.jsonl")
    shards = sorted(path.rglob("*.parquet"))
    if not shards:
        raise _broken(path, "a folder needs a saved dataset (state.json), metadata.jsonl, or parquet files")
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
