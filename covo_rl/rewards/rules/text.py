"""Unicode text -> plain text: one form for what looks alike; superscripts and fractions keep their meaning."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import Literal

MAX_CHARS = 20_000  # longer text is cut before it is compared; no answer is that long
MAX_RUN = 500

_RUN = re.compile(rf"\s+|\S{{1,{MAX_RUN}}}")
_PLAIN = {
    **dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc\u2032\u00b4", "'"),
    **dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb\u2033\u301d\u301e\u301f", '"'),
    **dict.fromkeys("\u2212\u02d7\u2796\u2043\ufe63", "-"), **dict.fromkeys("\u301c\u223c", "~"),
    **dict.fromkeys("\u3001\u060c\u066c", ","), **dict.fromkeys("\u2022\u2023\u2713\u2714\u2611\u2705", " "),
    "\u066b": ".", "\u066a": "%", "\u00b7": "\u00b7", "\u266f": "#", "\u266d": "b",
    "\u2044": "/", "\u2215": "/", "\u2236": ":",
}  # fmt: skip
#: by category: dashes, brackets, quotes and marks of any script; digits are read by their value
_BY_CATEGORY = {"Pd": "-", "Ps": "(", "Pe": ")", "Pi": '"', "Pf": '"', "Zs": " ", "Zl": "\n", "Zp": "\n", "Cf": ""}
_MEANING = frozenset("\u2030\u2031\u00a7\u00b6\u2020\u2021")  # marks that are no decoration
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u20e3\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
_SUPERSCRIPTS = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b\u207f", "0123456789+-n"
)
_SUPERSCRIPT = re.compile(rf"(?<=[\w)\]])[{''.join(map(chr, _SUPERSCRIPTS))}]+")
_FRACTION = re.compile("(\\d?)([\u00bc-\u00be\u2150-\u215e\u2189])")
_APART = re.compile("(?<=\\d)(?=[\u2460-\u249b\u24ea-\u24ff\u2776-\u2793])")  # a number in a circle is one of its own
_SUBSCRIPT = re.compile("(?<=\\d)(?=[\u2080-\u2089])")
_SOFT_MINUS = re.compile("\u00ad(?=\\s*\\d)")  # may be seen as a minus


def clean_text(text: str) -> str:
    """One form of what looks the same: width, quotes, dashes, brackets, digits of any script; spaces collapsed.

    >>> clean_text("\u300c1\u00bd  kHz\u300d"), clean_text("10\u00b2 \u2212 \u0664")
    ('(1 1/2 kHz)', '10^2 - 4')
    """
    return " ".join(clean_lines(text).split())


def clean_lines(text: str) -> str:
    """`clean_text` that keeps line breaks."""
    text = text[:MAX_CHARS]
    if not text.isascii():
        text = _SUPERSCRIPT.sub(lambda match: "^" + match[0].translate(_SUPERSCRIPTS), _SOFT_MINUS.sub("-", text))
        text = _SUBSCRIPT.sub("_", _APART.sub(" ", text))
        text = _FRACTION.sub(lambda match: f"{match[1]} {unicodedata.normalize('NFKC', match[2])}", text)
        text = normal_form("NFKC", text)[:MAX_CHARS]
        text = normal_form("NFC", "".join(map(_plain, _UNSEEN.sub("", text)))).strip("\u00b7 ")
    return text.replace("`", "'")


def normal_form(form: Literal["NFC", "NFD", "NFKC"], text: str) -> str:
    """Word by word where it is long: sorting a run of combining marks takes the square of its length."""
    if len(text) <= MAX_RUN:
        return unicodedata.normalize(form, text)
    return "".join(unicodedata.normalize(form, piece) for piece in _RUN.findall(text))


@lru_cache(maxsize=4096)
def _plain(char: str) -> str:
    if char.isascii():
        return char
    category = unicodedata.category(char)
    if char in _PLAIN:
        return _PLAIN[char]
    if category == "Nd":
        return str(unicodedata.decimal(char))
    if category == "Po" and char not in _MEANING:
        return ". "
    return _BY_CATEGORY.get(category, char)
