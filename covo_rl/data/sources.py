"""Rows of any source as dictionaries: files, folders of tables, a datasets folder, the hub, rows in memory."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from covo_rl.data.memory import IN_MEMORY, dataset_rows, memory_rows
from covo_rl.data.read import DataError, Problem, Row, broken, is_url, json_rows, printable
from covo_rl.resolve import meant

if TYPE_CHECKING:
    from covo_rl.data.memory import Source

#: The end of an Arrow stream, and a numbered piece of a table.
_ARROW_END, _SHARD = b"\xff\xff\xff\xff\0\0\0\0", re.compile(r"(.+)-(\d+)-of-(\d+)\.parquet")


def source_name(source: Source) -> str:
    """What messages call the source."""
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else IN_MEMORY


def read_rows(source: Source) -> list[Row]:
    """All rows of `source`: a file, a folder, `hf:NAME:SPLIT` for the hub (fetched only when so named), or in memory.

    Raises:
        DataError: it is missing, of an unknown kind, damaged, or rows are not objects; every damaged line is named.
    """
    name = source_name(source)
    if not isinstance(source, (str, os.PathLike)):
        rows = memory_rows(source)
    elif name.startswith("hf:"):
        rows = _hub(name)
    elif os.path.isdir(path := Path(source)):
        rows = _folder(path)
    elif os.path.isfile(path):
        rows = _parquet(path) if path.suffix == ".parquet" else json_rows(path)
    else:
        fetch = "nothing is fetched from a URL: download it, or name a set of the hub as hf:OWNER/NAME:SPLIT; "
        raise broken(name, f"{fetch * is_url(name)}no such file or folder (looked in {Path.cwd()}){meant(path)}")
    others = {f"row {number}": row for number, row in enumerate(rows, start=1) if not isinstance(row, dict)}
    if others:
        what = "is {}, not an object with fields"
        raise DataError(name, [Problem(row, what.format(printable(value))) for row, value in others.items()])
    if not rows:
        raise broken(name, "it holds no rows")
    return rows


def _parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path).read().to_pylist()
    # ArrowException covers damage of every kind; OSError the file, ValueError values that Python cannot hold.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise broken(path, f"not a readable parquet file: {error}") from error


def _folder(path: Path) -> list[Row]:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
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
    if (path / "metadata.jsonl").is_file():
        return json_rows(path / "metadata.jsonl")
    shards = sorted(path.rglob("*.parquet"))
    if not shards:
        raise broken(path, "a folder needs a saved dataset (state.json), metadata.jsonl, or parquet files")
    matches = filter(None, (_SHARD.fullmatch(shard.name) for shard in shards))
    names = {(match[1], int(match[2]), int(match[3])) for match in matches}
    for stem, _, count in names:
        if missing := [n for n in range(count) if (stem, n, count) not in names]:
            raise broken(path, f"of the {count} shards of {stem} these are missing: {', '.join(map(str, missing))}")
    return [row for shard in shards for row in _parquet(shard)]


def _hub(name: str) -> list[Row]:
    import datasets

    parts = re.split(r":(?![^\[]*\])", name.removeprefix("hf:"))  # not at the colon of a slice, `train[:100]`
    if len(parts) not in (2, 3) or not all(parts):
        raise broken(name, "a data set of the hub is named hf:OWNER/NAME:SPLIT or hf:OWNER/NAME:CONFIG:SPLIT")
    try:
        dataset = datasets.load_dataset(*parts[:-1], split=parts[-1])
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise broken(name, f"cannot be loaded: {error}") from error
    return dataset_rows(dataset, name)
