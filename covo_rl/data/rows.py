"""One row of a file -> one Example, by its schema. Everything that is wrong with the row is said, nothing guessed."""

from __future__ import annotations

import ast
import io
import json
import math
import os
import re
import tokenize
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from covo_rl.data.folder import LONE_SURROGATE, AudioFolder
from covo_rl.data.read import Row, printable
from covo_rl.data.schemas import AnswerKind, Schema
from covo_rl.types import Clip, Example

_LETTER = re.compile(r"\(?([A-Za-z])[).:]?", re.ASCII)
_LETTER_AND_TEXT = re.compile(r"\(?([A-Z])[).:]\s*(\S.*)", re.ASCII | re.DOTALL)
_PLACE = re.compile(r"(\d{1,3})(?:\.0)?", re.ASCII)
#: Columns that show what a model here cannot see; `--columns audio=video` hears the sound of one.
PICTURES = ("image", "images", "video", "videos")
#: Characters of a list as Python writes it, whose parser is slow and deep.
_MAX_LITERAL = 20_000


def normalized(text: str) -> str:
    """For comparing texts: NFKC, case folded, white space collapsed, outer punctuation dropped."""
    words = unicodedata.normalize("NFKC", text).casefold().split()
    return " ".join(words).strip(" .,;:!?\"'")


