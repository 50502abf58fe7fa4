"""Rows of a file as dictionaries: JSON, JSONL, parquet, a datasets folder, a folder of parquet shards, the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from covo_rl.data.problems import DataError, Problem, printable

Row = dict[str, Any]
_LISTS = ("data", "rows", "questions", "examples")
_LINES = (".jsonl", ".ndjson")


def read_rows(source: str | Path) -> list[Row]:
    """All rows of `source`: a file, a folder, or `hf:NAME:SPLIT` for the hub (fetched only when so named).

    Raises:
        DataError: it is missing, of an unknown kind, damaged, or rows are not objects; every damaged line is named.
    """
    name = str(source)
    if name.startswith("hf:"):
        return _hub(name)
    path = Path(source)
    try:
        found = "folder" if path.is_dir() else "file" if path.is_file() else ""
    except (OSError, ValueError):
        found = ""
    if not found:
        raise _broken(name, f"no such file or folder (looked in {Path.cwd()})")
    rows = _folder(path) if found == "folder" else _file(path)
    wrong = [
        Problem(f"row {number}", f"is {printable(row)}, not an object with fields")
        for number, row in enumerate(rows, start=1)
        if not isinstance(row, dict)
    ]
    if wrong:
        raise DataError(name, wrong)
    if not rows:
        raise _broken(name, "it holds no rows")
    return rows


def _broken(source: str, what: str) -> DataError:
    return DataError(source, [Problem("file", what)])


def _file(path: Path) -> list[Row]:
    if path.suffix == ".parquet":
        return _parquet(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _broken(str(path), f"not UTF-8 text: {error}; JSON, JSONL and parquet are read") from error
    except OSError as error:
        raise _broken(str(path), f"cannot be read: {error}") from error
    lines = path.suffix in _LINES or (path.suffix != ".json" and _is_lines(text))
    return list(_json_lines(path, text)) if lines else _json(path, text)


def _is_lines(text: str) -> bool:
    """Without a telling suffix: JSONL starts with a whole object on its first line and has more lines."""
    first, _, rest = text.lstrip().partition("\n")
    try:
        return isinstance(json.loads(first), dict) and bool(rest.strip())
    except (ValueError, RecursionError):
        return False


def _json(path: Path, text: str) -> list[Row]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if _is_lines(text):
            return list(_json_lines(path, text))
        raise _broken(str(path), f"not valid JSON: {error}; is it half-written?") from error
    if isinstance(content, list):
        return content
    if isinstance(content, dict):
        lists = [content[name] for name in _LISTS if isinstance(content.get(name), list)]
        if len(lists) == 1:
            return lists[0]
    raise _broken(
        str(path), f"a list of rows is expected, or an object with one of {', '.join(_LISTS)}; got {printable(content)}"
    )


def _json_lines(path: Path, text: str) -> Iterator[Row]:
    # Not splitlines(): JSON strings may hold U+2028 and its kin.
    wrong: list[Problem] = []
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            wrong.append(Problem(f"line {number}", f"not valid JSON: {error}; it starts {printable(line, 60)}"))
    if wrong:
        raise DataError(str(path), wrong)
    yield from rows


def _parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path).read().to_pylist()
    # ArrowException covers damage of every kind; OSError the file, ValueError values that Python cannot hold.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise _broken(str(path), f"not a readable parquet file: {error}") from error


def _folder(path: Path) -> list[Row]:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _saved(path)
    if (path / "metadata.jsonl").is_file():
        return _file(path / "metadata.jsonl")
    shards = sorted(path.rglob("*.parquet"))
    if not shards:
        raise _broken(str(path), "a folder needs a saved dataset (state.json), metadata.jsonl, or parquet files")
    return [row for shard in shards for row in _parquet(shard)]


def _saved(path: Path) -> list[Row]:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _broken(str(path), f"not a readable datasets folder: {error}") from error
    if isinstance(dataset, datasets.DatasetDict):
        raise _broken(str(path), f"it holds several splits; name one: {', '.join(str(path / str(n)) for n in dataset)}")
    return _undecoded(dataset)


def _hub(name: str) -> list[Row]:
    import datasets

    parts = name.removeprefix("hf:").split(":")
    if len(parts) != 2 or not all(parts):
        raise _broken(name, "a data set of the hub is named hf:OWNER/NAME:SPLIT")
    try:
        return _undecoded(datasets.load_dataset(parts[0], split=parts[1]))
    except (OSError, ValueError) as error:
        raise _broken(name, f"cannot be loaded: {error}") from error


def _undecoded(dataset: Any) -> list[Row]:
    """Rows with audio as {path, bytes}: datasets itself decodes with torchcodec only."""
    import datasets

    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Audio):
            dataset = dataset.cast_column(column, datasets.Audio(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Audio):
            dataset = dataset.cast_column(column, datasets.List(datasets.Audio(decode=False)))
    return dataset.to_list()
