"""Packed rows of a mixture as batches of one rank: the same rows in the same order for any number of ranks.

    stream = PackedStream({"asr": TaskData(80, "asr/*.jsonl")}, vocabulary, seed=0, length=8192, pad_id=0)
    for batch in stream: ...                  # state_dict() is that of the batch handed out last

Every rank (and every worker of it) draws and packs all rows, which is text alone, and reads audio for its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from covo_rl.data.read import DataError, Problem
from covo_rl.resolve import ConfigError
from covo_rl.supervised.pretrain.builder import cut_text
from covo_rl.supervised.pretrain.document import BuildOptions, DocumentTask, Vocabulary
from covo_rl.supervised.pretrain.mixture import NO_ROWS, Mixture, MixtureTask, check_weights, unknown_task
from covo_rl.supervised.pretrain.packing import PackedBatch, PackedRow, Packer, collate_rows
from covo_rl.supervised.pretrain.rows import KINDS, Kind, RowStore
from covo_rl.supervised.pretrain.stream_rows import StreamStore
from covo_rl.supervised.pretrain.tasks import TASKS
from covo_rl.types import UserError

NO_DUPLEX = (
    "the model says no ids of full duplex, so there is nothing to write its decisions with: `covo-rl duplex prepare "
    "--model MODEL --output DIR` gives a model its section duplex; or give the task weight 0"
)


@dataclass(frozen=True)
class TaskData:
    """A task's weight in tokens, and its rows: a file, folder or pattern, or several; of streams, folders of them."""

    weight: float
    data: str | Sequence[str] | None = None
    audio_dir: str | None = None


