"""Rows of speech: a recording, its text, the times of its words, its codes. All that is wrong is said at once.

    {"id": "a1", "audio": "a1.wav", "text": "one two", "language": "en", "speaker": "anna", "document": "d",
     "position": 0, "words": [["one", 0.1, 0.4], ["two", 0.5, 0.8]], "codes": [17, 3], "tokenizer": "9c0e..."}

Only `id` is always needed; `codes` is a list or the path of a one-dimensional .npy file of whole numbers, and
`tokenizer` the digest of the tokenizer that made them (`covo-rl speech encode` writes both).
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from covo_rl.audio import AudioError, decode, resample, resampled_length, stored_length
from covo_rl.data.files import json_line, write_atomically
from covo_rl.data.folder import AudioFolder
from covo_rl.data.load import audio_root
from covo_rl.data.read import DataError, Problem, Row, printable
from covo_rl.data.sources import read_rows, source_name
from covo_rl.models.covo_audio.persona import persona_problems
from covo_rl.models.text import unfit
from covo_rl.speech.grid import CODE_SECONDS, RATE, count_codes
from covo_rl.types import Clip

if TYPE_CHECKING:
    from covo_rl.data.memory import Source

_TEXTS = ("text", "language", "speaker", "document", "tokenizer")
#: what a row may be asked for -> how to get it
_MISSING = {
    "audio": "no audio", "text": "no text", "words": "no words: `covo-rl speech align` adds them",
    "codes": "no codes: `covo-rl speech encode` adds them",
}  # fmt: skip


#: said of the second row with an id
SAME_ID = "another row has this id"


@dataclass(frozen=True)
class SpeechRow:
    """One utterance. codes: (L,) int64 or None; words: (text, start, end) in seconds, in order, or None.

    `source` is the row as it stands in the file.
    """

    id: str
    text: str = ""
    clip: Clip | None = None
    language: str | None = None
    speaker: str | None = None
    document: str | None = None
    position: int | None = None
    words: tuple[tuple[str, float, float], ...] | None = None
    codes: np.ndarray | None = None
    source: Mapping[str, Any] = field(default_factory=dict)

    def wave(self) -> np.ndarray:
        """Its recording at 24 kHz, (T,) float32.

        Raises:
            AudioError: it cannot be read, or its words end beyond it.
        """
        if self.clip is None:
            raise AudioError(f"{self.id}: the row has no audio")
        wave_T = resample(*decode(self.clip), RATE)
        self._check_words(self.clip, len(wave_T))
        return wave_T

    def code_count(self) -> int:
        """How many codes its recording fills. Without codes the head of its file says it; others are decoded.

        Raises:
            AudioError: it has neither codes nor a recording that can be read, or its words end beyond it.
        """
        if self.codes is not None:
            return len(self.codes)
        length = None if self.clip is None else stored_length(self.clip)
        if self.clip is None or length is None:
            return count_codes(len(self.wave()))
        samples = resampled_length(*length, RATE)
        self._check_words(self.clip, samples)
        return count_codes(samples)

    def _check_words(self, clip: Clip, samples: int) -> None:
        if self.words and (beyond := _beyond(self.words, samples / RATE)):
            raise AudioError(f"{clip.name}: {beyond}")


def read_speech_rows(
    source: Source,
    audio_dir: str | Path | None = None,
    *,
    needs: Collection[str] = (),
    codebook: int | None = None,
    tokenizer: str | None = None,
) -> list[SpeechRow]:
    """All rows of a JSONL file, or of whatever `load_examples` reads.

    Args:
        audio_dir: folder of the paths; default: that of the file.
        needs: which of audio, text, words, codes every row must have.
        codebook: how many codes there are; others are refused.
        tokenizer: digest of the tokenizer that must have made the codes.

    Raises:
        DataError: every problem of every row.
    """
    rows = read_rows(source)
    paths = [row[name] for row in rows for name in ("audio", "codes") if isinstance(row.get(name), str)]
    folder = AudioFolder(audio_root(source, audio_dir), False, paths)
    reader = SpeechRowReader(folder, needs, codebook, tokenizer)
    speech = [reader.read(number, row) for number, row in enumerate(rows, 1)]
    if reader.problems:
        raise DataError(source_name(source), reader.problems)
    return speech


def named_row(number: int | str, row: Row) -> tuple[str, list[str]]:
    """The id of a row as text, and what is wrong with it; it is `row {number}` where the row has none."""
    id = row.get("id")
    if isinstance(id, (str, int)) and not isinstance(id, bool) and str(id).strip():
        why = unfit(str(id))
        return (f"row {number}", [f"its id {why}; remove it"]) if why else (str(id), [])
    missing = id is None or (isinstance(id, str) and not id.strip())
    what = "it has no id" if missing else f"its id is {printable(id)}, not a text or whole number"
    return f"row {number}", [what]


def load_waves(rows: Iterable[SpeechRow], source: str = "rows") -> dict[str, np.ndarray]:
    """Row id -> its wave at 24 kHz.

    Raises:
        DataError: every recording that cannot be used.
    """
    waves, problems = {}, []
    for row in rows:
        try:
            waves[row.id] = row.wave()
        except AudioError as error:
            problems.append(Problem(row.id, str(error)))
    if problems:
        raise DataError(source, problems)
    return waves


def recording_problems(rows: Iterable[SpeechRow]) -> list[Problem]:
    """What is wrong with the recordings of rows, each of which is read: training asks before it begins."""
    problems = []
    for row in rows:
        try:
            length = count_codes(len(row.wave()))
            if row.codes is not None and len(row.codes) != length:
                problems.append(Problem(row.id, f"{len(row.codes)} codes, its audio has {length}: encode it again"))
        except AudioError as error:
            problems.append(Problem(row.id, str(error)))
    return problems


def write_speech_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, whole or not at all."""
    write_atomically(Path(path), lambda file: file.writelines(map(json_line, rows)))


