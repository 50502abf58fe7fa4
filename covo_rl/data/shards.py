"""Rows of JSONL and parquet files, each read when it is asked for: what stays in memory is where it stands.

files = ShardedRows("corpus/*.jsonl")
for where, row, faults in files.scan(): ...      # one pass over all of them, which also finds their places
files[123_456]                                   # the same row, or an error if its file is another now
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from covo_rl.data.held import HeldFiles
from covo_rl.data.memory import name_labels
from covo_rl.data.read import DataError, Row, broken, checked_lines, printable
from covo_rl.data.sources import label_names
from covo_rl.resolve import meant

SUFFIXES = (".jsonl", ".ndjson", ".parquet")
#: uncompressed bytes that a row group may have
GROUP_BYTES = 256 * 2**20
_BOM = b"\xef\xbb\xbf"
_CHANGED = "it has changed since its rows were read and checked; put the old file back, or start anew"

#: (how messages name it, the row or None, what is wrong with it)
Scanned = tuple[str, Row | None, list[str]]


def shard_files(data: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files of one or several names: a file, a folder, or a pattern (`corpus/*.jsonl`); each in sorted order.

    Raises:
        DataError: there is none, or one of another kind.
    """
    files: dict[Path, None] = {}
    for name in [data] if isinstance(data, (str, os.PathLike)) else data:
        path = Path(name)
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
            what = f"the folder holds no {', '.join(SUFFIXES)} files"
        elif path.is_file():
            found, what = [path], ""
        else:
            found = sorted(map(Path, glob.glob(str(name), recursive=True)))
            what = f"no such file, folder or pattern (looked in {Path.cwd()}){meant(path)}"
        if not found:
            raise broken(str(name), what)
        files |= dict.fromkeys(found)
    if others := [file for file in files if file.suffix.lower() not in SUFFIXES]:
        kinds = "rows read one at a time are JSON lines (.jsonl) or parquet"
        raise broken(others[0], f"{kinds}; a table of another kind is converted by `covo-rl data convert`")
    if not files:
        raise broken(str(data), "it names no files")
    return list(files)


