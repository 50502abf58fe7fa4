"""Rows of an evaluation set, the answer key word for word.

Training reads a key helpfully (letters and indices become option texts); an official scorer compares what the file
says. So ids, questions, options and answers come from the file as they stand, and only the clips through covo_rl.data.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covo_rl.evaluate.predictions import read_rows
from covo_rl.evaluate.problems import EvalInputError
from covo_rl.types import Clip, Example

if TYPE_CHECKING:
    from covo_rl.evaluate.sets import EvalSet

#: Names tried after a set's own; `choice_a ... choice_d` is written as one string.
USUAL = {
    "id": ("id",),
    "audio": ("audio_id", "audio_path", "audio"),
    "question": ("question",),
    "choices": ("choices", "choice_a choice_b choice_c choice_d"),
    "answer": ("answer", "answer_gt"),
}
TABLES = (".parquet",)


def read_examples(
    eval_set: EvalSet, path: Path, audio_dir: Path | None, *, hear: bool, allow_outside: bool = False
) -> list[Example]:
    """The rows in the order of the file. `hear`: clips are needed, so that their paths are resolved strictly.

    A set that names no fields (training data) and tables other than JSON are read by covo_rl.data alone.

    Raises:
        EvalInputError: everything that cannot be read, rows named.
    """
    verbatim = bool(eval_set.fields) and path.suffix not in TABLES
    if not verbatim:
        return _load(path, audio_dir, allow_outside=allow_outside, strict=not eval_set.fields)
    rows = read_rows(path)
    keys, problems = [], []
    for number, row in enumerate(rows, start=1):
        found = _key(eval_set.fields, row, number)
        (problems if isinstance(found, str) else keys).append(found)
    if problems:
        raise EvalInputError(problems[:50])
    folder = audio_dir or path.parent
    if hear and not eval_set.own:
        loaded = _load(path, audio_dir, allow_outside=allow_outside, strict=False)
        clips = [example.clips for example in loaded]
    else:
        clips = [_clips(row, eval_set.fields, folder, allow_outside or not hear) for row in rows]
    used = {part for noun in USUAL for name in _names(eval_set.fields, noun) for part in name.split()}
    return [
        Example(key[0], heard, key[1], tuple(key[2]), key[3], {k: v for k, v in row.items() if k not in used})
        for key, row, heard in zip(keys, rows, clips, strict=True)
    ]


def _load(path: Path, audio_dir: Path | None, *, allow_outside: bool, strict: bool) -> list[Example]:
    from covo_rl import data

    try:
        return data.load_examples(path, audio_dir, allow_outside=allow_outside, strict=strict)
    except data.DataError as error:
        raise EvalInputError([str(error)]) from error


def _names(fields: Mapping[str, str], noun: str) -> list[str]:
    return list(dict.fromkeys([*([fields[noun]] if noun in fields else []), *USUAL[noun]]))


def _field(row: Mapping[str, Any], fields: Mapping[str, str], noun: str) -> Any:
    """The value under the first name that the row has."""
    return next((row[name] for name in _names(fields, noun) if name in row), None)


def _choices(row: Mapping[str, Any], fields: Mapping[str, str]) -> list[str] | None:
    """Options as texts; trailing absent ones of `choice_a ...` are left out. None where there is no list."""
    for name in _names(fields, "choices"):
        parts = name.split()
        if len(parts) > 1 and parts[0] in row:
            values = [row.get(part) for part in parts]
            while values and values[-1] is None:
                values.pop()
            return ["" if value is None else str(value) for value in values]
        if name in row and isinstance(row[name], list):
            return [str(value) for value in row[name]]
    return None


def _key(fields: Mapping[str, str], row: Any, number: int) -> tuple[str, str, list[str], str | None] | str:
    """(id, question, choices, answer), or what the row lacks."""
    if not isinstance(row, Mapping):
        return f"row {number} is {type(row).__name__}, not an object"
    identity, question = _field(row, fields, "id"), _field(row, fields, "question")
    choices, answer = _choices(row, fields), _field(row, fields, "answer")
    absent = [
        f"{noun} ({' or '.join(_names(fields, noun))})"
        for noun, value in (("id", identity), ("question", question), ("choices", choices))
        if value is None
    ]
    if absent or choices is None:
        return f"row {number if identity is None else identity} has no {' and no '.join(absent)}"
    text = None if answer is None or (answer == "" and "" not in choices) else str(answer)
    return str(identity), str(question), choices, text


def _clips(row: Mapping[str, Any], fields: Mapping[str, str], folder: Path, allow_outside: bool) -> tuple[Clip, ...]:
    """Clips by path, under `folder`."""
    value = _field(row, fields, "audio")
    clips = []
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, str) or not item:
            continue
        path = folder / item
        if not allow_outside and not path.resolve().is_relative_to(folder.resolve()):
            raise EvalInputError([f"row {_field(row, fields, 'id')}: {item} leaves {folder}"])
        clips.append(Clip(path=str(path)))
    return tuple(clips)
