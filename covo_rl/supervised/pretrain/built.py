"""Packed rows as files, to be looked at or used elsewhere: `covo-rl data build`.

    build.json            options, ids of the vocabulary, tokens and documents by task, rows skipped by reason
    rows-00000.jsonl      {"row", "length", "ids", "labels", "positions", "documents": [{"task", "complete", "streamed",
                          "start", "end", "clips": [[row id, a, b]], "rows": [{"id", "speaker"}]}]}

The rows are those of a training of the same options and seed, of all its ranks, in its order.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

from covo_rl.config import ConfigError
from covo_rl.data.files import json_line, plain, read_record, write_json
from covo_rl.export.exporting import staging
from covo_rl.models import ModelError, family_at
from covo_rl.models.builtin import resolve_model
from covo_rl.models.covo_audio import CovoAudioConfig, CovoAudioProcessor
from covo_rl.models.covo_audio.processing import IGNORE
from covo_rl.records.console import ProgressDisplay
from covo_rl.supervised.pretrain.config import PretrainConfig
from covo_rl.supervised.pretrain.document import BuildOptions, Document, Vocabulary
from covo_rl.supervised.pretrain.packing import PackedRow, Packer
from covo_rl.supervised.pretrain.stages import planned_tasks
from covo_rl.supervised.pretrain.stream import PackedStream, stream_report
from covo_rl.types import UserError, shown, visible

SUMMARY, SHARD = "build.json", "rows-{:05d}.jsonl"
SHARD_ROWS = 1000


class BuiltError(UserError, ValueError):
    """A file of packed rows that is not what `covo-rl data build` writes, or lacks the row that was asked for."""


@dataclass(frozen=True)
class StoredRow:
    """A packed row: its documents, and for each of them the (id, speaker) of the rows that it was made of."""

    number: int
    length: int
    documents: tuple[Document, ...]
    rows: tuple[tuple[tuple[str, str | None], ...], ...]

    def as_json(self) -> dict[str, Any]:
        """The line of a file."""
        ids, labels, positions, start, documents = [], [], [], 0, []
        for document, rows in zip(self.documents, self.rows, strict=True):
            ids += document.ids
            labels += document.labels
            positions += range(len(document))
            documents.append(
                {"task": document.task, "complete": document.complete, "streamed": document.streamed, "start": start,
                 "end": len(ids), "clips": document.clips,
                 "rows": [{"id": id, "speaker": speaker} for id, speaker in rows]}
            )  # fmt: skip
            start = len(ids)
        return {"row": self.number, "length": self.length, "ids": ids, "labels": labels, "positions": positions,
                "documents": documents}  # fmt: skip

    @classmethod
    def of(cls, number: int, row: PackedRow) -> StoredRow:
        """Of a row that a stream has packed."""
        return cls(number, row.length, row.documents, tuple(made_of(drawn.unit) for drawn in row.drawn))

    @classmethod
    def read(cls, line: Mapping[str, Any]) -> StoredRow:
        """Of a line. Raises BuiltError, ValueError, KeyError or TypeError for what is no such line."""
        documents, rows, done = [], [], 0
        ids, labels = [_integer(id) for id in line["ids"]], [_integer(label) for label in line["labels"]]
        for part in line["documents"]:
            here = slice(_integer(part["start"]), _integer(part["end"]))
            clips = tuple((str(id), _integer(a), _integer(b)) for id, a, b in part["clips"])
            if not (done == here.start < here.stop <= len(ids) == len(labels)):
                raise BuiltError(f"a document from {here.start} to {here.stop} of {len(ids)} ids, {len(labels)} labels")
            flags = part["complete"] is True, part.get("streamed") is True
            documents.append(Document(ids[here], labels[here], clips, str(part["task"]), *flags))
            rows.append(tuple((str(row["id"]), row["speaker"] and str(row["speaker"])) for row in part["rows"]))
            done = here.stop
        if done != len(ids):
            raise BuiltError(f"its documents end at {done} of {len(ids)} ids")
        return cls(_integer(line["row"]), _integer(line["length"]), tuple(documents), tuple(rows))


def _integer(value: Any) -> int:
    if type(value) is not int or abs(value) >= 2**31:
        raise BuiltError(f"{shown(value, 40)} where an integer of 32 bits should be")
    return value


def made_of(unit: Any) -> tuple[tuple[str, str | None], ...]:
    """(id, speaker) of the rows that a task drew."""
    rows = unit if isinstance(unit, (list, tuple)) else [unit]
    return tuple((row.id, getattr(row, "speaker", None)) for row in rows)


def written_vocabulary(path: str) -> tuple[Vocabulary, Any]:
    """The vocabulary and the tokenizer of a Covo-Audio folder, of which no weights are read.

    Raises:
        ModelError: another family, a model without codes, or files that do not load.
    """
    name, path = path, resolve_model(path)
    kind = family_at(path).model_type
    if kind != CovoAudioConfig.model_type:
        raise ModelError(f"model {name}: a {kind} model writes no codes of speech; pre-training needs Covo-Audio")
    config = CovoAudioConfig.from_pretrained(path)
    if not config.num_audio_codes:
        raise ModelError(f"model {name}: it has no codes of speech; covo-rl models create makes a model that has")
    tokenizer = CovoAudioProcessor.from_pretrained(path).tokenizer
    codes = range(config.audio_token_index, config.audio_token_index + config.num_audio_codes)
    family = SimpleNamespace(model=SimpleNamespace(config=config), tokenizer=tokenizer, code_ids=codes)
    return Vocabulary.of(family), tokenizer


def packer_of(config: PretrainConfig, vocabulary: Vocabulary) -> Packer:
    """What packs the rows of a training with these options, from its first one on; rows are read and checked.

    Raises:
        ConfigError: tasks without rows. DataError: every problem of every row.
    """
    options = BuildOptions(config.sentence_share, config.content, config.query, config.text_loss)  # pyright: ignore
    return PackedStream(
        planned_tasks(config), vocabulary, seed=config.seed, length=config.length, pad_id=vocabulary.text_end,
        options=options, tokenizer=config.tokenizer,
    ).packer()  # fmt: skip


def build_rows(config: PretrainConfig, folder: str | Path, count: int) -> dict[str, Any]:
    """Write the first `count` packed rows and `build.json` to a new folder; returns what that file says.

    Raises:
        ConfigError: the folder exists, tasks without rows. DataError: every problem of every row.
    """
    folder = Path(folder)
    if folder.exists():
        raise ConfigError([f"output {folder} exists: give a new folder"])
    vocabulary, _ = written_vocabulary(str(config.model))
    packer = packer_of(config, vocabulary)
    taught = dict.fromkeys(packer.mixture.tasks, 0)
    with staging(folder, replace=False) as stage, ProgressDisplay("packing", count) as display:
        for first in range(0, count, SHARD_ROWS):
            with open(stage / SHARD.format(first // SHARD_ROWS), "w", encoding="utf-8") as file:
                for number in range(first, min(first + SHARD_ROWS, count)):
                    _write(file, StoredRow.of(number, packer.next_row()), taught)
                    display.update(number + 1, "")
        report = stream_report(packer.state_dict())
        for task, number in taught.items():
            report["tasks"][task]["taught"] = number
        summary = {"model": config.model, **report, "length": config.length, "vocabulary": _ids(vocabulary),
                   "options": dataclasses.asdict(config)}  # fmt: skip
        write_json(stage / SUMMARY, summary)
    return summary


def _write(file: TextIO, row: StoredRow, taught: dict[str, int]) -> None:
    file.write(json_line(row.as_json()))
    for document in row.documents:
        taught[document.task] += sum(label != IGNORE for label in document.labels)


def _ids(vocabulary: Vocabulary) -> dict[str, Any]:
    ids = {name: value for name, value in vars(vocabulary).items() if name not in ("text", "duplex")}
    return ids | ({} if vocabulary.duplex is None else {"duplex": plain(dataclasses.asdict(vocabulary.duplex))})


def built_vocabulary(folder: Path, summary: Mapping[str, Any], model: str | None = None) -> tuple[Vocabulary, Any]:
    """`written_vocabulary` of `model`, or of the one that build.json names, whose ids must be those of the rows.

    Raises:
        BuiltError: no model is named, or its ids are others. ModelError: as `written_vocabulary`.
    """
    name = model or summary.get("model")
    if not isinstance(name, str):
        raise BuiltError(f"{folder / SUMMARY} names no model; give --model")
    vocabulary, tokenizer = written_vocabulary(name)
    ids, said = _ids(vocabulary), summary.get("vocabulary")
    if said != ids:
        said = said if isinstance(said, Mapping) else {}
        other = [
            f"{key} {visible(shown(said.get(key), 40))}, not {id}" for key, id in ids.items() if said.get(key) != id
        ]
        raise BuiltError(f"{folder} has the ids of another model than {name}: {'; '.join(other)}; give its --model")
    return vocabulary, tokenizer


def is_built(path: Path) -> bool:
    """Whether a folder is one that `build_rows` wrote."""
    return (path / SUMMARY).is_file()


def read_built(folder: Path, number: int) -> tuple[StoredRow, dict[str, Any]]:
    """A row of a folder, and its build.json.

    Raises:
        BuiltError: there is no such row, or its line is damaged.
    """
    summary = read_record(folder / SUMMARY)
    file = folder / SHARD.format(number // SHARD_ROWS)
    place, line = number % SHARD_ROWS, None
    if number >= 0 and file.is_file():
        with open(file, encoding="utf-8", errors="replace") as lines:
            line = next(islice(_whole(lines), place, None), None)
    if line is None:
        raise BuiltError(f"{folder} has no row {number}; it says that it has {visible(shown(summary.get('rows')))}")
    try:
        return StoredRow.read(json.loads(line)), summary
    except (BuiltError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BuiltError(f"{file}, line {place + 1}: no packed row ({visible(shown(error))}); build it again") from None


def _whole(lines: TextIO) -> Iterator[str]:
    return (line for line in lines if line.strip())