def row_digest(content: bytes) -> int:
    """64 bits that tell one row from another."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


class _Shard(Protocol):
    """One file: `scan` it once, then rows by their place."""

    path: Path

    def scan(self) -> Iterator[tuple[int, Any, list[str], int]]: ...
    def row(self, place: int, expected: int) -> tuple[Row, int]: ...


class ShardedRows:
    """Rows of several files by their number over all of them. `scan` must have run to its end.

    Held for each row: where it stands and 64 bits of its content, so that a file that changes later is noticed.
    """

    def __init__(self, data: str | Path | Sequence[str | Path]) -> None:
        self.files = shard_files(data)
        self.name = str(data) if isinstance(data, (str, os.PathLike)) else ", ".join(map(str, data))
        held = HeldFiles()
        self._shards: list[_Shard] = [
            _ParquetShard(path, held) if path.suffix.lower() == ".parquet" else _LineShard(path, held)
            for path in self.files
        ]
        self._versions: list[tuple[int, int]] = []
        self._starts = np.zeros(1, dtype=np.int64)
        self._digests = np.zeros(0, dtype=np.uint64)
        self.fingerprint = ""

    def scan(self) -> Iterator[Scanned]:
        """Every row of every file, in order.

        Raises:
            DataError: a file that cannot be read, or that is written meanwhile.
        """
        digests, starts = array("Q"), [0]
        self._versions = [_version(path) for path in self.files]
        for shard, version in zip(self._shards, self._versions, strict=True):
            for number, row, faults, digest in shard.scan():
                digests.append(digest)
                if not faults and not isinstance(row, dict):
                    faults = [f"is {printable(row)}, not an object with fields"]
                yield self._named(number, shard.path), row if isinstance(row, dict) else None, faults
            starts.append(len(digests))
            if _version(shard.path) != version:
                raise broken(shard.path, "it was written while its rows were read")
        self._starts, self._digests = np.array(starts), np.array(digests, dtype=np.uint64)
        self.fingerprint = hashlib.sha256(self._digests.tobytes()).hexdigest()[:16]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def place(self, index: int) -> tuple[int, int]:
        """(file, row of it from 0)."""
        shard = int(np.searchsorted(self._starts, index, "right")) - 1
        return shard, int(index - self._starts[shard])

    def where(self, index: int) -> str:
        """How messages name a row: `7 of part-3.jsonl`, or its number alone where there is one file."""
        shard, place = self.place(index)
        return self._named(place + 1, self.files[shard])

    def _named(self, number: int, path: Path) -> str:
        return f"{number} of {path.name}" if len(self.files) > 1 else str(number)

    def __getitem__(self, index: int) -> Row:
        """A row, as it was when it was scanned.

        Raises:
            DataError: its file is another now.
        """
        shard, place = self.place(index)
        path = self.files[shard]
        if _version(path) != self._versions[shard]:
            raise broken(path, _CHANGED)
        expected = int(self._digests[index])
        row, digest = self._shards[shard].row(place, expected)
        if digest != expected:
            raise broken(path, f"row {place + 1}: {_CHANGED}")
        return row


def _version(path: Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise broken(path, f"cannot be read: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns


def _opened(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise broken(path, f"cannot be read: {error.strerror}") from error


class _LineShard:
    """JSON lines: offset and length of each that is not blank."""

    def __init__(self, path: Path, held: HeldFiles) -> None:
        self.path, self.held = path, held
        self.offsets, self.lengths = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def scan(self) -> Iterator[tuple[int, Any, list[str], int]]:
        offsets, lengths = array("q"), array("q")
        last: list[Any] = [0, b""]

        def lines(file: BinaryIO) -> Iterator[bytes]:
            offset = len(_BOM) * (file.read(len(_BOM)) == _BOM)
            file.seek(offset)
            for line in file:
                last[:] = offset, line
                yield line
                offset += len(line)

        with _opened(self.path) as file:
            for number, row, faults in checked_lines(lines(file)):
                offsets.append(last[0])
                lengths.append(len(last[1]))
                yield number, row, faults, row_digest(last[1])
        self.offsets, self.lengths = np.array(offsets, np.int64), np.array(lengths, np.int64)

    def row(self, place: int, expected: int) -> tuple[Row, int]:
        file = self.held.file(self.path, _opened)
        file.seek(int(self.offsets[place]))
        line = file.read(int(self.lengths[place]))
        digest = row_digest(line)
        # another line is refused by its digest; this one was parsed before, with everything that can be wrong
        return (json.loads(line) if digest == expected else {}), digest


class _ParquetShard:
    """Parquet: one row group at a time, of which the last ones are held."""

    def __init__(self, path: Path, held: HeldFiles) -> None:
        self.path, self.held = path, held
        self.starts = np.zeros(1, np.int64)
        self.labels: dict[str, list[str]] = {}

    def scan(self) -> Iterator[tuple[int, Any, list[str], int]]:
        file = self._file()
        sizes = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        self.labels = label_names(file.schema_arrow.metadata)
        self.starts = np.cumsum([0, *(size.num_rows for size in sizes)])
        large = max((size.total_byte_size for size in sizes), default=0)
        if large > GROUP_BYTES:
            what = (
                f"a row group of {large / 2**20:.0f} MB must be read for one row of it; {GROUP_BYTES >> 20} MB is most"
            )
            raise broken(self.path, f"{what}: write it again with row_group_size=1000")
        number = 0
        for group in range(len(sizes)):
            for row in self._rows(self._table(group)):
                number += 1
                faults = self._named(row)
                yield number, row, faults, _values_digest(row)

    def row(self, place: int, expected: int) -> tuple[Row, int]:
        group = int(np.searchsorted(self.starts, place, "right")) - 1
        table = self.held.group(self.path, group, lambda: self._table(group))
        row = next(iter(self._rows(table.slice(place - int(self.starts[group]), 1))))
        self._named(row)
        return row, _values_digest(row)

    def _named(self, row: Row) -> list[str]:
        """Names in the place of the numbers of labels; what is wrong with them."""
        try:
            name_labels([row], {name: names for name, names in self.labels.items() if name in row}, str(self.path))
        except DataError as error:
            return [problem.what for problem in error.problems]
        return []

    def _file(self) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            return self.held.file(self.path, pyarrow.parquet.ParquetFile)
        except (pyarrow.ArrowException, OSError) as error:
            raise broken(self.path, f"not a readable parquet file: {error}") from error

    def _table(self, group: int) -> Any:
        import pyarrow

        try:
            return self._file().read_row_group(group)
        # ArrowException covers damage of every kind, OSError the file
        except (pyarrow.ArrowException, OSError) as error:
            raise broken(self.path, f"row group {group} cannot be read: {error}") from error

    def _rows(self, table: Any) -> Iterable[Row]:
        try:
            for batch in table.to_batches(max_chunksize=256):
                yield from batch.to_pylist()
        except (ValueError, OverflowError) as error:  # values that Python cannot hold
            raise broken(self.path, f"not a readable parquet file: {error}") from error


def _values_digest(row: Row) -> int:
    return row_digest(repr(row).encode("utf-8", "surrogatepass"))