class RowReader:
    """Reads the rows of one file. `problems` collects what is wrong with the current row; `bases`: see answers.py."""

    def __init__(self, folder: AudioFolder, strict: bool, bases: Mapping[str, int | None]) -> None:
        self.folder, self.strict, self.bases = folder, strict, bases
        self.problems: list[str] = []

    def read(self, row: Row, schema: Schema, row_id: str) -> Example | None:
        """The example, or None with `problems` filled."""
        self.problems = []
        question_field, question = first_value(row, schema.question)
        choices_field, choices = first_value(row, schema.choices)
        answer_field, answer, kinds = answer_of(row, schema)
        audio_field, audio = _audio_of(row, schema)
        id_field, _ = first_value(row, schema.id)
        system_field, system = first_value(row, schema.system_prompt)
        used = {id_field, question_field, choices_field, answer_field, audio_field, system_field, *schema.options}
        for name in PICTURES:
            if name not in used and not _is_empty(row.get(name)):
                what = "which no prompt can hold here: drop the column where the sound alone can answer"
                self.problems.append(f"it has {name} ({printable(row[name])}), {what}")
        if isinstance(question, str) and question.strip():
            self._clean(question, "question")
        else:
            self.problems.append(f"its question ({question_field}) is {printable(question)}, not a text")
        if system is not None and not isinstance(system, str):
            self.problems.append(f"its system message ({system_field}) is {printable(system)}, not a text")
        options = [row.get(name) for name in schema.options]
        while options and (options[-1] is None or (self.strict and options[-1] == "")):
            options.pop()
        choices = self._choices(options if schema.options else choices)
        answer = self._answer(answer, kinds, choices, self.bases.get(answer_field or "", 0))
        clips = []
        for item in _items(audio):
            try:
                clips.append(self._clip(item, audio_field))
            except (ValueError, TypeError, OverflowError, RuntimeError) as error:  # the last of tensors and decoders
                self.problems.append(str(error))
                if isinstance(item, (int, float)):  # samples, thousands of them
                    break
        if self.problems:
            return None
        columns = {name: value for name, value in row.items() if name not in used - schema.renamed}
        system = self._clean(system, "system message") if system and system.strip() else None
        return Example(row_id, tuple(clips), question, choices, answer, columns, system)

    def _clean(self, text: str, what: str) -> str:
        if LONE_SURROGATE.search(text):
            self.problems.append(f"its {what} {printable(text)} has a lone surrogate: not valid Unicode")
        return text

    def _choices(self, value: Any) -> tuple[str, ...]:
        values = option_list(value)
        if not isinstance(values, list):
            self.problems.append(f"its choices are {printable(values)}, not a list of texts")
            return ()
        for value in values:
            if not _is_text_or_number(value) or (self.strict and not str(value).strip()):
                self.problems.append(f"its choices {printable(values)} hold {printable(value)}, not a text")
                return ()
        return tuple(self._clean(str(value), "choice") for value in values)

    def _answer(
        self, value: Any, kinds: Sequence[AnswerKind], choices: tuple[str, ...], base: int | None
    ) -> str | None:
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        if not _is_text_or_number(value):
            hint = "; what is missing is None (hand in pandas' frame itself)" if value != value else ""
            self.problems.append(f"its answer is {printable(value)}, not a text, letter or index{hint}")
            return None
        text = self._clean(str(value), "answer")
        if not choices and "text" in kinds and not (kinds[0] == "index" and isinstance(value, int)):
            return text
        readings, number = kinds, place_number(value, kinds)
        if number is not None:  # never one row by its place and the next by its text
            readings = ("text",) if base is None else ("index",)
        for kind in readings:
            choice = _choice(number - (base or 0) if number is not None else value, kind, choices)
            if choice is not None:
                return choice if self.strict or kind != "text" else text
        if not self.strict and "text" in kinds and isinstance(value, str):
            return text
        listed = printable(list(choices), 200) if choices else "it has no choices"
        hint = ""
        if "letter" not in kinds and isinstance(value, str) and _LETTER.fullmatch(value.strip()):
            hint = "; if it is a letter, read the file with format covo"
        elif number is not None:
            hint = f"; places count from {base or 0}: if those of this set do not, write the texts of the options"
        elif isinstance(value, (int, str)) and str(value).isdigit() and kinds != ("index",):
            hint = "; call the field answer_index if it counts from 0"
        what = f"its answer {printable(value)} is not among the choices ({listed}), read as {' or '.join(kinds)}{hint}"
        self.problems.append(what)
        return None

    def _clip(self, item: Any, field: str | None) -> Clip:
        if isinstance(item, os.PathLike):
            item = os.fspath(item)
        if isinstance(item, str):
            return Clip(path=self.folder.named(item) if field == "video_name" else self.folder.resolve(item))
        if isinstance(item, (bytes, bytearray)):
            return Clip(data=bytes(item))
        if hasattr(item, "get_all_samples"):  # torchcodec's decoder, which `datasets` makes of an Audio column
            samples = item.get_all_samples()
            return Clip(array=_waveform(samples.data), sampling_rate=samples.sample_rate)
        if isinstance(item, Mapping):
            if isinstance(item.get("bytes"), (bytes, bytearray)):
                return Clip(data=bytes(item["bytes"]))
            if isinstance(item.get("array"), list) or hasattr(item.get("array"), "__array__"):
                rate: Any = item.get("sampling_rate")
                rate = rate.item() if hasattr(rate, "item") else rate
                return Clip(array=_waveform(item["array"]), sampling_rate=rate)
            if isinstance(item.get("path"), (str, os.PathLike)):
                return Clip(path=self.folder.resolve(os.fspath(item["path"])))
        is_samples = isinstance(item, (int, float, np.ndarray))
        hint = '; samples need their rate: {"array": ..., "sampling_rate": ...}' * is_samples
        what = f"its audio ({field}) is {printable(item)}, not a path, bytes, or an object with one of them"
        raise ValueError(what + hint)


def _waveform(values: Any) -> np.ndarray:
    """A copy of the samples, (samples,) or (samples, channels), also of (channels, samples) where the shape tells.

    Raises:
        ValueError: which axis holds the channels is unclear.
    """
    array = np.asarray(values, dtype=np.float32 if isinstance(values, list) else None).copy()
    if array.ndim != 2:
        return array
    few = [axis for axis, size in enumerate(array.shape) if size in (1, 2)]
    if len(few) != 1:
        what = f"its audio is an array of shape {array.shape}: (samples,), (samples, channels) and (channels, samples) "
        raise ValueError(what + "are read, with one or two channels and more samples")
    return array if few == [1] else np.ascontiguousarray(array.T)


