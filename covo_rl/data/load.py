"""A file of questions -> list[Example], or one error with everything that is wrong."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from covo_rl.data.paths import AudioFolder
from covo_rl.data.problems import DataError, Problem, printable
from covo_rl.data.read import read_rows
from covo_rl.data.rows import RowReader, audio_references, has_fields, row_id
from covo_rl.data.schemas import SCHEMAS, Schema, detect, known_fields
from covo_rl.types import Example


def load_examples(
    path: str | Path,
    audio_dir: str | Path | None = None,
    *,
    format: str = "auto",
    allow_outside: bool = False,
    strict: bool = True,
) -> list[Example]:
    """Read a question set: JSON list, JSONL, parquet, datasets folder, or `hf:NAME:SPLIT`.

    Args:
        audio_dir: folder that relative audio paths start from; default: the folder of the file.
        format: a name in SCHEMAS, or auto: each row's schema is told by its fields.
        allow_outside: let audio paths leave `audio_dir`.
        strict: answers must be among the choices (and are spelled as there), ids unique, audio files present.
            False leaves these to the caller (an evaluation reports and scores such rows) and keeps answer texts as
            they stand. What cannot become an Example is refused either way.

    Returns:
        Examples in the order of the file. An empty answer is None. Rows without any id are named by position.
        Every field that is not id, audio, question, choices or answer is in `columns`, untouched.

    Raises:
        DataError: all problems of all rows, with row ids.
        ValueError: an unknown format.
    """
    if format != "auto" and format not in SCHEMAS:
        raise ValueError(f"format {format!r} is not known; use auto, {', '.join(SCHEMAS)}")
    rows = read_rows(path)
    problems: list[Problem] = []
    schemas = [_schema(row, number, format, problems) for number, row in enumerate(rows, start=1)]
    folder = AudioFolder(_audio_root(path, audio_dir), allow_outside)
    folder.fit(
        text
        for row, schema in zip(rows, schemas, strict=True)
        if schema is not None
        for text in audio_references(row, schema)
    )
    ids = _ids(rows, schemas, problems, strict=strict)
    reader = RowReader(folder, strict)
    examples: list[Example] = []
    for row, schema, name in zip(rows, schemas, ids, strict=True):
        if schema is None:
            continue
        example = reader.read(row, schema, name)
        problems += [Problem(name, what) for what in reader.problems]
        if example is not None:
            examples.append(example)
            if strict:
                problems += missing_files(example)
    if problems:
        raise DataError(str(path), problems, examples)
    return examples


def missing_files(example: Example) -> list[Problem]:
    """One problem for every clip of a row whose file does not exist."""
    lost = [clip.path for clip in example.clips if clip.path is not None and not os.path.isfile(clip.path)]
    return [Problem(example.id, f"its audio file {path} does not exist; check --audio-dir") for path in lost]


def _audio_root(path: str | Path, audio_dir: str | Path | None) -> Path:
    if audio_dir is not None:
        return Path(audio_dir)
    if str(path).startswith("hf:"):
        return Path()
    return Path(path) if Path(path).is_dir() else Path(path).parent


def _schema(row: Mapping[str, Any], number: int, format: str, problems: list[Problem]) -> Schema | None:
    """The schema of a row; None with a problem where the row does not have its fields."""
    found = detect(row) if format == "auto" else SCHEMAS[format]
    name = f"row {number}" + (f" (id {printable(row['id'], 40)})" if row.get("id") is not None else "")
    has = printable(sorted(map(str, row)), 200)
    if found is None:
        problems.append(Problem(name, f"unknown fields {has}; {known_fields()}"))
        return None
    lacks = has_fields(row, found)
    if lacks:
        problems.append(Problem(name, f"schema {found.name} needs {', '.join(lacks)}; it has {has}"))
        return None
    return found


def _ids(
    rows: Sequence[Mapping[str, Any]], schemas: Sequence[Schema | None], problems: list[Problem], *, strict: bool
) -> list[str]:
    """A name for every row. Where no row has an id, positions; where some lack one, that is a problem."""
    found: list[str | None] = []
    wrong: list[Problem] = []
    for number, (row, schema) in enumerate(zip(rows, schemas, strict=True), start=1):
        try:
            found.append(row_id(row, schema) if schema is not None else f"row {number}")
        except ValueError as error:
            wrong.append(Problem(f"row {number}", str(error)))
            found.append(f"row {number}")
    readable = [name for name, schema in zip(found, schemas, strict=True) if schema is not None]
    if not wrong and all(name is None for name in readable):
        return [f"row-{number:06d}" if schema else f"row {number}" for number, schema in enumerate(schemas, start=1)]
    problems += wrong
    problems += [Problem(f"row {n}", "it has no id, other rows do") for n, name in enumerate(found, 1) if name is None]
    names = [f"row {number}" if name is None else name for number, name in enumerate(found, start=1)]
    if strict:
        problems += _same_ids(names)
    return names


def _same_ids(names: Sequence[str]) -> list[Problem]:
    """One problem for every id that several rows have, with their positions from 1."""
    places: dict[str, list[int]] = {}
    for number, name in enumerate(names, start=1):
        places.setdefault(name, []).append(number)
    return [
        Problem(name, f"rows {', '.join(map(str, numbers[:10]))} have the same id")
        for name, numbers in places.items()
        if len(numbers) > 1
    ]
