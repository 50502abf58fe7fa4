"""Is an answer right? One rule per kind of answer: choice, numeric, text, wer.

An answer is compared as it stands, then without each layer around it (frames.py), until one is read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from covo_rl.rewards.rules.frames import frames
from covo_rl.rewards.rules.normalize import key, loose_key, merged_key
from covo_rl.rewards.rules.numbers import UNIT_NAMES
from covo_rl.rewards.rules.options import prepare, readings, side_readings
from covo_rl.rewards.rules.quantities import quantity
from covo_rl.rewards.rules.restated import own_words_of, restated
from covo_rl.rewards.rules.text import clean_text

KINDS = ("choice", "numeric", "text", "wer")
MAX_TEXT = 4000
MAX_NUMBER = 320  # a formula of 256 characters in its frame
#: numbers that are names, and are not calculated with: ranges, dates, telephone numbers, codes
_SPELLED = re.compile(r"\d+(?: ?- ?\d+)+|\d+(?:/\d+){2,}|0\d+")
_GROUPS = re.compile(r"[-() ]+")
_FRACTION = re.compile(r"\d+ ?/ ?\d+")
_NOT_A_VALUE = re.compile(r"signature|met(?:er|re)\b|ratio", re.IGNORECASE)  # 6/8 is not 3/4
_FACTORIAL = re.compile(r"\d ?!")


def answer_kind(gold: Any, choices: Sequence[str], question: str = "") -> str:
    """What kind of answer a row asks for.

    >>> [answer_kind("dog", ["dog", "cat"]), *(answer_kind(gold, ()) for gold in ("120 bpm", "x^2+1", "a dog", "3-4"))]
    ['choice', 'numeric', 'numeric', 'text', 'text']
    """
    if choices:
        return "choice"
    text = _exact(str(gold))
    if _is_spelled(text, question):
        return "text"
    if quantity(text):
        return "numeric"
    if not any(ch.isdigit() or ch in "\\^*=(" for ch in text) and "pi" not in text:
        return "text"
    from covo_rl.rewards.rules.formula import read_formula  # mpmath takes a tenth of a second

    return "numeric" if read_formula(text) else "text"


def _exact(gold: str) -> str:
    """The number that `~5` gives."""
    return clean_text(gold).lstrip("~\u2248 ")


def _is_spelled(gold: str, question: str) -> bool:
    fraction = _FRACTION.fullmatch(gold) and _NOT_A_VALUE.search(question)
    return bool(_SPELLED.fullmatch(gold) or fraction)


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
    kind = kind or answer_kind(gold, choices, question)
    if kind == "choice":
        right = find_gold(gold, choices)
        return None if right is None else float(interpret(answer, choices, question) == right)
    if not answer:
        return 0.0
    if kind == "numeric":
        return float(same_number(answer, str(gold), question))
    if kind == "wer":
        return float(word_error_rate(answer, str(gold)) <= max_wer)
    return float(same_text(answer, str(gold), question))


def same_text(answer: str, gold: str, question: str = "") -> bool:
    """Equal after normalisation, with or without what stands around it."""
    if len(answer) > 4 * len(gold) + MAX_TEXT:
        return False
    own = own_words_of([gold])
    layers = [text for text, _ in frames(answer)]
    texts = [*layers, *(restated(text, question, own) for text in layers)]
    levels = (loose_key, merged_key) if re.search("[,;:]", gold) else (loose_key,)  # a list, or a ratio
    if any(level(text) == level(gold) for level in levels for text in texts):
        return True
    groups = _GROUPS.split(clean_text(gold))  # 555-1234
    number = len("".join(groups)) >= 7 and "".join(groups).isdigit()
    return number and clean_text(answer) in ("".join(groups), " ".join(groups), "-".join(groups))


def same_number(answer: str, gold: str, question: str = "") -> bool:
    """Equal in value: as quantities with units, or as formulas.

    A number without a unit is right for a quantity; a unit that the right answer lacks must stand in the question.
    """
    if len(answer) > MAX_NUMBER:
        return False
    written, gold = clean_text(gold), _exact(gold)
    if _FACTORIAL.search(answer) and "!" not in gold:  # 5! is 120
        return False
    if _is_spelled(gold, question):
        return same_text(answer, gold, question)
    texts = [text for text, how in frames(answer) if how != "bullet"]
    own = own_words_of([gold]) | own_words_of(["1 s"])
    texts += [restated(text, question, own) for text in texts]
    verdicts = [text == written or _same_value(text, gold, question) for text in texts]
    return True in verdicts or (False not in verdicts and same_text(answer, gold, question))


def _same_value(answer: str, gold: str, question: str) -> bool | None:
    """None where one of the two is no value."""
    claim, truth = quantity(answer), quantity(gold)
    if claim and truth:
        if claim[:2] == truth[:2]:
            return True
        if None in (claim.number, truth.number) or claim.number != truth.number:
            return False
        if claim.unit == "degree" and truth.unit.startswith("degree"):
            return True
        in_question = claim.unit in {UNIT_NAMES.get(word, word) for word in key(question)}
        return not claim.unit or (not truth.unit and in_question)
    if _SPELLED.fullmatch(answer):
        return None
    from covo_rl.rewards.rules.formula import equal_formulas, read_formula

    fraction = claim and not claim.unit and claim.number is not None and str(claim.number)  # three quarters
    a, b = read_formula(answer) or (read_formula(fraction) if fraction else None), read_formula(gold)
    return equal_formulas(a, b) if a and b else None


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


def interpret(answer: str | None, choices: Sequence[str], question: str = "") -> int | None:
    """Index of the one option that `answer` names (the first of its duplicates), or None.

    >>> options = ["dog", "cat"]
    >>> [interpret(a, options) for a in ("Cat.", "B", "(B) cat", "B. dog", "dog and cat", "not a dog")]
    [1, 1, 1, None, None, None]
    """
    return _interpret(answer, tuple(choices), question) if answer and choices else None


@lru_cache(maxsize=16384)
def _interpret(answer: str, choices: tuple[str, ...], question: str = "") -> int | None:
    if len(answer) > 4 * max(map(len, choices)) + 200:
        return None
    options = prepare(choices)
    layers = list(frames(answer))
    for read in (readings, side_readings):
        for text, how in layers:
            if classes := read(options, text, how):
                return next(iter(classes)) if len(classes) == 1 else None
    own = own_words_of(choices)
    for core in (restated(text, question, own) for text, _ in layers):
        if classes := readings(options, core, "name" if len(core) <= 2 else "") or side_readings(options, core):
            return next(iter(classes)) if len(classes) == 1 else None
    return None


def find_gold(answer: object, choices: Sequence[str]) -> int | None:
    """Index of the right option from a row's answer: its text, else its letter; None if it is not among them."""
    if isinstance(answer, bool) or answer is None or not choices:
        return None
    if not isinstance(answer, int):
        return _interpret(str(answer), tuple(choices))
    options = prepare(tuple(choices))
    if classes := options.named(str(answer)):
        return next(iter(classes)) if len(classes) == 1 else None
    return options.classes[answer] if 0 <= answer < len(choices) else None
