"""covo-rl rewards: list, try, check and score with reward functions.

covo-rl rewards list
covo-rl rewards try accuracy --completion "<think>It rings.</think><answer>bell</answer>" --row row.json
covo-rl rewards check accuracy ./my_reward.py:score
covo-rl rewards score --rewards accuracy,format --input rows.jsonl --output scored.jsonl
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from covo_rl.config import RewardConfig
from covo_rl.prompt import parse
from covo_rl.rewards import specs
from covo_rl.rewards.columns import example_from_row, group_from_completions
from covo_rl.rewards.scoring import Component, components, score
from covo_rl.types import Group, RewardTable

DEFAULT = RewardConfig().rewards
BATCH = 2048  # rows scored at once by `score`
app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode=None)
console = Console()


def fail(message: object) -> typer.Exit:
    """Print an error and leave with exit code 2."""
    typer.echo(f"covo-rl rewards: {message}", err=True)
    return typer.Exit(2)


def _load(rewards: str | Sequence[str]) -> list[Component]:
    try:
        return components(rewards)
    except ValueError as error:
        raise fail(error) from error


@app.command("list")
def list_rewards() -> None:
    """What exists, and where it was found."""
    table = Table("name", "found in", "what", show_edge=False)
    for source in specs.available_rewards():
        try:
            text = specs.load_reward(source.spec).__doc__ or ""
            module_doc = _module_doc(source.location) or text
        except specs.RewardError as error:
            module_doc = f"does not load: {error}"
        first = module_doc.strip().splitlines()[0] if module_doc.strip() else ""
        table.add_row(source.name, f"{source.place}: {source.location}", first)
    console.print(table)
    console.print("also ./file.py:function and package.module:function", highlight=False)


def _module_doc(location: str) -> str:
    import ast

    if not location.endswith(".py"):
        return ""
    return ast.get_docstring(ast.parse(Path(location).read_text(encoding="utf-8"))) or ""


@app.command("try")
def try_rewards(
    names: list[str] = typer.Argument(None, help="rewards; default: all four"),
    completion: str = typer.Option(..., help="the completion, or - to read it from standard input"),
    row: Path | None = typer.Option(None, help="JSON file with question, choices, answer and further columns"),
    stop_reason: str = typer.Option("stop", help="stop or length"),
    judge: str | None = typer.Option(None, help="openai:MODEL@URL or transformers:PATH"),
) -> None:
    """Score one completion and explain the score."""
    _load(names or DEFAULT)
    text = typer.get_text_stream("stdin").read() if completion == "-" else completion
    example = example_from_row(_read_json(row)) if row else example_from_row({})
    table = _run([group_from_completions(example, [text], stop_reason)], names or DEFAULT, judge=judge)
    parsed = parse(text, stop_reason)
    console.print(f"think:   {parsed.think!r}", highlight=False, markup=False)
    console.print(f"answer:  {parsed.answer!r}", highlight=False, markup=False)
    console.print(f"grammar: {'; '.join(parsed.problems) or 'fine'}", highlight=False, markup=False)
    if example.choices:
        console.print(f"options: {_option_reading(parsed.answer, example)}", highlight=False, markup=False)
    for r, name in enumerate(table.names):
        value = table.rewards_PGR[0, 0, r]
        shown = "None" if math.isnan(value) else f"{value:g}"
        console.print(f"{name}: {shown}  {table.missing.get((0, 0, name), '')}", highlight=False, markup=False)
    for name, values in table.extras.items():
        if values[0]:
            console.print(f"  {name}: {values[0]}", highlight=False, markup=False)
    console.print(f"total: {table.rewards_PG[0, 0]:g}", highlight=False)


def _option_reading(answer: str | None, example: Any) -> str:
    from covo_rl.rewards.rules.options import find_gold, interpret

    named, right = interpret(answer, example.choices), find_gold(example.answer, example.choices)
    say = [example.choices[i] if i is not None else "no single option" for i in (named, right)]
    return f"the answer names {say[0]!r}, right is {say[1]!r}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise fail(f"{path}: {error}") from error
    if not isinstance(row, dict):
        raise fail(f"{path}: expected one row as a JSON object, found {type(row).__name__}")
    return row


@app.command("check")
def check_rewards(
    names: list[str] = typer.Argument(..., help="rewards to check"),
    rows: Path | None = typer.Option(None, help="JSONL of your own rows: their gold answers must score 1"),
    quiet: bool = typer.Option(False, help="findings only, without the table of cases"),
) -> None:
    """Lint rewards: gold, hack strings, determinism, range, length, speed, pickling. Exit code 1 on findings."""
    from covo_rl.rewards.linter import hack_table, reward_findings

    found = 0
    examples = [example_from_row(row, i) for i, row in enumerate(_rows(rows))] if rows else []
    for term in _load(names):
        if not quiet:
            console.print(_cases_table(term.name, hack_table(term)))
        findings = reward_findings([term.name], examples)
        found += len(findings)
        for finding in findings:
            console.print(f"FAIL {finding}", highlight=False, markup=False)
        if not findings:
            console.print(f"{term.name}: fine", highlight=False, markup=False)
    if found:
        raise typer.Exit(1)


def _cases_table(name: str, verdicts: Sequence[Any]) -> Table:
    table = Table("case", "score", "expected", "", title=name, show_edge=False)
    for verdict in verdicts:
        score = "None" if verdict.score is None else f"{verdict.score:g}"
        expected = "" if verdict.expected is None else str(verdict.expected)
        table.add_row(verdict.case.name, score, expected, "" if verdict.ok else "FAIL")
    return table


@app.command("score")
def score_rewards(
    rewards: str = typer.Option(DEFAULT, help="components: name,name or name=weight,name=weight"),
    input: Path = typer.Option(..., help="JSONL with completion, question, choices, answer, and what else is wanted"),
    output: Path = typer.Option(..., help="JSONL with `rewards` and `reward_total` added"),
    reward_gate: str = typer.Option("none", help="none, accuracy or format"),
    reward_timeout: float = typer.Option(60.0, help="seconds per component and batch of rows"),
    reward_failure_limit: float = typer.Option(0.2, help="share of failed scores above which it stops"),
    judge: str | None = typer.Option(None, help="openai:MODEL@URL or transformers:PATH"),
) -> None:
    """Score rollouts offline; rows keep their order and their columns."""
    _load(rewards)
    written = failed = 0
    totals: dict[str, list[float]] = {}
    pending = _rows(input)
    partial = output.with_name(output.name + ".part")
    with partial.open("w", encoding="utf-8") as file:
        while batch := list(islice(pending, BATCH)):
            table = _run(
                [_group(row, written + i, input) for i, row in enumerate(batch)], rewards, judge=judge,
                gate=reward_gate, timeout=reward_timeout,
            )  # fmt: skip
            for p, row in enumerate(batch):
                file.write(json.dumps(_scored(row, table, p), ensure_ascii=False) + "\n")
            for r, name in enumerate(table.names):
                totals.setdefault(name, []).extend(table.rewards_PGR[:, 0, r].tolist())
            written += len(batch)
            reasons = [why for why in table.missing.values() if why.startswith("failed")]
            failed += len(reasons)
            if failed > reward_failure_limit * written * len(table.names):
                raise fail(f"{failed} of {written * len(table.names)} scores failed; the first: {reasons[0]}")
    partial.replace(output)
    for name, values in totals.items():
        graded = [value for value in values if not math.isnan(value)]
        mean = f"{sum(graded) / len(graded):.4f}" if graded else "-"
        typer.echo(f"{name}: mean {mean} of {len(graded)} graded, {len(values) - len(graded)} None")
    typer.echo(f"{written} rows -> {output}")


def _group(row: dict[str, Any], index: int, source: Path) -> Group:
    if not isinstance(row.get("completion"), str):
        raise fail(f"{source} row {index + 1}: needs a text `completion`; it has {', '.join(row)}")
    return group_from_completions(example_from_row(row, index), [row["completion"]], row.get("stop_reason", "stop"))


def _scored(row: dict[str, Any], table: RewardTable, p: int) -> dict[str, Any]:
    scores = {name: _number(table.rewards_PGR[p, 0, r]) for r, name in enumerate(table.names)}
    return {**row, "rewards": scores, "reward_total": _number(table.rewards_PG[p, 0])}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 12)


def _run(
    groups: list[Group], rewards: Any, *, judge: str | None = None, gate: str = "none", timeout: float = 60.0
) -> RewardTable:
    config = RewardConfig(reward_gate=gate, reward_timeout=timeout, judge=judge)
    try:
        return score(groups, config, rewards=rewards)
    except ValueError as error:
        raise fail(error) from error


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise fail(f"{path} line {number}: not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise fail(f"{path} line {number}: expected an object, found {type(row).__name__}")
                yield row
    except OSError as error:
        raise fail(error) from error


if __name__ == "__main__":
    app()
