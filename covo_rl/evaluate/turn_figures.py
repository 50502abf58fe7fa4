"""How answers came that a duplex session gave: early, late or never, and what that has to do with pauses and scores.

Computed from records alone. Early: the answer begins before the question's last speech ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from covo_rl.evaluate.records import Record
from covo_rl.evaluate.summary import row_score, wilson
from covo_rl.evaluate.tables import table_lines
from covo_rl.records.console import interval, number, percent


def turn_figures(records: Sequence[Record]) -> dict[str, Any]:
    """Figures over all answers, and correlations over rows; empty where no session answered.

    `early_by_pause` goes by the longest silence inside the question. `score`: share of right answers (strict) among the
    early ones and among the others. A correlation of what does not vary is None.
    """
    from covo_rl.duplex.figures import pause_class

    rows = [record for record in records if record.get("turns")]
    turns = [turn for record in rows for turn in record["turns"]]
    if not turns:
        return {}
    early = [record_early(record) for record in rows]
    pauses = [record["turns"][0]["longest_pause"] for record in rows]
    scores = [row_score(record, "strict") for record in rows]
    delays = [turn["delay"] for turn in turns if turn["delay"] is not None]
    by_pause: dict[str, list[Mapping[str, Any]]] = {}
    for turn in sorted(turns, key=lambda turn: turn["longest_pause"]):
        by_pause.setdefault(pause_class(turn["longest_pause"]), []).append(turn)
    return {
        "n": len(turns),
        "early_response_rate": _share(turns, "early"),
        "never_answered": _share(turns, "never"),
        "cut": _share(turns, "limit"),
        "delay_p50": float(np.quantile(delays, 0.5)) if delays else None,
        "delay_p90": float(np.quantile(delays, 0.9)) if delays else None,
        "early_by_pause": {name: _share(part, "early") for name, part in by_pause.items()},
        "score": {"early": _score(rows, True), "not_early": _score(rows, False)},
        "correlation": {
            "early_and_pause": correlation(early, pauses),
            "early_and_score": correlation(early, scores),
            "pause_and_score": correlation(pauses, scores),
        },
        "rows_beyond_context": sum(any(turn["dropped_chunks"] for turn in record["turns"]) for record in rows),
    }


def record_early(record: Record) -> float:
    """Share of a row's answers that were early."""
    return fmean(turn["outcome"] == "early" for turn in record["turns"])


def correlation(a: Sequence[float | None], b: Sequence[float | None]) -> float | None:
    """Pearson's, over the pairs that are whole; None where there are no two, or one of the sides does not vary.

    >>> round(correlation([0, 0, 1, 1], [0.2, 0.4, 1.0, 3.0]), 3)
    0.768
    """
    pairs = np.array([pair for pair in zip(a, b, strict=True) if None not in pair], float).reshape(-1, 2)
    if len(pairs) < 2 or (np.ptp(pairs, axis=0) == 0).any():
        return None
    return float(np.corrcoef(pairs.T)[0, 1])


def _share(turns: Sequence[Mapping[str, Any]], outcome: str) -> dict[str, Any]:
    count = sum(outcome in (turn["outcome"], turn["ending"]) for turn in turns)
    return {"share": count / len(turns), "n": len(turns), "ci95": list(wilson(count, len(turns)))}


def _score(rows: Sequence[Record], early: bool) -> dict[str, Any]:
    """Right answers among those that were early, or that were not."""
    pairs = [pair for row in rows for pair in zip(row["turns"], row["verdicts"]["strict"], strict=True)]
    verdicts = [float(right) for turn, right in pairs if (turn["outcome"] == "early") == early and right is not None]
    return {
        "accuracy": fmean(verdicts) if verdicts else None, "n": len(verdicts),
        "ci95": list(wilson(sum(verdicts), len(verdicts))) if verdicts else None,
    }  # fmt: skip


def turn_lines(figures: Mapping[str, Any]) -> list[str]:
    """The figures as Markdown."""
    shares = {"begun before the question's last speech": "early_response_rate", "never begun": "never_answered",
              "cut by the limit of a turn": "cut"}  # fmt: skip
    blocks = {text: figures[name] for text, name in shares.items()}
    rows = [[text, interval({"accuracy": block["share"], **block})] for text, block in blocks.items()]
    rows += [[f"right (strict), {name.replace('_', ' ')}", interval(block)] for name, block in figures["score"].items()]
    lines = ["## Taking turns (answers through a duplex session)", ""]
    lines += table_lines([f"% of {figures['n']} answers, 95 % Wilson interval", ""], rows)
    rows = [[f"answer after the question, {text}", number(figures[name])]
            for text, name in (("median s", "delay_p50"), ("90 % s", "delay_p90"))]  # fmt: skip
    rows += [[f"correlation over rows: {name.replace('_', ' ')}", number(value)]
             for name, value in figures["correlation"].items()]  # fmt: skip
    rows += [["rows whose oldest chunks left the context", figures["rows_beyond_context"]]]
    lines += table_lines(["", ""], rows)
    rows = [[name, block["n"], percent(block["share"])] for name, block in figures["early_by_pause"].items()]
    return [*lines, *table_lines(["longest silence inside the question", "answers", "early %"], rows)]
