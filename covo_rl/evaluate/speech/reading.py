"""Reading a speech set: the files of its parts, their rows, the paths of audio. Every problem is kept with its place.

SetReader(speech_set, root).read()    -> rows, replies that lie beside them, problems, notes
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from covo_rl.data.files import json_lines
from covo_rl.data.folder import AudioFolder
from covo_rl.data.read import DataError, some
from covo_rl.data.sources import read_rows
from covo_rl.evaluate.speech.row_fields import RowFields
from covo_rl.evaluate.speech.rows import GivenReply, SpeechItem, SpokenRound
from covo_rl.evaluate.speech.sets import SpeechSet, Subset

#: what stands behind a row's name in the ids of engines (hearing.sound_id)
_PART_OF = re.compile(r"(#\d+)?(~\w+)?$")


class SetReader:
    """Everything read of one set so far. `wanted` are names of sub-sets or groups, none for all."""

    def __init__(
        self, speech_set: SpeechSet, root: Path, wanted: Sequence[str] = (), *, audio_dir: Path | None = None,
        replies_in: Path | None = None, allow_outside: bool = False,
    ) -> None:  # fmt: skip
        self.speech_set, self.root, self.wanted = speech_set, root, tuple(wanted)
        self.audio_dir, self.allow_outside = audio_dir, allow_outside
        #: folder of a model's outputs in the layout of the data; without one they lie beside the data
        self.replies_in = replies_in or root
        self.subsets: dict[str, Subset] = {subset.name: subset for subset in speech_set.subsets}
        self.rows: list[SpeechItem] = []
        self.replies: dict[str, GivenReply] = {}
        self.files: list[Path] = []
        #: files that hold replies and no rows
        self.reply_files: list[Path] = []
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._folders: list[AudioFolder] = []

    def read(self) -> None:
        """Read what is asked for; rows of parts that are not asked for are left out."""
        declared = {name for subset in self.speech_set.subsets for name in (subset.name, *subset.groups)}
        unknown = [name for name in self.wanted if name not in declared]
        if unknown and not self.speech_set.open_parts:
            self.problems.append(self._no_part(unknown))
            return
        self.speech_set.read(self)
        found = {name for row in self.rows for name in (row.subset, *self.subsets[row.subset].groups)}
        if not self.problems and (absent := [name for name in self.wanted if name not in found]):
            no_rows = f"--data {self.root}: no rows of {some(absent)}"
            self.problems.append(self._no_part(absent) if set(absent) & set(unknown) else no_rows)
        self.rows = [row for row in self.rows if self.subsets[row.subset].is_asked(self.wanted)]
        self._check_ids()
        self._check_engine_ids()

    def _no_part(self, names: Sequence[str]) -> str:
        groups = dict.fromkeys(group for subset in self.subsets.values() for group in subset.groups)
        parts = f"{', '.join(self.subsets)}; groups of them are {', '.join(groups) or '(none)'}"
        known = [*self.subsets, *groups]
        near = dict.fromkeys(one for name in names for one in difflib.get_close_matches(name, known, n=1))
        guess = f"; did you mean {', '.join(near)}? " if near else ""
        return f"--subset {', '.join(names)}: no such part{guess or '; '}{self.speech_set.name} has {parts}"

    def _check_ids(self) -> None:
        places: dict[str, list[SpeechItem]] = defaultdict(list)
        for row in self.rows:
            places[row.name].append(row)
        twice = {name: rows for name, rows in places.items() if len(rows) > 1}
        if twice and not self.speech_set.numbered:
            self.problems += [
                f"{rows[1].place}: the id of {rows[0].place} again ({name})" for name, rows in twice.items()
            ]
        elif twice:
            again = {rows[0].subset for rows in twice.values()}
            self.notes.append(
                f"ids stand more than once ({some([*twice])}): rows of {some([*again])} are named by number"
            )
            self.rows = [replace(row, id=row.key) if row.subset in again else row for row in self.rows]

    def _check_engine_ids(self) -> None:
        """No id may be the one under which engines are asked about a further round or part of another row."""
        names = {row.name for row in self.rows}
        for row in self.rows:
            base = _PART_OF.sub("", row.name)
            if base != row.name and base in names:
                own = row.name.removeprefix(f"{row.subset}/")
                self.problems.append(
                    f"{row.place}: id {own!r}: engines are asked by it about a part of {base}; rename it"
                )

    # -- files -------------------------------------------------------------------------------------------------------

    def parts(self) -> Iterator[tuple[Path, list[Subset]]]:
        """(file or folder, its sub-sets) of all that is asked for and there."""
        by_path: dict[str, list[Subset]] = defaultdict(list)
        declared = self.speech_set.subsets
        asked = [subset for subset in declared if subset.is_asked(self.wanted)]
        for subset in asked or declared:  # a part that only the rows name may lie in any file
            by_path[subset.path].append(subset)
        found = {path: self._find(path, alone=len(by_path) == 1) for path in by_path}
        absent = [path for path, place in found.items() if place is None]
        named = ", ".join(f"{path} ({some([s.name for s in by_path[path]], 3)})" for path in absent)
        if len(absent) == len(found) or any(s.name in self.wanted for path in absent for s in by_path[path]):
            how = f"found in {self.root}: {some(sorted(os.listdir(self.root)), 12)}" if self.root.is_dir() else (
                f"{self.root} is one file: --subset says of which part, or give the folder"
            )  # fmt: skip
            self.problems.append(f"--data {self.root}: no {named}; {how}. {self.speech_set.how_to_get}")
        elif absent:
            self.notes.append(f"not in {self.root}, so that means over them are partial: {named}")
        yield from ((place, by_path[path]) for path, place in found.items() if place is not None)

    def _find(self, path: str, *, alone: bool) -> Path | None:
        """Where `path` lies below the root, which may be given from any of its own folders downwards."""
        if self.root.is_file():
            return self.root if alone or path == self.root.name else None
        pieces = PurePosixPath(path).parts
        starts = range(len(pieces) if alone else max(1, len(pieces) - 1))
        places = [self.root.joinpath(*pieces[start:]) for start in starts]
        if alone and any(self.root.glob("*/input.wav")):  # a folder of items
            places.append(self.root)
        return next((place for place in places if place.exists()), None)

    def numbered_rows(self, path: Path) -> Iterator[tuple[int, str, Any]]:
        """(number from 0, place, row) of JSON lines, a JSON list, a table or parquet; what is no row is a problem."""
        if path.is_dir():
            self.problems.append(f"{path} is a folder; a file of rows is expected there")
            return
        self.files.append(path)
        if path.suffix == ".jsonl":
            lines = list(json_lines(path))
            for number, (line, row, problem) in enumerate(lines):
                if row is None:
                    self.problems.append(f"{path}, line {line}: {problem}")
                else:
                    yield number, f"{path}, line {line}", row
            if not lines:
                self.problems.append(f"{path}: no rows in it")
            return
        try:
            for number, row in enumerate(read_rows(path)):
                yield number, f"{path}, row {number + 1}", row
        except DataError as error:
            self.problems.append(str(error))

    def lines(self, path: Path, *audio: str) -> Iterator[RowFields]:
        """The rows of a file; `audio` are the fields, at any depth, that hold paths of clips."""
        rows = list(self.numbered_rows(path))
        self.audio_from(path.parent, [name for _, _, row in rows for name in _references(row, audio)])
        for number, place, row in rows:
            yield RowFields(self, row, place, number)

    def load_json(self, path: Path) -> Any:
        """The content of a small JSON file, or None after a problem."""
        try:
            return json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            self.problems.append(f"{path}: not JSON, half-written? {error}")
            return None

    # -- audio -------------------------------------------------------------------------------------------------------

    def audio_from(self, folder: Path, references: Sequence[str]) -> None:
        """The paths of the next rows start at `folder`, at the root, or at the user's audio folder alone."""
        root = self.root if self.root.is_dir() else folder
        bases = [self.audio_dir] if self.audio_dir else [folder] if folder == root else [folder, root]
        self._folders = [AudioFolder(base, self.allow_outside, references) for base in bases]

    def audio_path(self, references: Sequence[str]) -> str:
        """The first of the places at which one of the references exists, else the first place.

        Raises:
            ValueError: every reference is empty, a URL, or leaves its folder.
        """
        places, errors = [], []
        for reference in references:
            for folder in self._folders:
                try:
                    places.append(folder.resolve(reference))
                except ValueError as error:
                    errors.append(error)
        if not places:
            raise errors[0]
        return next((place for place in places if os.path.isfile(place)), places[0])

    # -- rows --------------------------------------------------------------------------------------------------------

    def add(
        self, fields: RowFields, subset: Subset, rounds: Sequence[SpokenRound], *, row_id: str | None = None,
        language: str | None = None, choices: Sequence[str] = (),
        times: Mapping[str, Any] | None = None, columns: Mapping[str, Any] | None = None,
    ) -> SpeechItem | None:  # fmt: skip
        """Keep a row in which nothing was wrong. Without `row_id` its number is its id."""
        if fields.failed:
            return None
        self.subsets.setdefault(subset.name, subset)
        key = f"{fields.index:04d}"
        row = SpeechItem(
            row_id if row_id else key, key, subset.name, subset.kind, tuple(rounds), language or subset.language,
            tuple(choices), times or {}, {**fields.values, **(columns or {})}, fields.place,
        )  # fmt: skip
        self.rows.append(row)
        return row

    def keep_reply(self, row: SpeechItem | None, reply: GivenReply) -> None:
        """A reply that stands in the row itself, unless the replies are elsewhere."""
        if row is not None and self.replies_in == self.root and not reply.is_empty:
            self.replies[row.name] = reply


def _references(value: Any, names: Sequence[str]) -> Iterator[str]:
    """Every text under one of the names, at any depth."""
    for key, item in value.items() if isinstance(value, Mapping) else ():
        if key in names:
            yield from (text for text in (item if isinstance(item, list) else [item]) if isinstance(text, str))
        elif isinstance(item, (list, Mapping)):
            for inner in item if isinstance(item, list) else [item]:
                yield from _references(inner, names)


def problem_lines(problems: Sequence[str], limit: int = 50) -> list[str]:
    """The first of many problems, and how many there are more."""
    return [*problems[:limit], *([f"... and {len(problems) - limit} more"] if len(problems) > limit else [])]
