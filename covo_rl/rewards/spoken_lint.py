"""The linter's questions to rewards that hear a reply: those that take its `completion_codes`.

Silence earns nothing, and what hears is asked once before a run begins, so that a folder or a label that is not there
is said then. A row with `text` and `codes`, as `covo-rl speech encode` writes it, deserves full marks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from covo_rl.rewards.call import Outcome
from covo_rl.rewards.columns import group_from_completions, reward_columns
from covo_rl.rewards.scoring import Component
from covo_rl.rewards.specs import RewardError
from covo_rl.rewards.worker import run_components
from covo_rl.types import Example, visible

TIMEOUT = 180.0  # seconds, models to be loaded among them
TEXT = "<answer>three seven</answer>"
HUM = (0,) * 50  # two seconds of one code
#: an id that is no code, and that of the first code
_TEXT_ID, _FIRST_CODE = 1, 1000


def hears(term: Component) -> bool:
    """Whether a reward takes the codes of a reply."""
    return "completion_codes" in term.reward.parameters


def check_hearing(terms: Sequence[Component], speaks: bool) -> None:
    """Raises RewardError: a reward hears replies of a model that writes text alone."""
    if deaf := [term.name for term in terms if hears(term) and not speaks]:
        raise RewardError(f"{', '.join(deaf)}: hears the audio codes of a reply, and replies of this model hold none: "
                          "leave it out, or train a model that speaks (and not with speech_mode a2t)")  # fmt: skip


def spoken_problems(
    term: Component, examples: Sequence[Example], full: bool, scorer_model: str | None, judged: bool
) -> Iterator[tuple[str, str]]:
    """(check, what is wrong). `judged`: a judge hears replies in the run; here none is asked."""
    row = Example("linter", (), "What do you hear?")
    for name, text, codes in (("nothing at all", "", ()), *((("no codes", TEXT, ()),) if full else ())):
        outcome = _outcome(term, [(row, text, codes)], scorer_model)
        yield from (("odd input", why.removeprefix("failed: ")) for why in outcome.failures)
        if outcome.scores[0] > 0:
            yield "junk", f"{name} scores {outcome.scores[0]:g}, expected 0"
    if not (judged and "judge" in term.reward.parameters):
        yield from _hum_problems(term, examples or [row], full, scorer_model)
    own = [(row, str(row.columns.get("text")), row.columns.get("codes")) for row in examples if full]
    own = [(row, text, codes) for row, text, codes in own if isinstance(codes, list)]
    scores = _outcome(term, own, scorer_model).scores if own else []
    for (example, *_), score in zip(own, scores, strict=True):
        if score != 1.0:
            yield "gold", f"row {visible(example.id)} with its own codes scores {score:g}, not 1"


def _hum_problems(
    term: Component, examples: Sequence[Example], full: bool, scorer_model: str | None
) -> Iterator[tuple[str, str]]:
    """One code for two seconds, of every row: whatever it is worth, it can be heard."""
    hums = [(example, TEXT, HUM) for example in examples if example.columns.get("speak") is not False]
    outcome = _outcome(term, hums, scorer_model)
    for i, why in outcome.missing.items():
        if not why.startswith("failed"):
            yield "gold", f"row {visible(hums[i][0].id)} is not gradeable: {why}"
    yield from (("hearing", why.removeprefix("failed: ")) for why in dict.fromkeys(outcome.failures))
    for score in outcome.scores:
        if score < 0 or score > 1:
            yield "range", f"a hum scores {score:g}, outside [0, 1]"
    again = _outcome(term, hums, scorer_model).scores if full else outcome.scores
    for first, second in zip(outcome.scores, again, strict=True):
        if first != second and not (math.isnan(first) and math.isnan(second)):
            yield "determinism", f"a hum scores {first:g}, then {second:g}"


def _outcome(
    term: Component, replies: Sequence[tuple[Example, str, Sequence[int]]], scorer_model: str | None
) -> Outcome:
    groups = []
    for example, text, codes in replies:
        ids = [_TEXT_ID] * len(text.split()) + [_FIRST_CODE + code for code in codes]
        groups.append(group_from_completions(example, [text], "stop", ids, codes))
    columns: dict[str, Any] = reward_columns(groups) | ({"scorer_model": scorer_model} if scorer_model else {})
    return run_components([term.reward], columns, TIMEOUT)[0]
