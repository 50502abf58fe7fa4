"""Rows of any source as dictionaries: files, folders of tables, a datasets folder, the hub, rows in memory."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covo_rl.data.delimited import SUFFIXES, delimited_rows
from covo_rl.data.memory import IN_MEMORY, dataset_rows, memory_rows, name_labels
from covo_rl.data.read import DataError, Problem, Row, broken, is_url, json_rows, printable, row_name
from covo_rl.data.schemas import SCHEMAS
from covo_rl.resolve import meant

if TYPE_CHECKING:
    from covo_rl.data.memory import Source

#: The end of an Arrow stream, and a numbered piece of a table.
_ARROW_END, _SHARD = b"\xff\xff\xff\xff\0\0\0\0", re.compile(r"(.+)-(\d+)-of-(\d+)\.parquet")
#: What `datasets` calls the table of an audiofolder, and the words by which it tells splits.
_METADATA = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet")
_SPLIT = re.compile(
    r"(train|training|test|testing|eval|evaluation|valid|validation|val|dev)(?![A-Za-z])", re.IGNORECASE
)
_SPLITS = {"training": "train", "testing": "test", "eval": "test", "evaluation": "test"} | dict.fromkeys(
    ("valid", "val", "dev"), "validation"
)


def source_name(source: Source) -> str:
    """What messages call the source."""
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else IN_MEMORY


def read_rows(source: Source, columns: Mapping[str, str] | None = None) -> list[Row]:
    """All rows of `source`: a file, a folder, `hf:NAME:SPLIT` for the hub (fetched only when so named), or in memory.

    `columns` maps fields to their columns, for the cells of a table of texts.

    Raises:
        DataError: it is missing, of an unknown kind, damaged, or rows are not objects; every damaged line is named.
    """
    name, columns = source_name(source), columns or {}
    if not isinstance(source, (str, os.PathLike)):
        rows = memory_rows(source)
    elif name.startswith("hf:"):
        rows = _hub(name)
    elif os.path.isdir(source):
        rows = _folder(Path(source), columns)
    elif os.path.isfile(source):
        rows = _file(Path(source), columns)
    else:
        fetch = "nothing is fetched from a URL: download it, or name a set of the hub as hf:OWNER/NAME:SPLIT; "
        raise broken(name, f"{fetch * is_url(name)}no such file or folder (looked in {Path.cwd()}){meant(name)}")
    others = {f"row {number}": row for number, row in enumerate(rows, start=1) if not isinstance(row, dict)}
    if others:
        what = "is {}, not an object with fields"
        raise DataError(name, [Problem(row, what.format(printable(value))) for row, value in others.items()])
    if not rows:
        raise broken(name, "it holds no rows")
    return rows


def _file(path: Path, columns: Mapping[str, str]) -> list[Row]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path)
    return delimited_rows(path, columns) if suffix in SUFFIXES else json_rows(path)


def _parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
        rows = table.to_pylist()
    # ArrowException covers damage of every kind; OSError the file, ValueError values that Python cannot hold.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise broken(path, f"not a readable parquet file: {error}") from error
    name_labels(rows, label_names(table.schema.metadata), str(path))
    return rows


def label_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """The names of the columns that `datasets` wrote as labels, numbers from 0."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {name: [*map(str, kind["names"])] for name, kind in features.items() if kind["_type"] == "ClassLabel"}
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}


# -- folders ---------------------------------------------------------------------------------------------------------


def _folder(path: Path, columns: Mapping[str, str]) -> list[Row]:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _saved(path)
    if files := [path / name for name in _METADATA if (path / name).is_file()]:
        return _metadata(path, files[0], columns)
    shards = sorted(path.rglob("*.parquet"))
    if not shards:
        below = {file.parent for name in _METADATA for file in path.rglob(name)}
        if below:
            raise broken(path, f"its metadata lies in {_listed(below)}; name one folder")
        raise broken(path, "a folder needs a saved dataset (state.json), metadata.csv, metadata.jsonl or parquet files")
    splits: dict[str, Path] = {}
    for shard in shards:
        for part in shard.relative_to(path).parts:
            if match := _SPLIT.match(part):
                splits.setdefault(_split_name(match), shard)
    if len(splits) > 1:
        what = f"it holds several splits ({', '.join(sorted(splits))}); name the files or the folder of one"
        raise broken(path, f"{what}, e.g. {splits[min(splits)]}, or hf:{path}:{min(splits)}")
    matches = filter(None, (_SHARD.fullmatch(shard.name) for shard in shards))
    names = {(match[1], int(match[2]), int(match[3])) for match in matches}
    for stem, _, count in names:
        if missing := [n for n in range(count) if (stem, n, count) not in names]:
            raise broken(path, f"of the {count} shards of {stem} these are missing: {', '.join(map(str, missing))}")
    return [row for shard in shards for row in _parquet(shard)]


