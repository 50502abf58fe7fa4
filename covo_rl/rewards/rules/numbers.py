"""Numbers and units in words -> digits and symbols, over tokens; ranges, signs and dates in one order."""

from __future__ import annotations

import re

from covo_rl.rewards.rules.notation import MONTHS

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen".split()
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
#: number word -> (which part of a number it is, value)
_NUMBER_WORDS = {
    **{word: ("digit" if 1 <= value <= 9 else "teen", value) for value, word in enumerate(_SMALL)},
    **{word: ("tens", 10 * i) for i, word in enumerate(_TENS, start=2)},
    "hundred": ("hundred", 100), **{word: ("scale", value) for word, value in _SCALES.items()}, "and": ("and", 0),
}  # fmt: skip
_LARGE = ("hundred", "scale")
#: part of a number -> the parts that it may follow
_FOLLOWS = {
    "digit": ("start", "tens", *_LARGE, "and"), "teen": ("start", *_LARGE, "and"), "tens": ("start", *_LARGE, "and"),
    "hundred": ("start", "digit", "teen", "tens"), "scale": ("start", "digit", "teen", "tens", "hundred"),
    "and": _LARGE,
}  # fmt: skip
#: ordinal -> the number word it is made of
_ORDINALS = {
    "first": "one", "second": "two", "third": "three", "fifth": "five", "eighth": "eight", "ninth": "nine",
    "twelfth": "twelve", **{word[:-1] + "ieth": word for word in _TENS},
    **{word + "th": word for word in (*_SMALL, "hundred", *_SCALES)},
}  # fmt: skip
_LEVELLED = (_NUMBER_WORDS.keys() | _ORDINALS.keys()) - {"and"}
_ENDINGS = {1: "st", 2: "nd", 3: "rd"}

#: symbol -> (dimension, factor to its base unit, other spellings directly after a number); one dimension converts.
UNITS = {
    "": ("", 1, ""), "%": ("", "1/100", "percent"),
    "hz": ("frequency", 1, "hertz"), "khz": ("frequency", 1000, "kilohertz"),
    "mhz": ("frequency", 1_000_000, "megahertz"),
    "s": ("time", 1, "second seconds sec secs 2nd"), "ms": ("time", "1/1000", "millisecond milliseconds msec"),
    "min": ("time", 60, "minute minutes mins"), "h": ("time", 3600, "hour hours hr hrs"),
    "m": ("length", 1, "metre metres meter meters"), "mm": ("length", "1/1000", "millimetre millimetres"),
    "cm": ("length", "1/100", "centimetre centimetres centimeter centimeters"),
    "km": ("length", 1000, "kilometre kilometres kilometer kilometers"),
    "g": ("mass", 1, "gram grams"), "kg": ("mass", 1000, "kilogram kilograms"), "bpm": ("bpm", 1, ""),
    "db": ("db", 1, "decibel decibels"), "kbit": ("kbit", 1, "kilobit kilobits"),
    "semitone": ("semitone", 1, "semitones"), "octave": ("octave", 1, "octaves"), "cent": ("cent", 1, "cents"),
    "beat": ("beat", 1, "beats"), "time": ("time(s)", 1, "times"), "degree": ("degree", 1, "degrees \u00b0"),
    "degreec": ("celsius", 1, "celsius"), "degreef": ("fahrenheit", 1, "fahrenheit"), "km/h": ("speed", 1, "kmh kph"),
    "m/s": ("m/s", 1, ""), "dollar": ("dollar", 1, "dollars"), "euro": ("euro", 1, "euros"),
    "pound": ("pound", 1, "pounds"), "yen": ("yen", 1, ""), "millihertz": ("frequency", "1/1000", ""),
    "w": ("power", 1, "watt watts"), "kw": ("power", 1000, "kilowatt kilowatts"),
    "mw": ("power", "1/1000", "milliwatt milliwatts"), "megawatt": ("power", 1_000_000, "megawatts"),
    "v": ("voltage", 1, "volt volts"), "mv": ("voltage", "1/1000", "millivolt millivolts"),
}  # fmt: skip
UNIT_NAMES = {name: symbol for symbol, (_, _, names) in UNITS.items() for name in names.split()}