class SpeechRowReader:
    """Reads rows and notes what is wrong with them: `problems`.

    `needs`: which of audio, text, words, codes every row must have; voice: a speaker and an emotion, if it has them,
    that a system message can name. With `unique` no two of them may have the same id, so all ids are kept.
    """

    def __init__(
        self, folder: AudioFolder, needs: Collection[str] = (), codebook: int | None = None,
        tokenizer: str | None = None, *, unique: bool = True,
    ) -> None:  # fmt: skip
        self.folder, self.needs, self.codebook, self.tokenizer = folder, frozenset(needs), codebook, tokenizer
        self.unique = unique
        self.problems: list[Problem] = []
        self.ids: set[str] = set()

    def read(self, number: int | str, row: Row) -> SpeechRow:
        """A row, named `row {number}` where it has no id; whatever is wrong with it is left out of it."""
        name, wrong = named_row(number, row)
        if self.unique:
            wrong += [SAME_ID] * (name in self.ids)
            self.ids.add(name)
        wrong += [f"its {key} is {printable(row[key])}, not a text" for key in _TEXTS
                  if not isinstance(row.get(key, ""), str | None)]  # fmt: skip
        written = [(key, row[key]) for key in _TEXTS if isinstance(row.get(key), str)]
        wrong += [f"its {key} {why}; remove it" for key, text in written if (why := unfit(text))]
        position = row.get("position")
        if position is not None and type(position) is not int:
            wrong.append(f"its position is {printable(position)}, not a whole number")
        values = {}
        for key, read in (("audio", self._audio), ("words", _words), ("codes", self._codes)):
            try:
                values[key] = None if row.get(key) is None else read(row[key])
            except (ValueError, OSError) as error:
                wrong.append(str(error))
        wrong += self._together(row, values)
        if "voice" in self.needs:
            speaker = row.get("speaker")
            wrong += persona_problems(speaker if isinstance(speaker, str) else None, row.get("emotion"))
        self.problems += [Problem(name, what) for what in wrong]
        texts = {key: row.get(key) for key in ("language", "speaker", "document")}
        words, codes = values.get("words"), values.get("codes")
        text, clip = row.get("text") or "", values.get("audio")
        return SpeechRow(name, text, clip, **texts, position=position, words=words, codes=codes, source=row)

    def _together(self, row: Row, values: Mapping[str, Any]) -> list[str]:
        """What is missing, and what does not fit together."""
        present = {"text": str(row.get("text") or "").strip(), **{key: row.get(key) for key in values}}
        wrong = [
            f"it has {what}"
            for key, what in _MISSING.items()
            if key in self.needs and present.get(key, 1) in (None, "")
        ]
        codes, words = values.get("codes"), values.get("words")
        if codes is None:
            return wrong
        if not present["text"] and "text" not in self.needs:
            wrong.append("it has codes and no text: what do they say?")
        if words and (beyond := _beyond(words, len(codes) * CODE_SECONDS)):
            wrong.append(beyond)
        if self.tokenizer and row.get("tokenizer") != self.tokenizer:
            other = printable(row["tokenizer"]) if row.get("tokenizer") else "an unnamed one"
            wrong.append(f"its codes are of another tokenizer ({other}, not {self.tokenizer!r}): encode the rows again")
        return wrong

    def _audio(self, value: Any) -> Clip:
        if not isinstance(value, str):
            raise ValueError(f"its audio is {printable(value)}, not a path")
        return Clip(path=self._file(value))

    def _codes(self, value: Any) -> np.ndarray:
        codes = _load_codes(self._file(value), value) if isinstance(value, str) else value
        if isinstance(codes, list):
            strange = next((code for code in codes if type(code) is not int or abs(code) >= 2**62), None)
            if strange is not None:
                raise ValueError(f"its codes hold {printable(strange)}, not a whole number")
            codes = np.array(codes, dtype=np.int64)
        if not isinstance(codes, np.ndarray):
            raise ValueError(f"its codes are {printable(codes)}, neither a list nor the path of a .npy file")
        if not len(codes):
            raise ValueError("its codes are empty: a recording has at least one")
        outside = np.flatnonzero((codes < 0) | (codes >= (self.codebook or np.inf)))
        if len(outside):
            limit = f"0 to {self.codebook - 1}" if self.codebook else "none below 0"
            raise ValueError(f"its code {codes[outside[0]]} at position {outside[0]}: there are {limit}")
        return codes

    def _file(self, name: str) -> str:
        path = self.folder.resolve(name)
        if not os.path.isfile(path):
            raise ValueError(f"there is no file {path}" + (f"; {self.folder.hint}" if self.folder.hint else ""))
        return path


