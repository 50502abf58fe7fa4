"""One call of one reward function: give it its columns, check what comes back, never raise.

The same code runs in a thread of the trainer (our own rewards) and in a worker process (everybody else's).
"""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from covo_rl.rewards.specs import Reward

LOCATE_SECONDS = 1.0  # spent on finding the row that a function raises on


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


def call(reward: Reward, columns: dict[str, Any], n: int) -> Outcome:
    """Scores of the n completions in `columns`; an exception, even SystemExit, is an outcome."""
    start = time.perf_counter()
    outcome = Outcome([math.nan] * n)
    reasons: dict[int, str] = {}
    arguments = _arguments(reward, columns, n, outcome, reasons)
    try:
        result = _invoke(reward, arguments)
    except BaseException as error:  # SystemExit would end the thread without a word
        where = _locate(reward, columns, n)
        return Outcome.failed(n, f"{reward.source.spec} raised {_describe(error)}{where}", time.perf_counter() - start)
    _read_scores(reward.source.spec, result, n, outcome, columns, reasons)
    outcome.seconds = time.perf_counter() - start
    return outcome


def _invoke(reward: Reward, arguments: dict[str, Any]) -> Any:
    result = reward(**arguments)
    if inspect.isawaitable(result):

        async def awaited() -> Any:
            return await result

        result = asyncio.run(awaited())
    return result


def _arguments(
    reward: Reward, columns: dict[str, Any], n: int, outcome: Outcome, reasons: dict[int, str]
) -> dict[str, Any]:
    def log_extra(name: str, values: Any) -> None:
        values = list(values)
        if len(values) != n:
            raise ValueError(f"log_extra({name!r}): {len(values)} values for {n} completions")
        outcome.extras[name] = values

    def log_metric(name: str, value: float) -> None:
        outcome.metrics[name] = float(value)

    def log_missing(index: int, why: str) -> None:
        reasons[index] = why

    given: dict[str, Callable[..., None]] = {
        "log_extra": log_extra, "log_metric": log_metric, "log_missing": log_missing
    }  # fmt: skip
    arguments = {**columns, **given}
    if "clips" in arguments and "clips" not in reward.parameters:
        del arguments["clips"]
    if reward.conversational:
        arguments["completions"] = [[{"role": "assistant", "content": text}] for text in columns["completions"]]
        arguments["prompts"] = [[{"role": "user", "content": text}] for text in columns["prompts"]]
    return arguments


def _read_scores(
    spec: str, result: Any, n: int, outcome: Outcome, columns: dict[str, Any], reasons: dict[int, str]
) -> None:
    values = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(values, (list, tuple)):
        failed = Outcome.failed(n, f"{spec} returned {type(result).__name__}, not a list of {n} numbers")
        outcome.missing = failed.missing
        return
    if len(values) != n:
        outcome.missing = Outcome.failed(n, f"{spec} returned {len(values)} scores for {n} completions").missing
        return
    for i, value in enumerate(values):
        if value is None:
            outcome.missing[i] = reasons.get(i, "not gradeable")
        elif not isinstance(value, (int, float)) or not math.isfinite(value):
            outcome.missing[i] = f"failed: {spec} returned {value!r}{_shown(columns, i)}"
        else:
            outcome.scores[i] = float(value)


def _locate(reward: Reward, columns: dict[str, Any], n: int) -> str:
    """Which completion does it raise on? Called one by one, for a second; only for the message."""
    deadline = time.perf_counter() + LOCATE_SECONDS
    for i in range(n):
        if time.perf_counter() > deadline:
            return " (on a batch; no single row was found)"
        one = {name: _one(value, i, n) for name, value in columns.items()}
        try:
            _invoke(reward, _arguments(reward, one, 1, Outcome([math.nan]), {}))
        except BaseException:  # the one we look for
            return _shown(columns, i)
    return " (only on the whole batch, not on any single row)"


def _one(value: Any, i: int, n: int) -> Any:
    return [value[i]] if isinstance(value, list) and len(value) == n else value


def _shown(columns: dict[str, Any], i: int) -> str:
    rows, completions = columns.get("id"), columns["completions"]
    text = completions[i]
    text = text if len(text) <= 80 else text[:77] + "..."
    return f" for row {rows[i] if rows else i}, completion {text!r}"


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
