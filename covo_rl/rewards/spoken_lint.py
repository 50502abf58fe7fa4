"""The linter's questions to rewards that hear a reply: those that take its `completion_codes`.

Silence earns nothing, and what hears is asked once before a run begins, so that a folder, a label or a code that is not
there is said then. A row with `text` and `codes`, as `covo-rl speech encode` writes it, deserves full marks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
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


def check_hearing(
    terms: Sequence[Component], codes: int, examples: Sequence[Example] = (), scorer_model: str | None = None
) -> None:
    """Raises RewardError: a reward hears replies of a model that writes no codes, or not the last of its `codes` in a
    reply to the first of `examples`."""
    hearing = [term for term in terms if hears(term)]
    if hearing and not codes:
        names = ", ".join(term.name for term in hearing)
        raise RewardError(f"{names}: hears the audio codes of a reply, and replies of this model hold none: "
                          "leave it out, or train a model that speaks (and not with speech_mode a2t)")  # fmt: skip
    for term in hearing:
        replies = [(example, TEXT, (codes - 1,) * 10) for example in examples[:1]]
        if replies and (failures := _outcome(term, scorer_model, replies).failures):
            raise RewardError(f"{term.name} does not hear all {codes} audio codes of this model: {failures[0]}; name "
                              "the model's own tokenizer or decoder")  # fmt: skip


def spoken_problems(
    term: Component, examples: Sequence[Example], full: bool, scorer_model: str | None, judged: bool
) -> Iterator[tuple[str, str]]:
    """(check, what is wrong). `judged`: a judge hears replies in the run; here none is asked."""
    outcome_of = partial(_outcome, term, scorer_model)
    row = Example("linter", (), "What do you hear?")
    silence = outcome_of([(row, text, ()) for text in ("", TEXT)[: 1 + full]])
    yield from (("odd input", why.removeprefix("failed: ")) for why in silence.failures)
    for name, score in zip(("nothing at all", "no codes"), silence.scores, strict=False):
        if score > 0:
            yield "junk", f"{name} scores {score:g}, expected 0"
    if not (judged and "judge" in term.reward.parameters):
        # one code for two seconds, of every row: whatever it is worth, it can be heard
        hums = [(one, TEXT, HUM) for one in examples or [row] if one.columns.get("speak") is not False]
        heard = outcome_of(hums)
        yield from _hum_problems(heard, outcome_of(hums) if full else heard, [one for one, *_ in hums])
    own = [(one, str(one.columns.get("text")), one.columns.get("codes")) for one in examples if full]
    own = [(one, text, codes) for one, text, codes in own if isinstance(codes, list)]
    for (one, *_), score in zip(own, outcome_of(own).scores if own else (), strict=True):
        if score != 1.0:
            yield "gold", f"row {visible(one.id)} with its own codes scores {score:g}, not 1"


def _hum_problems(heard: Outcome, again: Outcome, examples: Sequence[Example]) -> Iterator[tuple[str, str]]:
    for i, why in heard.missing.items():
        if not why.startswith("failed"):
            yield "gold", f"row {visible(examples[i].id)} is not gradeable: {why}"
    yield from (("hearing", why.removeprefix("failed: ")) for why in dict.fromkeys(heard.failures))
    for first, second in zip(heard.scores, again.scores, strict=True):
        if first < 0 or first > 1:
            yield "range", f"a hum scores {first:g}, outside [0, 1]"
        if first != second and not (math.isnan(first) and math.isnan(second)):
            yield "determinism", f"a hum scores {first:g}, then {second:g}"


def _outcome(
    term: Component, scorer_model: str | None, replies: Sequence[tuple[Example, str, Sequence[int]]]
) -> Outcome:
    groups = []
    for example, text, codes in replies:
        ids = [_TEXT_ID] * len(text.split()) + [_FIRST_CODE + code for code in codes]
        groups.append(group_from_completions(example, [text], "stop", ids, codes))
    columns: dict[str, Any] = reward_columns(groups) | ({"scorer_model": scorer_model} if scorer_model else {})
    return run_components([term.reward], columns, TIMEOUT)[0]
