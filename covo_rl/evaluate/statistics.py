"""Intervals and tests for accuracies: Wilson, paired bootstrap, McNemar, pass@k. Pure Python and NumPy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054


def wilson(correct: float, total: int, z: float = Z95) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion (Wilson 1927); (0, 1) where nothing was scored.

    `correct` may be fractional, as the mean of several samples per row is. 8 of 10 gives (0.490, 0.943).
    """
    if total == 0:
        return 0.0, 1.0
    share = correct / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(max(share * (1 - share), 0.0) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class PairedDifference:
    """B minus A over the same rows: mean, 95 % bootstrap interval, exact McNemar p-value and its discordant counts."""

    mean: float
    ci95: tuple[float, float]
    p_value: float
    only_a: int
    only_b: int
    n: int


def compare_pairs(a_N: Sequence[float], b_N: Sequence[float], *, seed: int = 0) -> PairedDifference:
    """Two runs over the same rows, in the same order. Scores of 0.5 and more count as right."""
    if len(a_N) != len(b_N):
        raise ValueError(f"paired comparison needs the same rows: {len(a_N)} against {len(b_N)}")
    only_a = sum(a >= 0.5 > b for a, b in zip(a_N, b_N, strict=True))
    only_b = sum(b >= 0.5 > a for a, b in zip(a_N, b_N, strict=True))
    interval = paired_bootstrap(a_N, b_N, seed=seed)
    mean = float(np.mean(np.asarray(b_N, float) - np.asarray(a_N, float)))
    return PairedDifference(mean, interval, mcnemar(only_a, only_b), only_a, only_b, len(a_N))


def paired_bootstrap(
    a_N: Sequence[float], b_N: Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of mean(b - a) when rows are drawn with replacement, pairs kept together."""
    difference_N = np.asarray(b_N, dtype=np.float64) - np.asarray(a_N, dtype=np.float64)
    if difference_N.size == 0:
        raise ValueError("paired bootstrap: the two runs share no row")
    values, counts = np.unique(difference_N, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(difference_N.size, counts / difference_N.size, size=resamples)
    low, high = np.percentile(draws @ values / difference_N.size, [2.5, 97.5])
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
