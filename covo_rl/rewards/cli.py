"""covo-rl rewards: list, try, check and score with reward functions.

covo-rl rewards list
covo-rl rewards try accuracy --completion "<think>It rings.</think><answer>bell</answer>" --row row.json
covo-rl rewards check accuracy ./my_reward.py:score
covo-rl rewards score --rewards accuracy,format --input rows.jsonl --output scored.jsonl
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import typer
from rich.table import Table

from covo_rl.config import ConfigError, RewardConfig, value_problems
from covo_rl.data.files import json_lines, plain, write_atomically
from covo_rl.data.terminal import Terminal, say
from covo_rl.prompt import parse
from covo_rl.rewards import specs
from covo_rl.rewards.columns import example_from_row, group_from_completions
from covo_rl.rewards.linter import case_verdicts, lint
from covo_rl.rewards.rules.answers import find_gold, interpret
from covo_rl.rewards.scoring import FailureWindow, components, score, weighted_sum
from covo_rl.types import RewardTable, user_errors

DEFAULT = RewardConfig().rewards
OLD_RECORD = (
    "a run's rollout without the choices and facts that its rewards saw (written by an older covo_rl), so that its "
    "scores would differ from the run's. Add the columns of the data, by id"
)
BATCH = 2048  # rows scored at once by `score`
app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode=None)
console = Terminal()


@app.command("list")
def list_rewards() -> None:
    """What exists, and where it was found."""
    table = Table("name", "found in", "what", show_edge=False)
    for source in specs.available_rewards():
        try:
            text = specs.load_reward(source.spec).__doc__
            if source.location.endswith(".py"):
                text = specs.load_file(Path(source.location)).__doc__ or text
        except specs.RewardError as error:
            text = f"does not load: {error}"
        table.add_row(source.name, f"{source.place}: {source.location}", (text or "").strip().partition("\n")[0])
    console.print(table)
    console.print("also ./file.py:function and package.module:function")


@app.command("try")
@user_errors("covo-rl rewards try")
def try_rewards(
    names: list[str] = typer.Argument(None, help="rewards; default: all four"),
    completion: str = typer.Option(..., help="the completion, or - to read it from standard input"),
    row: Path | None = typer.Option(None, help="JSON file with question, choices, answer and further columns"),
    stop_reason: str = typer.Option("stop", help="stop or length"),
    judge: str | None = typer.Option(None, help="openai:MODEL@URL or transformers:PATH"),
) -> None:
    """Score one completion and explain the score."""
    components(names or DEFAULT)  # complains before anything is read
    text = typer.get_text_stream("stdin").read() if completion == "-" else completion
    columns: Any = {}
    if row:
        try:
            columns = json.loads(row.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise specs.RewardError(f"{row}: {error}") from error
        if not isinstance(columns, dict):
            raise specs.RewardError(f"{row}: expected one row as a JSON object, found {type(columns).__name__}")
    example = example_from_row(columns)
    groups = [group_from_completions(example, [text], stop_reason)]
    table = score(groups, RewardConfig(judge=judge), rewards=names or DEFAULT, explain=True)
    parsed = parse(text, stop_reason)
    console.print(f"think:   {parsed.think!r}")
    console.print(f"answer:  {parsed.answer!r}")
    console.print(f"grammar: {'; '.join(parsed.problems) or 'fine'}")
    if example.choices:
        readings = (
            interpret(parsed.answer, example.choices, example.question),
            find_gold(example.answer, example.choices),
        )
        named, right = (example.choices[i] if i is not None else "no single option" for i in readings)
        console.print(f"options: the answer names {named!r}, right is {right!r}")
    extras = dict(table.extras)
    for name, value in zip(table.names, table.rewards_PGR[0, 0], strict=True):
        key = f"{name.partition('(')[0]}_reason"
        reason = extras.pop(f"{name}/{key}" if f"{name}/{key}" in extras else key, [""])[0]
        console.print(f"{name}: {_shown(value)}  {table.missing.get((0, 0, name), reason)}")
    for name, values in extras.items():
        if values[0]:
            console.print(f"  {name}: {values[0]}")
    console.print(f"total: {_shown(table.rewards_PG[0, 0])}")


def _shown(value: float) -> str:
    return "None" if math.isnan(value) else f"{value:g}"


@app.command("check")
@user_errors("covo-rl rewards check")
def check_rewards(
    names: list[str] = typer.Argument(..., help="rewards to check"),
    rows: Path | None = typer.Option(None, help="JSONL of your own rows: their gold answers must score 1"),
    quiet: bool = typer.Option(False, help="findings only, without the table of cases"),
) -> None:
    """Lint rewards: gold, hack strings, determinism, range, length, speed, pickling. Exit code 1 on findings."""
    examples = [example_from_row(row, i) for i, row in enumerate(_rows(rows))] if rows else []
    failures = 0
    for term in components(names):
        if not quiet:
            table = Table("case", "score", "expected", "", title=term.name, show_edge=False)
            for case, value, expected, ok in case_verdicts(term):
                table.add_row(case.name, _shown(value), "" if expected is None else str(expected), "" if ok else "FAIL")
            console.print(table)
        findings = lint([term.name], examples, full=True)
        failures += len(findings)
        for finding in findings:
            console.print(f"FAIL {finding}")
        if not findings:
            console.print(f"{term.name}: fine")
    if failures:
        raise typer.Exit(1)


@app.command("score")
@user_errors("covo-rl rewards score")
def score_rewards(
    rewards: str = typer.Option(DEFAULT, help="components: name,name or name=weight,name=weight"),
    input: Path = typer.Option(..., help="JSONL with completion, question, choices, answer, and what else is wanted"),
    output: Path = typer.Option(
        ..., help="JSONL with `rewards` and `reward_total` added; where a row has them, `rescored_rewards` and so on"
    ),
    reward_gate: str = typer.Option("none", help="none, accuracy or format"),
    reward_timeout: float = typer.Option(60.0, help="seconds per component and batch of rows"),
    reward_failure_limit: float = typer.Option(0.2, help="share of failed scores of a component above which it stops"),
    judge: str | None = typer.Option(None, help="openai:MODEL@URL or transformers:PATH"),
) -> None:
    """Score rollouts offline, a run's too; rows keep their order and their columns, its own scores among them."""
    config = RewardConfig(
        rewards=rewards, reward_gate=reward_gate, reward_timeout=reward_timeout, judge=judge,
        reward_failure_limit=reward_failure_limit,
    )  # fmt: skip
    if problems := value_problems(config):
        raise ConfigError(problems)
    components(rewards)  # complains before anything is read
    columns: dict[str, list[float]] = {}
    failures: dict[str, list[str]] = {}
    rows = _rows(input)
    written = again = other = 0

    def write(file: IO[str]) -> None:
        nonlocal written, again, other
        window = FailureWindow(reward_failure_limit)
        while batch := list(islice(rows, BATCH)):
            groups = []
            for i, row in enumerate(batch, written):
                if not isinstance(row.get("completion"), str):
                    raise specs.RewardError(f"{input} row {i + 1}: needs a text `completion`; it has {', '.join(row)}")
                if "advantage" in row and "choices" not in row:
                    raise specs.RewardError(f"{input} row {i + 1}: {OLD_RECORD}")
                completion, stop_reason = [row["completion"]], row.get("stop_reason", "stop")
                groups.append(group_from_completions(example_from_row(row, i), completion, stop_reason))
            table = score(groups, config)
            totals = _totals([row.get("id", i) for i, row in enumerate(batch)], table, reward_gate)
            for row, scores, total in zip(batch, table.rewards_PGR[:, 0], totals, strict=True):
                by_name = {name: round(float(v), 12) for name, v in zip(table.names, scores, strict=True)}
                scored = _with_scores(row, by_name, round(float(total), 12))
                file.write(json.dumps(scored, ensure_ascii=False) + "\n")
                again += "rescored_rewards" in scored
                other += _differ(row.get("rewards"), by_name)
            for name, values in zip(table.names, table.rewards_PGR[:, 0].T, strict=True):
                columns.setdefault(name, []).extend(values.tolist())
            written += len(batch)
            for (_, _, name), why in table.missing.items():
                if why.startswith("failed"):
                    failures.setdefault(name, []).append(why)
            if problem := window.add([table]):  # a component that always fails: the rest is spared
                raise specs.RewardError(problem)
        for name, reasons in failures.items():
            if len(reasons) > reward_failure_limit * written:
                raise specs.RewardError(f"{name}: {len(reasons)} of {written} scores failed; the first: {reasons[0]}")

    write_atomically(output, write)
    for name, values in columns.items():
        graded = [value for value in values if not math.isnan(value)]
        mean = f"{sum(graded) / len(graded):.4f}" if graded else "-"
        say(f"{name}: mean {mean} of {len(graded)} graded, {len(values) - len(graded)} None")
    if again:
        say(f"{again} rows had scores, which are kept; {other} of them differ from the new rescored_rewards")
    say(f"{written} rows -> {output}")