class PackedStream:
    """Batches without end.

    Args:
        tasks: name (of `known`, default TASKS) -> its weight and rows; rows are read and checked here, once.
        length: positions of a row; pad_id: what fills it up.
        extractor: makes the audio fields (a processor's `feature_extractor`); None: batches hold waves.
        tokenizer: digest of the one that made the codes; None: any, but the same for all.
        batch_size: rows of a batch. Batch i of rank r of W has rows i B W + r, i B W + W + r, ... of the one order.
        workers: processes that read ahead, two batches each; 0: everything is made when it is asked for.
        ranks: (rank, world).

    Raises:
        ConfigError: unknown tasks, weights that cannot be, tasks without rows.
        DataError: every problem of every row of every task.
    """

    def __init__(
        self, tasks: Mapping[str, TaskData], vocabulary: Vocabulary, *, seed: int, length: int, pad_id: int,
        extractor: Callable[..., Any] | None = None, options: BuildOptions | None = None, tokenizer: str | None = None,
        batch_size: int = 1, workers: int = 0, ranks: tuple[int, int] = (0, 1),
        known: Mapping[str, DocumentTask] | None = None,
    ) -> None:  # fmt: skip
        known = TASKS if known is None else known
        self.stores = open_stores(tasks, known, vocabulary, tokenizer)
        # of a document's codes at most two thirds: with its text and slots it then fits a row
        parts = [mixture_task(name, data, known, self.stores, 2 * length // 3) for name, data in tasks.items()]
        self._voices = {
            name: store for name, data in tasks.items()
            if "voice" in known[name].needs
            and isinstance(store := self.stores.get(_store_key(data, known[name])), RowStore)
        }  # fmt: skip
        mixture = Mixture(parts, vocabulary, seed=seed, length=length, options=options, cut=cut_text)
        self.tasks = tuple(mixture.tasks)
        self._mixture, self._workers, self._items = mixture, workers, None
        self._plan = partial(
            _Plan, mixture, vocabulary, pad_id, extractor, batch_size=batch_size, ranks=ranks, tasks=self.tasks
        )
        self._state = Packer(mixture).state_dict()
        self.wait_seconds = 0.0  # how long `next_batch` took, all together

    def __iter__(self) -> Iterator[PackedBatch]:
        while True:
            yield self.next_batch()

    def next_batch(self) -> PackedBatch:
        """The next batch of this rank.

        Raises:
            DataError: a file that has changed, a recording that cannot be used, a task that gives no documents.
        """
        begin = time.perf_counter()
        if self._items is None:
            plan = self._plan(self._state)
            self._items = iter(_read_ahead(plan, self._workers) if self._workers else plan)
        item = next(self._items)
        self.wait_seconds += time.perf_counter() - begin
        if isinstance(item, UserError):
            raise item
        batch, self._state = item
        return batch

    def packer(self) -> Packer:
        """What makes the rows of all ranks from here on, for looking at them; the stream itself stays where it is."""
        packer = Packer(self._mixture.copy())
        packer.load_state_dict(self._state)
        return packer

    def rows(self) -> Iterator[PackedRow]:
        """All rows from here on, of all ranks and without tensors. The stream itself stays."""
        packer = self.packer()
        while True:
            yield packer.next_row()

    def close(self) -> None:
        """End the workers. What they made ahead is forgotten, and made again if it is asked for."""
        self._items = None

    def state_dict(self) -> dict[str, Any]:
        """After the batches handed out so far, of all ranks; the same on each of them. JSON holds it."""
        return self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, with any number of ranks, workers and rows of a batch.

        Raises:
            ConfigError: it is of another mixture.
        """
        packer = Packer(self._mixture.copy())
        packer.load_state_dict(state)
        self._state, self._items = packer.state_dict(), None

    def report(self) -> dict[str, Any]:
        """What was drawn until the last batch: rows, padding's share, and for each task its tokens and skipped rows."""
        return stream_report(self._state)

    def unnamed_speakers(self) -> list[str]:
        """Of each task that names who speaks: how many rows say nothing of it, which is allowed. For a log."""
        return [
            f"{name}: {store.unnamed} rows with codes and without a speaker ({', '.join(store.unnamed_first)}): what "
            "they teach of a voice has no name"
            for name, store in self._voices.items()
            if store.unnamed
        ]

    def heard_problems(self, rank: int = 0, world: int = 1) -> list[Problem]:
        """What is wrong with the recordings of all tasks, of a rank's share, each of which is decoded."""
        return [problem for store in self.stores.values() for problem in store.heard_problems(rank, world)]

    def padded_replies(self) -> list[str]:
        """How many replies of streams get codes of silence until their text is out, which is allowed. For a log."""
        return [
            f"{store.name}: the text of {store.padded} of {store.replies} replies outlasts their codes: silence follows"
            for store in self.stores.values()
            if isinstance(store, StreamStore) and store.padded
        ]


def stream_report(state: Mapping[str, Any]) -> dict[str, Any]:
    """`PackedStream.report` of a state, for instance of a checkpoint."""
    mixture, rows = state["mixture"], state["rows"]
    total = sum(task["tokens"] for task in mixture["tasks"].values())
    tasks = {}
    for name, task in mixture["tasks"].items():
        weight, units, _ = mixture["data"][name]
        skipped = {
            why: {"rows": entry["rows"], "times": entry["times"], "first": list(entry["first"])}
            for why, entry in task["skipped"].items()
        }
        tasks[name] = {
            "weight": weight,
            "share": task["tokens"] / total if total else 0.0,
            "tokens": task["tokens"],
            "documents": task["documents"],
            "epochs": task["epoch"] + task["place"] / units,
            "skipped": skipped,
        }
    padding = 1 - state["tokens"] / (rows * mixture["length"]) if rows else 0.0
    return {"rows": rows, "tokens": state["tokens"], "padding": padding, "tasks": tasks}


class _Plan(IterableDataset):
    """What every worker of a rank does: all rows from a state on are packed, its own become batches."""

    def __init__(
        self, mixture: Mixture, vocabulary: Vocabulary, pad_id: int, extractor: Callable[..., Any] | None,
        state: Mapping[str, Any], *, batch_size: int, ranks: tuple[int, int], tasks: Sequence[str],
    ) -> None:  # fmt: skip
        self.mixture, self.state, self.batch_size, self.ranks = mixture, state, batch_size, ranks
        self.collated = (vocabulary, pad_id, extractor, tasks)

    def __iter__(self) -> Iterator[tuple[PackedBatch, dict[str, Any]] | UserError]:
        """(batch, state after it). What a user can mend is handed on, since a worker would lose its type."""
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        rank, world = self.ranks
        try:
            packer = Packer(self.mixture.copy())
            packer.load_state_dict(self.state)
            for group in count():
                rows = [packer.next_row() for _ in range(self.batch_size * world)]
                if group % workers == number:
                    yield collate_rows(rows[rank::world], *self.collated), packer.state_dict()
        except UserError as error:
            while True:
                yield error


def _read_ahead(plan: _Plan, workers: int) -> DataLoader:
    return DataLoader(plan, batch_size=None, num_workers=workers, prefetch_factor=2, collate_fn=_unchanged)


def _unchanged(item: Any) -> Any:
    return item


# -- rows of all tasks -----------------------------------------------------------------------------------------------


def open_stores(
    tasks: Mapping[str, TaskData],
    known: Mapping[str, DocumentTask],
    vocabulary: Vocabulary,
    tokenizer: str | None = None,
) -> dict[tuple[Any, ...], RowStore | StreamStore]:
    """The rows of all tasks that have a weight; data that several tasks name is read once, with all that they need.

    Raises:
        ConfigError: unknown tasks, weights that cannot be, tasks without data, or that the model has no ids for.
        DataError: every problem of every row.
    """
    problems = [unknown_task(name, list(known)) for name in tasks if name not in known]
    problems += [f"{name}: {NO_ROWS}" for name, task in tasks.items() if task.weight and not task.data]
    problems += [
        f"{name}: {NO_DUPLEX}" for name, task in tasks.items()
        if name in known and task.weight and known[name].unit == "stream" and vocabulary.duplex is None
    ]  # fmt: skip
    if problems:
        raise ConfigError(problems)
    check_weights({name: task.weight for name, task in tasks.items()})
    needs: dict[tuple[Any, ...], set[str]] = {}
    for name, task in tasks.items():
        if task.weight:
            needs.setdefault(_store_key(task, known[name]), set()).update(known[name].needs)
    stores: dict[tuple[Any, ...], RowStore | StreamStore] = {}
    errors: list[DataError] = []
    for key, fields in needs.items():
        data, audio_dir, kind = key
        try:
            if kind == "stream":
                stores[key] = StreamStore(data, vocabulary, tokenizer)
                continue
            stores[key] = RowStore(
                data, audio_dir, kind=kind, needs=fields, codebook=vocabulary.codes, tokenizer=tokenizer
            )
        except DataError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        every = [Problem(f"{error.source}: {p.row_id}", p.what) for error in errors for p in error.problems]
        raise DataError("the rows of the tasks", list(dict.fromkeys(every)))  # two tasks may name the same file
    _check_tokenizers(stores.values())
    return stores


def mixture_task(
    name: str, data: TaskData, known: Mapping[str, DocumentTask],
    stores: Mapping[tuple[Any, ...], RowStore | StreamStore], most_codes: int | None = None,
) -> MixtureTask:  # fmt: skip
    """A task with its units of `open_stores`; without any where it has no weight."""
    store = stores.get(_store_key(data, known[name]))
    if store is None:
        return MixtureTask(name, data.weight, known[name], ())
    units = store if isinstance(store, StreamStore) else store.units(known[name].unit, most_codes)
    return MixtureTask(name, data.weight, known[name], units, store.fingerprint)


def _store_key(data: TaskData, task: DocumentTask) -> tuple[Any, str | None, Kind]:
    files = data.data if isinstance(data.data, str | None) else tuple(data.data)
    return files, data.audio_dir, KINDS[task.unit]


def _check_tokenizers(stores: Any) -> None:
    """Codes mean nothing beside those of another tokenizer."""
    first: dict[str | None, Problem] = {}
    for store in stores:
        for digest, row in store.tokenizers.items():
            first.setdefault(digest, Problem(row, f"its codes are of tokenizer {digest!r} ({store.name})"))
    if len(first) > 1:
        problems = list(first.values())
        raise DataError("codes of several tokenizers; encode all rows with one: `covo-rl speech encode`", problems)
