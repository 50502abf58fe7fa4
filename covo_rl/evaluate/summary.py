"""Records -> figures: accuracies with intervals, breakdowns, shares, lengths. Pure; computed the same for every run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from covo_rl.evaluate.records import VERDICTS, Record
from covo_rl.evaluate.statistics import majority, pass_at_k, wilson

#: Upper ends in seconds of the audio-length classes.
LENGTH_CLASSES = (5.0, 10.0, 20.0, 30.0, 60.0)


def row_score(record: Record, verdict: str) -> float | None:
    """Share of a row's replies that are right; 0 for a row without reply; None where the official rule drops it.

    A row with several samples is dropped only when every sample is; a dropped sample leaves that row's mean.
    """
    values = [float(value) for value in record["verdicts"][verdict] if value is not None]
    if values:
        return fmean(values)
    return 0.0 if record["missing"] and verdict.startswith("strict") and record["strict_correct"] is False else None


def accuracy(records: Sequence[Record], verdict: str) -> dict[str, Any]:
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
    if seconds is None:
        return "unknown"
    low = 0.0
    for high in LENGTH_CLASSES:
        if seconds <= high:
            return f"{low:g}-{high:g} s"
        low = high
    return f"> {low:g} s"


def breakdown(records: Sequence[Record]) -> dict[str, dict[str, dict[str, Any]]]:
    """column -> value -> {official, official_extracted, strict: accuracy block, n}; audio length is a column too."""
    columns: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        values = {**record["breakdown"], "audio length": length_class(record["seconds"])}
        for column, value in values.items():
            columns.setdefault(column, {}).setdefault(str(value), []).append(record)
    if set(columns.get("audio length", {})) == {"unknown"}:
        del columns["audio length"]
    return {
        column: {
            value: {"n": len(rows), **{name: accuracy(rows, name) for name in VERDICTS[:3]}}
            for value, rows in sorted(groups.items(), key=lambda item: _natural(item[0]))
        }
        for column, groups in columns.items()
    }


def _natural(value: str) -> tuple[float, str]:
    """Length classes by number, everything else by name after them."""
    head = value.split("-")[0].lstrip("> ").removesuffix(" s")
    return (float(head), value) if value.endswith(" s") and head.replace(".", "").isdigit() else (1e9, value)


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return fmean(present) if present else None


def _replies(records: Sequence[Record], key: str) -> list[Any]:
    return [value for record in records for value in record[key]]


def _share(records: Sequence[Record], key: str, test: Callable[[Any], bool]) -> float | None:
    values = _replies(records, key)
    return sum(map(test, values)) / len(values) if values else None


def reply_figures(records: Sequence[Record]) -> dict[str, Any]:
    """How the replies look: shares over all replies, lengths, counts of rows without or with unreadable replies."""
    present = [record for record in records if not record["missing"]]
    return {
        "n_missing": len(records) - len(present),
        "n_unparseable": sum(record["answers"][0] is None for record in present),
        "share_unparseable": _share(present, "answers", lambda answer: answer is None),
        "share_truncated": _share(present, "stop_reasons", lambda reason: reason == "length"),
        "mean_thinking_words": _mean(_replies(present, "thinking_words")),
        "mean_completion_tokens": _mean([n for n in _replies(present, "completion_tokens") if n]),
    }


def reward_means(records: Sequence[Record]) -> dict[str, float | None]:
    """`reward_<component>` and `reward_total`: means over all gradeable replies."""
    names = dict.fromkeys(name for record in records for name in record["rewards"])
    return {
        f"reward_{name}": _mean([v for record in records for v in record["rewards"].get(name, ())]) for name in names
    }


def sampled_figures(records: Sequence[Record]) -> dict[str, Any]:
    """mean@n, unbiased pass@k and majority@n (strict), for rows with n > 1 replies; empty for single replies."""
    n = min((len(record["replies"]) for record in records if not record["missing"]), default=0)
    if n < 2:
        return {}
    right = [sum(bool(value) for value in r["verdicts"]["strict"]) for r in records]
    sizes = [len(r["replies"]) for r in records]
    ks = sorted({k for k in (1, 2, 4, 8, 16, 32, 64, n) if k <= n})
    vote = [_majority_right(record) for record in records]
    return {
        "n": n,
        "mean_at_n": accuracy(records, "strict")["accuracy"],
        "pass_at_k": {
            str(k): fmean(pass_at_k(size, c, k) if size >= k else 0.0 for c, size in zip(right, sizes, strict=True))
            for k in ks
        },
        "majority_at_n": {"accuracy": fmean(vote), "ci95": list(wilson(sum(vote), len(vote)))},
    }


def _majority_right(record: Record) -> bool:
    """Is the answer that most samples give right? Answers vote as lower-cased text."""
    keys = [None if answer is None else " ".join(answer.lower().split()) for answer in record["answers"]]
    winner = majority(keys)
    return winner is not None and bool(record["verdicts"]["strict"][keys.index(winner)])


def summarize(records: Sequence[Record]) -> dict[str, Any]:
    """Everything that is computed from records alone."""
    strict = accuracy(records, "strict")
    rewards = reward_means(records)
    return {
        "n": len(records),
        "accuracy": strict["accuracy"],
        "ci95": strict["ci95"],
        **{name: accuracy(records, name) for name in VERDICTS},
        **reply_figures(records),
        **rewards,
        "consistency_rate": rewards.get("reward_consistency"),
        "sampled": sampled_figures(records),
        "breakdown": breakdown(records),
    }


def per_category(summary: Mapping[str, Any], column: str = "category") -> dict[str, tuple[int, float | None]]:
    """value -> (n, strict accuracy) of one breakdown column, for a short table."""
    return {v: (e["n"], e["strict"]["accuracy"]) for v, e in summary["breakdown"].get(column, {}).items()}
