"""What a speech model finds likely: sWUGGY, sBLIMP (ZeroSpeech 2021, arXiv 2011.11588), topic StoryCloze (2305.13009).

    pair_credit(right, wrong)      1, 1/2 on a tie, 0: a word against a non-word, a sentence against a wrong one
    pair_report(rows)              means over the voices of a pair, then over pairs; summed and per code

The score of a sound is the sum of the log-probabilities of its codes, over their number (`mean`) or not (`sum`); of a
story's ending that of the ending's tokens, given the story. A row: {pair, right: [log-probability, ...], wrong: [...],
voice?, in_vocabulary?, modality?}; modality is A2A, A2T or T2T of tSC.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from covo_rl.evaluate.speech.fields import MalformedRow, checked, field
from covo_rl.evaluate.summary import bootstrap_ratio

NORMALISE = ("mean", "sum")


def sequence_score(logps_K: Sequence[float], normalise: str = "mean") -> float:
    """Of the codes of one sound. Raises MalformedRow: no codes, or what is no finite log-probability."""
    if normalise not in NORMALISE:
        raise ValueError(f"normalise {normalise!r}: there are {' and '.join(NORMALISE)}")
    if not len(checked(logps_K, "the log-probabilities", Sequence)):
        raise MalformedRow("a sound has no codes, so it has no likelihood")
    total = sum(checked(logp, f"log-probability {k}", float) for k, logp in enumerate(logps_K))
    if any(logp > 0 for logp in logps_K):
        raise MalformedRow(f"a log-probability is {max(logps_K)}; none is above 0")
    return total / len(logps_K) if normalise == "mean" else total


def pair_credit(right_K: Sequence[float], wrong_K: Sequence[float], normalise: str = "mean") -> float:
    """1 where the right one is likelier, 1/2 on a tie, 0.

    >>> pair_credit([-1.0, -1.0], [-1.5]), pair_credit([-1.0, -1.0], [-1.5], "sum"), pair_credit([-1.0], [-1.0])
    (1.0, 0.0, 0.5)
    """
    right, wrong = sequence_score(right_K, normalise), sequence_score(wrong_K, normalise)
    return 0.5 if right == wrong else float(right > wrong)


def pair_report(rows: Sequence[Mapping[str, Any]], normalise: str = "mean") -> dict[str, Any]:
    """`score` in percent with `ci95` over draws of pairs, the same for both ways to normalise under their names, for
    words `in_vocabulary` alone where rows say so, and by `modality`."""
    blocks = {name: _accuracy(rows, name) for name in NORMALISE}
    report = {**blocks[normalise], "normalise": normalise, **blocks}
    if known := [row for row in rows if "in_vocabulary" in row and field(row, "in_vocabulary", bool)]:
        report["in_vocabulary"] = _accuracy(known, normalise)
    kinds = sorted({field(row, "modality", str) for row in rows if "modality" in row})
    return report | ({"by_modality": {
        kind: _accuracy([row for row in rows if row.get("modality") == kind], normalise) for kind in kinds
    }} if kinds else {})  # fmt: skip


def _accuracy(rows: Sequence[Mapping[str, Any]], normalise: str) -> dict[str, Any]:
    pairs: dict[Any, list[float]] = {}
    for row in rows:
        credit = pair_credit(field(row, "right", Sequence), field(row, "wrong", Sequence), normalise)
        pairs.setdefault((row.get("modality"), str(row.get("pair", len(pairs)))), []).append(credit)
    means = [fmean(voices) for voices in pairs.values()]
    return {
        "score": 100 * fmean(means) if means else None,
        "ci95": [100 * end for end in bootstrap_ratio(means)] if means else None,
        "n": len(means), "rows": len(rows),
    }  # fmt: skip