def _load_codes(path: str, name: str) -> np.ndarray:
    try:  # mapped, so that a header cannot ask for more than the file holds
        codes = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"its codes {name!r} are no .npy file: {error}") from error
    if not isinstance(codes, np.ndarray) or codes.ndim != 1 or codes.dtype.kind not in "iu":
        what = f"{codes.dtype} {codes.shape}" if isinstance(codes, np.ndarray) else type(codes).__name__
        raise ValueError(f"its codes {name!r} are {what}, not one row of whole numbers")
    return np.array(codes).astype(np.int64)


def _words(value: Any) -> tuple[tuple[str, float, float], ...]:
    words, before = [], 0.0
    for item in value if isinstance(value, list) else [value]:
        if not (isinstance(item, (list, tuple)) and len(item) == 3 and isinstance(item[0], str)
                and all(type(second) in (int, float) and math.isfinite(second) for second in item[1:])):  # fmt: skip
            raise ValueError(f"its words hold {printable(item)}, not [text, start, end] in seconds")
        text, start, end = item
        if not before - 1e-6 <= start <= end:
            raise ValueError(f"its word {printable(text)} from {start} to {end} s: words follow one another in time")
        words.append((text, float(start), float(end)))
        before = end
    return tuple(words)


def _beyond(words: Sequence[tuple[str, float, float]], seconds: float) -> str:
    """Rounding of a word's end is allowed, up to the end of the last code."""
    text, _, end = words[-1]
    return (
        f"its word {printable(text)} ends at {end} s, the clip at {seconds:.2f} s"
        if end > seconds + CODE_SECONDS
        else ""
    )