def _split_name(match: re.Match[str]) -> str:
    """`train`, `test` or `validation`."""
    return _SPLITS.get(match[1].lower(), match[1].lower())


def _saved(path: Path) -> list[Row]:
    """A folder of `save_to_disk`."""
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise broken(path, f"not a readable datasets folder: {error}") from error
    if isinstance(dataset, datasets.DatasetDict):
        raise broken(path, f"it holds several splits; name one: {', '.join(str(path / str(n)) for n in dataset)}")
    # a cut stream of whole batches is read without a word
    for name in {entry["filename"] for entry in dataset.cache_files}:
        with open(name, "rb") as file:
            file.seek(-len(_ARROW_END), os.SEEK_END)
            is_whole = file.read() == _ARROW_END
        if not is_whole:
            raise broken(path, f"{name} is cut: it lacks the end of its stream; write or copy the folder again")
    return dataset_rows(dataset, str(path))


def _listed(folders: Iterable[Path]) -> str:
    return ", ".join(map(str, sorted(folders)))


def _metadata(path: Path, file: Path, columns: Mapping[str, str]) -> list[Row]:
    """An audiofolder: the rows of its metadata, whose `file_name` or `*_file_name` lies beside it.

    Raises:
        DataError: several files of metadata, here or below; rows without a file.
    """
    others = [other for name in _METADATA for other in path.rglob(name) if other != file]
    if others:
        raise broken(path, f"it has several files of metadata: {_listed([file, *others])}; name one, or its folder")
    rows, problems = _file(file, columns), []
    splits: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        try:
            reference = _file_of(row, columns) if isinstance(row, dict) else None
        except ValueError as error:
            problems.append(Problem(row_name(number, row), str(error)))
            continue
        folders = str(reference).split("/")[:-1]
        if match := next(filter(None, map(_SPLIT.match, folders)), None):
            splits.setdefault(_split_name(match), str(reference))
    if problems:
        raise DataError(str(path), problems)
    if len(splits) > 1:
        what = f"its files are of several splits ({', '.join(splits[name] for name in sorted(splits))})"
        raise broken(path, f"{what}; write a table for each, or name the file to read all of them as one set: {file}")
    return rows


def _file_of(row: Row, columns: Mapping[str, str]) -> Any:
    """What a row of metadata names as its file, which becomes its `file_name`; None where it names none.

    Raises:
        ValueError: it names none in its column, or another field would be taken for the sound.
    """
    if "audio" in columns:
        return row.get(columns["audio"])
    names = ["file_name"] if "file_name" in row else [name for name in row if str(name).endswith("_file_name")]
    if not names:
        return None
    before = takewhile(lambda name: name != "file_name", SCHEMAS["covo"].audio)  # read before it
    names += [name for name in before if row.get(name) not in (None, row[names[0]])]
    if len(names) > 1:
        raise ValueError(f"its sound may be in {', '.join(names)}; say which: --columns audio={names[0]}")
    if not row[names[0]]:
        raise ValueError(f"its {names[0]} is empty")
    row["file_name"] = row[names[0]]
    return row["file_name"]


def _hub(name: str) -> list[Row]:
    import datasets
    from datasets.exceptions import DatasetsError

    parts = re.split(r":(?![^\[]*\])", name.removeprefix("hf:"))  # not at the colon of a slice, `train[:100]`
    if len(parts) not in (2, 3) or not all(parts):
        raise broken(name, "a data set of the hub is named hf:OWNER/NAME:SPLIT or hf:OWNER/NAME:CONFIG:SPLIT")
    try:
        dataset = datasets.load_dataset(*parts[:-1], split=parts[-1])
    except (OSError, ValueError, DatasetsError) as error:
        raise broken(name, f"cannot be loaded: {error}") from error
    return dataset_rows(dataset, name)
