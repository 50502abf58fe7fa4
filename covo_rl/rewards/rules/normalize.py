"""Text -> tokens that are equal when two answers mean the same string, and different when they do not.

Unicode form, case, width, quotes, decoration, number words and unit names are levelled. What tells answers apart
stays: signs, decimal points, `#`, `+`, `%`, negations, word order. `key` is the comparison of answers, `tokens` the
common ground of all reward code that looks for words in text.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

MAX_CHARS = 20_000  # longer text is cut before it is compared; no answer is that long

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen".split()
)
UNITS_WORDS = {word: value for value, word in enumerate(_SMALL)}
TENS_WORDS = {
    word: 10 * (i + 2) for i, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split())
}
SCALES = {"hundred": 100, "thousand": 1000, "million": 1_000_000}
ORDINALS = {
    word: f"{i + 1}{'st' if i == 0 else 'nd' if i == 1 else 'rd' if i == 2 else 'th'}"
    for i, word in enumerate(
        "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
    )
}
#: spelled-out unit -> symbol; used only directly after a number.
UNIT_NAMES = {
    "hertz": "hz", "kilohertz": "khz", "megahertz": "mhz",
    "second": "s", "seconds": "s", "sec": "s", "secs": "s", "2nd": "s",
    "millisecond": "ms", "milliseconds": "ms", "msec": "ms",
    "minute": "min", "minutes": "min", "mins": "min", "hour": "h", "hours": "h", "hr": "h", "hrs": "h",
    "decibel": "db", "decibels": "db", "percent": "%",
    "metre": "m", "metres": "m", "meter": "m", "meters": "m", "kilometre": "km", "kilometres": "km",
    "kilometer": "km", "kilometers": "km", "centimetre": "cm", "centimetres": "cm", "centimeter": "cm",
    "centimeters": "cm", "kilobit": "kbit", "kilobits": "kbit", "semitones": "semitone", "octaves": "octave",
    "cents": "cent", "beats": "beat", "times": "time", "degrees": "degree", "°": "degree",
}  # fmt: skip
_LEVELLED = frozenset((*UNITS_WORDS, *TENS_WORDS, *SCALES, *ORDINALS))
#: symbol -> (dimension, factor to its base unit); the same dimension converts.
UNITS = {
    "hz": ("frequency", 1), "khz": ("frequency", 1000), "mhz": ("frequency", 1_000_000),
    "ms": ("time", "1/1000"), "s": ("time", 1), "min": ("time", 60), "h": ("time", 3600),
    "m": ("length", 1), "cm": ("length", "1/100"), "mm": ("length", "1/1000"), "km": ("length", 1000),
    "%": ("", "1/100"), "bpm": ("bpm", 1), "db": ("db", 1), "kbit": ("kbit", 1), "semitone": ("semitone", 1),
    "octave": ("octave", 1), "cent": ("cent", 1), "beat": ("beat", 1), "time": ("time(s)", 1),
    "degree": ("degree", 1), "kg": ("mass", 1000), "g": ("mass", 1),
}  # fmt: skip

#: after these a leading "A" names a note, not an article.
_NOTE_WORDS = frozenset(
    "minor major flat sharp natural note string chord clef scale key min maj mixolydian dorian".split()
)
_ARTICLES = frozenset(("a", "an", "the"))
_TRANSLATE = {
    **dict.fromkeys(map(ord, "\u2018\u2019\u201b\u02bc\u2032\u00b4`"), "'"),
    **dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f\u00ab\u00bb\u2033"), '"'),
    **dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe63\uff0d"), "-"),
    **dict.fromkeys(map(ord, "\u00d7"), "x"),
    ord("\u266f"): "#", ord("\u266d"): "b", ord("\u3002"): ".", ord("\u3001"): ",", ord("\u2044"): "/",
}  # fmt: skip
_NUMBER = r"(?:(?<![\w.)])[+-])?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|(?<![\w.])\.\d+)"
_TOKEN = re.compile(
    rf"(?P<ordinal>\d+(?:st|nd|rd|th)\b)|(?P<number>{_NUMBER})|(?P<word>[^\W\d_]+(?:'[^\W\d_]+)*)|(?P<sign>[^\w\s])"
)
_PLAIN = re.compile(r"(?:[A-Za-z]|(?<=[A-Za-z])'(?=[A-Za-z])|[ \n,.;:!?])*")  # the same tokens with less work
_PLAIN_WORD = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)*")
#: marks that decorate and separate; every other symbol is kept as a token of its own.
_HARMLESS = frozenset(".,;:!?\"'()[]{}*_|\\")


def clean(text: str) -> str:
    """Unicode NFKC without invisible format characters, quotes and dashes in their ASCII forms, spaces collapsed."""
    text = text[:MAX_CHARS]
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).translate(_TRANSLATE)
        text = "".join(ch for ch in text if unicodedata.category(ch) != "Cf")
        text = unicodedata.normalize("NFC", text)
    elif "`" in text:
        text = text.replace("`", "'")
    return " ".join(text.split())


def fold(text: str) -> str:
    """`clean`, without case."""
    text = clean(text).casefold()
    return text if text.isascii() else unicodedata.normalize("NFKC", text)


def raw_tokens(text: str) -> list[str]:
    """Tokens of cleaned text, in its own case: words, numbers, and symbols that carry meaning."""
    result: list[str] = []
    for match in _TOKEN.finditer(text):
        kind, token = match.lastgroup, match.group()
        if kind == "sign":
            if token == "-":
                if not _hyphen_counts(text, match.start(), match.end()):
                    continue
            elif token in _HARMLESS:
                continue
        elif kind == "number":
            token = plain_number(token)
        result.append(token)
    return result


def _hyphen_counts(text: str, start: int, end: int) -> bool:
    """A hyphen is a token between digits (a range) and after a word that nothing follows (a grade, a blood group)."""
    before, after = text[:start].rstrip()[-1:], text[end:].lstrip()[:1]
    if before.isdigit() and after.isdigit():
        return True
    return text[start - 1 : start].isalnum() and not after.isalnum()


def plain_number(token: str) -> str:
    """`1,000` -> 1000, `.5` -> 0.5, `+3` stays +3 (a sign can be the difference between two options)."""
    sign = token[0] if token[0] in "+-" else ""
    digits = token.removeprefix(sign).replace(",", "")
    return sign + ("0" + digits if digits.startswith(".") else digits)


def level_numbers(words: list[str]) -> list[str]:
    """Number words -> digits, spelled-out units after a number -> symbols, ordinals -> 1st, 2nd, ..."""
    if _LEVELLED.isdisjoint(words) and not any(word[0].isdigit() for word in words):
        return words
    result: list[str] = []
    i = 0
    while i < len(words):
        value, used = _number_words(words, i)
        if used:
            result.append(str(value))
            i += used
            continue
        word = words[i]
        after_number = bool(result) and result[-1][-1].isdigit()
        if after_number and words[i : i + 3] == ["beats", "per", "minute"]:
            result.append("bpm")
            i += 3
            continue
        result.append(UNIT_NAMES[word] if after_number and word in UNIT_NAMES else ORDINALS.get(word, word))
        i += 1
    return result


def _number_words(words: list[str], i: int) -> tuple[int, int]:
    """(value, words used) of the number written in words at position i; (0, 0) if there is none."""
    total = current = used = 0
    last = "start"
    while i + used < len(words):
        word = words[i + used]
        if word in UNITS_WORDS and last in ("start", "scale", "and", "tens"):
            value = UNITS_WORDS[word]
            if last == "tens" and not 1 <= value <= 9:
                break
            current, last = current + value, "unit"
        elif word in TENS_WORDS and last in ("start", "scale", "and"):
            current, last = current + TENS_WORDS[word], "tens"
        elif word in SCALES and last in ("unit", "tens"):
            if SCALES[word] == 100:
                current *= 100
            else:
                total, current = total + current * SCALES[word], 0
            last = "scale"
        elif word == "and" and last == "scale" and _starts_number(words, i + used + 1):
            last = "and"
        else:
            break
        used += 1
    return total + current, used


def _starts_number(words: list[str], i: int) -> bool:
    return i < len(words) and (words[i] in UNITS_WORDS or words[i] in TENS_WORDS)


def drop_articles(cased: list[str]) -> list[str]:
    """Remove a, an, the. A capital A inside text, a last A, and A before `minor` and its like are names, and stay."""
    result = []
    for i, token in enumerate(cased):
        if len(token) <= 3 and (lower := token.lower()) in _ARTICLES and i + 1 < len(cased):
            following = cased[i + 1].lower()
            note = lower == "a" and (following in _NOTE_WORDS or not following[0].isalpha() or (token == "A" and i))
            if not note:
                continue
        result.append(token)
    return result


@lru_cache(maxsize=16384)
def key(text: str) -> tuple[str, ...]:
    """What two answers must share to be the same answer.

    >>> key("The  Car.") == key("car"), key("120 BPM") == key("120 beats per minute"), key("C#") == key("C")
    (False, True, False)
    """
    words = [token.casefold() for token in raw_tokens(clean(text))]
    words = ["and" if word == "&" else word for word in words]
    return tuple(level_numbers(words)) or (fold(text),)


@lru_cache(maxsize=16384)
def loose_key(text: str) -> tuple[str, ...]:
    """`key` without articles and without plus signs of numbers.

    >>> loose_key("The  Car.") == loose_key("car"), loose_key("A minor") == loose_key("minor")
    (True, False)
    """
    words = [token.casefold() for token in drop_articles(raw_tokens(clean(text)))]
    words = ["and" if word == "&" else word for word in words]
    levelled = level_numbers(words)
    return tuple(w[1:] if w[0] == "+" and len(w) > 1 else w for w in levelled) or key(text)


def text_tokens(text: str) -> list[str]:
    """Tokens of running text (reasoning): folded, articles dropped, numbers levelled."""
    tokens = _PLAIN_WORD.findall(text) if _PLAIN.fullmatch(text) else raw_tokens(clean(text))
    return level_numbers([token.casefold() for token in drop_articles(tokens)])
