"""Three rollouts of a step for the reader: the best, the median and the worst, with what each component said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from rich.text import Text

from covo_rl.prompt import parse
from covo_rl.records import console
from covo_rl.records.console import Figures, column_names, number
from covo_rl.records.steps import StepRecord
from covo_rl.types import visible

Row = Mapping[str, Any]
#: lines of reasoning that are shown, and of a question or an answer
REASONING_LINES, OTHER_LINES = 4, 3
INDENT = 12


def three_of(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """("best" | "median" | "worst", row of rollouts/step_N.jsonl) by R_total; of equal ones that of another question.

    Rows without a total, where a component could not be graded, come in only where there are no others.
    """
    graded = [row for row in rows if _total(row) is not None]
    order = sorted(graded or rows, key=lambda row: _total(row) or 0.0)
    if not order:
        return []
    ranked = {"best": order[::-1], "worst": order}
    if len(order) > 2:
        ranked = {"median": [order[len(order) // 2]], **ranked}
    picks: dict[str, Row] = {}
    for name, rows in ranked.items():
        taken = list(picks.values())
        rest = [row for row in rows if not any(row is other for other in taken)]
        alike = [row for row in rest if _total(row) == _total(rest[0])]
        asked = {str(row.get("id")) for row in taken}
        if rest:
            picks[name] = next((row for row in alike if str(row.get("id")) not in asked), rest[0])
    return [(name, picks[name]) for name in ("best", "median", "worst") if name in picks]


def step_samples(record: StepRecord, source: Path | None) -> list[Text]:
    """What is printed of a step: a headline, then its three rollouts."""
    title = Text(f"rollouts of step {record.step}: best, median, worst of {len(record.rollouts)}", style="bold")
    return [title, *(sample_text(*pick, source, width=console.console.width) for pick in three_of(record.rollouts))]


def sample_text(name: str, row: Row, source: Path | None, *, width: int = 80) -> Text:
    """Question, key, the model's answer, the verdict of each component, and the reasoning, cut at some lines.

    `source` is the file that holds all of it, if one does.
    """
    completion = str(row.get("completion", ""))
    parsed = parse(completion, str(row.get("stop_reason", "stop")))
    choices = [str(choice) for choice in row.get("choices") or ()]
    question = str(row.get("question", "")) + (f"  [{' | '.join(choices)}]" if choices else "")
    fields = [("question", question, OTHER_LINES), ("key", row.get("answer"), OTHER_LINES),
              ("answer", parsed.answer, OTHER_LINES)]  # fmt: skip
    if "speech" in row:  # a decision has no blocks
        fields[2:] = [("said", completion, OTHER_LINES)]
    elif parsed.problems:  # what does not parse is shown as it is
        fields += [("said", completion, REASONING_LINES), ("format", "; ".join(parsed.problems), OTHER_LINES)]
    else:
        fields += [("reasoning", parsed.think, REASONING_LINES)]
    pieces = [_field(field, value, width, limit) for field, value, limit in fields]
    lines, cut = [line for some, _ in pieces for line in some], any(cut for _, cut in pieces)
    text = Text(f"{name}  ", style="bold", no_wrap=True, overflow="ellipsis")
    text.append(verdict(row).within(width - len(name) - 2), style="not bold")
    text.append("".join(f"\n{line}" for line in lines), style="not bold")
    if cut:
        whole = f"whole in {visible(source)}" if source else "and with log_rollouts off kept nowhere"
        text.append(f"\n{'':{INDENT}}(... is cut, {whole})", style="not bold dim")
    return text


def verdict(row: Row) -> Figures:
    """R and each component of one rollout; a dash where it could not be graded."""
    scores = row.get("rewards")
    scores = scores if isinstance(scores, Mapping) else {}
    names = column_names(map(str, scores))
    pairs = [(names[str(name)], number(_number(value))) for name, value in scores.items()]
    return Figures([("R", number(_total(row))), *pairs])


def _field(name: str, value: Any, width: int, limit: int) -> tuple[list[str], bool]:
    """`  name      text`, wrapped, and whether more lines were there than `limit`."""
    shown = Text(visible("-" if value is None else value, "\n"))
    lines = [line.plain.rstrip() for line in shown.wrap(console.console, max(width - INDENT, 20), overflow="fold")]
    texts = [*lines[:limit], *(["..."] if len(lines) > limit else [])]
    return [f"{'' if i else '  ' + name:<{INDENT}}{text}" for i, text in enumerate(texts)], len(lines) > limit


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and isfinite(value) else None


def _total(row: Row) -> float | None:
    return _number(row.get("reward_total"))
