"""Records -> figures: accuracies with intervals, breakdowns, shares, lengths, and the tests that compare two runs.

Pure, in Python and NumPy; computed the same for every run.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

import numpy as np

from covo_rl.evaluate.records import VERDICTS, Record

#: Ends of the audio-length classes in seconds, and the names of the classes.
LENGTHS = (0.0, 5.0, 10.0, 20.0, 30.0, 60.0)
LENGTH_CLASSES = (*(f"{low:g}-{high:g} s" for low, high in pairwise(LENGTHS)), f"> {LENGTHS[-1]:g} s", "unknown")


def summarize(records: Sequence[Record]) -> dict[str, Any]:
    """Everything that is computed from records alone."""
    accuracies = {name: accuracy_of(records, name) for name in VERDICTS}
    components = dict.fromkeys(name for record in records for name in record["rewards"])
    rewards = {
        f"reward_{name}": _mean([value for record in records for value in record["rewards"].get(name, ())])
        for name in components
    }
    return {
        "n": len(records),
        "accuracy": accuracies["strict"]["accuracy"],
        "ci95": accuracies["strict"]["ci95"],
        **accuracies,
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
    values = [float(value) for value in record["verdicts"].get(verdict, ()) if value is not None]
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
    return {
        column: {
            value: {"n": len(groups[value]), **{name: accuracy_of(groups[value], name) for name in VERDICTS[:3]}}
            for value in sorted(groups, key=LENGTH_CLASSES.index if column == "audio length" else None)
        }
        for column, groups in columns.items()
    }


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


# -- statistics ------------------------------------------------------------------------------------------------------


def wilson(correct: float, total: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion (Wilson 1927); (0, 1) where nothing was scored.

    `correct` may be fractional, as the mean of several samples per row is. 8 of 10 gives (0.490, 0.943).
    """
    if total == 0:
        return 0.0, 1.0
    share, z = correct / total, 1.959963984540054
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(max(share * (1 - share), 0.0) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def compare_pairs(a_N: Sequence[float], b_N: Sequence[float]) -> dict[str, Any]:
    """B minus A over the same rows, in the same order: `mean`, `ci95` (bootstrap), `p_value` (exact McNemar), its
    discordant counts `only_a` and `only_b`, and `n`. Scores of 0.5 and more count as right."""
    if len(a_N) != len(b_N):
        raise ValueError(f"paired comparison needs the same rows: {len(a_N)} against {len(b_N)}")
    only_a = sum(a >= 0.5 > b for a, b in zip(a_N, b_N, strict=True))
    only_b = sum(b >= 0.5 > a for a, b in zip(a_N, b_N, strict=True))
    mean = float(np.mean(np.asarray(b_N, float) - np.asarray(a_N, float)))
    return {"mean": mean, "ci95": list(paired_bootstrap(a_N, b_N)), "p_value": mcnemar(only_a, only_b),
            "only_a": only_a, "only_b": only_b, "n": len(a_N)}  # fmt: skip


def paired_bootstrap(a_N: Sequence[float], b_N: Sequence[float]) -> tuple[float, float]:
    """95 % percentile interval of mean(b - a) over 10,000 draws of rows with replacement, pairs kept together."""
    difference_N = np.asarray(b_N, dtype=np.float64) - np.asarray(a_N, dtype=np.float64)
    if difference_N.size == 0:
        raise ValueError("paired bootstrap: the two runs share no row")
    values, counts = np.unique(difference_N, return_counts=True)
    draws = np.random.default_rng(0).multinomial(difference_N.size, counts / difference_N.size, size=10_000)
    low, high = np.percentile(draws @ values / difference_N.size, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_ratio(top_N: Sequence[float], bottom_N: Sequence[float] | None = None) -> tuple[float, float]:
    """95 % percentile interval of sum(top) / sum(bottom) over 2,000 draws of rows with replacement; without `bottom_N`
    of the mean of `top_N`. Draws whose bottoms sum to 0 have no ratio and are left out.

    Raises:
        ValueError: no rows, or none with a bottom above 0.
    """
    top, size = np.asarray(top_N, dtype=np.float64), len(top_N)
    bottom = np.ones(size) if bottom_N is None else np.asarray(bottom_N, dtype=np.float64)
    if size == 0 or bottom.sum() <= 0:
        raise ValueError("bootstrap of a ratio: no row has anything below the line")
    if size == 1:
        return float(top[0] / bottom[0]), float(top[0] / bottom[0])
    rng, ratios = np.random.default_rng(0), []
    together = max(1, 200_000 // size)  # draws at once, by their memory
    for start in range(0, 2_000, together):
        rows_DN = rng.integers(size, size=(min(together, 2_000 - start), size))
        top_D, bottom_D = top[rows_DN].sum(1), bottom[rows_DN].sum(1)
        ratios.append(top_D[bottom_D > 0] / bottom_D[bottom_D > 0])
    low, high = np.percentile(np.concatenate(ratios), [2.5, 97.5])
    return float(low), float(high)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided McNemar p-value: a binomial test at 1/2 on the rows where just one of the two is right.

    1 against 9 gives 2 * (1 + 10) / 2**10 = 0.0215.
    """
    total = only_a + only_b
    tail = sum(math.comb(total, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**total)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased pass@k of one row, 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, equation 1).

    4 samples, 1 right: pass@1 = 0.25, pass@2 = 0.5.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs between 1 and n = {n} samples")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer; ties go to the one seen first; None answers do not vote."""
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None
