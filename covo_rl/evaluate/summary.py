"""Records -> figures: accuracies with intervals, breakdowns, shares, lengths. Pure; computed the same for every run."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from covo_rl.evaluate.records import VERDICTS, Record
from covo_rl.evaluate.statistics import majority, pass_at_k, wilson

#: Ends of the audio-length classes in seconds, and the names of the classes.
LENGTHS = (0.0, 5.0, 10.0, 20.0, 30.0, 60.0)
LENGTH_CLASSES = (*(f"{low:g}-{high:g} s" for low, high in pairwise(LENGTHS)), f"> {LENGTHS[-1]:g} s", "unknown")


def summarize(records: Sequence[Record]) -> dict[str, Any]:
    """Everything that is computed from records alone."""
    strict = accuracy_of(records, "strict")
    components = dict.fromkeys(name for record in records for name in record["rewards"])
    rewards = {
        f"reward_{name}": _mean([value for record in records for value in record["rewards"].get(name, ())])
        for name in components
    }
    return {
        "n": len(records),
        "accuracy": strict["accuracy"],
        "ci95": strict["ci95"],
        **{name: accuracy_of(records, name) for name in VERDICTS},
        **_reply_figures(records),
        **rewards,
        "consistency_rate": rewards.get("reward_consistency"),
        "sampled": _sampled_figures(records),
        "breakdown": _breakdown(records),
    }


def row_score(record: Record, verdict: str) -> float | None:
    """Share of a row's replies that are right; 0 for a row without reply; None where the official rule drops it.

    A row with several samples is dropped only when every sample is; a dropped sample leaves that row's mean.
    """
    values = [float(value) for value in record["verdicts"][verdict] if value is not None]
    if values:
        return fmean(values)
    return 0.0 if record["missing"] and verdict.startswith("strict") and record["strict_correct"] is False else None


def accuracy_of(records: Sequence[Record], verdict: str) -> dict[str, Any]:
    """`accuracy` over the rows that the rule scores (`n_scored`), `accuracy_all` over all rows, dropped ones wrong.

    Both with 95 % Wilson intervals; null where nothing was scored.
    """
    scores = [score for record in records if (score := row_score(record, verdict)) is not None]
    total, right = len(records), sum(scores)
    return {
        "accuracy": right / len(scores) if scores else None,
        "n_scored": len(scores),
        "n_total": total,
        "ci95": list(wilson(right, len(scores))) if scores else None,
        "accuracy_all": right / total if total else None,
        "ci95_all": list(wilson(right, total)) if total else None,
        "n_dropped": total - len(scores),
    }


def length_class(seconds: float | None) -> str:
    """The audio-length class of a row, for example `5-10 s`; `unknown` without a length."""
    return LENGTH_CLASSES[-1 if seconds is None else bisect_left(LENGTHS, seconds, lo=1) - 1]


def _breakdown(records: Sequence[Record]) -> dict[str, dict[str, dict[str, Any]]]:
    """column -> value -> {official, official_extracted, strict: accuracy block, n}; audio length is a column too."""
    columns: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        for column, value in {**record["breakdown"], "audio length": length_class(record["seconds"])}.items():
            columns.setdefault(column, {}).setdefault(str(value), []).append(record)
    if set(columns.get("audio length", ())) == {"unknown"}:
        del columns["audio length"]
    blocks = {}
    for column, groups in columns.items():
        values = [name for name in LENGTH_CLASSES if name in groups] if column == "audio length" else sorted(groups)
        blocks[column] = {
            value: {"n": len(groups[value]), **{name: accuracy_of(groups[value], name) for name in VERDICTS[:3]}}
            for value in values
        }
    return blocks


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return fmean(present) if present else None


def _reply_figures(records: Sequence[Record]) -> dict[str, Any]:
    """How the replies look: shares over all replies, lengths, counts of rows without or with unreadable replies."""
    present = [record for record in records if not record["missing"]]
    answers, reasons, words, tokens = (
        [value for record in present for value in record[key]]
        for key in ("answers", "stop_reasons", "thinking_words", "completion_tokens")
    )
    return {
        "n_missing": len(records) - len(present),
        "n_unparseable": sum(record["answers"][0] is None for record in present),
        "share_unparseable": _mean([answer is None for answer in answers]),
        "share_truncated": _mean([reason == "length" for reason in reasons]),
        "mean_thinking_words": _mean(words),
        "mean_completion_tokens": _mean([n for n in tokens if n]),
    }


def _sampled_figures(records: Sequence[Record]) -> dict[str, Any]:
    """mean@n, unbiased pass@k and majority@n (strict), for rows with n > 1 replies; empty for single replies."""
    n = min((len(record["replies"]) for record in records if not record["missing"]), default=0)
    if n < 2:
        return {}
    counts = [(len(r["replies"]), sum(map(bool, r["verdicts"]["strict"]))) for r in records]
    votes = [_majority_right(record) for record in records]
    return {
        "n": n,
        "mean_at_n": accuracy_of(records, "strict")["accuracy"],
        "pass_at_k": {
            str(k): fmean(pass_at_k(size, right, k) if size >= k else 0.0 for size, right in counts)
            for k in sorted({1, 2, 4, 8, 16, 32, 64, n})
            if k <= n
        },
        "majority_at_n": {"accuracy": fmean(votes), "ci95": list(wilson(sum(votes), len(votes)))},
    }


def _majority_right(record: Record) -> bool:
    """Is the answer that most samples give right? Answers vote as lower-cased text."""
    keys = [None if answer is None else " ".join(answer.lower().split()) for answer in record["answers"]]
    winner = majority(keys)
    return winner is not None and bool(record["verdicts"]["strict"][keys.index(winner)])
