"""Is a reward fit to train on? Gold answers, hack strings, determinism, range, length, speed, odd input.

    covo-rl rewards check accuracy ./my_reward.py:score

The trainer runs the short form before its first step: what would ruin a run, in about a second.
"""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from covo_rl.prompt import reference_completion
from covo_rl.rewards.call import Outcome
from covo_rl.rewards.columns import TrainerState, example_from_row, from_groups, group_from_completions
from covo_rl.rewards.hacks import CASES, GOLD, ROW, Case, Expected
from covo_rl.rewards.scoring import Component, components, run_components
from covo_rl.types import Example

BUILT_IN = ("accuracy", "format", "consistency", "thinking")
TIMEOUT = 20.0
SPEED = 0.02  # seconds a deterministic reward may take for one completion
ODD = {
    "empty": "",
    "unicode": "<think>\u97f3\u304c \U0001f514 e\u0301 \u202e\ud83d</think><answer>\u00e9</answer>",
    "50,000 characters": "<think>" + "I hear a bell and a knock. " * 1852 + "</think><answer>knock</answer>",
    "50,000 brackets": "<answer>" + "(" * 25_000 + ")" * 25_000 + "</answer>",
}


@dataclass(frozen=True)
class Finding:
    """Something wrong with a reward."""

    reward: str
    check: str
    what: str

    def __str__(self) -> str:
        return f"reward {self.reward}: {self.check}: {self.what}"


@dataclass(frozen=True)
class Verdict:
    """A case of the table: the score that a reward gave, what was expected, and whether that is fine."""

    case: Case
    score: float | None
    expected: Expected
    ok: bool


def lint(rewards: Any, examples: Sequence[Example] = ()) -> list[Finding]:
    """The short form for the trainer: gold answers of these rows, junk, odd input. No judge is asked.

    `rewards` is a RewardConfig, or what `components` takes.
    """
    terms = components(getattr(rewards, "rewards", rewards))
    findings: list[Finding] = []
    for term in terms:
        findings += check_gold(term, examples)
        findings += check_odd(term)
        findings += [f for f in hack_findings(term, hack_table(term)) if _built_in(term) or f.check == "junk"]
    return findings


def reward_findings(rewards: Any, examples: Sequence[Example] = ()) -> list[Finding]:
    """The full form behind `covo-rl rewards check`."""
    findings: list[Finding] = []
    for term in components(rewards):
        findings += check_gold(term, examples or [example_from_row(ROW)], full=True)
        findings += check_odd(term)
        findings += hack_findings(term, hack_table(term))
        findings += check_deterministic(term)
        findings += check_speed(term)
        findings += check_pickle(term)
    return findings


def gold_completion(example: Example) -> str:
    """A completion that deserves full marks: the row's own evidence if it has some, and the right answer."""
    answer = str(example.answer[0] if isinstance(example.answer, (list, tuple)) else example.answer)
    if isinstance(example.answer, int) and 0 <= example.answer < len(example.choices):
        answer = example.choices[example.answer]
    if example.id == ROW["id"]:
        return GOLD
    given = [example.columns.get(name) for name in ("evidence", "think", "reasoning", "cot")]
    think = next((text for text in given if isinstance(text, str) and text.strip()), None)
    return reference_completion(
        think or f"I hear it clearly in this recording, steady from the start, so the answer is {answer}.", answer
    )


def score(term: Component, example: Example, completions: Iterable[str]) -> Outcome:
    """Scores of completions of one row, through the runner."""
    columns: dict[str, Any] = dict(from_groups([group_from_completions(example, completions)]))
    columns["trainer_state"] = TrainerState()
    return run_components([term], columns, len(columns["completions"]), TIMEOUT)[0]


def _built_in(term: Component) -> bool:
    return term.reward.source.trusted and term.reward.source.name in BUILT_IN and not term.reward.source.arguments


