"""One row of a file -> one Example, by its schema. Everything that is wrong with the row is said, nothing guessed."""

from __future__ import annotations

import ast
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from covo_rl.data.read import Row, printable
from covo_rl.data.schemas import EXPLICIT_ANSWERS, AnswerKind, Schema
from covo_rl.types import Clip, Example

_LETTER = re.compile(r"\(?([A-Za-z])[).:]?", re.ASCII)
_LETTER_AND_TEXT = re.compile(r"\(?([A-Z])[).:]\s*(\S.*)", re.ASCII | re.DOTALL)
#: JSON can spell them, UTF-8 cannot.
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
#: A list of options written as one string is at most this long.
_MAX_LIST = 20_000
#: Tried after the name itself when a row names a recording without a suffix (AVQA's `video_name`).
_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus")


def normalized(text: str) -> str:
    """For comparing texts: NFKC, case folded, white space collapsed, outer punctuation dropped."""
    words = unicodedata.normalize("NFKC", text).casefold().split()
    return " ".join(words).strip(" .,;:!?\"'")


class AudioFolder:
    """Resolves the audio paths of one data file, which has these `references`.

    Where no path exists as it stands but all would without their first folders (`./test-mini-audios/x.wav` with
    --audio-dir .../test-mini-audios), the same number of folders is dropped from every path.
    """

    def __init__(self, root: Path, allow_outside: bool, references: Iterable[str]) -> None:
        self.root, self.allow_outside, self.dropped = root, allow_outside, 0
        self._real_root = os.path.realpath(root)
        self._real_folder = lru_cache(maxsize=4096)(os.path.realpath)
        relative = [PurePosixPath(text).parts for text in references if _is_relative(text)]
        for count in range(max(map(len, relative), default=0)):
            shortened = [parts[count:] for parts in relative if len(parts) > count or not count]
            if any(os.path.exists(os.path.join(root, *parts)) for parts in shortened):
                self.dropped = count
                break

    def resolve(self, reference: str) -> str:
        """The path of a file.

        Raises:
            ValueError: an empty path, one with NUL or lone surrogates, or one that leaves the folder.
        """
        if not reference.strip():
            raise ValueError("its audio path is empty")
        if "\0" in reference or _LONE_SURROGATE.search(reference):
            raise ValueError(f"its audio path {reference!r} is not a path")
        parts = PurePosixPath(reference).parts
        dropped = self.dropped if _is_relative(reference) and len(parts) > self.dropped else 0
        path = os.path.join(self.root, *parts[dropped:])
        if not self.allow_outside and not self._is_inside(path):
            hint = "copy the file there or allow it (--allow-outside-audio, load_examples(..., allow_outside=True))"
            raise ValueError(f"its audio path {reference!r} leaves the audio folder {self.root}; {hint}")
        return path

    def named(self, name: str) -> str:
        """The file of a recording that is named without a suffix; `name` with .wav where none exists.

        AVQA writes `ID_000030`, its extracted audio is usually called `ID_30.wav`: both are tried.
        """
        stem, _, number = name.rpartition("_")
        names = [name, f"{stem}_{int(number)}"] if stem and number.isascii() and number.isdigit() else [name]
        paths = [self.resolve(candidate + suffix) for candidate in names for suffix in _SUFFIXES]
        return next((path for path in paths if os.path.isfile(path)), paths[0])

    def _is_inside(self, path: str) -> bool:
        # Real paths, so that neither `..` nor a link that came with the data leads out.
        folder, name = os.path.split(path)
        real = os.path.join(self._real_folder(folder), name)
        if name in ("", ".", "..") or os.path.islink(real):
            real = os.path.realpath(path)
        return os.path.commonpath([self._real_root, real]) == self._real_root


