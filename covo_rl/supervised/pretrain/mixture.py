"""Which task comes next, and which of its rows: weighted by tokens, decided by the seed and nothing else.

The next task is the one whose share of all tokens is furthest below its weight. Each goes through its rows in an order
of its own, new in every epoch; what a row becomes depends on (seed, task, epoch, place) alone, so that counters and
places are the whole state.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

import numpy as np

from covo_rl.data.read import DataError, Problem
from covo_rl.resolve import ConfigError
from covo_rl.supervised.pretrain.document import BuildOptions, Document, DocumentTask, SkippedError, Vocabulary

#: ids that a report names for each reason of skipping
NAMED = 5
NO_ROWS = "the task has a weight and no rows; give it data, or weight 0"


@dataclass(frozen=True)
class Draw:
    """A place in the order of a task; `part` of the document there, which is cut where it is a long text."""

    task: str
    epoch: int
    place: int
    part: int = 0

    def state(self) -> list[Any]:
        """As JSON holds it."""
        return [self.task, self.epoch, self.place, self.part]


@dataclass(frozen=True)
class Drawn:
    """A document, where it was drawn, and the rows that it was made of."""

    document: Document
    draw: Draw
    unit: Any

    def __len__(self) -> int:
        return len(self.document)


@dataclass
class TaskState:
    """How far a task is, and what was drawn of it: tokens are positions of documents, slots included.

    `skipped`: reason -> how many `rows` (the most of one epoch) and how many `times`, ids of the `first`; a row that is
    skipped comes again in the next epoch. `epoch`, `now`: the epoch that is counted, and its rows so far.
    """

    epoch: int = 0
    place: int = 0
    part: int = 0
    tokens: int = 0
    documents: int = 0
    skipped: dict[str, dict[str, Any]] = field(default_factory=dict)


class Drawable(Protocol):
    """What a task draws from: `Units`, or a list."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class MixtureTask:
    """A task with its rows: `units[i]` is what its builder takes."""

    def __init__(self, name: str, weight: float, task: DocumentTask, units: Drawable, fingerprint: str = "") -> None:
        self.name, self.weight, self.task, self.units, self.fingerprint = name, weight, task, units, fingerprint
        self._order: tuple[tuple[int, int], np.ndarray] | None = None

    def unit(self, seed: int, epoch: int, place: int) -> Any:
        """What stands at a place of the order of an epoch."""
        if self._order is None or self._order[0] != (seed, epoch):
            digest = hashlib.sha256(f"{seed}:{self.name}:{epoch}".encode()).digest()
            order = np.random.default_rng(int.from_bytes(digest, "little")).permutation(len(self.units))
            small = len(self.units) < 2**31
            self._order = (seed, epoch), order.astype(np.int32) if small else order
        return self.units[int(self._order[1][place])]


