"""Documents -> rows of one length that hold nearly nothing but documents, none of them cut; rows -> tensors.

The oldest waiting document begins a row, so that none waits for ever; of the others that combination goes with it
which fills the row best, found exactly: sums up to `length` are bits of one whole number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from covo_rl.audio import AudioError, content_key
from covo_rl.data.read import DataError, Problem
from covo_rl.models.covo_audio.processing import IGNORE
from covo_rl.speech.grid import CODE_SAMPLES, RATE, count_codes, count_slots
from covo_rl.speech.rows import SpeechRow
from covo_rl.supervised.pretrain.document import Document, Vocabulary
from covo_rl.supervised.pretrain.mixture import Draw, Drawn, Mixture
from covo_rl.types import Clip

#: documents that wait, of which the next row is made
WINDOW = 64


def best_fill(lengths: Sequence[int], room: int) -> list[int]:
    """Which of the lengths together come closest to `room` from below; of several such choices one of the earliest.

    >>> best_fill([5, 4, 3, 3], 10)
    [1, 2, 3]
    """
    limit = (1 << (room + 1)) - 1
    sums = [1]  # bit s of sums[i]: s is a sum of the last i lengths
    for length in reversed(lengths):
        sums.append((sums[-1] | sums[-1] << length) & limit)
    target, chosen = sums[-1].bit_length() - 1, []
    for index, length in enumerate(lengths):
        without = sums[len(lengths) - index - 1]
        if length <= target and without >> (target - length) & 1:
            chosen.append(index)
            target -= length
    return chosen


@dataclass(frozen=True)
class PackedRow:
    """Documents side by side, in the order in which they were drawn, of at most `length` positions together."""

    drawn: tuple[Drawn, ...]
    length: int

    @property
    def documents(self) -> tuple[Document, ...]:
        return tuple(item.document for item in self.drawn)

    @property
    def tokens(self) -> int:
        """Positions that are no padding."""
        return sum(map(len, self.drawn))

    @cached_property
    def recordings(self) -> dict[tuple[str, str], Recorded]:
        """(task, row id) -> the row, of every recording that clips are of; an id is one of its data set alone.

        Raises:
            DataError: a clip of something that has no recording.
        """
        found: dict[tuple[str, str], Recorded] = {}
        for item in self.drawn:
            there = unit_recordings(item.unit) if item.document.clips else {}
            for name, _, _ in item.document.clips:
                if name not in there:
                    problem = Problem(name, f"a document of {item.draw.task} has a clip of it, and it has no recording")
                    raise DataError("packed rows", [problem])
                found[item.draw.task, name] = there[name]
        return found


class Recorded(Protocol):
    """What clips are of: a file, and what of it is heard, at 24 kHz."""

    @property
    def clip(self) -> Clip | None: ...
    def wave(self) -> np.ndarray: ...


def unit_recordings(unit: Any) -> Mapping[str, Recorded]:
    """Name, as `Document.clips` has it -> what is recorded, of what a task drew; dialogues and streams say it."""
    if hasattr(unit, "recordings"):
        return unit.recordings
    rows = unit if isinstance(unit, Sequence) else [unit]
    return {row.id: row for row in rows if isinstance(row, SpeechRow) and row.clip is not None}


class Packer:
    """Rows of `mixture`, without end. The state between two rows: the mixture's, and where each waiting one is from."""

    def __init__(self, mixture: Mixture, window: int = WINDOW) -> None:
        self.mixture, self.length, self.window = mixture, mixture.length, window
        self.waiting: list[Drawn] = []
        self.rows = self.tokens = 0

    def next_row(self) -> PackedRow:
        """The next row.

        Raises:
            DataError: see `Mixture.draw`.
        """
        row: list[Drawn] = []
        room = self.length
        while True:
            while len(self.waiting) < self.window:
                self.waiting.append(self.mixture.draw())
            if sum(map(len, self.waiting)) > room:
                break
            row += self.waiting  # all of them fit: short documents need more than a window
            room -= sum(map(len, self.waiting))
            self.waiting = []
        chosen = set(self._chosen(room, must=not row))
        row += [item for index, item in enumerate(self.waiting) if index in chosen]
        self.waiting = [item for index, item in enumerate(self.waiting) if index not in chosen]
        packed = PackedRow(tuple(row), self.length)
        self.rows, self.tokens = self.rows + 1, self.tokens + packed.tokens
        return packed

    def _chosen(self, room: int, must: bool) -> list[int]:
        """Of those that wait; the oldest one among them, where it must be."""
        lengths = [len(item) for item in self.waiting]
        if not must:
            return best_fill(lengths, room)
        return [0, *(1 + index for index in best_fill(lengths[1:], room - lengths[0]))]

    def state_dict(self) -> dict[str, Any]:
        """JSON holds it."""
        waiting = [item.draw.state() for item in self.waiting]
        return {"mixture": self.mixture.state_dict(), "waiting": waiting, "rows": self.rows, "tokens": self.tokens}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; what waited is made again. Raises ConfigError as `Mixture.load_state_dict`."""
        self.mixture.load_state_dict(state["mixture"])
        self.waiting = [self.mixture.rebuild(Draw(*draw)) for draw in state["waiting"]]
        self.rows, self.tokens = state["rows"], state["tokens"]


# -- tensors -----------------------------------------------------------------------------------------------------------


@dataclass
class PackedBatch:
    """Packed rows as a model takes them; padding is one more document at the right, its labels IGNORE.

    input_ids, labels, position_ids: (N, L) int64, positions from 0 in every document. tasks: names, of which `task`
    (N, L) int8 holds the place, -1 at padding. clips: (row id, a, b) in order of appearance; `clip_order` (A,) int64
    which of `waves` (24 kHz, float32, whole codes) each of them is. streams: place in `waves` -> key of its content, of
    those that the streaming encoder hears. audio: what the family's extractor makes of the others, in their order, and
    `clip_order`, or empty.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    task: torch.Tensor
    tasks: tuple[str, ...]
    clips: list[tuple[str, int, int]] = field(default_factory=list)
    clip_order: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    waves: list[np.ndarray] = field(default_factory=list)
    streams: dict[int, str] = field(default_factory=dict)
    audio: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def supervised(self) -> int:
        """Labels that are taught."""
        return int((self.labels != IGNORE).sum())


