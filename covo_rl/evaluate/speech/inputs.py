"""Everything that a speech evaluation reads, checked together before anything runs: rows, clips, replies."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from covo_rl.data.files import file_sha256
from covo_rl.evaluate.inputs import clip_problems, count_rows
from covo_rl.evaluate.sets import EvalInputError
from covo_rl.evaluate.speech.predictions import read_spoken_predictions
from covo_rl.evaluate.speech.reading import SetReader, problem_lines
from covo_rl.evaluate.speech.rows import GivenReply, SpeechItem
from covo_rl.evaluate.speech.sets import KINDS, SpeechSet, Subset
from covo_rl.resolve import meant
from covo_rl.types import Example


@dataclass(frozen=True)
class SpeechInputs:
    """Rows of a speech set, and replies where they come from files. `meta` goes into the report.

    `subsets` are those that have rows, also such as only the rows name; `replies` are by `SpeechItem.name`; `caveats`
    say by sub-set why a model was not asked as the published ones were.
    """

    speech_set: SpeechSet
    data: Path
    subsets: Mapping[str, Subset]
    rows: tuple[SpeechItem, ...]
    replies: Mapping[str, GivenReply] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    caveats: Mapping[str, str] = field(default_factory=dict)

    def by_subset(self) -> dict[str, list[SpeechItem]]:
        """The rows of each sub-set, in the order of the files."""
        rows: dict[str, list[SpeechItem]] = {name: [] for name in self.subsets}
        for row in self.rows:
            rows[row.subset].append(row)
        return rows

    def reply(self, row: SpeechItem) -> GivenReply | None:
        """The reply to a row; None where it is missing."""
        return (self.replies or {}).get(row.name)

    def missing(self) -> dict[str, list[str]]:
        """Ids of the rows without a reply, by sub-set; a row that needs none is not among them."""
        absent: dict[str, list[str]] = defaultdict(list)
        for row in self.rows:
            reply = self.reply(row)
            if reply is None or (KINDS[row.kind].likelihood and reply.logps is None):
                absent[row.subset].append(row.id)
        return dict(absent)


def read_speech_inputs(
    speech_set: SpeechSet, data: Path | None, *, subsets: Sequence[str] = (), predictions: Path | None = None,
    audio_dir: Path | None = None, limit: int | None = None, allow_outside: bool = False,
) -> SpeechInputs:  # fmt: skip
    """Read and check. `subsets` are names of sub-sets or of groups of them; none: all that `data` has.

    Without `predictions` a model will hear the clips, which must be there; with them replies are scored as they are.
    `predictions` may be the data itself, where replies lie beside it. `limit`: the first rows of each sub-set.

    Raises:
        EvalInputError: all problems at once, with file, line and field.
    """
    if data is None:
        raise EvalInputError([f"--set {speech_set.name} needs --data. {speech_set.how_to_get}"])
    if not data.exists():
        where = f"no such file or folder (looked in {Path.cwd()}){meant(data)}"
        raise EvalInputError([f"--data {data}: {where}. {speech_set.how_to_get}"])
    beside = predictions is not None and predictions.resolve() == data.resolve()
    replies_in = predictions if predictions is not None and predictions.is_dir() and not beside else None
    reader = SetReader(
        speech_set, data, subsets, audio_dir=audio_dir, replies_in=replies_in, allow_outside=allow_outside
    )
    reader.read()
    data_files = list(reader.files)
    if not reader.rows and not reader.problems:
        reader.problems.append(f"--data {data}: no rows in it")
    seen: Counter[str] = Counter()
    rows = []
    for row in reader.rows:
        seen[row.subset] += 1
        if limit is None or seen[row.subset] <= limit:
            rows.append(row)
    replies, before = None, _predictions_sha256(predictions, [])
    if predictions is None:
        reader.problems += clip_problems([Example(row.name, row.clips, row.text or "") for row in rows])
    elif not reader.problems:
        replies = dict(reader.replies) if beside else read_spoken_predictions(predictions, reader)
        if beside and not replies:
            reader.problems.append(f"--predictions {predictions}: no replies beside the data; give a predictions file")
        reader.problems += _lost_audio(predictions, replies)
        if before != _predictions_sha256(predictions, []):
            reader.problems.append(f"--predictions {predictions}: it changed while it was read; wait for who writes it")
    if reader.problems:
        raise EvalInputError(problem_lines(reader.problems))
    notes = [*reader.notes, *_count_notes(reader)]
    used = {row.subset for row in rows}
    meta: dict[str, Any] = {
        "data": str(data), "data_sha256": _files_sha256(data_files), "data_files": len(data_files),
        "set_version": speech_set.version, "subsets_asked": list(subsets), "limit": limit, "problems": notes,
    }  # fmt: skip
    if predictions is not None:
        own = [*reader.reply_files, *reader.files[len(data_files) :]]
        meta |= {"predictions": str(predictions), "predictions_sha256": before or _predictions_sha256(predictions, own)}
    parts = {name: subset for name, subset in reader.subsets.items() if name in used}
    inputs = SpeechInputs(speech_set, data, parts, tuple(rows), replies, meta)
    if predictions is not None:
        notes += [
            f"{name}: no reply to {count_rows(ids)}; counted as missing" for name, ids in inputs.missing().items()
        ]
    return inputs


def _lost_audio(path: Path, replies: Mapping[str, GivenReply]) -> list[str]:
    lost = {
        name: sound for name, reply in replies.items() for sound in reply.audio if sound and not os.path.isfile(sound)
    }
    if not lost:
        return []
    first = next(iter(lost.values()))
    return [f"{path}: reply_audio does not exist in {count_rows([*lost])} (first: {first})"]


def _count_notes(reader: SetReader) -> list[str]:
    """Sub-sets whose rows are not as many as published."""
    counts = Counter(row.subset for row in reader.rows)
    published = {name: reader.subsets[name].rows for name in counts}
    notes = [f"{name} has {counts[name]} rows, {published[name]} are published"
             for name in counts if published[name] not in (None, counts[name])]  # fmt: skip
    whole = reader.speech_set.rows
    if whole is not None and not reader.wanted and len(reader.rows) != whole:
        notes.append(f"{reader.speech_set.title} has {len(reader.rows)} rows here, {whole} are published")
    return notes


def _predictions_sha256(path: Path | None, files: Sequence[Path]) -> str | None:
    """Of a file its own, of a folder that of the `files` read in it; None where there are none."""
    if path is not None and path.is_file():
        return file_sha256(path)
    return _files_sha256(files) if files else None


def _files_sha256(files: Sequence[Path]) -> str:
    """One hash over the hashes of the files read, in their order; of one file its own."""
    hashes = [file_sha256(path) for path in dict.fromkeys(files)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
