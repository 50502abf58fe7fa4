"""Completions of another trainer -> scores of our rewards, one completion at a time: it need not know its group."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from functools import cache
from typing import Any

import numpy as np

from covo_rl.config import RewardConfig
from covo_rl.rewards import Component, RewardError, components, score
from covo_rl.rewards.columns import example_from_row, group_from_completions
from covo_rl.rewards.scoring import weighted_sum

#: what a reward may name and another trainer does not tell as this one does
_UNTOLD = {"group_id": "the other rollouts of the prompt", "completion_ids": "tokens", "trainer_state": "the step",
           "completion_codes": "audio codes"}  # fmt: skip
_OPTIONS = {field.name for field in fields(RewardConfig)} - {"rewards", "reward_failure_limit", "check_rewards"}


@cache
def lone_terms(rewards: str) -> tuple[Component, ...]:
    """The components of `accuracy=1,format=0.5`.

    Raises:
        RewardError: one that cannot be loaded, or that needs more than a row and a completion.
    """
    terms = components(rewards)
    for term in terms:
        if untold := sorted(_UNTOLD.keys() & term.reward.parameters):
            needs = " and ".join(_UNTOLD[name] for name in untold)
            raise RewardError(f"reward {term.name} needs {needs}, which other trainers do not tell it; leave it out")
        if term.name == "score":
            raise RewardError("a reward cannot be named 'score' here, which is the weighted sum: rename it")
    return tuple(terms)


def lone_scores(
    rows: Sequence[Any], completions: Sequence[str], *, rewards: str = "accuracy,format", missing: float | None = None,
    stop_reasons: Sequence[str] | None = None, **options: Any,
) -> list[dict[str, float]]:  # fmt: skip
    """`score`, the weighted sum, and every component, by completion. `rows` are texts `covo_row` of converted rows.

    `missing` is what a component counts as that is not gradeable. `options` are those of RewardConfig (reward_gate,
    judge, reward_timeout, ...); a reward that fails raises, unless `reward_failure` is "none".

    Raises:
        RewardError: no such option, a row that was not converted, a score that is missing without `missing`.
    """
    if unknown := sorted(options.keys() - _OPTIONS):
        raise RewardError(f"there is no option {', '.join(unknown)} here; there are rewards, missing, "
                          f"{', '.join(sorted(_OPTIONS))}")  # fmt: skip
    config, terms = RewardConfig(**{"reward_failure": "stop", **options}), lone_terms(rewards)
    examples = [example_from_row(_row(row), number) for number, row in enumerate(rows)]
    reasons = stop_reasons or ["stop"] * len(rows)
    trios = zip(examples, completions, reasons, strict=True)
    groups = [group_from_completions(example, [text], reason) for example, text, reason in trios]
    table = score(groups, config, rewards=list(terms))
    for (number, _, name), why in table.missing.items():
        if missing is None:
            raise RewardError(
                f"row {examples[number].id}: {name} is not gradeable ({why}). Here it would leave the group; other "
                "trainers have no such thing: leave the reward out, or say what it counts as, for example missing=0.0"
            )
    filler = np.nan if missing is None else missing
    scores_NR = np.where(np.isnan(table.rewards_PGR), filler, table.rewards_PGR)[:, 0]
    gate = table.names.index(table.gate) if table.gate != "none" else None
    totals_N = weighted_sum(scores_NR[:, None], table.weights_R, gate)[:, 0]
    return [
        {"score": total, **dict(zip(table.names, scores, strict=True))}
        for total, scores in zip(totals_N.tolist(), scores_NR.tolist(), strict=True)
    ]


def _row(text: Any) -> dict[str, Any]:
    """Raises RewardError for what `covo-rl data convert` did not write."""
    with suppress(TypeError, ValueError):
        if isinstance(row := json.loads(text), dict):
            return row
    raise RewardError(
        "a row has no covo_row: write the rows with `covo-rl data convert IN OUT --to verl|swift|nemo-rl`"
    )
