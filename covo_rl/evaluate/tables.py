"""What reports are made of: a Markdown table, and the list of what a figure depends on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from covo_rl.types import visible

PROVENANCE = (
    "set", "version", "data_sha256", "columns", "answer_key_sha256", "source", "licence", "model", "adapter",
    "load_in_4bit", "predictions", "predictions_sha256", "through", "prompt", "decoding", "official_rule", "packages",
)  # fmt: skip


def table_lines(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of a table; the first column is text, the others numbers. A cell is one line of text, never markup."""
    cells = [[re.sub(r"[|<\\`]", r"\\\g<0>", visible(cell)) for cell in row] for row in (head, *rows)]
    line, *body = ("| " + " | ".join(row) + " |" for row in cells)
    return [line, "|---" + "|---:" * (len(head) - 1) + "|", *body, ""]


def provenance_lines(report: Mapping[str, Any]) -> list[str]:
    """Everything needed to repeat a report."""
    known = [f"- {k}: {json.dumps(report[k], ensure_ascii=False)}" for k in PROVENANCE if report.get(k) is not None]
    return ["## To repeat this", "", *known]


def source_lines(published_in: Mapping[str, str]) -> list[str]:
    """Where published scores stand, a line for each place: `Moshi, Freeze-Omni: arXiv 2602.09823`."""
    models: dict[str, list[str]] = {}
    for model, where in published_in.items():
        models.setdefault(where, []).append(model)
    return [f"{', '.join(names)}: {where}" for where, names in models.items()]