class RowReader:
    """Reads the rows of one file. `problems` collects what is wrong with the current row."""

    def __init__(self, folder: AudioFolder, strict: bool) -> None:
        self.folder, self.strict = folder, strict
        self.problems: list[str] = []

    def read(self, row: Row, schema: Schema, row_id: str) -> Example | None:
        """The example, or None with `problems` filled."""
        self.problems = []
        question_field, question = _first(row, schema.question)
        choices_field, choices = _first(row, schema.choices)
        answer_field, answer = _first(row, schema.answer)
        kinds: Sequence[AnswerKind] = schema.answers
        for name, kind in EXPLICIT_ANSWERS.items():
            if schema.name == "covo" and answer is None and row.get(name) is not None:
                answer_field, answer = name, row[name]
                kinds = (kind,)
        audio_field, audio = _audio_of(row, schema)
        used = {_first(row, schema.id)[0], question_field, choices_field, answer_field, audio_field, *schema.options}
        if isinstance(question, str) and question.strip():
            self._clean(question, "question")
        else:
            self.problems.append(f"its question ({question_field}) is {printable(question)}, not a text")
        options = [row.get(name) for name in schema.options]
        while options and (options[-1] is None or (self.strict and options[-1] == "")):
            options.pop()
        choices = self._choices(options if schema.options else choices)
        answer = self._answer(answer, kinds, choices)
        clips = []
        for item in _items(audio):
            try:
                clips.append(self._clip(item, audio_field))
            except (ValueError, TypeError, OverflowError) as error:
                self.problems.append(str(error))
        if self.problems:
            return None
        columns = {name: value for name, value in row.items() if name not in used}
        return Example(row_id, tuple(clips), question, choices, answer, columns)

    def _clean(self, text: str, what: str) -> str:
        if _LONE_SURROGATE.search(text):
            self.problems.append(f"its {what} {printable(text)} has a lone surrogate: not valid Unicode")
        return text

    def _choices(self, value: Any) -> tuple[str, ...]:
        values = _option_list(value)
        if not isinstance(values, list):
            self.problems.append(f"its choices are {printable(values)}, not a list of texts")
            return ()
        for value in values:
            if not _is_text_or_number(value) or (self.strict and not str(value).strip()):
                self.problems.append(f"its choices {printable(values)} hold {printable(value)}, not a text")
                return ()
        return tuple(self._clean(str(value), "choice") for value in values)

    def _answer(self, value: Any, kinds: Sequence[AnswerKind], choices: tuple[str, ...]) -> str | None:
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        if not _is_text_or_number(value):
            self.problems.append(f"its answer is {printable(value)}, not a text, letter or index")
            return None
        text = self._clean(str(value), "answer")
        if not choices and "text" in kinds and not (kinds[0] == "index" and isinstance(value, int)):
            return text
        for kind in kinds:
            choice = _choice(value, kind, choices, explicit=len(kinds) == 1)
            if choice is not None:
                return choice if self.strict or kind != "text" else text
        if not self.strict and "text" in kinds and isinstance(value, str):
            return text
        listed = printable(list(choices), 200) if choices else "it has no choices"
        hint = ""
        if "letter" not in kinds and isinstance(value, str) and _LETTER.fullmatch(value.strip()):
            hint = "; if it is a letter, read the file with format covo"
        elif "index" not in kinds and isinstance(value, int):
            hint = "; call the field answer_index if it counts from 0"
        what = f"its answer {printable(value)} is not among the choices ({listed}), read as {' or '.join(kinds)}{hint}"
        self.problems.append(what)
        return None

    def _clip(self, item: Any, field: str | None) -> Clip:
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


def audio_references(row: Row, schema: Schema) -> list[str]:
    """The audio paths of a row as they stand in the file."""
    field, value = _audio_of(row, schema)
    items = _items(value) if field != "video_name" else ()
    paths = [item.get("path") if isinstance(item, Mapping) and not item.get("bytes") else item for item in items]
    return [path for path in paths if isinstance(path, str)]


def row_id(row: Row, schema: Schema) -> str | None:
    """The id of a row as text; None where it has none. ValueError where it is no id."""
    _, value = _first(row, schema.id)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        raise ValueError(f"its id is {printable(value)}, not a text or whole number")
    if _LONE_SURROGATE.search(str(value)):
        raise ValueError(f"its id {printable(value)} has a lone surrogate: not valid Unicode")
    return str(value)


def _first(row: Row, names: Sequence[str]) -> tuple[str | None, Any]:
    """(name, value) of the first of the names that the row has, one with a value if there is any."""
    present = [name for name in names if name in row]
    name = next((name for name in present if row[name] is not None), present[0] if present else None)
    return name, None if name is None else row[name]


def _audio_of(row: Row, schema: Schema) -> tuple[str | None, Any]:
    """(name, value) of the field that holds the sound itself, else of the first that names a file."""
    sounds = [name for name in schema.audio if isinstance(row.get(name), Mapping)]
    sounds = [name for name in sounds if any(row[name].get(key) is not None for key in ("bytes", "array"))]
    return _first(row, sounds or schema.audio)


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else () if value is None else (value,)


def _is_text_or_number(value: object) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def _option_list(value: Any) -> Any:
    """A list of options; also {"A": ..., "B": ...} and a list written as one string. Anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("[") and len(value) <= _MAX_LIST:
        # Literals only: nothing is evaluated.
        for parse, text in ((json.loads, value), (ast.literal_eval, value.strip())):
            try:
                return parse(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                pass
    if isinstance(value, Mapping):
        letters = [chr(ord("A") + i) for i in range(len(value))]
        return list(value.values()) if len(value) <= 26 and list(value) == letters else value
    return list(value or ()) if value is None or isinstance(value, tuple) else value


def _choice(value: Any, kind: AnswerKind, choices: tuple[str, ...], *, explicit: bool) -> str | None:
    """The choice that a value stands for under one reading, or None."""
    if kind == "index":
        digits = isinstance(value, str) and explicit and value.isascii() and value.isdigit() and len(value) < 4
        number = int(value) if digits or isinstance(value, int) else -1
        return choices[number] if 0 <= number < len(choices) else None
    text = str(value)
    if kind == "text":
        same = [text] if text in choices else [choice for choice in choices if normalized(choice) == normalized(text)]
        return same[0] if len(same) == 1 else None
    letter = _LETTER.fullmatch(text.strip())
    match = letter or _LETTER_AND_TEXT.fullmatch(text.strip())
    place = ord(match[1].upper()) - ord("A") if match else len(choices)
    if match is None or place >= len(choices):
        return None
    return choices[place] if letter or normalized(choices[place]) == normalized(match[2]) else None


def _is_relative(reference: str) -> bool:
    path, is_text = PurePosixPath(reference), "\0" not in reference and not _LONE_SURROGATE.search(reference)
    return is_text and not path.is_absolute() and ".." not in path.parts
