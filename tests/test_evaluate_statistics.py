"""Intervals and tests on numbers that can be worked out by hand."""

import math
from itertools import combinations

import numpy as np
import pytest

from covo_rl.evaluate.summary import compare_pairs, majority, mcnemar, paired_bootstrap, pass_at_k, wilson


def test_wilson_by_hand():
    # n = 10, p = 0.8, z = 1.96: centre (0.8 + 0.19207) / 1.38415 = 0.71675, half 0.22657 (textbook: .490, .943).
    low, high = wilson(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)


def test_wilson_at_the_ends_and_with_nothing():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 10)[0] == pytest.approx(0.0)
    assert wilson(10, 10)[1] == pytest.approx(1.0)
    assert wilson(0, 10)[1] == pytest.approx(1 - wilson(10, 10)[0])


def test_wilson_holds_its_level():
    """Exact coverage over all outcomes of 50 draws at p = 0.7 is near 95 %."""
    weight = [math.comb(50, k) * 0.7**k * 0.3 ** (50 - k) for k in range(51)]
    covered = sum(w for k, w in enumerate(weight) if wilson(k, 50)[0] <= 0.7 <= wilson(k, 50)[1])
    assert 0.92 < covered < 0.98


def test_mcnemar_by_hand():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 1024)
    assert mcnemar(9, 1) == mcnemar(1, 9)
    assert mcnemar(5, 5) == 1.0


def test_paired_bootstrap_matches_a_plain_resampling_loop():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 2, 60).tolist(), rng.integers(0, 2, 60).tolist()
    slow = [np.mean([b[i] - a[i] for i in rng.integers(0, 60, 60)]) for _ in range(4000)]
    assert paired_bootstrap(a, b) == pytest.approx(np.percentile(slow, [2.5, 97.5]), abs=0.03)


def test_paired_bootstrap_of_identical_runs_is_zero():
    assert paired_bootstrap([1, 0, 1], [1, 0, 1]) == (0.0, 0.0)


def test_compare_pairs_counts_discordant_rows():
    result = compare_pairs([1, 1, 0, 0, 0], [1, 0, 1, 1, 1])
    assert (result["only_a"], result["only_b"], result["n"]) == (1, 3, 5)
    assert result["mean"] == pytest.approx(0.4)
    assert result["p_value"] == pytest.approx(2 * (1 + 4) / 16)


def test_compare_pairs_refuses_unequal_rows():
    with pytest.raises(ValueError, match="3 against 2"):
        compare_pairs([1, 0, 1], [1, 0])


@pytest.mark.parametrize(("n", "c"), [(4, 1), (5, 3), (6, 0), (6, 6)])
def test_pass_at_k_counts_all_subsets(n, c):
    for k in range(1, n + 1):
        draws = list(combinations([1] * c + [0] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(any(d) for d in draws) / len(draws))


def test_pass_at_k_needs_enough_samples():
    with pytest.raises(ValueError, match="pass@5"):
        pass_at_k(4, 1, 5)


def test_majority_ignores_empty_votes_and_takes_the_first_of_a_tie():
    assert majority(["b", "a", None, None, None, "a", "b"]) == "b"
    assert majority([None, None]) is None
