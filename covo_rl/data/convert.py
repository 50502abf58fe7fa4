"""Examples -> rows of another schema -> a file; `load_examples` reads back the same examples."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from covo_rl.audio import content_key, decode
from covo_rl.data.files import write_atomically
from covo_rl.data.read import DataError, Problem
from covo_rl.data.schemas import EXPLICIT_ANSWERS, SCHEMAS, Schema
from covo_rl.types import Clip, Example

#: What else a schema's readers look for; filled where the row has no such column.
_EXTRA: Mapping[str, Mapping[str, str]] = {
    "avqa": {"dataset_name": "AVQA"},
    "audiomcq": {"source_dataset": "unknown"},
    "mmar": {"modality": "unknown"},
}
_MAGIC = ((b"RIFF", ".wav"), (b"fLaC", ".flac"), (b"OggS", ".ogg"), (b"ID3", ".mp3"), (b"\xff", ".mp3"))


def to_rows(examples: Sequence[Example], schema: str, audio_dir: str | Path) -> list[dict[str, Any]]:
    """Rows in the field names of a schema; audio paths are relative to `audio_dir` where they lie in it.

    Further columns stay. One whose name the schema needs for itself is kept as `original_NAME`. A clip without a file
    is written to `audio_dir`/converted, named by its content.

    Raises:
        DataError: rows that the schema cannot express: several clips, no choices, more options than it has fields.
        ValueError: an unknown schema.
    """
    if schema not in SCHEMAS:
        raise ValueError(f"format {schema!r} is not known; use {', '.join(SCHEMAS)}")
    target = SCHEMAS[schema]
    problems = [Problem(example.id, what) for example in examples for what in _unfit(example, target)]
    if problems:
        raise DataError(f"conversion to {schema}", problems)
    return [_row(example, target, Path(audio_dir)) for example in examples]


def write(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write rows as JSON list, JSONL or parquet, by the suffix; whole or not at all.

    Raises:
        ValueError: another suffix, or rows that a parquet table cannot hold.
    """
    path = Path(path)
    if path.suffix not in (".json", ".jsonl", ".parquet"):
        raise ValueError(f"{path}: write to .json, .jsonl or .parquet")
    path.parent.mkdir(parents=True, exist_ok=True)

    def content(file: TextIO) -> None:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        elif path.suffix == ".json":
            json.dump(list(rows), file, ensure_ascii=False, indent=1)
        else:
            import pyarrow
            import pyarrow.parquet

            # Columns of all rows: from_pylist takes those of the first.
            names = dict.fromkeys(name for row in rows for name in row)
            try:
                table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
            except pyarrow.ArrowException as error:
                raise ValueError(f"{path}: a column mixes types, which parquet cannot hold: {error}") from error
            pyarrow.parquet.write_table(table, file.buffer)

    write_atomically(path, content)


def _unfit(example: Example, target: Schema) -> list[str]:
    """Why a schema cannot hold a row."""
    if target.name == "covo":
        return []
    name, clips, choices, options = target.name, len(example.clips), len(example.choices), len(target.options)
    placed = example.answer is None or not choices or example.answer in example.choices
    reasons = {
        f"it has {clips} clips, {name} rows have one": clips != 1,
        f"it has no choices, {name} rows have": not choices,
        f"it has {choices} choices, {name} rows have {options}": options and choices > options,
        f"it has one choice, {name} rows have two or more": options and choices == 1,
        f"it has a system message of its own, {name} rows have none": example.system is not None,
        f"its answer {example.answer!r} is not among its choices, {name} needs its place":
            target.answers[0] == "index" and not placed,
    }  # fmt: skip
    return [reason for reason, holds in reasons.items() if holds]


def _row(example: Example, target: Schema, audio_dir: Path) -> dict[str, Any]:
    root = os.path.abspath(audio_dir)
    paths = [stored_path(clip, audio_dir) for clip in example.clips]
    audio = [os.path.relpath(path, root) if os.path.commonpath([root, path]) == root else path for path in paths]
    row: dict[str, Any] = {target.id[0]: example.id}
    row[target.audio[0]] = audio[0] if len(audio) == 1 else audio
    row[target.question[0]] = example.question
    if target.options:
        row |= dict.fromkeys(target.options) | dict(zip(target.options, example.choices, strict=False))
    else:
        row[target.choices[0]] = list(example.choices)
    answer: Any = example.answer if example.answer is not None else ""
    if target.answers[0] == "index":
        answer = example.choices.index(answer) if answer else None
    row[target.answer[0]] = answer
    if example.system is not None:
        row[target.system_prompt[0]] = example.system
    # Names that a further column cannot have without being read as something else.
    names = {*target.id, *target.audio, *target.question, *target.choices, *target.answer, *target.options}
    names |= {*target.system_prompt}
    marks = {mark for schema in SCHEMAS.values() for mark in schema.marks} - {"source_dataset", "modality"}
    reserved = (names | marks | set(EXPLICIT_ANSWERS)) - {"video_name"}
    for name, value in example.columns.items():
        row[f"original_{name}" if name in reserved else name] = value
    for name, value in _EXTRA.get(target.name, {}).items():
        row.setdefault(name, value)
    return row


def stored_path(clip: Clip, audio_dir: Path) -> str:
    """A clip's absolute path. One without a file goes to `audio_dir`/converted: bytes as they are, an array as wav."""
    path = clip.path
    if path is None:
        folder, data = audio_dir / "converted", clip.data
        folder.mkdir(parents=True, exist_ok=True)
        suffix = ".wav" if data is None else next((end for magic, end in _MAGIC if data.startswith(magic)), ".audio")
        path = str(folder / f"{content_key(clip)[:32]}{suffix}")

        def content(file: TextIO) -> None:
            if data is not None:
                file.buffer.write(data)
            else:
                import soundfile

                soundfile.write(file.buffer, *decode(clip), format="WAV", subtype="FLOAT")

        write_atomically(Path(path), content)
    return os.path.abspath(path)
