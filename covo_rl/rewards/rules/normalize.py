"""Text -> tokens that are equal when two answers mean the same string, and different when they do not.

Unicode form (text.py), notation (notation.py), number words and unit names (numbers.py), case and decoration are
levelled. What tells answers apart stays: signs, decimal points, `#`, `+`, `%`, negations, word order. `key` is the
comparison of answers, `text_tokens` the common ground of all reward code that looks for words in text.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from itertools import pairwise

from covo_rl.rewards.rules.notation import plain_notation
from covo_rl.rewards.rules.numbers import UNIT_NAMES, UNITS, level_numbers
from covo_rl.rewards.rules.text import clean_text, normal_form

#: after these a leading "A" names a note, not an article.
_NOTE_WORDS = frozenset(
    "minor major flat sharp natural note string chord clef scale key min maj mixolydian dorian".split()
)
_UNIT = "|".join(sorted(map(re.escape, filter(str.isalpha, (*UNITS, *UNIT_NAMES))), key=len, reverse=True))
_TOKEN = re.compile(
    r"\d+(?i:st|nd|rd|th)\b"
    r"|(?<![\w.)+-])[+-]{2,8}(?=\.?\d)"  # no sign
    r"|(?:(?<![\w.)+-])[+-])?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|(?<![\w.])\.\d+)"  # a number
    r"|[^\W\d_]+(?:'[^\W\d_]+)*"  # a word
    r"|(?:(?<=\d)|(?<=\d ))-(?= ?\d)|(?<=[^\W_])-(?! ?[^\W_])"  # the hyphen of a range, or of a grade or blood group
    r"|(?<=\d):(?=\d)|(?<=\d),(?= ?[+-]?\d)"  # of a clock or a ratio; of a decimal or a list
    rf"|(?:(?<=\d)-(?= )|(?<=\d )-)(?= ?(?i:{_UNIT})$)|(?<=\d )-$"  # 6 - dB: whose sign is it?
    r"|[^\w\s.,;:!?\"'()\[\]{}*|\\-]",  # a symbol; marks that only decorate and separate are none
)
_ACCENTS = re.compile("(?<=[A-Za-z])[\u0300-\u036f]+")
_JOINED = re.compile(r"(?<=[^\W\d_])(?:(?<![IVXivx])-|-(?![IVXivx]))(?=[^\W\d_])")  # not V-I
_GREEK = re.compile("(?<![^\\W_])[\u03b1-\u03c1\u03c3-\u03c9](?![^\\W_])", re.IGNORECASE)
_NEEDLESS = re.compile(
    r"^both (?=.+ and )|(?:(?<=^none)|(?<=^all))(?: of)? the above\b(?: options| choices)?"
    r"|'?\b(?:19|20)(?=\d0s\b)",
    re.IGNORECASE,
)
_LISTED = re.compile(
    r" ?(?:;|,(?!\d)|->|\u2192)(?: and\b)?(?: then\b)? ?| \+ | (?:and )?then |(?<=[^\W\d_]) - (?=[^\W\d_])",
    re.IGNORECASE,
)
_CONTRACTED = re.compile(r"(?<!\bca)n't\b|(?<=\bcan)(?:not|'t)\b")


def raw_tokens(text: str) -> list[str]:
    """Tokens of cleaned text, in its own case: words, numbers (1,000 as 1000, .5 as 0.5), symbols with a meaning."""
    tokens = [token.replace(",", "") or "," for token in _TOKEN.findall(plain_notation(text).replace("\u00d7", "x"))]
    if tokens.count(",") > 1:  # a list of numbers needs no commas
        tokens = [token for token in tokens if token != ","]
    return [re.sub(r"^([+-]?)\.", r"\g<1>0.", token) if "." in token else token for token in tokens]


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
    """Folded and levelled; `&` and the n of rock 'n' roll are `and`."""
    inner = range(1, len(tokens) - 1)
    joins = ("and" if token == "&" or (token == "n" and i in inner) else token for i, token in enumerate(tokens))
    return level_numbers([token.casefold() for token in joins])


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
def plain_key(text: str) -> tuple[str, ...]:
    """`key` without accents on Latin letters, and with Greek letters by their names.

    >>> plain_key("caf\u00e9 \u03b2") == plain_key("Cafe beta")
    True
    """
    text = normal_form("NFC", _ACCENTS.sub("", normal_form("NFD", clean_text(text))))
    text = _GREEK.sub(lambda match: unicodedata.name(match[0]).split()[-1], text)
    return key(text.replace("\u0131", "i"))


@lru_cache(maxsize=16384)
def merged_key(text: str) -> tuple[str, ...]:
    """`loose_key` without hyphens and contractions, with `and` for a comma, an arrow and `then`; `2 to 1` is a ratio.

    >>> merged_key("Hip-Hop, slow") == merged_key("hiphop and slow"), merged_key("2:1") == merged_key("2 to 1")
    (True, True)
    """
    text = _CONTRACTED.sub(" not", clean_text(text))
    text = _LISTED.sub(" and ", _JOINED.sub("", text).strip(" ,;"))
    words = loose_key(_NEEDLESS.sub("", text))
    ratio = any(word == ":" and len(after) == 1 for word, after in pairwise(words))
    return tuple("-" if word == ":" and ratio else word for word in words)


@lru_cache(maxsize=16384)
def text_tokens(text: str) -> tuple[str, ...]:
    """Tokens of running text (reasoning): folded, articles dropped, numbers levelled."""
    return tuple(level_numbers([token.casefold() for token in drop_articles(raw_tokens(clean_text(text)))]))