def collate_rows(
    rows: Sequence[PackedRow], vocabulary: Vocabulary, pad_id: int, extractor: Callable[..., Any] | None = None,
    tasks: Sequence[str] | None = None,
) -> PackedBatch:  # fmt: skip
    """Packed rows of one length -> a batch on the CPU.

    Args:
        extractor: makes the audio fields of waves (a processor's `feature_extractor`); without one they stay waves.
        tasks: names in the order of their numbers in `task`; default: those of the rows, sorted.

    Raises:
        DataError: clips that do not fill the slots of their document, or recordings that cannot be used: all of them.
    """
    names = tuple(tasks) if tasks is not None else tuple(sorted({d.task for row in rows for d in row.documents}))
    count, length = len(rows), rows[0].length
    ids = np.full((count, length), pad_id, np.int64)
    labels = np.full((count, length), IGNORE, np.int64)
    positions, task = np.zeros((count, length), np.int64), np.full((count, length), -1, np.int8)
    for n, row in enumerate(rows):
        start = 0
        for document in row.documents:
            end = start + len(document)
            ids[n, start:end], labels[n, start:end] = document.ids, document.labels
            positions[n, start:end], task[n, start:end] = np.arange(end - start), names.index(document.task)
            start = end
        positions[n, start:] = np.arange(length - start)
    input_ids, taught, places, numbers = (torch.from_numpy(array) for array in (ids, labels, positions, task))
    batch = PackedBatch(input_ids, taught, places, numbers, names)
    _add_clips(batch, rows, vocabulary)
    if len(batch.waves) > len(batch.streams) and extractor is not None:
        _add_audio(batch, extractor)
    return batch


