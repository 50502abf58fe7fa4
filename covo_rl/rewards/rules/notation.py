"""Ways to write the same thing -> one way, in cleaned text of its own case: numbers, times, dates, notes, symbols.

Each rule is linear in the text, applies to answer and option alike, and joins only what every reader joins.
"""

from __future__ import annotations

import re
from collections.abc import Callable

MONTHS = "january february march april may june july august september october november december".split()
_DECADES = ["twent", "thirt", "fort", "fift", "sixt", "sevent", "eight", "ninet"]
#: symbols that differ from another one only in case
_CASED = {
    "mHz": "millihertz", "pA": "picoampere", "MW": "megawatt", "MV": "megavolt", "MPa": "megapascal",
    "kB": "kilobyte", "KB": "kilobyte", "MB": "megabyte", "GB": "gigabyte", "TB": "terabyte",
    "kB/s": "kilobyte/s", "MB/s": "megabyte/s", "Co": "cobalt", "Hf": "hafnium",
}  # fmt: skip
_CURRENCIES = {"$": "dollars", "\u20ac": "euros", "\u00a3": "pounds", "\u00a5": "yen", "\u20b9": "rupees"}
_ACCIDENTALS = {"sharp": "#", "flat": "b"}


def _clock(match: re.Match[str]) -> str:
    """3 PM is 15:00; 3 AM stays apart from a 3:00 that does not say which."""
    hour, minutes, half = int(match[1]), match[2] or "00", match[3].lower()
    if not 1 <= hour <= 12:
        return match[0]
    return f"{hour % 12 + 12}:{minutes}" if half in ("p", "afternoon", "evening") else f"{hour % 12}:{minutes} am"


def _date(year: str, month: str, day: str, text: str) -> str:
    return f"{MONTHS[int(month) - 1]} {int(day)} {year}" if 1 <= int(month) <= 12 and 1 <= int(day) <= 31 else text


def _date_by_size(match: re.Match[str]) -> str:
    """20/10/2020: only where one of the two is no month, or both are the same."""
    a, b = int(match[1]), int(match[3])
    if a > 12 or a == b:
        a, b = b, a
    return _date(match[4], str(a), str(b), match[0]) if b > 12 or a == b else match[0]


def _age(match: re.Match[str]) -> str:
    """`Female, in her 30s` is `Female, 30s`, but a male in her 30s is nobody."""
    other = {"her": r"\b(?:male|man|boy|he)\b", "his": r"\b(?:female|woman|girl|she)\b"}.get((match[1] or "").lower())
    return (
        match[0]
        if other and re.search(other, match.string[max(match.start() - 60, 0) : match.start()], re.IGNORECASE)
        else " "
    )


