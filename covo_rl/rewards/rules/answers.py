"""Is an answer right? One rule per kind of answer: choice, numeric, text, wer; and which option an answer names.

Readings of an answer among options are collected (its text, its letter, letter and text together) and must agree. Keys
are tried from strict to loose, so that options that differ only in case, article or sign stay different options.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from covo_rl.prompt import option_letter
from covo_rl.rewards.rules.normalize import UNIT_NAMES, clean_text, key, loose_key, quantity

KINDS = ("choice", "numeric", "text", "wer")
MAX_TEXT = 4000
MAX_NUMBER = 320  # a formula of 256 characters in its frame
_LEAD_IN = re.compile(
    r"(?:(?:so|therefore|thus|hence),? )?"
    r"(?:(?:the |my )?(?:final |correct |right |best )?(?:answer|option|choice)(?: is| ?:| -)?(?: ?:)? ?"
    r"(?:the |my )?(?:(?:option|choice|letter)(?: ?:)? )?|(?:it is|it's|this is|that is|that's|i choose|i pick) "
    r"(?:option |choice |letter )?|letter |(?:\u7b54\u6848(?:\u662f|\u4e3a)?|\u9009\u9879|\u9009) ?:? ?)",
    re.IGNORECASE,
)
_SAYS_LABEL = re.compile(r"option|choice|letter|\u9009", re.IGNORECASE)
_BOXED = re.compile(r"\$?\\boxed\{(.*)\}\$?\.?|\$?\\text\{(.*)\}\$?\.?|\$([^$]*)\$\.?|\\\((.*)\\\)\.?", re.DOTALL)
_LABEL = re.compile(r"[(\[{*'\" ]*([A-Za-z]{1,2})(?:[)\]}*'\"]|[.:,!?])*")
_LABEL_TEXT = re.compile(r"[(\[{*'\"]*(?P<label>[A-Za-z]{1,2})(?P<mark>[)\]}.:,*'\"]+ ?|\s?-\s?| = | )(?P<text>\S.*)")
_TEXT_LABEL = re.compile(r"(?P<text>.*\S) ?[(\[](?P<label>[A-Za-z]{1,2})[)\]]\.?")
_LEVELS = (clean_text, key, loose_key)  # what a text is compared by, from strict to loose


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
    if claim and truth and claim[:2] == truth[:2]:
        return True
    if claim and truth and claim.number == truth.number and not (claim.unit and truth.unit):
        return not claim.unit or claim.unit in {UNIT_NAMES.get(word, word) for word in key(question)}
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


@dataclass(frozen=True)
class ChoiceIndex:
    """The options of one row, prepared. `classes[i]` is the first index with the same text: duplicates are one."""

    texts: tuple[str, ...]
    classes: tuple[int, ...]
    by_text: dict[Any, set[int]]
    by_letter: dict[str, int]

    def named(self, text: str, strict: bool = False) -> set[int]:
        """Classes of this text at the strictest level that knows it, else of this quantity; `strict`: articles count.

        A number is enough where all options are quantities of one unit.
        """
        for level in _LEVELS[: 2 if strict else 3]:
            if classes := self.by_text.get((level, level(text))):
                return classes
        claim, quantities = quantity(text), [item for item in map(quantity, self.texts) if item]
        if strict or not claim or len(quantities) < len(self.texts):
            return set()
        bare = not claim.unit and len({item.unit for item in quantities}) == 1
        pairs = zip(self.classes, quantities, strict=True)
        return {i for i, item in pairs if item[:2] == claim[:2] or (bare and item.number == claim.number)}

    def labelled(self, letter: str) -> set[int]:
        """The class of the option with this label, if there is one."""
        return {self.by_letter[letter.upper()]} if letter.upper() in self.by_letter else set()


@lru_cache(maxsize=4096)
def prepare(choices: tuple[str, ...]) -> ChoiceIndex:
    """Index the options of a row."""
    keys = [key(choice) for choice in choices]
    classes = [
        next(j for j in range(i + 1) if keys[j] == keys[i] and not _case_tells_apart(choices[j], choices[i]))
        for i in range(len(choices))
    ]
    by_letter = {option_letter(i): group for i, group in enumerate(classes)}
    labels = [
        re.fullmatch(rf"\s*\(?{letter}[).:]\s*(\S.*)", choice, re.DOTALL)
        for letter, choice in zip(by_letter, choices, strict=True)
    ]
    # `B) cat`: options that carry their own labels are known without them too
    without_label = [label[1] for label in labels if label] if all(labels) else []
    by_text: dict[Any, set[int]] = {}
    for text, group in [*zip(choices, classes, strict=True), *zip(without_label, classes, strict=False)]:
        for level in _LEVELS:
            by_text.setdefault((level, level(text)), set()).add(group)
    return ChoiceIndex(choices, tuple(classes), by_text, by_letter)


def _case_tells_apart(a: str, b: str) -> bool:
    """Cm7 and CM7, Mb and MB are different; Dog, DOG and dog are not."""
    return any(
        x != y and x.casefold() == y.casefold() and not (x.isalpha() and len(x) >= 3)
        for x, y in zip(clean_text(a).split(), clean_text(b).split(), strict=False)
    )


def interpret(answer: str | None, choices: Sequence[str]) -> int | None:
    """Index of the one option that `answer` names (the first of its duplicates), or None.

    >>> options = ["dog", "cat"]
    >>> [interpret(a, options) for a in ("Cat.", "B", "(B) cat", "B. dog", "dog and cat", "not a dog")]
    [1, 1, 1, None, None, None]
    """
    return _interpret(answer, tuple(choices)) if answer and choices else None


@lru_cache(maxsize=16384)
def _interpret(answer: str, choices: tuple[str, ...]) -> int | None:
    if len(answer) > 4 * max(map(len, choices)) + 200:
        return None
    options = prepare(choices)
    lead_in, rest = _split_frame(answer)
    readings = _readings(options, lead_in + rest)
    if not readings and lead_in:
        readings = _readings(options, rest.strip())
        label = _LABEL.fullmatch(rest.strip())
        if label and _SAYS_LABEL.search(lead_in):  # "option B", where an option is called B: a label too
            readings = readings | options.labelled(label[1])
    return next(iter(readings)) if len(readings) == 1 else None


def _readings(options: ChoiceIndex, text: str) -> set[int]:
    """Classes that a text names as a whole, by letter, or by both; more than one if it contradicts itself."""
    label, label_text = _LABEL.fullmatch(text), _LABEL_TEXT.fullmatch(text)
    # "(A) cat" is a label and a text, not an article and a text
    strict = bool(label_text and label_text["mark"].strip() and options.labelled(label_text["label"]))
    whole = options.named(text, strict)
    if label and (not whole or text.rstrip(".").strip("*'\"") != label[1]):
        return whole | options.labelled(label[1])  # "(A)" where an option is called A: a label too
    for both in () if whole else (label_text, _TEXT_LABEL.fullmatch(text)):
        if both and (by_text := options.named(both["text"])) and (by_letter := options.labelled(both["label"])):
            return by_text | by_letter
    return whole


def _split_frame(answer: str) -> tuple[str, str]:
    """(lead-in, rest) of an answer that is cleaned and out of its `\\boxed{}`, `\\text{}`, `$` or `\\( \\)`."""
    text = clean_text(answer)
    while boxed := _BOXED.fullmatch(text):
        text = boxed[boxed.lastindex or 0].strip()
    lead_in = _LEAD_IN.match(text)
    at = lead_in.end() if lead_in and lead_in.end() < len(text) else 0
    return text[:at], text[at:]


def without_frame(answer: str) -> str:
    """An answer without `\\boxed{}`, `$` and a lead-in such as "the answer is"."""
    return _split_frame(answer)[1].strip()


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
