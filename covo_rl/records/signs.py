"""By what the monitor's rules know a condition: signs, over what is remembered of the steps so far.

A sign is a generator with the numbers of its rule as arguments (records/rules.py). It yields the figures of the rule's
sentence where the condition holds now, one set for each reward component or phase that it concerns.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from statistics import fmean, median, variance
from typing import Any

from covo_rl.config import Options, corrects_sampler
from covo_rl.records.steps import is_number, scalars

#: values of a column that are remembered, how many of its first ones, and those of them that say what it was at first
LONGEST, FIRST, START = 60, 10, 5

Figures = dict[str, Any]
Sign = Callable[..., Iterator[Figures]]


class Past:
    """What is remembered of the steps so far, column by column; of the columns that `scalars` gives."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = {**Options().flat(), **{str(name): value for name, value in options.items()}}
        decisive = ("sampler_correction", "use_vllm", "rollout_ahead")
        self.options["sampler_correction"] = corrects_sampler(*map(self.options.__getitem__, decisive))
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
        return fmean(self.first[column][:START])

    def earlier(self, column: str, count: int) -> list[list[float]]:
        """What the last `count` values can be compared with: the `count` before them, those before, and the first;
        each empty where the column has not as many."""
        before = self.last(column, count, count)
        return [before, self.last(column, count, 2 * count), self.first[column][:count] if before else []]

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
    if now is None or past.count < 2 * steps or now >= low:
        return
    if now - (start := past.start("reward_format")) < rise:
        reading = "does not find the tags by itself" if start < low else "has lost the tags that it wrote"
        yield {"now": now, "start": start, "count": past.count, "reading": reading}


def groups_alike(low: float, high: float) -> Sign:
    """Nearly all groups have no variance while accuracy lies in [low, high); one that is not measured counts as 0.5."""

    def sign(past: Past, steps: int, share: float) -> Iterator[Figures]:
        alike, accuracy = past.mean("zero_variance_groups", steps), past.mean("reward_accuracy", steps)
        if alike is not None and alike >= share and low <= (0.5 if accuracy is None else accuracy) < high:
            yield {"alike": alike, "accuracy": accuracy}

    return sign


def runs_away(column: str) -> Sign:
    """A column is above `limit`, or above `floor` and `times` what it was, in most of the steps: one may be a spike."""

    def sign(past: Past, steps: int, limit: float, floor: float, times: float) -> Iterator[Figures]:
        if not (values := past.last(column, steps)):
            return
        now, start = median(values), past.start(column)
        if now > limit or (past.count > 2 * steps and now > floor and now > times * start):
            yield {"now": now, "start": start}

    return sign


def off_policy(past: Past, steps: int, kl: float, ess: float) -> Iterator[Figures]:
    """In most of the steps the engine's KL from the policy is above `kl`, or its sample worth less than `ess`."""
    distances, shares = past.last("engine/kl_k3", steps), past.last("engine/ess", steps)
    if distances and shares and (median(distances) > kl or median(shares) < ess):
        yield {"now": median(distances), "share": median(shares)}


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
        known = "nothing measures accuracy" if accuracy is None else f"accuracy is {accuracy:.0%}"
        for figures in shrinks("sampling/entropy")(past, steps, share, 0.0):
            if figures["now"] < low:
                yield {"known": known, **figures}


def moved(before: list[float], now: list[float], by: float, errors: float) -> tuple[float, float] | None:
    """The means of two windows, if the second is higher by `by` (lower, where that is negative) or more, and by more
    than `errors` standard errors: a few groups a step make noise."""
    if len(before) < 2 or len(now) < 2:
        return None
    noise = math.sqrt(variance(before) / len(before) + variance(now) / len(now))
    change = math.copysign(1.0, by) * (fmean(now) - fmean(before))
    return (fmean(before), fmean(now)) if change >= max(abs(by), errors * noise) else None


def farmed(past: Past, steps: int, rise: float, fall: float, errors: float) -> Iterator[Figures]:
    """Of the components that rose while accuracy fell, by more than their noise: what rose most."""
    now = past.last("reward_accuracy", steps)
    for i, before in enumerate(past.earlier("reward_accuracy", steps) if now else ()):
        if (accuracy := moved(before, now, -fall, errors)) is None:
            continue
        levels = {}
        for name in past.components:
            if name != "accuracy" and (values := past.last(column := f"reward_{name}", steps)):
                level = moved(past.earlier(column, steps)[i], values, rise, errors)
                levels |= {} if level is None else {name: level}
        if levels:
            name, (low, high) = max(levels.items(), key=lambda item: item[1][1] - item[1][0])
            yield {"name": name, "before": low, "after": high, "then": accuracy[0], "now": accuracy[1]}
            return


def stops_listening(past: Past, steps: int, gap: float, share: float, least: float, rows: int) -> Iterator[Figures]:
    """The clips bring less than `gap`, or than `share` of what they brought, to an accuracy of `least` or more, on as
    many `rows` at least."""
    real, silent = past.mean("listen_real", steps), past.mean("listen_silent", steps)
    if real is None or silent is None or real < least or (past.mean("listen_rows", 1) or rows) < rows:
        return
    start = past.start("listen_real") - past.start("listen_silent")
    if real - silent < max(gap, share * start):
        yield {"real": real, "silent": silent, "start": start}


def ungraded(prefix: str) -> Sign:
    """A column `prefix`_NAME of a component is above `limit`."""

    def sign(past: Past, steps: int, limit: float) -> Iterator[Figures]:
        for name in past.components:
            for figures in above(f"{prefix}_{name}")(past, steps, limit):
                yield {"component": name, **figures}

    return sign


def missing(past: Past, steps: int, limit: float, lost: float, never: float) -> Iterator[Figures]:
    """A component is missing above `limit`, and rollouts leave their groups for it, or it is (nearly) never there.

    That rows of another kind have no score of it is no fault: it is left out for the whole group.
    """
    total = past.mean("none_total", steps)
    for figures in ungraded("none")(past, steps, limit):
        if total is None or total > lost:
            share = "such rollouts" if total is None else f"{total:.0%} of all rollouts"
            yield {"effect": f"{share} leave their group, and little is learnt from the rest", **figures}
        elif figures["now"] >= never:
            yield {"effect": "it counts for nothing", **figures}


def unanimous(past: Past, steps: int, share: float, fall: float, errors: float) -> Iterator[Figures]:
    """Nearly all groups agree, and accuracy (of the replies, or of the majority) fell or is not known."""
    agreement = past.mean("majority_unanimous", steps)
    if agreement is None or agreement < share:
        return
    column = "reward_accuracy" if "reward_accuracy" in past.first else "majority_right"
    if not (now := past.last(column, steps)):
        yield {"agreement": agreement, "known": "there is no key to compare with"}
    for before in past.earlier(column, steps) if now else ():
        if accuracy := moved(before, now, -fall, errors):
            yield {"agreement": agreement, "known": "accuracy fell from {:.0%} to {:.0%}".format(*accuracy)}
            return


def updates_skipped(past: Past, steps: int) -> Iterator[Figures]:
    values = [*past.recent.get("skipped_steps", ())][-steps:]
    if past.step <= len(values):  # the run began within them
        values.insert(0, 0.0)
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
