"""By what the monitor's rules know a condition: signs, over what is remembered of the steps so far.

A sign is a generator with the numbers of its rule as arguments (records/rules.py). It yields the figures of the rule's
sentence where the condition holds now, one set for each reward component or phase that it concerns.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from statistics import fmean, pvariance
from typing import Any

from covo_rl.config import Options
from covo_rl.records.steps import is_number, scalars

#: values of a column that are remembered, and how many of its first ones
LONGEST, FIRST = 60, 5

Figures = dict[str, Any]
Sign = Callable[..., Iterator[Figures]]


class Past:
    """What is remembered of the steps so far, column by column; of the columns that `scalars` gives."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = {**Options().flat(), **{str(name): value for name, value in options.items()}}
        self.step = self.count = 0
        self.row: dict[str, float] = {}
        self.recent: dict[str, deque[float]] = {}
        self.first: dict[str, list[float]] = {}

    def add(self, metrics: Mapping[str, Any]) -> bool:
        """The next line; False where it is none of a step."""
        self.row = scalars(metrics)
        if "step" not in self.row:
            return False
        self.step, self.count = int(self.row["step"]), self.count + 1
        for name, value in self.row.items():
            self.recent.setdefault(name, deque(maxlen=LONGEST)).append(value)
            first = self.first.setdefault(name, [])
            if len(first) < FIRST:
                first.append(value)
        return True

    def last(self, column: str, count: int, ago: int = 0) -> list[float]:
        """The last `count` values of a column, `ago` values back; empty where there are fewer."""
        values = self.recent.get(column, ())
        end = len(values) - ago
        return list(islice(values, end - count, end)) if end >= count else []

    def mean(self, column: str, count: int, ago: int = 0) -> float | None:
        values = self.last(column, count, ago)
        return fmean(values) if values else None

    def start(self, column: str) -> float:
        """Mean of the first values of a column that is there."""
        return fmean(self.first[column])

    @property
    def components(self) -> list[str]:
        """The reward components of the last step."""
        names = (name.removeprefix("none_") for name in self.row if name.startswith("none_"))
        return [name for name in names if name != "total"]


def above(column: str) -> Sign:
    """The mean of a column over `steps` steps is above `limit`."""

    def sign(past: Past, steps: int, limit: float) -> Iterator[Figures]:
        now = past.mean(column, steps)
        if now is not None and now > limit:
            yield {"now": now}

    return sign


def format_flat(past: Past, steps: int, low: float, rise: float) -> Iterator[Figures]:
    now = past.mean("reward_format", steps)
    if now is not None and past.count >= 2 * steps and now < low and now - past.start("reward_format") < rise:
        yield {"now": now, "start": past.start("reward_format"), "count": past.count}


def groups_alike(low: float, high: float) -> Sign:
    """Nearly all groups have no variance while accuracy lies in [low, high]; one that is not measured counts as 0.5."""

    def sign(past: Past, steps: int, share: float) -> Iterator[Figures]:
        alike, accuracy = past.mean("zero_variance_groups", steps), past.mean("reward_accuracy", steps)
        if alike is not None and alike >= share and low <= (0.5 if accuracy is None else accuracy) <= high:
            yield {"alike": alike, "accuracy": accuracy}

    return sign


def runs_away(column: str) -> Sign:
    """A column is above `limit`, or above `floor` and `times` what it was."""

    def sign(past: Past, steps: int, limit: float, floor: float, times: float) -> Iterator[Figures]:
        now = past.mean(column, steps)
        if now is None:
            return
        start = past.start(column)
        if now > limit or (past.count > 2 * steps and now > floor and now > times * start):
            yield {"now": now, "start": start}

    return sign


def shrinks(column: str) -> Sign:
    """A column fell below `share` of what it was, which was at least `least`."""

    def sign(past: Past, steps: int, share: float, least: float) -> Iterator[Figures]:
        now = past.mean(column, steps)
        if now is not None and (start := past.start(column)) >= least and now < share * start:
            yield {"now": now, "start": start}

    return sign


def entropy_low(past: Past, steps: int, low: float, share: float, solved: float) -> Iterator[Figures]:
    accuracy = past.mean("reward_accuracy", steps)
    if accuracy is None or accuracy < solved:
        for figures in shrinks("sampling/entropy")(past, steps, share, 0.0):
            if figures["now"] < low:
                yield figures