class Mixture:
    """Documents of several tasks by the weights of these. `draw` gives the next; tasks of weight 0 are never drawn.

    `length`: positions that a document has at most; longer texts are cut, longer speech is skipped and counted.

    Raises:
        ConfigError: impossible weights, or a task with a weight and without rows.
    """

    def __init__(
        self, tasks: Sequence[MixtureTask], vocabulary: Vocabulary, *, seed: int, length: int,
        options: BuildOptions | None = None, cut: Callable[[Document, int], list[Document]] | None = None,
    ) -> None:  # fmt: skip
        self.tasks = {task.name: task for task in tasks if task.weight}
        self.vocabulary, self.seed, self.length = vocabulary, seed, length
        self.options, self._cut = options or BuildOptions(), cut
        check_weights({task.name: task.weight for task in tasks})
        if empty := [task.name for task in self.tasks.values() if not len(task.units)]:
            raise ConfigError([f"{name}: {NO_ROWS}" for name in empty])
        # whole numbers, so that no rounding decides between tasks
        exact = {name: Fraction(str(task.weight)) for name, task in self.tasks.items()}
        common = math.lcm(*(weight.denominator for weight in exact.values()))
        self.weights = {name: int(weight * common) for name, weight in exact.items()}
        self._total_weight = sum(self.weights.values())
        self.states = {name: TaskState() for name in self.tasks}
        self.total = 0  # tokens drawn of all tasks
        self._parts: dict[str, tuple[Draw, Any, list[Document]]] = {}

    def copy(self) -> Mixture:
        """Another one of the same rows, at its beginning."""
        other = copy.copy(self)
        other.states, other.total, other._parts = {name: TaskState() for name in self.tasks}, 0, {}
        return other

    # -- which comes next ----------------------------------------------------------------------------------------

    def next_task(self) -> str:
        """The task that is furthest below its share; of equal ones the heavier, of these the first."""
        return max(self.weights, key=lambda name: (self.lag(name), self.weights[name]))

    def lag(self, name: str) -> int:
        """Tokens by which a task is below its share of all that were drawn, times the sum of the weights.

        No task is ever above its share by a whole document; see docs/pretraining.md for how far one may be below.
        """
        return self.weights[name] * self.total - self.states[name].tokens * self._total_weight

    def draw(self) -> Drawn:
        """The next document.

        Raises:
            DataError: a whole epoch of a task gives none; says why.
        """
        name = self.next_task()
        state = self.states[name]
        failed: dict[str, dict[str, Any]] | None = None  # of an epoch that this draw saw from its beginning
        while True:
            if state.place == state.part == 0:
                if failed:
                    raise _no_documents(name, failed)
                failed = {}
            try:
                drawn, last = self._build(Draw(name, state.epoch, state.place, state.part))
            except SkippedError as error:
                _count(state.skipped, error, state.epoch)
                if failed is not None:
                    _count(failed, error, state.epoch)
                self._advance(name)
                continue
            state.tokens += len(drawn)
            self.total += len(drawn)
            state.documents += 1
            if last:
                self._advance(name)
            else:
                state.part += 1
            return drawn

    def rebuild(self, draw: Draw) -> Drawn:
        """The document of a draw that was made before."""
        return self._build(draw)[0]

    def _advance(self, name: str) -> None:
        state = self.states[name]
        state.place, state.part = state.place + 1, 0
        if state.place == len(self.tasks[name].units):
            state.epoch, state.place = state.epoch + 1, 0

    # -- what a row becomes --------------------------------------------------------------------------------------

    def _build(self, draw: Draw) -> tuple[Drawn, bool]:
        """The document of a draw, and whether it is the last part of what stands there."""
        whole = dataclasses.replace(draw, part=0)
        if draw.task not in self._parts or self._parts[draw.task][0] != whole:
            self._parts[draw.task] = whole, *self._documents(whole)
        _, unit, documents = self._parts[draw.task]
        last = draw.part == len(documents) - 1
        drawn = Drawn(documents[draw.part], draw, unit)
        if last:
            del self._parts[draw.task]
        return drawn, last

    def _documents(self, draw: Draw) -> tuple[Any, list[Document]]:
        task = self.tasks[draw.task]
        unit = task.unit(self.seed, draw.epoch, draw.place)
        rng = random.Random(f"{self.seed}:{draw.task}:{draw.epoch}:{draw.place}")
        try:
            document = task.task.build(unit, self.vocabulary, rng, self.options)
        except SkippedError as error:
            raise SkippedError(error.reason, error.row or unit_id(unit)) from None
        document = dataclasses.replace(document, task=draw.task)
        if not len(document):
            raise SkippedError("an empty document", unit_id(unit))
        if len(document) <= self.length:
            return unit, [document]
        if task.task.unit != "text" or self._cut is None:
            raise SkippedError(f"longer than {self.length} positions", unit_id(unit))
        return unit, [dataclasses.replace(part, task=draw.task) for part in self._cut(document, self.length)]

    # -- state and report ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Counters and places; JSON holds it. `data` and `seed` say what it belongs to."""
        states = {name: dataclasses.asdict(state) for name, state in self.states.items()}
        return {"seed": self.seed, "length": self.length, "data": self._data(), "tasks": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ConfigError: it is of another seed, length, tasks, weights or data, which are named.
        """
        now = {"seed": self.seed, "length": self.length}
        problems = [
            f"{name} {state[name]!r} there, {value!r} now" for name, value in now.items() if state[name] != value
        ]
        there, here = state["data"], self._data()
        for name in dict.fromkeys([*there, *here]):
            if there.get(name) != here.get(name):
                problems.append(f"task {name}: {_said(there.get(name))} there, {_said(here.get(name))} now")
        if problems:
            raise ConfigError([f"the state of the mixture is of another one: {problem}" for problem in problems])
        self.states = {name: TaskState(**_copied(state["tasks"][name])) for name in self.tasks}
        self.total = sum(state.tokens for state in self.states.values())
        self._parts.clear()

    def _data(self) -> dict[str, list[Any]]:
        """What a resumed run must have again: weight, units and content of each task's rows."""
        return {name: [task.weight, len(task.units), task.fingerprint] for name, task in self.tasks.items()}


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    skipped = {reason: {**entry, "first": list(entry["first"])} for reason, entry in state["skipped"].items()}
    return {**state, "skipped": skipped}


def _said(data: Sequence[Any] | None) -> str:
    return "none" if data is None else f"weight {data[0]} and {data[1]} units of rows {data[2] or '(unnamed)'}"


def _no_documents(name: str, failed: Mapping[str, dict[str, Any]]) -> DataError:
    reasons = [
        Problem(name, f"{entry['rows']} rows: {why} ({', '.join(entry['first'])})") for why, entry in failed.items()
    ]
    return DataError(f"the data of task {name}: no row of a whole epoch makes a document", reasons)


def _count(reasons: dict[str, dict[str, Any]], error: SkippedError, epoch: int) -> None:
    entry = reasons.setdefault(error.reason, {"rows": 0, "times": 0, "first": [], "epoch": epoch, "now": 0})
    now = 1 + (entry["now"] if entry["epoch"] == epoch else 0)
    entry |= {"rows": max(entry["rows"], now), "times": entry["times"] + 1, "epoch": epoch, "now": now}
    if len(entry["first"]) < NAMED and error.row not in entry["first"]:
        entry["first"].append(error.row)


def unit_id(unit: Any) -> str:
    """The id of a row, or of the first of several and how many follow."""
    if hasattr(unit, "id"):
        return str(unit.id)
    return f"{unit[0].id} and {len(unit) - 1} more" if len(unit) > 1 else str(unit[0].id)


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise ConfigError for weights that make no mixture."""
    problems = [
        f"{name}: its weight is {weight!r}, not a number of at least 0"
        for name, weight in weights.items()
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf
    ]
    if not problems and not any(weights.values()):
        problems.append("no task has a weight above 0: nothing would be drawn")
    if problems:
        raise ConfigError(problems)


def unknown_task(name: str, known: Sequence[str]) -> str:
    """What to say of a task that does not exist."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"there is no task {name!r}" + (f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}")
