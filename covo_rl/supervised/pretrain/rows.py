"""Rows of pre-training: read and checked once, held by their places, read again when a task draws them.

store = RowStore("corpus/*.jsonl", needs={"audio", "codes"}, codebook=16384)     # every problem, or none
store.units("document")[7]                                                       # SpeechRows that follow another
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from covo_rl.data.folder import AudioFolder
from covo_rl.data.load import audio_root
from covo_rl.data.read import DataError, Problem, Row, broken, printable
from covo_rl.data.shards import ShardedRows, row_digest
from covo_rl.models.text import unfit
from covo_rl.speech.rows import SAME_ID, SpeechRow, SpeechRowReader, named_row, recording_problems
from covo_rl.supervised.pretrain.dialogue_rows import DialogueRowReader

Kind = Literal["speech", "text", "dialogue", "stream"]
#: what one draw of a task takes -> the kind of its rows
KINDS: dict[str, Kind] = {
    "row": "speech", "document": "speech", "text": "text", "dialogue": "dialogue", "stream": "stream",
}  # fmt: skip
_NO_POSITION = -(2**62)


@dataclass(frozen=True)
class TextRow:
    """A text without speech."""

    id: str
    text: str


class UnitReader(Protocol):
    """Reads rows of one kind, as objects with an `id`, and notes what is wrong with them."""

    problems: list[Problem]

    def read(self, number: int | str, row: Row) -> Any: ...


class TextRowReader:
    """`id, text`; the other arguments are those of every reader, and texts need none of them."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.problems: list[Problem] = []

    def read(self, number: int | str, row: Row) -> TextRow:
        """A row, named `row {number}` where it has no id."""
        name, wrong = named_row(number, row)
        text = row.get("text")
        if not isinstance(text, str) or not text.strip():
            what = (
                "it has no text" if text is None or text == "" else f"its text is {printable(text)}, which says nothing"
            )
            wrong.append(what)
            text = ""
        elif why := unfit(text):
            wrong.append(f"its text {why}; remove it")
        self.problems += [Problem(name, what) for what in wrong]
        return TextRow(name, text)


#: kind -> its reader, made of (audio folder, needs, codebook, tokenizer); streams are no rows of a file
READERS: dict[Kind, Callable[..., UnitReader]] = {
    "speech": partial(SpeechRowReader, unique=False),
    "text": TextRowReader,
    "dialogue": DialogueRowReader,
}


