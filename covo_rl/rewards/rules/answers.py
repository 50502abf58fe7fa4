"""Is an answer right? One rule per kind of answer: choice, numeric, text, wer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from covo_rl.rewards.rules.normalize import UNIT_NAMES, clean_text, key, loose_key, quantity
from covo_rl.rewards.rules.options import find_gold, interpret, without_frame

KINDS = ("choice", "numeric", "text", "wer")
MAX_TEXT = 4000
MAX_NUMBER = 320  # a formula of 256 characters in its frame


def answer_kind(gold: Any, choices: Sequence[str]) -> str:
    """What kind of answer a row asks for.

    >>> [answer_kind("dog", ["dog", "cat"]), *(answer_kind(gold, ()) for gold in ("120 bpm", "x^2+1", "a dog"))]
    ['choice', 'numeric', 'numeric', 'text']
    """
    if choices:
        return "choice"
    text = str(gold)
    if quantity(text):
        return "numeric"
    if not any(ch.isdigit() or ch in "\\^*=(" for ch in text) and "pi" not in text:
        return "text"
    from covo_rl.rewards.rules.formula import read_formula  # sympy takes a third of a second

    return "numeric" if read_formula(text) else "text"


def grade(
    answer: str | None, gold: Any, choices: Sequence[str] = (), *, kind: str | None = None, question: str = "",
    max_wer: float = 0.0,
) -> float | None:  # fmt: skip
    """1.0 right, 0.0 wrong, None where the row has no answer to compare with. `gold` may list several right answers.

    Raises:
        ValueError: `kind` is none of KINDS.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"answer kind {kind!r}: there are {', '.join(KINDS)}")
    if isinstance(gold, (list, tuple)):
        scores = (grade(answer, one, choices, kind=kind, question=question, max_wer=max_wer) for one in gold)
        return max((score for score in scores if score is not None), default=None)
    if gold is None or not str(gold).strip():
        return None
    kind = kind or answer_kind(gold, choices)
    if kind == "choice":
        right = find_gold(gold, choices)
        return None if right is None else float(interpret(answer, choices) == right)
    if not answer:
        return 0.0
    if kind == "numeric":
        return float(same_number(answer, str(gold), question))
    if kind == "wer":
        return float(word_error_rate(answer, str(gold)) <= max_wer)
    return float(same_text(answer, str(gold)))


def same_text(answer: str, gold: str) -> bool:
    """Equal after normalisation, with or without a lead-in such as "the answer is"."""
    if len(answer) > 4 * len(gold) + MAX_TEXT:
        return False
    return loose_key(gold) in (loose_key(answer), loose_key(without_frame(answer)))


def same_number(answer: str, gold: str, question: str = "") -> bool:
    """Equal in value: as quantities with units, or as formulas.

    A number without a unit is right for a quantity; a unit that the right answer lacks must stand in the question.
    """
    if len(answer) > MAX_NUMBER:
        return False
    answer = without_frame(answer)
    claim, truth = quantity(answer), quantity(gold)
    if claim and truth:
        if claim[:2] == truth[:2] or (not claim.unit and claim.number == truth.number):
            return True
        if not truth.unit and claim.number == truth.number:
            return claim.unit in {UNIT_NAMES.get(word, word) for word in key(question)}
    from covo_rl.rewards.rules.formula import equal_formulas, read_formula

    a, b = read_formula(answer), read_formula(gold)
    return equal_formulas(a, b) if a and b else same_text(answer, gold)


def word_error_rate(answer: str, gold: str) -> float:
    """Word errors per word of `gold`, both normalised.

    Raises:
        ImportError: jiwer is not installed.
    """
    try:
        import jiwer
    except ImportError as error:
        raise ImportError("answer kind 'wer' needs jiwer: pip install 'covo-rl[wer]'") from error
    words = " ".join(loose_key(clean_text(answer)[:MAX_TEXT]))
    return float(jiwer.wer(" ".join(loose_key(gold)), words))