_N = r"([+-]?\d+(?:\.\d+)?)"
_MONTH = "(" + "|".join(f"{month[:3]}(?:{month[3:]})?" for month in MONTHS) + "|sept)"
_DAY = r"(\d{1,2})(?:st|nd|rd|th)?"
#: words that must be there -> (pattern over tokens joined by spaces, replacement)
_REWRITES = [
    ({"minus", "negative"}, re.compile(r"(?<!\d )\b(?:minus|negative) (?=\d)"), "-"),
    ({"plus"}, re.compile(r"(?<!\S)(?<!\d )plus (?=\d)"), "+"),
    ({"between"}, re.compile(rf"(?<!\S)between {_N} and {_N}(?!\S)"), r"\1 - \2"),
    ({"to", "-", "through"}, re.compile(rf"(?<!\S){_N} (\S+) (?:to|through|-) {_N} \2(?!\S)"), r"\1 - \3 \2"),
    ({"to", "through", "from"}, re.compile(rf"(?<!\S)(?:from )?{_N} (?:to|through|-) {_N}(?!\S)"), r"\1 - \2"),
    (set(), re.compile(rf"(?<!\S)(?:the )?{_DAY} (?:of )?{_MONTH}(?!\S)(?! \d{{1,2}}(?!\d))"), r"\2 \1"),
    (set(), re.compile(rf"(?<!\S){_MONTH} (?:the )?{_DAY}(?: ,)?(?!\S)"),
     lambda match: f"{match[1][:3]} {match[2]}"),
]  # fmt: skip
_MONTH_WORD = re.compile(rf"(?<!\S){_MONTH}(?!\S)")
_TRIGGERS = frozenset("minus negative plus between to through -".split())


def level_numbers(words: list[str]) -> list[str]:
    """Number words -> digits, units after a number -> symbols, ordinals -> 1st, 2nd, ...; `2 to 4` -> `2 - 4`."""
    digits = any(word[-1].isdigit() or word[0].isdigit() for word in words)
    if not digits and _LEVELLED.isdisjoint(words):
        return words
    result: list[str] = []
    i = 0
    while i < len(words):
        number = words[i] in _LEVELLED or (result and result[-1][-1].isdigit())
        used, written = _number_at(words, i, result) if number else (0, [])
        result += written or [words[i]]
        i += used or 1
    text = " ".join(result)
    dated = bool(_MONTH_WORD.search(text))
    if not dated and _TRIGGERS.isdisjoint(result):
        return result
    for triggers, pattern, replacement in _REWRITES:
        if not triggers.isdisjoint(result) or (dated and not triggers):
            text = pattern.sub(replacement, text)
    return text.split(" ")


def _number_at(words: list[str], i: int, before: list[str]) -> tuple[int, list[str]]:
    """(words used, what they are written as) at position i, behind the tokens `before`; (0, []) for any other word."""
    word = words[i]
    after_number = bool(before) and before[-1][-1].isdigit()
    if after_number:
        if words[i : i + 3] == ["beats", "per", "minute"]:
            return 3, ["bpm"]
        if word in UNIT_NAMES:
            return 1, [UNIT_NAMES[word]]
        if word in _SCALES and re.fullmatch(r"\d{1,15}(?:\.\d{1,12})?", before[-1]):  # 1.2 million
            whole, _, part = before.pop().partition(".")
            zeros = len(str(_SCALES[word])) - 1
            if len(part) <= zeros:
                return 1, [str(int(whole + part.ljust(zeros, "0")))]
            before.append(f"{whole}.{part}")
            return 0, []
    value, used, last = _number_in_words(words, i)
    ordinal = _ORDINALS.get(words[i + used]) if i + used < len(words) else None
    if ordinal and (
        not used or (ordinal != "two" and _NUMBER_WORDS[ordinal][0] in ("digit", "teen", "tens", "hundred"))
    ):
        part, more = _NUMBER_WORDS[ordinal]
        if not used or last in _FOLLOWS[part]:
            number = value * more if part == "hundred" and used else value + more
            ending = "th" if 10 <= number % 100 <= 20 else _ENDINGS.get(number % 10, "th")
            return used + 1, [f"{number}{ending}"]
    if not used:
        return 0, []
    if words[i + used : i + used + 1] == ["point"]:
        decimals = []
        for following in words[i + used + 1 :]:
            part, digit = _NUMBER_WORDS.get(following, ("", 99))
            if digit > 9 or part == "and":
                break
            decimals.append(str(digit))
        if decimals:
            return used + 1 + len(decimals), [f"{value}.{''.join(decimals)}"]
    used -= last == "and"
    if used == 1 and 17 <= value <= 20:  # nineteen sixty-nine
        rest, more, _ = _number_in_words(words, i + 1)
        if 10 <= rest <= 99:
            return 1 + more, [f"{value}{rest}"]
    return used, [str(value)]


def _number_in_words(words: list[str], i: int) -> tuple[int, int, str]:
    """(value, words used, part of the last one) of the number in words at position i; (0, 0, "start") without one."""
    total = group = used = 0
    last, smallest = "start", 10**15
    for at in range(i, len(words)):
        part, value = _NUMBER_WORDS.get(words[at], ("", 0))
        if last not in _FOLLOWS.get(part, ()) or (part == "scale" and value >= smallest):
            break
        if part == "hundred":
            group = max(group, 1) * value
        elif part == "scale":
            total, group, smallest = total + max(group, 1) * value, 0, value
        else:
            group += value
        last, used = part, used + 1
    return total + group, used, last
