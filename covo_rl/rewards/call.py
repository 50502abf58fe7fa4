"""One call of a reward function: whatever it returns, logs or raises becomes an outcome of known shape."""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from covo_rl.data.files import plain
from covo_rl.rewards.specs import Reward
from covo_rl.types import SHOWN, shown, visible

LOCATE_SECONDS = 1.0  # spent on finding the row that a function raises on
_limits = threading.local()  # .until: when the component that runs in this thread is stopped, time.monotonic()


class Interrupted(BaseException):
    """Raised inside a function that was stopped: nobody waits for what it would return."""


@dataclass
class Outcome:
    """Scores of one component, NaN where there is none; `missing` says why, by completion."""

    scores: list[float]
    missing: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0
    extras: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def failed(cls, n: int, why: str, seconds: float = 0.0) -> Outcome:
        """Nothing could be scored."""
        return cls([math.nan] * n, dict.fromkeys(range(n), f"failed: {why}"), seconds)

    @property
    def failures(self) -> list[str]:
        """The reasons that are faults of the function, not of a completion."""
        return [why for why in self.missing.values() if why.startswith("failed")]


def seconds_left() -> float:
    """Seconds until the component that calls this is stopped; infinity outside of one."""
    return getattr(_limits, "until", math.inf) - time.monotonic()


def call_reward(
    reward: Reward, columns: dict[str, Any], timeout: float, run: Callable[[Any], Any] = asyncio.run
) -> Outcome:
    """Scores of the completions in `columns`; an exception, even SystemExit, is an outcome. `run` runs coroutines."""
    start = time.perf_counter()
    _limits.until = time.monotonic() + timeout
    spec, n = reward.source.spec, len(columns["completions"])
    outcome = Outcome([math.nan] * n)
    try:
        result = _invoke(reward, columns, outcome, run)
        values = result.tolist() if hasattr(result, "tolist") else result
        values = list(values) if isinstance(values, (list, tuple)) else None
        scores = [math.nan if value is None else _number(value) for value in values or ()]
    except Interrupted:
        return Outcome.failed(n, f"{spec} was interrupted", time.perf_counter() - start)
    except BaseException as error:  # SystemExit would end the thread without a word
        what = ": ".join(filter(None, (type(error).__name__, shown(error))))
        return Outcome.failed(n, f"{spec} raised {what}{_locate(reward, columns, run)}", time.perf_counter() - start)
    if values is None or len(values) != n:
        kind = f"{type(result).__name__}, not a list of {n} numbers"
        what = kind if values is None else f"{len(values)} scores for {n} completions"
        return Outcome.failed(n, f"{spec} returned {what}", time.perf_counter() - start)
    reasons = outcome.missing
    outcome.scores, outcome.missing, outcome.seconds = scores, {}, time.perf_counter() - start
    for i, (value, score) in enumerate(zip(values, scores, strict=True)):
        if value is None:
            outcome.missing[i] = reasons.get(i, "not gradeable")
        elif math.isnan(score):
            text = repr(value[:SHOWN]) if isinstance(value, str) else shown(value)
            outcome.missing[i] = f"failed: {spec} returned {text}{_row(columns, i)}"
    return outcome


def _number(value: Any) -> float:
    """A finite number, also as a numpy or torch scalar or an array of one; NaN for anything else."""
    try:
        value = value.tolist() if hasattr(value, "tolist") else value
        for _ in range(3):  # an array of one
            value = value[0] if isinstance(value, list) and len(value) == 1 else value
        number = float(value) if isinstance(value, (numbers.Real, Decimal)) else math.nan
    except Exception:  # 10**400, or what an object of the user's does: no number, which the caller says
        return math.nan
    return number if math.isfinite(number) else math.nan


def _invoke(reward: Reward, columns: dict[str, Any], outcome: Outcome, run: Callable[[Any], Any]) -> Any:
    """What the function returns; what it logs goes to `outcome`."""

    def log_extra(name: str, values: Any) -> None:
        values = list(values)
        if len(values) != len(outcome.scores):
            raise ValueError(f"log_extra({name!r}): {len(values)} values for {len(outcome.scores)} completions")
        outcome.extras[str(name)] = plain(values)

    def log_metric(name: str, value: float) -> None:
        outcome.metrics[str(name)] = float(value)

    def log_missing(index: int, why: str) -> None:
        outcome.missing[index] = shown(why)

    arguments = {**columns, "log_extra": log_extra, "log_metric": log_metric, "log_missing": log_missing}
    if "clips" not in reward.parameters:
        arguments.pop("clips", None)
    if not reward.source.trusted:
        arguments.pop("explain", None)
    if reward.conversational:
        for name, role in (("completions", "assistant"), ("prompts", "user")):
            arguments[name] = [[{"role": role, "content": text}] for text in columns[name]]
    result = reward(**arguments)

    async def awaited() -> Any:
        return await result

    return run(awaited()) if inspect.isawaitable(result) else result


def _locate(reward: Reward, columns: dict[str, Any], run: Callable[[Any], Any]) -> str:
    """Which completion does it raise on? Called one by one, for a second; only for the message."""
    deadline = time.perf_counter() + min(LOCATE_SECONDS, seconds_left() / 2)
    n = len(columns["completions"])
    for i in range(n):
        if time.perf_counter() > deadline:
            return " (on a batch; no single row was found)"
        one = {k: [v[i]] if isinstance(v, list) and len(v) == n else v for k, v in columns.items()}
        try:
            _invoke(reward, one, Outcome([math.nan]), run)
        except BaseException:  # the one we look for
            return _row(columns, i)
    return " (only on the whole batch, not on any single row)"


def _row(columns: dict[str, Any], i: int) -> str:
    text = columns["completions"][i]
    return f" for row {visible(columns['id'][i])}, completion {text if len(text) <= 80 else text[:77] + '...'!r}"
