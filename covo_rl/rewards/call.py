"""One call of one reward function: give it its columns, check what comes back, never raise.

The same code runs in a thread of the trainer (our own rewards) and in a worker process (everybody else's).
"""

from __future__ import annotations

import asyncio
import inspect
import math
import time
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

    @property
    def failures(self) -> list[str]:
        """The reasons that are faults of the function, not of a completion."""
        return [why for why in self.missing.values() if why.startswith("failed")]


def call(reward: Reward, columns: dict[str, Any]) -> Outcome:
    """Scores of the completions in `columns`; an exception, even SystemExit, is an outcome."""
    start = time.perf_counter()
    n = len(columns["completions"])
    outcome = Outcome([math.nan] * n)
    try:
        result = _invoke(reward, columns, outcome)
    except BaseException as error:  # SystemExit would end the thread without a word
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        why = f"{reward.source.spec} raised {what}{_locate(reward, columns)}"
        return Outcome.failed(n, why, time.perf_counter() - start)
    _read_scores(reward.source.spec, result, columns, outcome)
    outcome.seconds = time.perf_counter() - start
    return outcome


def _invoke(reward: Reward, columns: dict[str, Any], outcome: Outcome) -> Any:
    """What the function returns; what it logs goes to `outcome`."""

    def log_extra(name: str, values: Any) -> None:
        values = list(values)
        if len(values) != len(outcome.scores):
            raise ValueError(f"log_extra({name!r}): {len(values)} values for {len(outcome.scores)} completions")
        outcome.extras[name] = values

    def log_metric(name: str, value: float) -> None:
        outcome.metrics[name] = float(value)

    def log_missing(index: int, why: str) -> None:
        outcome.missing[index] = why

    arguments = {**columns, "log_extra": log_extra, "log_metric": log_metric, "log_missing": log_missing}
    if "clips" not in reward.parameters:
        arguments.pop("clips", None)
    if reward.conversational:
        arguments["completions"] = [[{"role": "assistant", "content": text}] for text in columns["completions"]]
        arguments["prompts"] = [[{"role": "user", "content": text}] for text in columns["prompts"]]
    result = reward(**arguments)
    if not inspect.isawaitable(result):
        return result

    async def awaited() -> Any:
        return await result

    return asyncio.run(awaited())


def _read_scores(spec: str, result: Any, columns: dict[str, Any], outcome: Outcome) -> None:
    n = len(outcome.scores)
    reasons, outcome.missing = outcome.missing, {}
    values = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(values, (list, tuple)):
        what = f"returned {type(result).__name__}, not a list of {n} numbers"
    else:
        what = f"returned {len(values)} scores for {n} completions" if len(values) != n else ""
    if what:
        outcome.missing = Outcome.failed(n, f"{spec} {what}").missing
        return
    for i, value in enumerate(values):
        if value is None:
            outcome.missing[i] = reasons.get(i, "not gradeable")
        elif not isinstance(value, (int, float)) or not math.isfinite(value):
            outcome.missing[i] = f"failed: {spec} returned {value!r}{_row(columns, i)}"
        else:
            outcome.scores[i] = float(value)


def _locate(reward: Reward, columns: dict[str, Any]) -> str:
    """Which completion does it raise on? Called one by one, for a second; only for the message."""
    deadline = time.perf_counter() + LOCATE_SECONDS
    n = len(columns["completions"])
    for i in range(n):
        if time.perf_counter() > deadline:
            return " (on a batch; no single row was found)"
        one = {k: [v[i]] if isinstance(v, list) and len(v) == n else v for k, v in columns.items()}
        try:
            _invoke(reward, one, Outcome([math.nan]))
        except BaseException:  # the one we look for
            return _row(columns, i)
    return " (only on the whole batch, not on any single row)"


def _row(columns: dict[str, Any], i: int) -> str:
    text = columns["completions"][i]
    return f" for row {columns['id'][i]}, completion {text if len(text) <= 80 else text[:77] + '...'!r}"
