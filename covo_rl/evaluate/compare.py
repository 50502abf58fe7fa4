"""Two evaluations of the same rows: difference, paired bootstrap interval, exact McNemar p-value.

covo-rl eval compare runs/before runs/after
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from covo_rl.evaluate.inputs import count_rows
from covo_rl.evaluate.records import VERDICTS, Record, RecordLog
from covo_rl.evaluate.report import RULES, markdown_table, points
from covo_rl.evaluate.sets import EvalInputError
from covo_rl.evaluate.statistics import compare_pairs
from covo_rl.evaluate.summary import row_score
from covo_rl.records.console import percent


def compare_runs(a: Path, b: Path) -> dict[str, Any]:
    """B minus A, per verdict: over all shared rows, dropped and missing replies counted as wrong; also per breakdown.

    Raises:
        EvalInputError: not two finished evaluations, other rows, or another answer key.
    """
    (report_a, rows_a), (report_b, rows_b) = _read_run(a), _read_run(b)
    problems = []
    if report_a["answer_key_sha256"] != report_b["answer_key_sha256"]:
        problems.append(
            f"the answer keys differ: {a} used {report_a['data']} ({report_a['version']}), "
            f"{b} used {report_b['data']} ({report_b['version']})"
        )
    for name, here, there in ((a, rows_a, rows_b), (b, rows_b, rows_a)):
        if extra := [i for i in here if i not in there]:
            problems.append(f"only {name} has {count_rows(extra)}")
    if problems:
        raise EvalInputError(problems)
    pairs = [(record, rows_b[i]) for i, record in rows_a.items()]
    groups: dict[str, dict[str, list[tuple[Record, Record]]]] = {}
    for pair in pairs:
        for column, value in pair[0]["breakdown"].items():
            groups.setdefault(column, {}).setdefault(value, []).append(pair)
    settings = {k: [report_a.get(k), report_b.get(k)] for k in ("prompt", "decoding")}
    return {
        "a": str(a),
        "b": str(b),
        "n": len(rows_a),
        "differs_also_in": {k: both for k, both in settings.items() if both[0] != both[1]},
        **{
            verdict: _difference(pairs, verdict)
            for verdict in VERDICTS
            if any(row_score(record, verdict) is not None for record in rows_a.values())
        },
        "breakdown": {
            column: {value: _difference(part, "strict") for value, part in sorted(values.items())}
            for column, values in groups.items()
        },
    }


def _read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Record]]:
    """(report.json, id -> record) of a finished evaluation."""
    absent = [name for name in ("report.json", "rows.jsonl") if not (folder / name).is_file()]
    if absent:
        raise EvalInputError(
            [f"{folder}: no {' and no '.join(absent)}; is this the --output of a finished `covo-rl eval`?"]
        )
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report, {record["id"]: record for record in RecordLog(folder / "rows.jsonl").read()}


def _difference(pairs: list[tuple[Record, Record]], verdict: str) -> dict[str, Any]:
    a, b = ([row_score(record, verdict) or 0.0 for record in records] for records in zip(*pairs, strict=True))
    pair = compare_pairs(a, b)
    return {"accuracy_a": sum(a) / len(a), "accuracy_b": sum(b) / len(b), **asdict(pair), "ci95": list(pair.ci95)}


def comparison_markdown(result: Mapping[str, Any]) -> str:
    """The comparison as Markdown tables."""
    head = ["", "n", "A %", "B %", "B - A, points [95 %]", "only A right", "only B right", "McNemar p"]
    rows = [_row(RULES[verdict], result[verdict]) for verdict in VERDICTS if verdict in result]
    lines = [f"A: {result['a']}", "", f"B: {result['b']}", "", *markdown_table(head, rows)]
    for column, values in result["breakdown"].items():
        rows = [_row(value, pair) for value, pair in values.items()]
        lines += [f"Strict, by {column}", "", *markdown_table(head, rows)]
    for what, (a, b) in result["differs_also_in"].items():
        lines.append(f"The two also differ in {what}: A {json.dumps(a)}, B {json.dumps(b)}.")
    return "\n".join(lines)


def _row(name: str, pair: Mapping[str, Any]) -> list[Any]:
    star = " *" if pair["p_value"] < 0.05 else ""
    return [name, pair["n"], percent(pair["accuracy_a"]), percent(pair["accuracy_b"]), points(pair), pair["only_a"],
            pair["only_b"], f"{pair['p_value']:.4f}{star}"]  # fmt: skip
