"""Numbers and formulas as answers: untrusted text -> sympy objects within hard limits, compared in bounded time.

Nothing is evaluated as code and `sympify` is never called. Every limit is checked before the work it bounds, so that
`9**9**9`, `__import__('os')` and ten thousand brackets are refused at once. Formulas with symbols are compared at fixed
points to 30 digits (Schwartz-Zippel): sound for polynomials up to chance, and bounded, which simplification is not.
"""

from __future__ import annotations

import operator
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import sympy

TOLERANCE = 1e-6  # relative, where one side is a decimal and the other has no finite decimal form
MAX_CHARS = 256
MAX_TOKENS = 120
MAX_DEPTH = 23
MAX_DIGITS = 40
MAX_EXPONENT = 64
MAX_BITS = 4096

_TOKEN = re.compile(
    r"(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+\.?\d*(?:[eE][+-]?\d{1,3}(?![\w.]))?|\.\d+)"
    r"|(?P<name>\\[a-zA-Z]+|[a-zA-Z\u03b1-\u03c9]+)|\*\*|[-+*/^(){}\[\],=%]|\s+|(?P<other>.)",
    re.DOTALL,
)
_SIGNS = {0x2212: "-", 0xD7: "*", 0xB7: "*", 0xF7: "/", ord("\u03c0"): " pi ", ord("\u221a"): " sqrt "}
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_FUNCTIONS = {
    "exp": sympy.exp, "log": sympy.log, "ln": sympy.log, "sin": sympy.sin, "cos": sympy.cos, "tan": sympy.tan,
    "abs": sympy.Abs,
}  # fmt: skip
_CONSTANTS = {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "oo": sympy.oo}
_NAMES = (*_FUNCTIONS, *"sqrt pi alpha beta gamma delta theta lambda mu sigma omega phi".split())
#: token by the name, of more than one letter, that is written
_WORDS = {
    **{name: name for name in (*_NAMES, "oo")}, **{f"\\{name}": name for name in _NAMES}, "\\infty": "oo",
    "\\cdot": "*", "\\times": "*", "\\div": "/", "\\frac": "frac", "\\dfrac": "frac", "\\tfrac": "frac",
    "\\left": "", "\\right": "", "\\displaystyle": "",
}  # fmt: skip


class FormulaError(ValueError):
    """The text is no formula we read, or it is beyond a limit."""


def _refuse(wrong: Any, why: str) -> None:
    if wrong:
        raise FormulaError(why)


@dataclass(frozen=True)
class Formula:
    """One expression (`shape` ""), the two sides of an equation ("="), or the elements of a list (its brackets)."""

    sides: tuple[Any, ...]
    shape: str
    decimal: bool  # written with a decimal point: may be rounded


