"""Rows of a file -> scores, as the run that wrote them gave them: by group, with the columns that the rewards saw."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from covo_rl.config import RewardConfig
from covo_rl.rewards.columns import example_from_row, group_from_completions
from covo_rl.rewards.scoring import Component, FailureWindow, score, weighted_sum
from covo_rl.rewards.specs import RewardError
from covo_rl.types import shown

OLD_RECORD = (
    "a run's rollout without the choices and facts that its rewards saw (written by an older covo_rl), so that its "
    "scores would differ from the run's. Add the columns of the data, by id"
)
BATCH = 2048  # rows scored at once, or as many as the group of the last one needs
Row = Mapping[str, Any]


@dataclass
class RowScores:
    """`rewards` and `totals` by row, NaN where there is none; `metrics` that rewards logged, as means over rows."""

    rewards: list[dict[str, float]]
    totals: list[float]
    metrics: dict[str, float] = field(default_factory=dict)


def score_rows(rows: Sequence[Row], config: RewardConfig, terms: Sequence[Component], source: Path) -> RowScores:
    """Scores of the rows of one file; `source` is what errors call it, and its name may tell the step of a run.

    Raises:
        RewardError: a row that cannot be scored, or a component of which more than `reward_failure_limit` failed.
    """
    for i, row in enumerate(rows, 1):
        if problem := _row_problem(row, terms):
            raise RewardError(f"{source} row {i}: {problem}")
    number = re.fullmatch(r"step_(\d+)", source.stem)
    state = {"step": int(number[1])} if number else None
    result = RowScores([{} for _ in rows], [np.nan] * len(rows))
    window, failures = FailureWindow(config.reward_failure_limit), {term.name: [] for term in terms}
    for groups in _batches(row_groups(rows)):
        places = [i for group in groups for i in group]
        group_ids = [g for g, group in enumerate(groups) for _ in group]
        table = score([_as_group(rows[i], i) for i in places], config, trainer_state=state, rewards=terms,
                      group_ids=group_ids)  # fmt: skip
        scores_NR, start = table.rewards_PGR[:, 0], 0
        for i, scores in zip(places, scores_NR.tolist(), strict=True):
            result.rewards[i] = dict(zip(table.names, scores, strict=True))
        gate = table.names.index(table.gate) if table.gate != "none" else None
        for group in groups:  # compared with each other, as the group of a run
            totals = weighted_sum(scores_NR[None, start : start + len(group)], table.weights_R, gate)[0]
            start += len(group)
            for i, total in zip(group, totals.tolist(), strict=True):
                result.totals[i] = total
        for name, value in table.metrics.items():
            if not name.startswith("rewards/"):
                result.metrics[name] = result.metrics.get(name, 0.0) + value * len(places) / len(rows)
        for (_, _, name), why in table.missing.items():
            failures[name] += [why] if why.startswith("failed") else []
        if problem := window.add([table]):  # a component that always fails: the rest is spared
            raise RewardError(problem)
    for name, reasons in failures.items():
        if len(reasons) > config.reward_failure_limit * len(rows):
            raise RewardError(f"{name}: {len(reasons)} of {len(rows)} scores failed; the first: {reasons[0]}")
    return result


def _row_problem(row: Row, terms: Sequence[Component]) -> str:
    if not isinstance(row.get("completion"), str):
        return f"needs a text `completion`; it has {', '.join(row)}"
    if "advantage" in row and "choices" not in row:
        return OLD_RECORD
    for term in terms:
        if "completion_ids" in term.reward.parameters and not isinstance(row.get("completion_ids"), list):
            return f"{term.name} counts tokens, and the row has no list `completion_ids`"
        if "completion_codes" in term.reward.parameters and row.get("completion_codes") is None:
            return f"{term.name} hears the reply, and the row has no list `completion_codes`"
    codes = row.get("completion_codes")
    if codes is not None and not (isinstance(codes, list) and all(type(code) is int and code >= 0 for code in codes)):
        return f"completion_codes is {shown(codes, 80)}, not a list of numbers from 0 on"
    return ""


def _as_group(row: Row, place: int) -> Any:
    ids = row["completion_ids"] if isinstance(row.get("completion_ids"), list) else ()
    example, codes = example_from_row(row, place), row.get("completion_codes") or ()
    return group_from_completions(example, [row["completion"]], row.get("stop_reason", ""), ids, codes)


def row_groups(rows: Sequence[Row]) -> list[list[int]]:
    """Places of the rows that belong together: those of one `id`; of a run, each `rollout` of a `group` once."""
    groups: dict[Any, list[int]] = {}
    seen: Counter[tuple[Any, ...]] = Counter()
    for i, row in enumerate(rows):
        key: tuple[Any, ...] = ("id", str(row["id"])) if row.get("id") is not None else ("row", i)
        if "advantage" in row and "rollout" in row:  # its row may have been taken again, in this step or another
            place = (*key, str(row.get("group")), str(row["rollout"]))
            key = (*place[:-1], seen[place])
            seen[place] += 1
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def _batches(groups: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """Whole groups, about BATCH rows at a time."""
    batch: list[list[int]] = []
    for group in groups:
        batch.append(group)
        if sum(map(len, batch)) >= BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