_Rule = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]
_HOUR = r"(?<![\d:.,])(\d{1,2})(?:[:.]([0-5]\d))?"
#: of numbers; applied in order
_WITH_DIGITS: list[_Rule] = [
    (re.compile(rf"{_HOUR} ?(p|a)(?:m|\. ?m\.|\.m)(?![^\W_])", re.IGNORECASE), _clock),
    (re.compile(rf"{_HOUR} in the (morning|afternoon|evening)\b", re.IGNORECASE), _clock),
    (re.compile(r"(?<![\d:])0(?=\d:[0-5]\d)"), ""),
    (re.compile(r"(?<![\d/.-])(\d{4})([-/.])(\d{1,2})\2(\d{1,2})(?![\d/-])"),
     lambda match: _date(match[1], match[3], match[4], match[0])),
    (re.compile(r"(?<![\d/.-])(\d{1,2})([-/.])(\d{1,2})\2(\d{4})(?![\d/-])"), _date_by_size),
    (re.compile(r"(?<![\d.,])\d{1,3}(?:\.\d{3})+,\d+(?![\d.,]*\d)"),  # 1.234,5
     lambda match: match[0].replace(".", "").replace(",", ".")),
    (re.compile(r"(?<![\d.,])\d{1,3}(?:\.\d{3}){2,}(?![\d.,]*\d)"), lambda match: match[0].replace(".", "")),
    (re.compile(r"(?<![\d.,])\d{1,2}(?:,\d{2})+,\d{3}(?![\d,]*\d)"), lambda match: match[0].replace(",", "")),
    (re.compile(r"(?<![\d.,])(?<![\d.,] )\d{1,3}(?:(?:'\d{3})+|(?: \d{3})+)(?! ?[\d'])"),
     lambda match: re.sub("[' ]", "", match[0])),
    (re.compile(r"([$\u20ac\u00a3\u00a5\u20b9]) ?(\d[\d.,]*)(?![\d$])"),
     lambda match: f"{match[2].rstrip('.,')} {_CURRENCIES[match[1]]} "),
    (re.compile(r"(?<=\d) ?~ ?(?=\d)"), "-"),
    (re.compile(r"(?<=\d) : (?=\d)"), ":"),
    (re.compile(r"(?<=\d) ?([A-Za-z]{1,5}) ?(?:-|to) ?([+-]?\d[\d.]*) ?\1(?![^\W_])"), r" to \2 \1"),  # 2s-4s
    (re.compile(r"(?<=\d0)'s\b"), "s"),
    (re.compile(r"(?:,? |(?<=\())(?:(?:aged )?in (her|his|their|the)|aged) (?=\d0s)", re.IGNORECASE), _age),
    (re.compile(r"(?<=\d) ?per cent\b", re.IGNORECASE), "%"),
    (re.compile(r"^([(\[\"' ]*[-+]) (?=\.?\d)"), r"\1"),  # a sign with a space
]  # fmt: skip
_AFTER_NUMBER = r"(?<!\d)(?<!\d )"
#: of names and symbols, before those of numbers
_ALWAYS: list[_Rule] = [
    (re.compile(r"\b(?:[^\W\d_]\.){2,}"), lambda match: match[0].replace(".", "")),  # U.S.
    (re.compile(rf"\b({'|'.join(_DECADES)})ies\b", re.IGNORECASE),
     lambda match: f"{_DECADES.index(match[1].lower()) + 2}0s"),
    (re.compile(rf"(?:(?<=\d)|(?<=\d )|^)({'|'.join(sorted(_CASED, key=len, reverse=True))})(?![\w/])"),
     lambda match: f" {_CASED[match[1]]}"),
    (re.compile(r"\b([A-G]|[a-g](?=[ -]?(?:sharp|flat) m))[ -]?(sharp|flat)\b"),
     lambda match: match[1] + _ACCIDENTALS[match[2]]),
    (re.compile(rf"{_AFTER_NUMBER}\b([A-G][#b]?|[a-g]#)[ -]?(maj|min)(?:\.|or)?(?![^\W\d_])"), r"\1 \2or "),
    (re.compile(rf"{_AFTER_NUMBER}\b([A-G][#b]?|[a-g][#b]?(?=m\d)|^[b-eg][#b]?(?=m$))m(?![^\W\d_])"), r"\1 minor "),
    (re.compile(rf"{_AFTER_NUMBER}\b([A-G][#b]?(?=M\d)|[B-EG][#b]?)M(?![^\W\d_])"), r"\1 major "),
]  # fmt: skip
#: what any rule of a list needs: most text is passed by with two searches
_DIGITS_NEEDED = re.compile(
    r"\d ?[apAP][.mM]|\d in |\d[:,.'~/-]\d|\d \d\d\d|\d ?~|\d : |[$\u20ac\u00a3\u00a5\u20b9]|'s|per cent"
    r"|\b(?:her|his|their|the|aged) \d0s|\d ?[A-Za-z]{1,5} ?(?:-|to) ?\d|^\W*[-+] "
)
_NEEDED = re.compile(
    r"[^\W\d_]\.[^\W\d_]|ties\b|sharp|flat|[A-Ga-g][#b]? ?-?(?:maj|min)|\b[A-Ga-g][#b]?[mM](?![^\W\d_])"
    rf"|\d ?(?:mH|pA|M|[kKGT]B)|^(?:{'|'.join(_CASED)})$"
)


def plain_notation(text: str) -> str:
    """Cleaned text in the one notation.

    >>> plain_notation("1:30 p.m."), plain_notation("2020-10-20"), plain_notation("C-sharp min"), plain_notation("CM7")
    ('13:30', 'october 20 2020', 'C# minor ', 'C major 7')
    """
    for needed, rules in ((_NEEDED, _ALWAYS), (_DIGITS_NEEDED, _WITH_DIGITS)):
        if needed.search(text):
            for pattern, replacement in rules:
                text = pattern.sub(replacement, text)
    return text
