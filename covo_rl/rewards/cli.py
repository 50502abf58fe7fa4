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
from itertools import chain, count
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
from covo_rl.rewards.rows import score_rows
from covo_rl.rewards.rules.answers import find_gold, interpret
from covo_rl.rewards.scoring import components, score
from covo_rl.rewards.spoken_lint import hears
from covo_rl.types import shown, user_errors

DEFAULT = RewardConfig().rewards
SCORER_HELP = "who hears replies for emotion: a folder (audio classification), module:fn or ./file.py:fn"
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
        place = source.place if source.trusted else f"{source.place}: {source.location}"
        table.add_row(source.name, place, (text or "").strip().partition("\n")[0])
    console.print(table)
    console.print("also ./file.py:function and package.module:function")


@app.command("try")
@user_errors("covo-rl rewards try")
def try_rewards(
    names: list[str] = typer.Argument(None, help="rewards; default: all four"),
    completion: str = typer.Option(..., help="the completion, or - to read it from standard input"),
    row: Path | None = typer.Option(None, help="JSON file with question, choices, answer and further columns"),
    stop_reason: str = typer.Option("stop", help="stop or length"),
    codes: str = typer.Option("", help="audio codes of a spoken completion: numbers (12,7,7) or a .npy file of them"),
    judge: str | None = typer.Option(None, help="openai:MODEL@URL, transformers:PATH or command:PROGRAM"),
    judge_audio: bool = typer.Option(False, help="the judge is sent the row's `clips`, and that of emotion the reply"),
    scorer_model: str | None = typer.Option(None, help=SCORER_HELP),
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
    groups = [group_from_completions(example, [text], stop_reason, completion_codes=_codes(codes))]
    config = RewardConfig(judge=judge, judge_audio=judge_audio, scorer_model=scorer_model)
    table = score(groups, config, rewards=names or DEFAULT, explain=True)
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


def _codes(text: str) -> list[int]:
    """Raises RewardError: no list of codes, and no .npy file of them."""
    try:
        if not text.endswith(".npy"):
            return [int(number) for number in filter(None, text.split(","))]
        codes = np.load(text, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise specs.RewardError(f"--codes {shown(text)}: {error}; write 12,7,7 or a .npy file of codes") from error
    if codes.ndim != 1 or codes.dtype.kind not in "iu":
        raise specs.RewardError(
            f"--codes {text} holds {codes.dtype} of shape {codes.shape}; expected whole numbers (L,)"
        )
    return codes.tolist()


def _shown(value: float) -> str:
    return "None" if math.isnan(value) else f"{value:g}"


@app.command("check")
@user_errors("covo-rl rewards check")
def check_rewards(
    names: list[str] = typer.Argument(..., help="rewards to check"),
    rows: Path | None = typer.Option(None, help="JSONL of your own rows: their gold answers must score 1"),
    quiet: bool = typer.Option(False, help="findings only, without the table of cases"),
    scorer_model: str | None = typer.Option(None, help=SCORER_HELP),
) -> None:
    """Lint rewards: gold, hack strings, determinism, range, length, speed, pickling. Exit code 1 on findings."""
    examples = [example_from_row(row, i) for i, row in enumerate(_rows(rows))] if rows else []
    failures = 0
    for term in components(names):
        if not quiet and not hears(term):
            table = Table("case", "score", "expected", "", title=term.name, show_edge=False)
            for case, value, expected, ok in case_verdicts(term):
                table.add_row(case.name, _shown(value), "" if expected is None else str(expected), "" if ok else "FAIL")
            console.print(table)
        findings = lint([term.name], examples, full=True, scorer_model=scorer_model)
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
    judge: str | None = typer.Option(None, help="openai:MODEL@URL, transformers:PATH or command:PROGRAM"),
    judge_audio: bool = typer.Option(False, help="the judge is sent the clips, and that of emotion the reply"),
    scorer_model: str | None = typer.Option(None, help=SCORER_HELP),
) -> None:
    """Score rollouts offline, a run's too; rows keep their order and their columns, its own scores among them."""
    config = RewardConfig(
        rewards=rewards, reward_gate=reward_gate, reward_timeout=reward_timeout, judge=judge, judge_audio=judge_audio,
        reward_failure_limit=reward_failure_limit, scorer_model=scorer_model,
    )  # fmt: skip
    if problems := value_problems(config):
        raise ConfigError(problems)
    terms = components(rewards)  # complains before anything is read
    _check_paths(input, output)
    rows = list(_rows(input))
    scores = score_rows(rows, config, terms, input)
    prefix = _free_prefix(rows)

    def write(file: IO[str]) -> None:
        for row, by_name, total in zip(rows, scores.rewards, scores.totals, strict=True):
            scored = {**row, f"{prefix}rewards": plain(by_name), f"{prefix}reward_total": plain(total)}
            file.write(json.dumps(scored, ensure_ascii=False) + "\n")

    write_atomically(output, write)
    for term in terms if rows else ():
        graded = [value for by_name in scores.rewards if not math.isnan(value := by_name[term.name])]
        mean = f"{sum(graded) / len(graded):.4f}" if graded else "-"
        say(f"{term.name}: mean {mean} of {len(graded)} graded, {len(rows) - len(graded)} None")
    for name, value in scores.metrics.items():
        say(f"{name}: {value:.4f}")
    if prefix:
        before = sum(not {"rewards", "reward_total"}.isdisjoint(row) for row in rows)
        other = sum(map(_differ, [row.get("rewards") for row in rows], scores.rewards))
        say(f"{before} rows had scores, which are kept; {other} of them differ from the new {prefix}rewards")
    say(f"{len(rows)} rows -> {output}")


def _check_paths(input: Path, output: Path) -> None:
    """Before anything is scored, which may take a judge minutes.

    Raises:
        RewardError: a folder in the place of a file, no folder to write into, or the output is the input.
    """
    if input.is_dir():
        raise specs.RewardError(f"--input {input} is a folder: name one of its files, or put them into one (cat)")
    if output.exists() and input.exists() and output.samefile(input):
        raise specs.RewardError(f"--output {output} is the input: write to another file")
    if output.is_dir() or not output.parent.is_dir():
        what = "is a folder: name a file" if output.is_dir() else f"has no folder: {output.parent} does not exist"
        raise specs.RewardError(f"--output {output} {what}")


def _free_prefix(rows: list[dict[str, Any]]) -> str:
    """What the new columns' names begin with so that no row has them already: "", rescored_, rescored_2_, ..."""
    taken = {name for row in rows for name in row}
    for prefix in chain(["", "rescored_"], (f"rescored_{n}_" for n in count(2))):
        if taken.isdisjoint((f"{prefix}rewards", f"{prefix}reward_total")):
            return prefix
    raise AssertionError("there is always a number that is free")


def _differ(before: Any, now: dict[str, float]) -> bool:
    """Whether a component that both hold has another score."""
    if not isinstance(before, dict):
        return False
    scores = {name: math.nan if value is None else value for name, value in before.items() if name in now}
    numbers = {name: value if isinstance(value, int | float) else math.inf for name, value in scores.items()}
    pairs = [(number, now[name]) for name, number in numbers.items()]
    return any(math.isnan(a) != math.isnan(b) or abs(a - b) > 1e-6 for a, b in pairs)


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