class RowStore:
    """The rows of one data set, of which only the places are in memory. Making it reads and checks each of them.

    Args:
        data: a JSONL or parquet file, a folder of them, a pattern, or several of these.
        audio_dir: folder of the paths; default: that of the first file.
        kind: what the rows are; `needs`: what every one must have, see `DocumentTask.needs`.
        codebook: how many codes there are; `tokenizer`: digest of the one that must have made them.

    Raises:
        DataError: every problem of every row.
    """

    def __init__(
        self, data: str | Path | Sequence[str | Path], audio_dir: str | Path | None = None, *, kind: Kind = "speech",
        needs: Collection[str] = (), codebook: int | None = None, tokenizer: str | None = None,
    ) -> None:  # fmt: skip
        self.rows, self.kind = ShardedRows(data), kind
        root = audio_root(self.rows.files[0], audio_dir)
        # paths are taken as they stand: which first folders might be dropped only all of them together could tell
        self._reader = READERS[kind](AudioFolder(root, False, ()), needs, codebook, tokenizer)
        self._documents, self._positions = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        self._codes = np.zeros(0, np.int32)
        self.tokenizers: dict[str | None, str] = {}  # of codes -> the first row that names it
        self.unnamed, self.unnamed_first = 0, list[str]()  # rows with codes and no speaker; ids of the first
        if problems := self._check():
            raise DataError(self.name, problems)
        if not len(self):
            raise broken(self.name, "it holds no rows")

    @property
    def name(self) -> str:
        """What messages call the data."""
        return self.rows.name

    @property
    def fingerprint(self) -> str:
        """Of the content of all rows."""
        return self.rows.fingerprint

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Any:
        """A SpeechRow, TextRow or DialogueRow.

        Raises:
            DataError: its file is another now, or something that it names is gone.
        """
        row = self._reader.read(self.rows.where(index), self.rows[index])
        if self._reader.problems:
            problems = [Problem(p.row_id, f"{p.what} (it was right before training)") for p in self._reader.problems]
            self._reader.problems = []
            raise DataError(self.name, problems)
        return row

    def units(self, unit: str, most_codes: int | None = None) -> Units:
        """What the draws of a task take. A document of more than `most_codes` is several, which follow one another.

        Raises:
            DataError: the positions within documents are not clear.
        """
        assert KINDS[unit] == self.kind, (unit, self.kind)
        if unit != "document":
            return Units(self, unit)
        return Units(self, unit, *self._grouped(most_codes))

    def heard_problems(self, rank: int = 0, world: int = 1) -> list[Problem]:
        """What is wrong with the recordings of a rank's share of the rows, each of which is decoded."""
        rows = (self.row(index) for index in range(rank, len(self), world))
        return recording_problems(said for row in rows for said in spoken_parts(row) if said.clip is not None)

    def _check(self) -> list[Problem]:
        """Read every row once, note where documents are; returns what is wrong."""
        ids, documents, positions, codes = array("Q"), array("Q"), array("q"), array("i")
        problems: list[Problem] = []
        for where, row, faults in self.rows.scan():
            problems += [Problem(f"row {where}", fault) for fault in faults]
            read: Any = self._reader.read(where, row) if row is not None and not faults else None
            problems += self._reader.problems
            self._reader.problems = []
            ids.append(row_digest(str(getattr(read, "id", where)).encode("utf-8", "surrogatepass")))
            position = getattr(read, "position", None)
            if position is not None and abs(position) >= 2**62:
                problems.append(Problem(read.id, f"its position {printable(position)} is too large"))
                position = None
            document = getattr(read, "document", None)
            documents.append(0 if document is None else row_digest(document.encode("utf-8", "surrogatepass")) or 1)
            positions.append(_NO_POSITION if position is None else position)
            coded = [said for said in spoken_parts(read) if said.codes is not None]
            for said in coded:
                self.tokenizers.setdefault(said.source.get("tokenizer"), said.id)
            if coded and read.speaker is None:
                self.unnamed += 1
                self.unnamed_first += [read.id] * (len(self.unnamed_first) < 5)
            codes.append(0 if getattr(read, "codes", None) is None else len(read.codes))
        self._documents, self._positions = np.array(documents, np.uint64), np.array(positions, np.int64)
        self._codes = np.array(codes, np.int32)
        return problems + self._repeated(np.array(ids, np.uint64))

    def _repeated(self, ids: np.ndarray) -> list[Problem]:
        """Rows with the id of one before them; rows of equal hashes are looked at again."""
        _, first, counts = np.unique(ids, return_index=True, return_counts=True)
        more = np.flatnonzero(np.isin(ids, ids[first[counts > 1]])) if (counts > 1).any() else ()
        seen: set[str] = set()
        problems = []
        for index in more:
            name = self.rows[int(index)].get("id")
            if name is not None and str(name) in seen:
                problems.append(Problem(str(name), f"{SAME_ID} (it is row {self.rows.where(int(index))})"))
            seen.add(str(name))
        return problems

    def _grouped(self, most_codes: int | None) -> tuple[np.ndarray, np.ndarray]:
        """(rows in the order of units, where each unit begins and the last ends)."""
        count, has = len(self), self._documents != 0
        group = np.arange(count)
        rows = np.flatnonzero(has)
        _, first, inverse = np.unique(self._documents[has], return_index=True, return_inverse=True)
        group[has] = rows[first[inverse]]  # a document stands where its first row does
        order = np.lexsort((np.arange(count), self._positions, group))
        same = group[order][1:] == group[order][:-1]
        before, after = self._positions[order][:-1], self._positions[order][1:]
        wrong = [(i, "another row of its document has its position") for i in np.flatnonzero(
            same & (before == after) & (before != _NO_POSITION))]  # fmt: skip
        wrong += [(i, "its document has rows without a position, and it has one") for i in np.flatnonzero(
            same & (before == _NO_POSITION) & (after != _NO_POSITION))]  # fmt: skip
        if wrong:
            rows_wrong = [(int(order[i + 1]), what) for i, what in wrong]
            raise DataError(self.name, [Problem(self.row(row).id, what) for row, what in sorted(rows_wrong)])
        starts = np.flatnonzero(np.r_[True, ~same])
        return order, _split(np.r_[starts, count], self._codes[order], most_codes)


class Units:
    """What a task draws from: item i is a row, or the rows of a document (or of a part of one) in order."""

    def __init__(
        self, store: RowStore, unit: str, order: np.ndarray | None = None, starts: np.ndarray | None = None
    ) -> None:
        self.store, self.unit, self.order, self.starts = store, unit, order, starts

    def __len__(self) -> int:
        return len(self.store) if self.starts is None else len(self.starts) - 1

    def __getitem__(self, index: int) -> Any:
        """A sequence of SpeechRows, a TextRow or a DialogueRow.

        Raises:
            DataError: see `RowStore.row`.
        """
        if self.order is None or self.starts is None:
            row = self.store.row(index)
            return (row,) if self.unit == "row" else row
        rows = self.order[self.starts[index] : self.starts[index + 1]]
        return tuple(self.store.row(int(row)) for row in rows)


def spoken_parts(row: Any) -> Sequence[SpeechRow]:
    """What is spoken in a row: itself, the turns of a dialogue, or nothing."""
    if isinstance(row, SpeechRow):
        return (row,)
    return [turn.said for turn in getattr(row, "turns", ())]


def _split(starts: np.ndarray, codes: np.ndarray, most: int | None) -> np.ndarray:
    """The starts of units and those of the parts of the ones that have more than `most` codes."""
    ends = np.cumsum(np.r_[0, codes.astype(np.int64)])
    sizes = ends[starts[1:]] - ends[starts[:-1]]
    parts = []
    for unit in np.flatnonzero(sizes > most) if most is not None else ():
        begin = ends[starts[unit]]
        for row in range(starts[unit] + 1, starts[unit + 1]):
            if ends[row + 1] - begin > most:
                parts.append(row)
                begin = ends[row]
    return np.unique(np.r_[starts, np.array(parts, dtype=np.int64)])