def _add_clips(batch: PackedBatch, rows: Sequence[PackedRow], vocabulary: Vocabulary) -> None:
    """The waves of all clips, each once, cut on the grid of codes."""
    problems: list[Problem] = []
    unique: dict[tuple[str, bool], int] = {}
    order: list[int] = []
    for row in rows:
        decoded: dict[Any, np.ndarray] = {}  # a recording is decoded once a row
        for item in row.drawn:
            problems += _slot_problems(item.document, vocabulary)
            for name, a, b in item.document.clips:
                try:
                    wave = clip_samples(_wave(row.recordings[item.draw.task, name], decoded), a, b)
                except AudioError as error:
                    problems.append(Problem(name, str(error)))
                    continue
                key = content_key(Clip(array=wave, sampling_rate=RATE)), item.document.streamed
                if key not in unique:
                    batch.streams |= {len(unique): key[0]} if item.document.streamed else {}
                    batch.waves.append(wave)
                order.append(unique.setdefault(key, len(unique)))
                batch.clips.append((name, a, b))
    if problems:
        raise DataError("packed rows", list(dict.fromkeys(problems)))
    batch.clip_order = torch.tensor(order, dtype=torch.int64)


def _slot_problems(document: Document, vocabulary: Vocabulary) -> Iterable[Problem]:
    slots, needed = document.ids.count(vocabulary.slot), sum(count_slots(b - a) for _, a, b in document.clips)
    if slots != needed:
        names = ", ".join(dict.fromkeys(name for name, _, _ in document.clips)) or "a document"
        yield Problem(names, f"{slots} audio slots in a document of {document.task}, its clips fill {needed}")


def _wave(row: Recorded, decoded: dict[Any, np.ndarray]) -> np.ndarray:
    """Its recording at 24 kHz, from `decoded` where it is there."""
    assert row.clip is not None
    key = type(row), row.clip.path or id(row.clip)  # of a stream one channel is heard
    if key not in decoded:
        decoded[key] = row.wave()
    return decoded[key]


def clip_samples(wave_T: np.ndarray, a: int, b: int) -> np.ndarray:
    """Codes [a, b) of a recording at 24 kHz, zeros after its end up to a whole code.

    Raises:
        AudioError: it has no such codes.
    """
    if not 0 <= a < b <= count_codes(len(wave_T)):
        raise AudioError(
            f"codes {a} to {b} are not in its recording, which has {count_codes(len(wave_T))}: encode it again"
        )
    piece = wave_T[a * CODE_SAMPLES : b * CODE_SAMPLES]
    return np.pad(piece, (0, (b - a) * CODE_SAMPLES - len(piece))).astype(np.float32, copy=False)


def _add_audio(batch: PackedBatch, extractor: Callable[..., Any]) -> None:
    """The fields of the unique clips that are no streams; the extractor must count slots as the documents do."""
    names: dict[int, str] = {}
    for (name, a, b), place in zip(batch.clips, batch.clip_order.tolist(), strict=True):
        names.setdefault(place, f"{name}, codes {a} to {b}")
    whole = {place: wave for place, wave in enumerate(batch.waves) if place not in batch.streams}
    names = {place: names[place] for place in whole}
    fields = dict(extractor([*whole.values()], sampling_rate=RATE, names=[*names.values()]))
    rows = fields["input_features_mask"].sum(1)
    slots = rows.new_zeros(len(names)).index_add(0, fields["segment_clips"], rows).tolist()
    wrong = [
        Problem(name, f"the encoder fills {count} slots, its codes {count_slots(len(wave) // CODE_SAMPLES)}")
        for name, wave, count in zip(names.values(), whole.values(), slots, strict=True)
        if count != count_slots(len(wave) // CODE_SAMPLES)
    ]
    if wrong:
        raise DataError("packed rows", wrong)
    batch.audio = {**fields, "clip_order": batch.clip_order}