def audio_references(row: Row, schema: Schema) -> list[str]:
    """The audio paths of a row as they stand in the file."""
    field, value = _audio_of(row, schema)
    items = _items(value) if field != "video_name" else ()
    paths = [item.get("path") if isinstance(item, Mapping) and not item.get("bytes") else item for item in items]
    return [os.fspath(path) for path in paths if isinstance(path, (str, os.PathLike))]


def row_id(row: Row, schema: Schema) -> str | None:
    """The id of a row as text; None where it has none. ValueError where it is no id."""
    _, value = first_value(row, schema.id)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        raise ValueError(f"its id is {printable(value)}, not a text or whole number")
    if LONE_SURROGATE.search(str(value)):
        raise ValueError(f"its id {printable(value)} has a lone surrogate: not valid Unicode")
    return str(value)


def answer_of(row: Row, schema: Schema) -> tuple[str | None, Any, Sequence[AnswerKind]]:
    """(field, value, how it may be read) of a row's answer."""
    field, value = first_value(row, schema.answer)
    for name, kind in schema.explicit.items():
        if value is None and row.get(name) is not None:
            return name, row[name], (kind,)
    return field, value, schema.answers


def place_number(value: Any, kinds: Sequence[AnswerKind]) -> int | None:
    """The number of an answer that may be the place of an option; digits are one where nothing else is meant.

    There 1.0 is 1: pandas makes such numbers of a column in which one is missing.
    """
    if kinds == ("index",) and isinstance(value, (str, float)) and (match := _PLACE.fullmatch(str(value))):
        return int(match[1])
    return value if "index" in kinds and isinstance(value, int) and not isinstance(value, bool) else None


def first_value(row: Row, names: Sequence[str]) -> tuple[str | None, Any]:
    """(name, value) of the first of the names that the row has, one with a value if there is any."""
    present = [name for name in names if name in row]
    name = next((name for name in present if row[name] is not None), present[0] if present else None)
    return name, None if name is None else row[name]


def _audio_of(row: Row, schema: Schema) -> tuple[str | None, Any]:
    """(name, value) of the field that holds the sound itself, else of the first that names a file."""
    sounds = [name for name in schema.audio if isinstance(row.get(name), Mapping)]
    sounds = [name for name in sounds if any(row[name].get(key) is not None for key in ("bytes", "array"))]
    return first_value(row, sounds or schema.audio)


def _is_empty(value: Any) -> bool:
    """None, "", [], and the NaN that pandas makes of a missing value."""
    has_length = isinstance(value, (str, bytes, list, tuple, Mapping, np.ndarray))
    return value is None or (isinstance(value, float) and math.isnan(value)) or (has_length and len(value) == 0)


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else () if value is None else (value,)


def _is_text_or_number(value: object) -> bool:
    is_number = isinstance(value, float) and math.isfinite(value)
    return is_number or (isinstance(value, (str, int)) and not isinstance(value, bool))


def option_list(value: Any) -> Any:
    """A list of options; also {"A": ..., "B": ...} and a list written as one string. Anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        # Literals only: nothing is evaluated.
        for parse, text in ((json.loads, value), (ast.literal_eval, value.strip())):
            try:
                if parse is json.loads or (len(text) <= _MAX_LITERAL and not _joins_texts(text)):
                    return parse(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
                pass
    if isinstance(value, Mapping):
        letters = [chr(ord("A") + i) for i in range(len(value))]
        return list(value.values()) if len(value) <= 26 and list(value) == letters else value
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return value.tolist()
    return list(value or ()) if value is None or isinstance(value, tuple) else value


def _joins_texts(literal: str) -> bool:
    """Whether texts follow one another without a comma, as numpy writes an array: Python makes one text of them."""
    kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(literal).readline) if token.string.strip()]
    return (tokenize.STRING, tokenize.STRING) in pairwise(kinds)


def _choice(value: Any, kind: AnswerKind, choices: tuple[str, ...]) -> str | None:
    """The choice that a value stands for under one reading, or None."""
    if kind == "index":
        return choices[value] if isinstance(value, int) and 0 <= value < len(choices) else None
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