def _failures(term: Component, outcome: Outcome, check: str) -> list[Finding]:
    whys = dict.fromkeys(why for why in outcome.missing.values() if why.startswith("failed"))
    return [Finding(term.name, check, why.removeprefix("failed: ")) for why in list(whys)[:3]]


def check_gold(term: Component, examples: Sequence[Example], full: bool = False) -> list[Finding]:
    """The right answer must score 1; the short form asks that of our own rewards only, of others that it is graded."""
    findings = []
    for example in examples:
        if example.answer is None:
            continue
        outcome = score(term, example, [gold_completion(example)])
        if failures := _failures(term, outcome, "gold"):
            return failures
        value = outcome.scores[0]
        if math.isnan(value):
            if term.reward.source.name != "consistency":
                findings.append(Finding(term.name, "gold", f"row {example.id} is {outcome.missing[0]}"))
        elif value != 1.0 and (full or (_built_in(term) and term.reward.source.name != "thinking")):
            what = f"the right completion of row {example.id} scores {value:g}, not 1: {gold_completion(example)!r}"
            findings.append(Finding(term.name, "gold", what))
    return findings


def hack_table(term: Component) -> list[Verdict]:
    """All cases, scored, with what was expected."""
    outcome = score(term, example_from_row(ROW), [case.completion for case in CASES])
    name = term.reward.source.name if _built_in(term) else ""
    gold = outcome.scores[0]
    verdicts = []
    for case, value in zip(CASES, outcome.scores, strict=True):
        expected = case.expected(name)
        verdicts.append(Verdict(case, None if math.isnan(value) else value, expected, _fits(value, expected, gold)))
    return verdicts


def _fits(value: float, expected: Expected, gold: float) -> bool:
    if expected is None:
        return True
    if math.isnan(value):
        return expected != 1.0
    if expected == "<1":
        return value < 1
    if expected == "<gold":
        return value < gold
    return value == expected


def hack_findings(term: Component, table: Sequence[Verdict]) -> list[Finding]:
    """Cases that got what they should not get, and scores outside [0, 1]."""
    findings = []
    for verdict in table:
        if not verdict.ok:
            what = f"{verdict.case.name}: scores {verdict.score}, expected {verdict.expected}"
            findings.append(Finding(term.name, "junk" if verdict.case.junk else "hack", what))
        if verdict.score is not None and not 0 <= verdict.score <= 1:
            findings.append(Finding(term.name, "range", f"{verdict.case.name}: {verdict.score:g} is outside [0, 1]"))
            break
    return findings


def check_odd(term: Component) -> list[Finding]:
    """Empty, strange and very long completions: a score or None, in good time."""
    return _failures(term, score(term, example_from_row(ROW), ODD.values()), "odd input")


def check_deterministic(term: Component) -> list[Finding]:
    """The same completions twice, the second time in another order."""
    texts = [case.completion for case in CASES]
    first = score(term, example_from_row(ROW), texts).scores
    second = score(term, example_from_row(ROW), reversed(texts)).scores[::-1]
    for case, a, b in zip(CASES, first, second, strict=True):
        if a != b and not (math.isnan(a) and math.isnan(b)):
            return [Finding(term.name, "determinism", f"{case.name}: {a:g}, then {b:g}")]
    return []


def check_speed(term: Component) -> list[Finding]:
    """Seconds per completion, over the cases."""
    texts = [case.completion for case in CASES]
    start = time.perf_counter()
    score(term, example_from_row(ROW), texts)
    each = (time.perf_counter() - start) / len(texts)
    if each > SPEED:
        return [Finding(term.name, "speed", f"{each * 1000:.0f} ms per completion, above {SPEED * 1000:.0f} ms")]
    return []


def check_pickle(term: Component) -> list[Finding]:
    """It must survive the way to another process."""
    try:
        again = pickle.loads(pickle.dumps(term.reward))
    except Exception as error:
        return [Finding(term.name, "pickle", f"{type(error).__name__}: {error}")]
    return [] if callable(again) else [Finding(term.name, "pickle", f"came back as {type(again).__name__}")]