@lru_cache(maxsize=8192)
def read_formula(text: str) -> Formula | None:
    """The formula that `text` is, or None."""
    text = text.strip().rstrip(".").strip()
    for opening, closing in (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if len(text) > 2 and text.startswith(opening) and text.endswith(closing):
            text = text[len(opening) : -len(closing)]
    try:
        tokens = tokenize(text)
        decimal = any("." in token for token in tokens)
        if tokens[0] in _CLOSING and tokens[-1] in _CLOSING.values():  # (1, 2), but not (1), (2)
            with suppress(FormulaError):
                sides, shape = _Parser(tokens[1:-1]).whole()
                if shape == "()":
                    return Formula(sides, tokens[0] + tokens[-1], decimal)
        return Formula(*_Parser(tokens).whole(), decimal)
    except FormulaError:
        return None


def tokenize(text: str) -> list[str]:
    """Tokens of a formula, at least one.

    Raises:
        FormulaError: a character, a name or a size that is not allowed.
    """
    _refuse(len(text) > MAX_CHARS, f"longer than {MAX_CHARS} characters")
    tokens: list[str] = []
    for match in _TOKEN.finditer(text.translate(_SIGNS).replace("\\,", "").replace("\\!", "")):
        kind, token = match.lastgroup, match.group()
        _refuse(kind == "other", f"character {token!r} is not allowed")
        if kind == "number":
            token = token.replace(",", "")
            _refuse(sum(c.isdigit() for c in token) > MAX_DIGITS, f"a number of more than {MAX_DIGITS} digits")
            exponent = int(token.lower().partition("e")[2] or 0)
            _refuse(abs(exponent) > MAX_EXPONENT, "a decimal exponent beyond the limit")
        elif kind == "name" and len(token) > 1:
            _refuse(token not in _WORDS, f"name {token!r} is not allowed")
            token = _WORDS[token]
        if token.strip():
            tokens.append("^" if token == "**" else token)
    _refuse(not 0 < len(tokens) <= MAX_TOKENS, f"no tokens, or more than {MAX_TOKENS}")
    return tokens


class _Parser:
    """Precedence climbing over the tokens of one expression."""

    def __init__(self, tokens: list[str]) -> None:
        self.rest = ["", *reversed(tokens)]  # the next token is the last; "" is the end
        depths = accumulate((token in _CLOSING) - (token in _CLOSING.values()) for token in tokens)
        _refuse(max(depths, default=0) > MAX_DEPTH, f"nested deeper than {MAX_DEPTH}")

    def take(self, *tokens: str) -> str:
        """The next token if it is one of these, else ""."""
        return self.rest.pop() if self.rest[-1] in tokens else ""

    def whole(self) -> tuple[tuple[Any, ...], str]:
        """All tokens: `sides` and `shape` of a formula."""
        sides = [self.expression()]
        separator = self.take("=", ",")
        if separator:
            sides.append(self.expression())
        while separator == "," and self.take(","):
            sides.append(self.expression())
        _refuse(self.rest[-1], f"{self.rest[-1]!r} is left over")
        return tuple(sides), {"": "", "=": "=", ",": "()"}[separator]

    def expression(self, level: int = 1) -> Any:
        """What comes next, as far as its operators bind at least as tightly as `level`."""
        sign = 1
        while token := self.take("+", "-"):
            sign = -sign if token == "-" else sign
        value = sign * self.power()
        while True:
            implied = self.rest[-1] in _CLOSING or self.rest[-1][:1].isalpha()  # 2x, 2(x+1)
            binding, apply = _OPERATORS.get("*" if implied else self.rest[-1], (0, None))
            if apply is None or binding < level:
                return value
            if not implied:
                self.rest.pop()
            value = _within_limits(apply(value, self.expression(binding + 1)))

    def power(self) -> Any:
        base = self.atom()
        while self.take("%"):
            base = base / 100
        if not self.take("^"):
            return base
        exponent = (-1 if self.take("-") else 1) * self.atom()
        _refuse(self.rest[-1] == "^", "a tower of powers")
        return _power(base, exponent)

    def atom(self) -> Any:
        token = self.take(self.rest[-1])
        if token in _CLOSING:
            value, closing = self.expression(), _CLOSING[token]
            _refuse(not self.take(closing), f"expected {closing!r}, found {self.rest[-1] or 'the end'!r}")
            return value
        if token == "frac":
            if re.fullmatch(r"\d\d", self.rest[-1]):  # \\frac12
                self.rest.extend(reversed(self.rest.pop()))
            return _within_limits(_OPERATORS["/"][1](self.part(), self.part()))
        if token == "sqrt":
            return _power(self.atom(), sympy.Rational(1, 2))
        if token in _FUNCTIONS:
            _refuse(self.rest[-1] not in _CLOSING, f"{token} needs brackets")
            argument = self.atom()
            return _within_limits(_FUNCTIONS[token](_without_power(argument) if token == "exp" else argument))
        if token[:1].isalpha():
            return _CONSTANTS.get(token) or sympy.Symbol(token)
        if token[:1].isdigit() or token[:1] == ".":
            return sympy.Rational(token)
        raise FormulaError(f"expected a number or a name, found {token or 'the end'!r}")

    def part(self) -> Any:
        _refuse(not re.fullmatch(r"\{|\d", self.rest[-1]), "\\frac needs two parts in braces")
        return self.atom()


def _power(base: Any, exponent: Any) -> Any:
    for number in _without_power(exponent).atoms(sympy.Number):
        wrong = not number.is_Rational or abs(number) > MAX_EXPONENT or number.q > 12
        _refuse(wrong, f"exponent {number} is beyond {MAX_EXPONENT}")
    if exponent.is_Rational and base.is_Rational:
        _refuse(base == 0 and exponent <= 0, "division by zero, or zero to the power of zero")
        _refuse(_bits(base) * abs(float(exponent)) > MAX_BITS, "a power beyond the size limit")
    return _within_limits(sympy.Pow(base, exponent))


def _without_power(exponent: Any) -> Any:
    _refuse(exponent.has(sympy.Pow, sympy.exp), "a power in an exponent")
    return exponent


def _within_limits(value: Any) -> Any:
    _refuse(value in (sympy.nan, sympy.zoo), "undefined")
    _refuse(value.is_Rational and _bits(value) > MAX_BITS, "a number beyond the size limit")
    return value


def _bits(value: Any) -> int:
    return max(int(value.p).bit_length(), int(value.q).bit_length())


#: token -> (how tightly it binds, function)
_OPERATORS = {
    "+": (1, operator.add), "-": (1, lambda a, b: a + -1 * b),
    "*": (2, operator.mul), "/": (2, lambda a, b: a * _power(b, sympy.Integer(-1))),
}  # fmt: skip


def equal_formulas(a: Formula, b: Formula) -> bool:
    """Same value; `x = 5` equals 5; lists by element, sets in any order."""
    same = partial(_same, decimal=a.decimal or b.decimal)
    if a.shape == b.shape == "=":
        one, other = a.sides[0] - a.sides[1], b.sides[0] - b.sides[1]
        return same(one, other) or same(one, -other)
    (a_shape, a_sides), (b_shape, b_sides) = (
        ("", f.sides[1:]) if f.shape == "=" and f.sides[0].is_Symbol else (f.shape, f.sides) for f in (a, b)
    )
    if a_shape != b_shape or len(a_sides) != len(b_sides):
        return False
    if a_shape != "{}":
        return all(map(same, a_sides, b_sides))
    rest = list(b_sides)
    for x in a_sides:
        match = next((y for y in rest if same(x, y)), None)
        if match is None:
            return False
        rest.remove(match)
    return True


def _same(a: Any, b: Any, decimal: bool) -> bool:
    if a == b:
        return True
    rational = a.is_Rational and b.is_Rational
    if a.is_infinite or b.is_infinite or (rational and _finite_decimal(a) == _finite_decimal(b)):
        return False
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    if not symbols:
        return _close(a.evalf(30), b.evalf(30), TOLERANCE if decimal else 1e-20)
    valid = 0
    for seed in (7, 11, 13, 17):
        point = {s: (seed * (2 * i + 3) % 29 + 1) / 13 + 0.01 * i for i, s in enumerate(symbols)}
        x, y = a.evalf(30, subs=point), b.evalf(30, subs=point)
        if x.is_number and y.is_number and x.is_finite and y.is_finite:
            if not _close(x, y, 1e-18):
                return False
            valid += 1
    return valid >= 2


def _finite_decimal(value: Any) -> bool:
    return pow(10, int(value.q).bit_length(), int(value.q)) == 0  # its denominator has no prime factor but 2 and 5


def _close(x: Any, y: Any, tolerance: float) -> bool:
    try:
        difference, size = abs(complex(x - y)), max(abs(complex(x)), abs(complex(y)))
    except (TypeError, OverflowError):
        return False
    return difference <= tolerance * size
