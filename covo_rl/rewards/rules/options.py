"""Which option does an answer name? By text or by letter, exactly one, or none.

Readings of the answer are collected (its text, its letter, letter and text together) and must agree. Keys are tried
from strict to loose, so that options that differ only in case, article or sign stay different options.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from covo_rl.prompt import option_letter
from covo_rl.rewards.rules.normalize import UNITS, clean, key, loose_key

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
_LABEL_TEXT = re.compile(r"[(\[{*'\"]*([A-Za-z]{1,2})(?P<mark>[)\]}.:,*'\"]+ ?|\s?-\s?| = | )(?P<text>\S.*)")
_TEXT_LABEL = re.compile(r"(?P<text>.*\S) ?[(\[]([A-Za-z]{1,2})[)\]]\.?")


@dataclass(frozen=True)
class Options:
    """The options of one row, prepared. `classes[i]` is the first index with the same text: duplicates are one."""

    texts: tuple[str, ...]
    classes: tuple[int, ...]
    exact: dict[str, frozenset[int]]
    strict: dict[tuple[str, ...], frozenset[int]]
    loose: dict[tuple[str, ...], frozenset[int]]
    letters: dict[str, int]
    longest: int

    def by_text(self, text: str) -> frozenset[int]:
        """Classes whose text this is, at the strictest level that knows it."""
        found = self.by_strict_text(text) or self.loose.get(loose_key(text))
        return found or _by_quantity(self.texts, self.classes, text)

    def by_strict_text(self, text: str) -> frozenset[int]:
        """Classes whose text this is, articles counted."""
        return self.exact.get(clean(text)) or self.strict.get(key(text)) or frozenset()

    def by_letter(self, letter: str) -> int | None:
        """Class of the option with this label."""
        return self.letters.get(letter.upper())


@lru_cache(maxsize=4096)
def prepare(choices: tuple[str, ...]) -> Options:
    """Index the options of a row."""
    keys = [key(choice) for choice in choices]
    classes = []
    for i, choice in enumerate(choices):
        same = (j for j in range(i) if keys[j] == keys[i] and not _case_tells_apart(choices[j], choice))
        classes.append(next(same, i))
    strict: dict[tuple[str, ...], set[int]] = {}
    loose: dict[tuple[str, ...], set[int]] = {}
    exact: dict[str, set[int]] = {}
    bare = [_without_label(choice, option_letter(i)) for i, choice in enumerate(choices)]
    listed = [choices] if None in bare else [choices, [text for text in bare if text is not None]]
    for texts in listed:
        for i, choice in enumerate(texts):
            exact.setdefault(clean(choice), set()).add(classes[i])
            strict.setdefault(key(choice), set()).add(classes[i])
            loose.setdefault(loose_key(choice), set()).add(classes[i])
    return Options(
        choices,
        tuple(classes),
        {k: frozenset(v) for k, v in exact.items()},
        {k: frozenset(v) for k, v in strict.items()},
        {k: frozenset(v) for k, v in loose.items()},
        {option_letter(i): classes[i] for i in range(len(choices))},
        max((len(choice) for choice in choices), default=0),
    )


def _without_label(choice: str, letter: str) -> str | None:
    """`B) cat` -> cat, for an option that carries its own label; None if it does not."""
    found = re.fullmatch(rf"\s*\(?{letter}[).:]\s*(\S.*)", choice, re.DOTALL)
    return found.group(1) if found else None


def _case_tells_apart(a: str, b: str) -> bool:
    """Cm7 and CM7, Mb and MB are different; Dog, DOG and dog are not."""
    for x, y in zip(clean(a).split(), clean(b).split(), strict=False):
        if x != y and x.casefold() == y.casefold() and not (x.isalpha() and len(x) >= 3):
            return True
    return False


def interpret(answer: str | None, choices: Sequence[str]) -> int | None:
    """Index of the one option that `answer` names (the first of its duplicates), or None.

    >>> options = ["dog", "cat"]
    >>> [interpret(a, options) for a in ("Cat.", "B", "(B) cat", "B. dog", "dog and cat", "not a dog")]
    [1, 1, 1, None, None, None]
    """
    if not answer or not choices:
        return None
    return _interpret(answer, tuple(choices))


@lru_cache(maxsize=16384)
def _interpret(answer: str, choices: tuple[str, ...]) -> int | None:
    options = prepare(choices)
    if len(answer) > 4 * options.longest + 200:
        return None
    text = _unwrapped(answer)
    readings = _all_readings(options, text)
    lead_in = _LEAD_IN.match(text)
    if not readings and lead_in and lead_in.end() < len(text):
        rest = text[lead_in.end() :].strip()
        readings = _all_readings(options, rest)
        label = _LABEL.fullmatch(rest)
        if label and _SAYS_LABEL.search(lead_in.group()):  # "option B", where an option is called B: a label too
            readings |= _letters(options, label.group(1))
    return next(iter(readings)) if len(readings) == 1 else None


def _all_readings(options: Options, text: str) -> set[int]:
    """Classes that a text names as a whole, by letter, or by both; more than one if it contradicts itself."""
    labelled = _LABEL_TEXT.fullmatch(text)  # "(A) cat" is a label and a text, not an article and a text
    marked = bool(labelled and labelled.group("mark").strip() and options.by_letter(labelled.group(1)) is not None)
    whole = options.by_strict_text(text) if marked else options.by_text(text)
    if not whole:
        return _readings(options, text)
    label = _LABEL.fullmatch(text)
    if label and text.rstrip(".").strip("*'\"") != label.group(1):  # "(A)" where an option is called A: a label too
        return set(whole) | _letters(options, label.group(1))
    return set(whole)


def _unwrapped(answer: str) -> str:
    """Cleaned, without `\\boxed{}`, `\\text{}`, `$` and `\\( \\)` around it."""
    text = clean(answer)
    while boxed := _BOXED.fullmatch(text):
        text = next(group for group in boxed.groups() if group is not None).strip()
    return text


def without_frame(answer: str) -> str:
    """An answer without `\\boxed{}`, `$` and a lead-in such as "the answer is"."""
    text = _unwrapped(answer)
    lead_in = _LEAD_IN.match(text)
    return text[lead_in.end() :].strip() if lead_in and lead_in.end() < len(text) else text


def _letters(options: Options, letter: str) -> set[int]:
    index = options.by_letter(letter)
    return set() if index is None else {index}


def _readings(options: Options, text: str) -> set[int]:
    """Classes named by a letter alone, or by letter and text together (two classes if they contradict)."""
    if label := _LABEL.fullmatch(text):
        return _letters(options, label.group(1))
    for pattern in (_LABEL_TEXT, _TEXT_LABEL):
        if both := pattern.fullmatch(text):
            letter = both.group(1) if pattern is _LABEL_TEXT else both.group(2)
            named = options.by_text(both.group("text"))
            labelled = _letters(options, letter)
            if named and labelled:
                return set(named) | labelled
    return set()


def _by_quantity(texts: tuple[str, ...], classes: tuple[int, ...], text: str) -> frozenset[int]:
    """Options that are the same quantity in another unit, or the same number where all options share their unit."""
    said = quantity(text)
    if said is None:
        return frozenset()
    listed = [quantity(choice) for choice in texts]
    if any(item is None for item in listed):
        return frozenset()
    units = {item[2] for item in listed if item}
    found = set()
    for index, item in enumerate(listed):
        assert item is not None
        same_unit = item[1] == said[1] and item[0] == said[0]
        bare = not said[2] and len(units) == 1 and item[3] == said[3]
        if same_unit or bare:
            found.add(classes[index])
    return frozenset(found)


@lru_cache(maxsize=16384)
def quantity(text: str) -> tuple[Fraction, str, str, Fraction] | None:
    """`10 kHz` -> (value in the base unit, dimension, unit, number as written); None if it is anything else."""
    parts = loose_key(text)
    if not 1 <= len(parts) <= 2 or len(parts[0]) > 30:
        return None
    unit = parts[1] if len(parts) == 2 else ""
    if unit and unit not in UNITS:
        return None
    try:
        number = Fraction(parts[0])
    except (ValueError, ZeroDivisionError):
        return None
    dimension, factor = UNITS.get(unit, ("", 1))
    return number * Fraction(factor), dimension, unit, number


def find_gold(answer: object, choices: Sequence[str]) -> int | None:
    """Index of the right option from a row's answer: its text, else its letter; None if it is not among them."""
    if isinstance(answer, bool) or answer is None or not choices:
        return None
    if isinstance(answer, int):
        text = str(answer)
        named = prepare(tuple(choices)).by_text(text)
        if named:
            return next(iter(named)) if len(named) == 1 else None
        return prepare(tuple(choices)).classes[answer] if 0 <= answer < len(choices) else None
    return _interpret(str(answer), tuple(choices))
