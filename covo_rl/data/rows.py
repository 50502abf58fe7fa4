"""One row of a file -> one Example, by its schema. Everything that is wrong with the row is said, nothing guessed."""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from covo_rl.data.paths import AudioFolder, encodable
from covo_rl.data.problems import printable
from covo_rl.data.schemas import EXPLICIT_ANSWERS, AnswerKind, Schema
from covo_rl.types import Clip, Example

_LETTER = re.compile(r"\(?([A-Za-z])[).:]?", re.ASCII)
_LETTER_AND_TEXT = re.compile(r"\(?([A-Z])[).:]\s*(\S.*)", re.ASCII | re.DOTALL)
#: A list of options written as one string is at most this long.
_MAX_LIST = 20_000


def normalized(text: str) -> str:
    """For comparing texts: NFKC, case folded, white space collapsed, outer punctuation dropped."""
    words = unicodedata.normalize("NFKC", text).casefold().split()
    return " ".join(words).strip(" .,;:!?\"'")


class RowReader:
    """Reads the rows of one file. `problems` collects what is wrong with the current row."""

    def __init__(self, folder: AudioFolder, strict: bool) -> None:
        self.folder, self.strict = folder, strict
        self.problems: list[str] = []

    def read(self, row: Mapping[str, Any], schema: Schema, row_id: str) -> Example | None:
        """The example, or None with `problems` filled."""
        self.problems = []
        question = self._text(row, schema.question, "question")
        choices = self._choices(row, schema)
        answer_field, kinds = _answer_field(row, schema)
        answer = self._answer(row.get(answer_field), kinds, choices) if answer_field else None
        audio_field = _audio_field(row, schema)
        clips = self._clips(row.get(audio_field), audio_field) if audio_field else ()
        if self.problems:
            return None
        used = {answer_field, audio_field, _first(row, schema.id), _first(row, schema.question)}
        used |= {_first(row, schema.choices)} | set(schema.options)
        columns = {name: value for name, value in row.items() if name not in used}
        return Example(row_id, clips, question, choices, answer, columns)

    def _text(self, row: Mapping[str, Any], names: Sequence[str], what: str) -> str:
        field = _first(row, names)
        value = row.get(field) if field else None
        if not isinstance(value, str) or not value.strip():
            self.problems.append(f"its {what} ({field or ' or '.join(names)}) is {printable(value)}, not a text")
            return ""
        return self._clean(value, what)

    def _clean(self, text: str, what: str) -> str:
        if not encodable(text):
            self.problems.append(f"its {what} {printable(text)} has a lone surrogate: not valid Unicode")
        return text

    def _choices(self, row: Mapping[str, Any], schema: Schema) -> tuple[str, ...]:
        if schema.options:
            values: Any = [row.get(name) for name in schema.options]
            while values and (values[-1] is None or (self.strict and values[-1] == "")):
                values.pop()
        else:
            field = _first(row, schema.choices)
            values = _option_list(row.get(field)) if field else []
        if not isinstance(values, list):
            self.problems.append(f"its choices are {printable(values)}, not a list of texts")
            return ()
        wrong = [
            value
            for value in values
            if not isinstance(value, (str, int, float))
            or isinstance(value, bool)
            or (self.strict and not str(value).strip())
        ]
        if wrong:
            self.problems.append(f"its choices {printable(values)} hold {printable(wrong[0])}, not a text")
            return ()
        return tuple(self._clean(str(value), "choice") for value in values)

    def _answer(self, value: Any, kinds: Sequence[AnswerKind], choices: tuple[str, ...]) -> str | None:
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            self.problems.append(f"its answer is {printable(value)}, not a text, letter or index")
            return None
        text = self._clean(str(value), "answer")
        if not choices and "text" in kinds and not (kinds[0] == "index" and isinstance(value, int)):
            return text
        for kind in kinds:
            found = _resolve(value, kind, choices, explicit=len(kinds) == 1)
            if found is not None:
                return found if self.strict or kind != "text" else text
        if not self.strict and "text" in kinds and isinstance(value, str):
            return text
        self.problems.append(_not_among(value, kinds, choices))
        return None

    def _clips(self, value: Any, field: str) -> tuple[Clip, ...]:
        items = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        clips = []
        for item in items:
            try:
                clips.append(self._clip(item, field))
            except (ValueError, TypeError, OverflowError) as error:
                self.problems.append(str(error))
        return tuple(clips)

    def _clip(self, item: Any, field: str) -> Clip:
        if isinstance(item, str):
            return Clip(path=self.folder.named(item) if field == "video_name" else self.folder.resolve(item))
        if isinstance(item, (bytes, bytearray)):
            return Clip(data=bytes(item))
        if isinstance(item, Mapping):
            if isinstance(item.get("bytes"), (bytes, bytearray)):
                return Clip(data=bytes(item["bytes"]))
            if isinstance(item.get("array"), (list, np.ndarray)):
                return Clip(array=np.asarray(item["array"], dtype=np.float32), sampling_rate=item.get("sampling_rate"))
            if isinstance(item.get("path"), str):
                return Clip(path=self.folder.resolve(item["path"]))
        raise ValueError(f"its audio ({field}) is {printable(item)}, not a path, bytes, or an object with one of them")