def _with_scores(row: dict[str, Any], rewards: dict[str, float], total: float) -> dict[str, Any]:
    """The row with its scores; those that it has already are kept under their names."""
    prefix = "rescored_" if {"rewards", "reward_total"} & row.keys() else ""
    return {**row, f"{prefix}rewards": plain(rewards), f"{prefix}reward_total": plain(total)}


def _differ(before: Any, now: dict[str, float]) -> bool:
    """Whether a component that both hold has another score."""
    if not isinstance(before, dict):
        return False
    scores = {name: math.nan if value is None else value for name, value in before.items() if name in now}
    numbers = {name: value if isinstance(value, int | float) else math.inf for name, value in scores.items()}
    pairs = [(number, now[name]) for name, number in numbers.items()]
    return any(math.isnan(a) != math.isnan(b) or abs(a - b) > 1e-6 for a, b in pairs)


def _totals(ids: list[Any], table: RewardTable, gate: str) -> np.ndarray:
    """(N,) weighted sums of groups of one; rows of one id are compared with each other, as the group of a run."""
    rows: dict[str, list[int]] = {}
    for i, name in enumerate(ids):
        rows.setdefault(str(name), []).append(i)
    totals_N = np.full(len(ids), np.nan)
    for group in rows.values():
        gate_index = table.names.index(gate) if gate != "none" else None
        totals_N[group] = weighted_sum(table.rewards_PGR[group, 0][None], table.weights_R, gate_index)[0]
    return totals_N


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows; half a last line after others, which a killed process leaves, is said and left out."""
    lines = json_lines(path)
    for number, row, problem in lines:
        if row is None:
            what = f"{path} line {number}: {problem}"
            whole = number == 1 or not problem.startswith("not JSON") or path.read_bytes().endswith(b"\n")
            if whole or next(lines, None) is not None:
                raise specs.RewardError(what)
            say(f"left out, half written: {what}", err=True)
            return
        yield row
