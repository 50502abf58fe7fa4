"""Is a reward fit to train on? Gold answers, hack strings, determinism, range, length, speed, odd input.

    covo-rl rewards check accuracy ./my_reward.py:score

The trainer runs the short form before its first step: what would ruin a run, in about a second.
"""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from covo_rl.prompt import reference_completion
from covo_rl.rewards.columns import example_from_row, group_from_completions, reward_columns
from covo_rl.rewards.hacks import CASES, COMPONENTS, GOLD, ROW, Expected, LintCase
from covo_rl.rewards.scoring import Component, components
from covo_rl.rewards.worker import Outcome, run_components
from covo_rl.types import Example

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


def lint(rewards: Any, examples: Sequence[Example] = (), *, full: bool = False) -> list[Finding]:
    """The short form for the trainer: gold answers of these rows, junk, odd input. No judge is asked.

    `rewards` is a RewardConfig, or what `components` takes. `full` is the form behind `covo-rl rewards check`: all
    cases for all rewards, determinism, speed, pickling, and full marks for the gold answer of any reward.
    """
    return [
        Finding(term.name, check, what)
        for term in components(getattr(rewards, "rewards", rewards))
        for check, what in _problems(term, examples, full)
    ]


def _problems(term: Component, examples: Sequence[Example], full: bool) -> Iterator[tuple[str, str]]:
    """(check, what is wrong)."""
    row = example_from_row(ROW)
    yield from (("gold", what) for what in _gold_problems(term, examples or ([row] if full else ()), full))
    yield from (("odd input", what) for what in _faults(_outcome(term, row, ODD.values())))
    verdicts = case_verdicts(term)
    every = full or _built_in(term)  # of other rewards the short form only asks that junk earns nothing
    for case, score, expected, ok in verdicts:
        if not ok and (every or case.junk):
            shown = None if math.isnan(score) else score
            yield "junk" if case.junk else "hack", f"{case.name}: scores {shown}, expected {expected}"
        if score < 0 or score > 1:
            if every:
                yield "range", f"{case.name}: {score:g} is outside [0, 1]"
            break
    if not full:
        return
    start = time.perf_counter()
    again = _outcome(term, row, [case.completion for case in reversed(CASES)]).scores[::-1]
    each = (time.perf_counter() - start) / len(CASES)
    for (case, first, _, _), second in zip(verdicts, again, strict=True):
        if first != second and not (math.isnan(first) and math.isnan(second)):
            yield "determinism", f"{case.name}: {first:g}, then {second:g}"
            break
    if each > SPEED:
        yield "speed", f"{each * 1000:.0f} ms per completion, above {SPEED * 1000:.0f} ms"
    try:
        pickle.loads(pickle.dumps(term.reward))
    except Exception as error:
        yield "pickle", f"{type(error).__name__}: {error}"


def _outcome(term: Component, example: Example, completions: Iterable[str]) -> Outcome:
    columns = reward_columns([group_from_completions(example, completions)])
    return run_components([term.reward], columns, TIMEOUT)[0]


def _built_in(term: Component) -> bool:
    source = term.reward.source
    return source.trusted and source.name in COMPONENTS and not source.arguments


def _faults(outcome: Outcome) -> list[str]:
    return [why.removeprefix("failed: ") for why in list(dict.fromkeys(outcome.failures))[:3]]


def gold_completion(example: Example) -> str:
    """A completion that deserves full marks: the row's own evidence if it has some, and the right answer."""
    if example.id == ROW["id"]:
        return GOLD
    answer = str(example.answer[0] if isinstance(example.answer, (list, tuple)) else example.answer)
    if isinstance(example.answer, int) and 0 <= example.answer < len(example.choices):
        answer = example.choices[example.answer]
    texts = [example.columns.get(name) for name in ("evidence", "think", "reasoning", "cot")]
    plain = f"I hear it clearly in this recording, steady from the start, so the answer is {answer}."
    return reference_completion(next((t for t in texts if isinstance(t, str) and t.strip()), plain), answer)


def _gold_problems(term: Component, examples: Sequence[Example], full: bool) -> list[str]:
    """The right answer must score 1; the short form asks that of our own rewards only, of others that it is graded."""
    problems = []
    name = term.reward.source.name
    for example in examples:
        if example.answer is None:
            continue
        completion = gold_completion(example)
        outcome = _outcome(term, example, [completion])
        if outcome.failures:
            return _faults(outcome)
        value = outcome.scores[0]
        if math.isnan(value):
            if name != "consistency":
                problems.append(f"row {example.id} is {outcome.missing[0]}")
        elif value != 1.0 and (full or (_built_in(term) and name != "thinking")):
            problems.append(f"the right completion of row {example.id} scores {value:g}, not 1: {completion!r}")
    return problems


def case_verdicts(term: Component) -> list[tuple[LintCase, float, Expected, bool]]:
    """All cases: the score (NaN for None), what was expected, and whether that is fine."""
    scores = _outcome(term, example_from_row(ROW), [case.completion for case in CASES]).scores
    verdicts = []
    for case, score in zip(CASES, scores, strict=True):
        other = "<gold" if case.junk else None  # what a reward that is none of the four is held to
        expected: Expected = getattr(case, term.reward.source.name) if _built_in(term) else other
        limit = {"<1": 1.0, "<gold": scores[0]}.get(str(expected))
        fits = score == expected if limit is None else score < limit
        if math.isnan(score):
            fits = expected != 1.0
        verdicts.append((case, score, expected, fits or expected is None))
    return verdicts
