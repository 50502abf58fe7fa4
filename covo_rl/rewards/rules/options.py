"""Which option does an answer name? By text or by letter, exactly one, or none.

Readings of the answer are collected (its text, its letter, letter and text together) and must agree. Keys are tried
from strict to loose, so that options that differ only in case, article or sign stay different options.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from covo_rl.prompt import option_letter
from covo_rl.rewards.rules.normalize import clean_text, key, loose_key, quantity

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


@dataclass(frozen=True)
class ChoiceIndex:
    """The options of one row, prepared. `classes[i]` is the first index with the same text: duplicates are one."""

    texts: tuple[str, ...]
    classes: tuple[int, ...]
    by_level: tuple[dict[Any, set[int]], ...]
    by_letter: dict[str, int]

    def named(self, text: str, strict: bool = False) -> set[int]:
        """Classes whose text this is, at the strictest level that knows it; `strict`: articles count."""
        for level, table in zip(_LEVELS[: 2 if strict else 3], self.by_level, strict=False):
            if classes := table.get(level(text)):
                return classes
        return set() if strict else self.measured(text)

    def labelled(self, letter: str) -> set[int]:
        """The class of the option with this label, if there is one."""
        return {self.by_letter[letter.upper()]} if letter.upper() in self.by_letter else set()

    def measured(self, text: str) -> set[int]:
        """Classes that are the same quantity, or the same number without its unit where all options share one."""
        claim, quantities = quantity(text), [item for item in map(quantity, self.texts) if item]
        if not claim or len(quantities) < len(self.texts):
            return set()
        bare = not claim.unit and len({item.unit for item in quantities}) == 1
        pairs = zip(self.classes, quantities, strict=True)
        return {i for i, item in pairs if item[:2] == claim[:2] or (bare and item.number == claim.number)}


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
    by_level: tuple[dict[Any, set[int]], ...] = ({}, {}, {})
    for text, group in [*zip(choices, classes, strict=True), *zip(without_label, classes, strict=False)]:
        for level, table in zip(_LEVELS, by_level, strict=True):
            table.setdefault(level(text), set()).add(group)
    return ChoiceIndex(choices, tuple(classes), by_level, by_letter)


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
    text = _unwrapped(answer)
    readings = _readings(options, text)
    lead_in = _LEAD_IN.match(text)
    if not readings and lead_in and lead_in.end() < len(text):
        rest = text[lead_in.end() :].strip()
        readings = _readings(options, rest)
        label = _LABEL.fullmatch(rest)
        if label and _SAYS_LABEL.search(lead_in.group()):  # "option B", where an option is called B: a label too
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


def _unwrapped(answer: str) -> str:
    """Cleaned, without `\\boxed{}`, `\\text{}`, `$` and `\\( \\)` around it."""
    text = clean_text(answer)
    while boxed := _BOXED.fullmatch(text):
        text = boxed[boxed.lastindex or 0].strip()
    return text


def without_frame(answer: str) -> str:
    """An answer without `\\boxed{}`, `$` and a lead-in such as "the answer is"."""
    text = _unwrapped(answer)
    lead_in = _LEAD_IN.match(text)
    return text[lead_in.end() :].strip() if lead_in and lead_in.end() < len(text) else text


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
