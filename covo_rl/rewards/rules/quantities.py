"""Text -> a number with a unit, in all the ways to write one: decimals, mixed numbers, durations, clocks."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from covo_rl.rewards.rules.normalize import loose_key
from covo_rl.rewards.rules.numbers import UNIT_NAMES, UNITS

_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?P<whole>\d{1,30})(?:\.(?P<decimals>\d{1,30})| , (?P<comma>\d{1,2}|\d{4,15}))?"
    r"(?:(?: and)? (?P<top>\d{1,6}) / (?P<bottom>\d{1,6})|(?: and(?: 1)?)? (?P<part>half|quarter)(?!s)"
    r"| (?P<parts>quarters))?"
    r"(?P<unit>.*)"
)
_PARTS = {"half": Fraction(1, 2), "quarter": Fraction(1, 4)}
_CLOCK = re.compile(r"(\d{1,2})(?: : (\d\d))?(?: : (\d\d))")
_DURATION = re.compile(r"(?:(\d{1,6}) h )?(?:(\d{1,6}) min )?(?:and )?(\d{1,6})(?:\.(\d{1,12}))? (s|min)")


class Quantity(NamedTuple):
    """Two are the same if `value`, in the base unit of `dimension`, is."""

    value: Fraction
    dimension: str
    unit: str
    number: Fraction | None  # as written; None for one of several parts, such as 1:30


@lru_cache(maxsize=16384)
def quantity(text: str) -> Quantity | None:
    """`10 kHz`, `1 1/2 h`, `3,5`, `1:30`: a number, with or without a unit; None if it is anything else."""
    if len(text) > 200:
        return None
    words = " ".join(loose_key(text))
    seconds = _seconds(words)
    if seconds is not None:
        return Quantity(seconds, "time", "s", None)
    match = _NUMBER.fullmatch({"half": "0 half", "quarter": "0 quarter"}.get(words, words))
    unit = match["unit"].replace(" ", "").replace("celsius", "c").replace("fahrenheit", "f") if match else ""
    unit = UNIT_NAMES.get(unit, unit)
    if not match or unit not in UNITS:
        return None
    if match["comma"] and not re.match(r"[^\w(\[{]*\d+,\d", text):
        return None  # a list
    number = Fraction(f"{match['whole']}.{match['decimals'] or match['comma'] or 0}")
    if match["top"]:
        if match["decimals"] or match["comma"] or not int(match["bottom"]):
            return None
        number += Fraction(int(match["top"]), int(match["bottom"]))
    elif match["part"]:
        alone = number == 1 and " and" not in words  # one half
        number = _PARTS[match["part"]] if alone else number + _PARTS[match["part"]]
    elif match["parts"]:
        number /= 4
    number = -number if match["sign"] == "-" else number
    dimension, factor, _ = UNITS[unit]
    return Quantity(number * Fraction(factor), dimension, unit, number)


def _seconds(words: str) -> Fraction | None:
    """Of `1 : 30` and of `1 min 30 s`."""
    if match := _CLOCK.fullmatch(words):
        first, second, third = match.groups()
        hours, minutes = (first, second) if second else ("0", first)
        return Fraction(3600 * int(hours) + 60 * int(minutes) + int(third))
    match = _DURATION.fullmatch(words)
    if not match or not (match[1] or match[2]) or (match[2] and match[5] == "min"):
        return None
    last = Fraction(f"{match[3]}.{match[4] or 0}") * (60 if match[5] == "min" else 1)
    return 3600 * int(match[1] or 0) + 60 * int(match[2] or 0) + last
