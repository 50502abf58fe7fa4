"""Numbers and formulas as answers: untrusted text -> values, in bounded time and memory.

Nothing is evaluated as code and nothing symbolic is kept: a formula is computed while it is read, in at most MAX_TOKENS
steps of bounded cost (arithmetic.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate

from covo_rl.rewards.rules.arithmetic import CONSTANTS, FormulaError, Value, apply, constant, refuse, same_value, symbol

MAX_CHARS = 256
MAX_TOKENS = 120
MAX_DEPTH = 23
MAX_DIGITS = 40
MAX_EXPONENT = 64

_TOKEN = re.compile(
    r"(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+\.?\d*(?:[eE][+-]?\d{1,3}(?![\w.]))?|\.\d+)"
    r"|(?P<name>\\[a-zA-Z]+|[a-zA-Z\u03b1-\u03c9]+)|\*\*|[-+*/^(){}\[\],=%]|\s+|(?P<other>.)",
    re.DOTALL,
)
_SIGNS = {0x2212: "-", 0xD7: "*", 0xB7: "*", 0xF7: "/", ord("\u03c0"): " pi ", ord("\u221a"): " sqrt "}
_BINDING = {"+": 1, "-": 1, "*": 2, "/": 2}  # how tightly an operator binds
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_FUNCTIONS = ("exp", "log", "ln", "sin", "cos", "tan", "abs")
_NAMES = (*_FUNCTIONS, *"sqrt pi alpha beta gamma delta theta lambda mu sigma omega phi".split())
#: token by the name, of more than one letter, that is written
_WORDS = {
    **{name: name for name in (*_NAMES, "oo")}, **{f"\\{name}": name for name in _NAMES}, "\\infty": "oo",
    "\\cdot": "*", "\\times": "*", "\\div": "/", "\\frac": "frac", "\\dfrac": "frac", "\\tfrac": "frac",
    "\\left": "", "\\right": "", "\\displaystyle": "",
}  # fmt: skip


@dataclass(frozen=True)
class Formula:
    """One expression (`shape` ""), the two sides of an equation ("="), or the elements of a list (its brackets)."""

    sides: tuple[Value, ...]
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
    refuse(len(text) > MAX_CHARS, f"longer than {MAX_CHARS} characters")
    tokens: list[str] = []
    for match in _TOKEN.finditer(text.translate(_SIGNS).replace("\\,", "").replace("\\!", "")):
        kind, token = match.lastgroup, match.group()
        refuse(kind == "other", f"character {token!r} is not allowed")
        if kind == "number":
            token = token.replace(",", "")
            refuse(sum(c.isdigit() for c in token) > MAX_DIGITS, f"a number of more than {MAX_DIGITS} digits")
            exponent = int(token.lower().partition("e")[2] or 0)
            refuse(abs(exponent) > MAX_EXPONENT, "a decimal exponent beyond the limit")
        elif kind == "name" and len(token) > 1:
            refuse(token not in _WORDS, f"name {token!r} is not allowed")
            token = _WORDS[token]
        if token.strip():
            tokens.append("^" if token == "**" else token)
    refuse(not 0 < len(tokens) <= MAX_TOKENS, f"no tokens, or more than {MAX_TOKENS}")
    return tokens


class _Parser:
    """Precedence climbing over the tokens of one expression."""

    def __init__(self, tokens: list[str]) -> None:
        self.rest = ["", *reversed(tokens)]  # the next token is the last; "" is the end
        depths = accumulate((token in _CLOSING) - (token in _CLOSING.values()) for token in tokens)
        refuse(max(depths, default=0) > MAX_DEPTH, f"nested deeper than {MAX_DEPTH}")

    def take(self, *tokens: str) -> str:
        """The next token if it is one of these, else ""."""
        return self.rest.pop() if self.rest[-1] in tokens else ""

    def whole(self) -> tuple[tuple[Value, ...], str]:
        """All tokens: `sides` and `shape` of a formula."""
        sides = [self.expression()]
        separator = self.take("=", ",")
        if separator:
            sides.append(self.expression())
        while separator == "," and self.take(","):
            sides.append(self.expression())
        refuse(self.rest[-1], f"{self.rest[-1]!r} is left over")
        return tuple(sides), {"": "", "=": "=", ",": "()"}[separator]

    def expression(self, level: int = 1) -> Value:
        """What comes next, as far as its operators bind at least as tightly as `level`."""
        value = self.signed(self.power)
        while True:
            implied = self.rest[-1] in _CLOSING or self.rest[-1][:1].isalpha()  # 2x, 2(x+1)
            operator_token = "*" if implied else self.rest[-1]
            binding = _BINDING.get(operator_token, 0)
            if binding < level:
                return value
            if not implied:
                self.rest.pop()
            value = apply(operator_token, value, self.expression(binding + 1))

    def signed(self, operand: Callable[[], Value]) -> Value:
        """What `operand` reads, behind any number of signs."""
        minus = False
        while token := self.take("+", "-"):
            minus ^= token == "-"
        value = operand()
        return apply("neg", value) if minus else value

    def power(self) -> Value:
        base = self.atom()
        while self.take("%"):
            base = apply("/", base, constant("100"))
        if not self.take("^"):
            return base
        exponent = self.signed(self.atom)
        refuse(self.rest[-1] == "^", "a tower of powers")
        return apply("^", base, exponent)

    def atom(self) -> Value:
        token = self.take(self.rest[-1])
        if token in _CLOSING:
            value, closing = self.expression(), _CLOSING[token]
            refuse(not self.take(closing), f"expected {closing!r}, found {self.rest[-1] or 'the end'!r}")
            return value
        if token == "frac":
            if re.fullmatch(r"\d\d", self.rest[-1]):  # \\frac12
                self.rest.extend(reversed(self.rest.pop()))
            return apply("/", self.part(), self.part())
        if token == "sqrt":
            return apply("^", self.atom(), constant("0.5"))
        if token in _FUNCTIONS:
            refuse(self.rest[-1] not in _CLOSING, f"{token} needs brackets")
            return apply(token, self.atom())
        if token[:1].isalpha():
            return CONSTANTS.get(token) or symbol(token)
        if token[:1].isdigit() or token[:1] == ".":
            return constant(token)
        raise FormulaError(f"expected a number or a name, found {token or 'the end'!r}")

    def part(self) -> Value:
        refuse(not re.fullmatch(r"\{|\d", self.rest[-1]), "\\frac needs two parts in braces")
        return self.atom()


def equal_formulas(a: Formula, b: Formula) -> bool:
    """Same value; `x = 5` equals 5; lists by element, sets in any order."""
    same = partial(same_value, decimal=a.decimal or b.decimal)
    if a.shape == b.shape == "=":
        with suppress(FormulaError):
            one, other = apply("-", *a.sides), apply("-", *b.sides)
            return same(one, other) or same(one, apply("neg", other))
        return False
    (a_shape, a_sides), (b_shape, b_sides) = (
        ("", f.sides[1:]) if f.shape == "=" and f.sides[0].symbol else (f.shape, f.sides) for f in (a, b)
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