def farmed(past: Past, steps: int, rise: float, fall: float, errors: float) -> Iterator[Figures]:
    """Of the components that rose while accuracy fell, by more than `errors` standard errors: what rose most."""
    now, then = past.mean("reward_accuracy", steps), past.mean("reward_accuracy", steps, ago=2 * steps)
    if now is None or then is None:
        return
    variance = sum(pvariance(past.last("reward_accuracy", steps, ago)) for ago in (0, 2 * steps))
    if then - now < max(fall, errors * math.sqrt(variance / steps)):
        return
    levels = {}
    for name in past.components:
        after, before = past.mean(f"reward_{name}", steps), past.mean(f"reward_{name}", steps, ago=2 * steps)
        if name != "accuracy" and after is not None and before is not None and after - before >= rise:
            levels[name] = before, after
    if levels:
        name, (before, after) = max(levels.items(), key=lambda item: item[1][1] - item[1][0])
        yield {"name": name, "before": before, "after": after, "then": then, "now": now}


def stops_listening(past: Past, steps: int, gap: float) -> Iterator[Figures]:
    real, silent = past.mean("listen_real", steps), past.mean("listen_silent", steps)
    if real is not None and silent is not None and real - silent < gap:
        yield {"real": real, "silent": silent}


def ungraded(prefix: str) -> Sign:
    """A column `prefix`_NAME of a component is above `limit`."""

    def sign(past: Past, steps: int, limit: float) -> Iterator[Figures]:
        for name in past.components:
            for figures in above(f"{prefix}_{name}")(past, steps, limit):
                yield {"component": name, **figures}

    return sign


def unanimous(past: Past, steps: int, share: float, fall: float) -> Iterator[Figures]:
    """Nearly all groups agree, and accuracy (of the replies, or of the majority) falls or is not known."""
    agreement = past.mean("majority_unanimous", steps)
    if agreement is None or agreement < share:
        return
    column = "reward_accuracy" if "reward_accuracy" in past.first else "majority_right"
    now, then = past.mean(column, steps), past.mean(column, steps, ago=2 * steps)
    if now is None or (then is not None and then - now >= fall):
        known = "there is no key to compare with" if now is None else f"accuracy fell from {then:.0%} to {now:.0%}"
        yield {"agreement": agreement, "known": known}


def updates_skipped(past: Past, steps: int) -> Iterator[Figures]:
    values = [0.0] * (past.count <= steps) + (past.last("skipped_steps", steps) or past.first.get("skipped_steps", []))
    if values and values[-1] > values[0]:
        yield {"new": values[-1] - values[0]}


def always_clipped(past: Past, steps: int) -> Iterator[Figures]:
    limit, norms = past.options.get("max_grad_norm"), past.last("grad_norm", steps)
    if is_number(limit) and limit and norms and min(norms) > limit:
        yield {"least": min(norms)}


def rate_zero(past: Past, steps: int) -> Iterator[Figures]:
    if not any(past.last("learning_rate", steps) or [1.0]):
        yield {}


def gradient_nil(past: Past, steps: int) -> Iterator[Figures]:
    """No gradient although some groups have variance."""
    norms, alike = past.last("grad_norm", steps), past.mean("zero_variance_groups", steps)
    if norms and not any(norms) and alike is not None and alike < 1:
        yield {"alike": alike}


def phase_waits(past: Past, steps: int, least: float, **limits: float) -> Iterator[Figures]:
    """A phase takes more than its share of steps that take at least `least` seconds."""
    step = past.mean("seconds/step", steps)
    for phase, limit in limits.items() if step is not None and step >= least else ():
        seconds = past.mean(f"seconds/{phase}", steps)
        if step and seconds is not None and seconds > limit * step:
            names = [name for name in past.row if name.startswith(f"seconds/{phase}_")]
            slowest = max(names, key=past.row.__getitem__, default="")
            part = f", most of it {slowest.removeprefix('seconds/')}" if slowest else ""
            yield {"component": phase, "seconds": seconds, "step": step, "part": part, "share": seconds / step}