def audio_references(row: Mapping[str, Any], schema: Schema) -> list[str]:
    """The audio paths of a row as they stand in the file."""
    field = _audio_field(row, schema)
    value = row.get(field) if field and field != "video_name" else None
    items = value if isinstance(value, (list, tuple)) else [value]
    paths = [item.get("path") if isinstance(item, Mapping) and not item.get("bytes") else item for item in items]
    return [path for path in paths if isinstance(path, str)]


def row_id(row: Mapping[str, Any], schema: Schema) -> str | None:
    """The id of a row as text; None where it has none. ValueError where it is no id."""
    field = _first(row, schema.id)
    value = row.get(field) if field else None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        raise ValueError(f"its id is {printable(value)}, not a text or whole number")
    if not encodable(str(value)):
        raise ValueError(f"its id {printable(value)} has a lone surrogate: not valid Unicode")
    return str(value)


def has_fields(row: Mapping[str, Any], schema: Schema) -> list[str]:
    """What a row lacks for a schema, as texts."""
    lacks = [names for names in (schema.question, schema.audio) if not _first(row, names)]
    missing = [" or ".join(names) for names in lacks]
    if schema.options:
        missing += [name for name in schema.options[:2] if name not in row]
    elif schema.name != "covo" and not _first(row, schema.choices):
        missing.append(" or ".join(schema.choices))
    return missing


def _first(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of the names that the row has, one with a value if there is any."""
    present = [name for name in names if name in row]
    return next((name for name in present if row[name] is not None), present[0] if present else None)


def _audio_field(row: Mapping[str, Any], schema: Schema) -> str | None:
    """The field that holds the sound itself, else the first that names a file."""
    for name in schema.audio:
        if isinstance(row.get(name), Mapping) and any(row[name].get(k) is not None for k in ("bytes", "array")):
            return name
    return _first(row, schema.audio)


def _answer_field(row: Mapping[str, Any], schema: Schema) -> tuple[str | None, Sequence[AnswerKind]]:
    field = _first(row, schema.answer)
    if schema.name == "covo" and (field is None or row[field] is None):
        for name, kind in EXPLICIT_ANSWERS.items():
            if row.get(name) is not None:
                return name, (kind,)
    return field, schema.answers


def _option_list(value: Any) -> Any:
    """A list of options; also {"A": ..., "B": ...} and a list written as one string."""
    if isinstance(value, str) and value.lstrip().startswith("[") and len(value) <= _MAX_LIST:
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            try:
                # Literals only: nothing is evaluated.
                return ast.literal_eval(value.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                return value
    if isinstance(value, Mapping):
        letters = [chr(ord("A") + i) for i in range(len(value))]
        if len(value) <= 26 and list(value) == letters:
            return list(value.values())
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else value


def _resolve(value: Any, kind: AnswerKind, choices: tuple[str, ...], *, explicit: bool) -> str | None:
    """The choice that a value stands for under one reading, or None."""
    if kind == "index":
        digits = isinstance(value, str) and explicit and value.isascii() and value.isdigit() and len(value) < 4
        number = int(value) if digits or isinstance(value, int) else -1
        return choices[number] if 0 <= number < len(choices) else None
    text = str(value)
    if kind == "text":
        if text in choices:
            return text
        same = [choice for choice in choices if normalized(choice) == normalized(text)]
        return same[0] if len(same) == 1 else None
    letter = _LETTER.fullmatch(text.strip())
    if letter:
        place = ord(letter[1].upper()) - ord("A")
        return choices[place] if place < len(choices) else None
    both = _LETTER_AND_TEXT.fullmatch(text.strip())
    place = ord(both[1]) - ord("A") if both else len(choices)
    agrees = both is not None and place < len(choices) and normalized(choices[place]) == normalized(both[2])
    return choices[place] if agrees else None


def _not_among(value: Any, kinds: Sequence[AnswerKind], choices: tuple[str, ...]) -> str:
    listed = printable(list(choices), 200) if choices else "it has no choices"
    read = " or ".join(kinds)
    hint = ""
    if "letter" not in kinds and isinstance(value, str) and _LETTER.fullmatch(value.strip()):
        hint = "; if it is a letter, read the file with format covo"
    elif "index" not in kinds and isinstance(value, int):
        hint = "; call the field answer_index if it counts from 0"
    return f"its answer {printable(value)} is not among the choices ({listed}), read as {read}{hint}"
