"""A file of questions -> list[Example], or one error with everything that is wrong."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from covo_rl.data.answers import index_bases
from covo_rl.data.chat import is_chat, lists_options, plain_row
from covo_rl.data.delimited import option_columns
from covo_rl.data.folder import AudioFolder
from covo_rl.data.read import DataError, DataNote, Problem, Row, printable, row_name, some
from covo_rl.data.rows import RowReader, audio_references, row_id
from covo_rl.data.schemas import SCHEMAS, Schema
from covo_rl.data.sources import read_rows, source_name
from covo_rl.resolve import column_map, meant
from covo_rl.types import Example, visible

if TYPE_CHECKING:
    from covo_rl.data.memory import Source


def load_examples(
    source: Source,
    audio_dir: str | Path | None = None,
    *,
    columns: str | Mapping[str, str] | None = None,
    format: str = "auto",
    allow_outside: bool = False,
    strict: bool = True,
) -> list[Example]:
    """Read a question set: a file, a folder, `hf:NAME:SPLIT` or rows in memory, in any layout of docs/data.md.

    Args:
        source: a path or hub name, a sequence of mappings, or a `datasets.Dataset`. Rows in memory are not changed.
        audio_dir: folder that relative audio paths start from; default: the folder of the file, of rows in memory
            the working directory, beside which these may name absolute paths.
        columns: which columns are which fields where the rows have other names: `question=prompt,answer=label` or a
            mapping. They stay in `Example.columns` under their own names, but for the sound.
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
        ValueError: an unknown format; `columns` that cannot be read (ConfigError).
    """
    if format != "auto" and format not in SCHEMAS:
        raise ValueError(f"format {format!r} is not known; use auto, {', '.join(SCHEMAS)}")
    problems: list[Problem] = []
    mapping = column_map(columns)
    rows = _with_schemas(read_rows(source, mapping), format, mapping, problems)
    references = (text for _, row, schema in rows for text in audio_references(row, schema))
    in_memory = not isinstance(source, (str, os.PathLike))
    absolute = in_memory and audio_dir is None
    folder = AudioFolder(audio_root(source, audio_dir), allow_outside, references, absolute=absolute)
    names = _names(rows, problems, strict=strict)
    # in a file the id finds a row, in a list its place
    labels = [_place(row.number, name) if in_memory else name for row, name in zip(rows, names, strict=True)]
    bases = index_bases([(label, row, schema) for label, (_, row, schema) in zip(labels, rows, strict=True)], problems)
    reader = RowReader(folder, strict, bases)
    examples: list[Example] = []
    homeless: list[str] = []
    has_folder = audio_dir is None or os.path.isdir(audio_dir)
    for name, label, (_, row, schema) in zip(names, labels, rows, strict=True):
        example = reader.read(row, schema, name)
        problems += [Problem(label, what) for what in reader.problems]
        if example is None:
            continue
        examples.append(example)
        if strict and (absent := _absent_files(label, example, folder.hint)):
            problems += absent if has_folder else []
            homeless += [label] * (not has_folder)
    if homeless:
        missing = "is a file" if os.path.isfile(str(audio_dir)) else "does not exist"
        what = f"the audio folder {audio_dir} {missing}; check --audio-dir (rows {some(homeless)})"
        problems.insert(0, Problem("file", what + meant(str(audio_dir))))
    if problems:
        raise DataError(source_name(source), problems, examples)
    for note in filter(None, (_options_note(examples), _missing_note(examples))):
        warnings.warn(note, DataNote, stacklevel=2)
    return examples


def _absent_files(label: str, example: Example, hint: str) -> list[Problem]:
    paths = [clip.path for clip in example.clips if clip.path and not os.path.isfile(clip.path)]
    hint = "write / instead of backslashes" if any("\\" in path for path in paths) else hint or "check --audio-dir"
    return [Problem(label, f"its audio file {path} does not exist; {hint}") for path in paths]


def _options_note(examples: Sequence[Example]) -> str:
    """Which rows list options in their question, where nothing reads them; empty where none does."""
    names = [row.id for row in examples if not row.choices and lists_options(row.question)]
    what = "their questions list options in the text, which is left as it is: they are open questions, with the answer"
    return f"rows {visible(some(names))}: {what} as it stands; write choices for options" if names else ""


def _missing_note(examples: Sequence[Example]) -> str:
    """That no row has an answer, or choices, although columns may be them; empty where nothing seems to be missing."""
    columns = list(dict.fromkeys(name for example in examples for name in example.columns))
    groups = [names for names in option_columns(columns) if names[0][-1] in "aA01"]
    options = [name for name in columns if _field_of(name) == "choices"] or next(iter(groups), [])
    parts = []
    if not any(example.answer for example in examples) and columns:
        parts.append(f"no row has an answer; if one of {visible(some(columns))} is it: --columns answer=NAME")
    if not any(example.choices for example in examples) and options:
        what = f"no row has choices; if {visible(some(options))} are options"
        parts.append(f"{what}, write them as a list (--columns choices=NAME), in a CSV also one a column: A, B, ...")
    return "; ".join(parts)


def _field_of(column: str) -> str:
    """The field whose name a column has but for case and blanks, `Question`; empty where it is none."""
    name, schema = "_".join(column.casefold().split()), SCHEMAS["covo"]
    fields = ("id", "audio", "question", "choices", "answer")
    return next((field for field in fields if name in getattr(schema, field)), "")


def audio_root(source: Source, audio_dir: str | Path | None) -> Path:
    """The folder that relative audio paths of a question set start from: `audio_dir`, by default that of the file."""
    if audio_dir is not None:
        return Path(audio_dir)
    if not isinstance(source, (str, os.PathLike)) or source_name(source).startswith("hf:"):
        return Path()
    return Path(source) if Path(source).is_dir() else Path(source).parent


class _Row(NamedTuple):
    """A row by its place, from 1, and how it is read."""

    number: int
    row: Row
    schema: Schema


def _with_schemas(rows: Sequence[Row], format: str, columns: Mapping[str, str], problems: list[Problem]) -> list[_Row]:
    """The rows that their schema can read; one problem for all others that have the same fields."""
    wrong: dict[str, list[str]] = defaultdict(list)
    notes: dict[str, list[str]] = defaultdict(list)
    readable = []
    for number, row in enumerate(rows, start=1):
        schema = next(schema for schema in SCHEMAS.values() if all(mark in row for mark in schema.marks))
        schema = schema if format == "auto" else SCHEMAS[format]
        name = row_name(number, row)
        if format in ("auto", "covo") and is_chat(row, columns):
            try:
                row, note = plain_row(row, columns)
            except ValueError as error:
                problems.append(Problem(name, str(error)))
                continue
            notes[note].append(name)
            schema = SCHEMAS["covo"].with_columns({field: field for field in ("audio", "answer") if field in row})
        schema = schema.with_columns(columns)
        if what := _unreadable(row, schema, format, columns):
            wrong[what].append(name)
        else:
            readable.append(_Row(number, row, schema))
    for what, names in wrong.items():
        more = f"; so have {len(names) - 1} further rows ({some(names[1:])})" if names[1:] else ""
        problems.append(Problem(names[0], what + more))
    for note, names in notes.items():
        if note:
            warnings.warn(f"{some(names)}: {note}", DataNote, stacklevel=3)
    return readable


def _unreadable(row: Row, schema: Schema, format: str, columns: Mapping[str, str]) -> str:
    """Which fields a row lacks, and which it has; empty where it can be read."""
    fields = printable(sorted(map(str, row)), 200)
    if absent := [f"{column!r} ({field}={column})" for field, column in columns.items() if column not in row]:
        near = [close[0] for name in columns.values() if name not in row if (close := get_close_matches(name, row, 1))]
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        return f"it has no column {', '.join(absent)}; it has {fields}{hint}"
    of_options = [name for names in option_columns(list(row)) for name in names] if schema.options else []
    if more := [name for name in of_options if name not in schema.options]:
        what = f"schema {schema.name} has the options {', '.join(schema.options)}"
        return f"{what}, and the row {', '.join(more)} as well; write a list: choices"
    if not (missing := schema.missing(row)):
        return ""
    if format != "auto" or schema.marks:
        return f"schema {schema.name} needs {', '.join(missing)}; it has {fields}"
    marks = "; ".join(f"{other.name} has {', '.join(other.marks)}" for other in SCHEMAS.values() if other.marks)
    ours = f"one of {', '.join(schema.audio)} and {' or '.join(schema.question)}"
    parts = []
    for field in ("id", "audio", "question", "choices", "answer"):
        if not any(name in row for name in getattr(schema, field)):
            near = next((name for name in row if _field_of(str(name)) == field), None)
            parts += [f"{field}={near or 'NAME'}"] if near or field in ("audio", "question", "answer") else []
    hint = f"or say which columns they are: --columns {','.join(parts)}"
    return f"unknown fields {fields}; {marks}; any other row needs {ours}, {hint}"


def _names(rows: Sequence[_Row], problems: list[Problem], *, strict: bool) -> list[str]:
    """A name for every row. Where no row has an id, positions; where some lack one, that is a problem."""
    ids: dict[int, str | None] = {}
    wrong = []
    for number, row, schema in rows:
        try:
            ids[number] = row_id(row, schema)
        except ValueError as error:
            wrong.append(Problem(f"row {number}", str(error)))
            ids[number] = f"row {number}"
    if all(name is None for name in ids.values()):
        return [f"row-{number:06d}" for number in ids]
    problems += wrong
    problems += [Problem(f"row {n}", "it has no id, other rows do") for n, name in ids.items() if name is None]
    names = {number: name or f"row {number}" for number, name in ids.items()}
    if strict:
        positions: dict[str, list[str]] = defaultdict(list)
        for number, name in names.items():
            positions[name].append(str(number))
        shared = {name: ", ".join(numbers[:10]) for name, numbers in positions.items() if len(numbers) > 1}
        problems += [Problem(name, f"rows {numbers} have the same id") for name, numbers in shared.items()]
    return list(names.values())


def _place(number: int, name: str) -> str:
    """`row 3`, with the row's id where it has one."""
    has_id = name not in (f"row {number}", f"row-{number:06d}")
    return row_name(number, {"id": name} if has_id else {})
