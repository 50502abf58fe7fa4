"""Text -> tokens that are equal when two answers mean the same string, and different when they do not.

Unicode form, case, width, quotes, decoration, number words and unit names are levelled. What tells answers apart
stays: signs, decimal points, `#`, `+`, `%`, negations, word order. `key` is the comparison of answers, `text_tokens`
the common ground of all reward code that looks for words in text.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

MAX_CHARS = 20_000  # longer text is cut before it is compared; no answer is that long

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen".split()
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
#: number word -> (which part of a number it is, value)
_NUMBER_WORDS = {
    **{word: ("digit" if 1 <= value <= 9 else "teen", value) for value, word in enumerate(_SMALL)},
    **{word: ("tens", 10 * i) for i, word in enumerate(_TENS, start=2)},
    "hundred": ("scale", 100), "thousand": ("scale", 1000), "million": ("scale", 1_000_000), "and": ("and", 0),
}  # fmt: skip
#: part of a number -> the parts that it may follow
_FOLLOWS = {
    "digit": ("start", "tens", "scale", "and"), "teen": ("start", "scale", "and"), "tens": ("start", "scale", "and"),
    "scale": ("digit", "teen", "tens"), "and": ("scale",),
}  # fmt: skip
_ORDINALS = {"first": "1st", "second": "2nd", "third": "3rd"} | {
    word: f"{i}th"
    for i, word in enumerate("fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split(), start=4)
}
_LEVELLED = (_NUMBER_WORDS.keys() | _ORDINALS.keys()) - {"and"}

#: symbol -> (dimension, factor to its base unit, other spellings directly after a number); one dimension converts.
_UNITS = {
    "": ("", 1, ""), "%": ("", "1/100", "percent"),
    "hz": ("frequency", 1, "hertz"), "khz": ("frequency", 1000, "kilohertz"),
    "mhz": ("frequency", 1_000_000, "megahertz"),
    "s": ("time", 1, "second seconds sec secs 2nd"), "ms": ("time", "1/1000", "millisecond milliseconds msec"),
    "min": ("time", 60, "minute minutes mins"), "h": ("time", 3600, "hour hours hr hrs"),
    "m": ("length", 1, "metre metres meter meters"), "mm": ("length", "1/1000", ""),
    "cm": ("length", "1/100", "centimetre centimetres centimeter centimeters"),
    "km": ("length", 1000, "kilometre kilometres kilometer kilometers"),
    "g": ("mass", 1, ""), "kg": ("mass", 1000, ""), "bpm": ("bpm", 1, ""), "db": ("db", 1, "decibel decibels"),
    "kbit": ("kbit", 1, "kilobit kilobits"), "semitone": ("semitone", 1, "semitones"),
    "octave": ("octave", 1, "octaves"), "cent": ("cent", 1, "cents"), "beat": ("beat", 1, "beats"),
    "time": ("time(s)", 1, "times"), "degree": ("degree", 1, "degrees °"),
}  # fmt: skip
UNIT_NAMES = {name: symbol for symbol, (_, _, names) in _UNITS.items() for name in names.split()}

#: after these a leading "A" names a note, not an article.
_NOTE_WORDS = frozenset(
    "minor major flat sharp natural note string chord clef scale key min maj mixolydian dorian".split()
)
_TRANSLATE = {
    **dict.fromkeys(map(ord, "\u2018\u2019\u201b\u02bc\u2032\u00b4`"), "'"),
    **dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f\u00ab\u00bb\u2033"), '"'),
    **dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe63\uff0d"), "-"),
    0xD7: "x", 0x266F: "#", 0x266D: "b", 0x3002: ".", 0x3001: ",", 0x2044: "/",
}  # fmt: skip
_TOKEN = re.compile(
    r"\d+(?:st|nd|rd|th)\b"
    r"|(?:(?<![\w.)])[+-])?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|(?<![\w.])\.\d+)"  # a number
    r"|[^\W\d_]+(?:'[^\W\d_]+)*"  # a word
    r"|(?:(?<=\d)|(?<=\d ))-(?= ?\d)|(?<=[^\W_])-(?! ?[^\W_])"  # the hyphen of a range, or of a grade or blood group
    r"|[^\w\s.,;:!?\"'()\[\]{}*|\\-]"  # a symbol; marks that only decorate and separate are none
)


def clean_text(text: str) -> str:
    """Unicode NFKC without invisible format characters, quotes and dashes in their ASCII forms, spaces collapsed."""
    text = text[:MAX_CHARS]
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).translate(_TRANSLATE)
        text = "".join(ch for ch in text if unicodedata.category(ch) != "Cf")
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.replace("`", "'").split())


def raw_tokens(text: str) -> list[str]:
    """Tokens of cleaned text, in its own case: words, numbers (1,000 as 1000, .5 as 0.5), symbols with a meaning."""
    tokens = (token.replace(",", "") for token in _TOKEN.findall(text))
    return [re.sub(r"^([+-]?)\.", r"\g<1>0.", token) if "." in token else token for token in tokens]


def level_numbers(words: list[str]) -> list[str]:
    """Number words -> digits, spelled-out units after a number -> symbols, ordinals -> 1st, 2nd, ..."""
    if _LEVELLED.isdisjoint(words) and not any(word[0].isdigit() for word in words):
        return words
    result: list[str] = []
    i = 0
    while i < len(words):
        word = words[i]
        after_number = bool(result) and result[-1][-1].isdigit()
        value, used = _number_in_words(words, i)
        if used:
            word = str(value)
        elif after_number and words[i : i + 3] == ["beats", "per", "minute"]:
            word, used = "bpm", 3
        elif after_number and word in UNIT_NAMES:
            word = UNIT_NAMES[word]
        else:
            word = _ORDINALS.get(word, word)
        result.append(word)
        i += used or 1
    return result


def _number_in_words(words: list[str], i: int) -> tuple[int, int]:
    """(value, words used) of the number written in words at position i; (0, 0) if there is none."""
    total = current = used = 0
    last = "start"
    for at in range(i, len(words)):
        part, value = _NUMBER_WORDS.get(words[at], ("", 0))
        if last not in _FOLLOWS.get(part, ()):
            break
        current = current * value if part == "scale" else current + value
        if part == "scale" and value > 100:
            total, current = total + current, 0
        last, used = part, used + 1
    return total + current, used - (last == "and")


def drop_articles(cased: list[str]) -> list[str]:
    """Remove a, an, the. A capital A inside text, a last A, and A before `minor` and its like are names, and stay."""
    result = []
    for i, token in enumerate(cased):
        if len(token) <= 3 and (lower := token.lower()) in ("a", "an", "the") and i + 1 < len(cased):
            following = cased[i + 1].lower()
            note = lower == "a" and (following in _NOTE_WORDS or not following[0].isalpha() or (token == "A" and i))
            if not note:
                continue
        result.append(token)
    return result


def _levelled(tokens: list[str]) -> list[str]:
    return level_numbers(["and" if token == "&" else token.casefold() for token in tokens])


@lru_cache(maxsize=16384)
def key(text: str) -> tuple[str, ...]:
    """What two answers must share to be the same answer.

    >>> key("The  Car.") == key("car"), key("120 BPM") == key("120 beats per minute"), key("C#") == key("C")
    (False, True, False)
    """
    text = clean_text(text)
    return tuple(_levelled(raw_tokens(text))) or (text,)


@lru_cache(maxsize=16384)
def loose_key(text: str) -> tuple[str, ...]:
    """`key` without articles and without plus signs of numbers.

    >>> loose_key("The  Car.") == loose_key("car"), loose_key("A minor") == loose_key("minor")
    (True, False)
    """
    words = _levelled(drop_articles(raw_tokens(clean_text(text))))
    return tuple(word[1:] if word[0] == "+" and len(word) > 1 else word for word in words) or key(text)


@lru_cache(maxsize=16384)
def text_tokens(text: str) -> tuple[str, ...]:
    """Tokens of running text (reasoning): folded, articles dropped, numbers levelled."""
    return tuple(level_numbers([token.casefold() for token in drop_articles(raw_tokens(clean_text(text)))]))


class Quantity(NamedTuple):
    """Two are the same if `value`, in the base unit of `dimension`, is."""

    value: Fraction
    dimension: str
    unit: str
    number: Fraction  # as written


@lru_cache(maxsize=16384)
def quantity(text: str) -> Quantity | None:
    """`10 kHz`: a number, with or without a unit; None if it is anything else."""
    parts = loose_key(text)
    digits, unit = parts if len(parts) == 2 else (parts[0], "")
    if len(parts) > 2 or len(digits) > 30 or unit not in _UNITS:
        return None
    try:
        number = Fraction(digits)
    except (ValueError, ZeroDivisionError):
        return None
    dimension, factor, _ = _UNITS[unit]
    return Quantity(number * Fraction(factor), dimension, unit, number)
