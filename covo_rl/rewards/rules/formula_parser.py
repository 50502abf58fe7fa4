"""A strict tokeniser and a hand-written parser: tokens of untrusted text -> sympy objects, within hard limits.

Nothing is ever evaluated as code and `sympify` is never called. Every limit is checked before the work it bounds, so
that `9**9**9`, `__import__('os')` and ten thousand brackets are refused at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

MAX_CHARS = 256
MAX_TOKENS = 120
MAX_DEPTH = 24
MAX_DIGITS = 40
MAX_EXPONENT = 64
MAX_BITS = 4096

_TOKEN = re.compile(
    r"(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d])|\d+\.?\d*(?:[eE][+-]?\d{1,3}(?![\w.]))?|\.\d+)"
    r"|(?P<command>\\[a-zA-Z]+)|(?P<name>[a-zA-Z\u03b1-\u03c9]+)|(?P<op>\*\*|[-+*/^(){}\[\],=%])|(?P<space>\s+)"
)
_FUNCTIONS = ("sqrt", "exp", "log", "ln", "sin", "cos", "tan", "abs")
_GREEK = "alpha beta gamma delta theta lambda mu sigma omega phi".split()
_DROPPED = {"\\left", "\\right", "\\displaystyle", "\\,", "\\;"}
_COMMANDS = {"\\cdot": "*", "\\times": "*", "\\div": "/", "\\pi": "pi", "\\frac": "frac", "\\dfrac": "frac",
             "\\tfrac": "frac", "\\infty": "oo"} | {f"\\{name}": name for name in (*_FUNCTIONS, *_GREEK)}  # fmt: skip
CLOSING = {"(": ")", "[": "]", "{": "}"}


class FormulaError(ValueError):
    """The text is no formula we read, or it is beyond a limit."""


def tokenize(text: str) -> list[str]:
    """Tokens of a formula.

    Raises:
        FormulaError: a character, a name or a size that is not allowed.
    """
    if len(text) > MAX_CHARS:
        raise FormulaError(f"longer than {MAX_CHARS} characters")
    text = text.replace("\u2212", "-").replace("\u00d7", "*").replace("\u00b7", "*").replace("\u00f7", "/")
    text = text.replace("\u03c0", " pi ").replace("\u221a", " sqrt ").replace("\\,", "").replace("\\!", "")
    tokens: list[str] = []
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise FormulaError(f"character {text[at]!r} is not allowed")
        at = match.end()
        tokens += _token(match.lastgroup or "", match.group())
        if len(tokens) > MAX_TOKENS:
            raise FormulaError(f"more than {MAX_TOKENS} tokens")
    return tokens


def _token(kind: str, token: str) -> list[str]:
    if kind == "space" or token in _DROPPED:
        return []
    if kind == "number" and sum(c.isdigit() for c in token) > MAX_DIGITS:
        raise FormulaError(f"a number of more than {MAX_DIGITS} digits")
    if kind == "number":
        return [token.replace(",", "")]
    if kind == "command":
        if token not in _COMMANDS:
            raise FormulaError(f"command {token} is not allowed")
        return [_COMMANDS[token]]
    if kind == "name" and len(token) > 1 and token not in (*_FUNCTIONS, *_GREEK, "pi", "oo"):
        raise FormulaError(f"name {token!r} is not allowed")
    return ["^" if token == "**" else token]


class Parser:
    """Recursive descent: sum -> product -> signed power -> atom."""

    def __init__(self, tokens: list[str]) -> None:
        import sympy

        self.sympy = sympy
        self.tokens = tokens
        self.at = 0
        self.depth = 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, *wanted: str) -> bool:
        if self.peek() and self.peek() in wanted:
            self.at += 1
            return True
        return False

    def need(self, token: str) -> None:
        if not self.take(token):
            raise FormulaError(f"expected {token!r}, found {self.peek() or 'the end'!r}")

    def sum(self) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise FormulaError(f"nested deeper than {MAX_DEPTH}")
        value = self.product()
        while self.peek() in ("+", "-"):
            sign = 1 if self.take("+") else -1
            if sign < 0:
                self.at += 1
            value = self.checked(value + sign * self.product())
        self.depth -= 1
        return value

    def product(self) -> Any:
        value = self.signed()
        while self.peek():
            if self.take("*"):
                value = self.checked(value * self.signed())
            elif self.take("/"):
                value = self.divide(value, self.signed())
            elif self.peek() in "([{" or self.peek()[0].isalpha():
                value = self.checked(value * self.power())
            else:
                break
        return value

    def divide(self, a: Any, b: Any) -> Any:
        if b == 0:
            raise FormulaError("division by zero")
        return self.checked(a / b)

    def signed(self) -> Any:
        sign = 1
        while self.peek() in ("+", "-"):
            sign = -sign if self.peek() == "-" else sign
            self.at += 1
        return sign * self.power()

    def power(self) -> Any:
        base = self.atom()
        while self.take("%"):
            base = base / 100
        if not self.take("^"):
            return base
        if self.peek() == "{":
            exponent = self.atom()
        else:
            sign = -1 if self.take("-") else 1
            exponent = sign * self.atom()
        if self.peek() == "^":
            raise FormulaError("a tower of powers")
        return self.raise_to(base, exponent)

    def raise_to(self, base: Any, exponent: Any) -> Any:
        sympy = self.sympy
        if exponent.has(sympy.Pow, sympy.exp):
            raise FormulaError("a power in an exponent")
        for number in exponent.atoms(sympy.Number):
            if not number.is_Rational or abs(number) > MAX_EXPONENT or number.q > 12:
                raise FormulaError(f"exponent {number} is beyond {MAX_EXPONENT}")
        if exponent.is_Rational and base.is_Rational:
            if base.is_zero and exponent <= 0:
                raise FormulaError("zero to the power of zero or less")
            bits = max(int(base.p).bit_length(), int(base.q).bit_length()) * abs(float(exponent))
            if bits > MAX_BITS:
                raise FormulaError("a power beyond the size limit")
        return self.checked(sympy.Pow(base, exponent))

    def atom(self) -> Any:
        token = self.peek()
        if token in CLOSING:
            self.at += 1
            value = self.sum()
            self.need(CLOSING[token])
            return value
        self.at += 1
        if token and (token[0].isdigit() or token[0] == "."):
            return self.number(token)
        if token == "frac":
            return self.fraction()
        if token in _FUNCTIONS:
            return self.function(token)
        return self.name(token)

    def number(self, token: str) -> Any:
        if "e" in token.lower() and abs(int(token.lower().split("e")[1])) > MAX_EXPONENT:
            raise FormulaError("a decimal exponent beyond the limit")
        return self.sympy.Rational(token)

    def fraction(self) -> Any:
        if self.peek().isdigit() and len(self.peek()) == 2:  # \\frac12
            both = self.peek()
            self.at += 1
            return self.divide(self.number(both[0]), self.number(both[1]))
        parts = []
        for _ in range(2):
            if self.peek() == "{" or (self.peek().isdigit() and len(self.peek()) == 1):
                parts.append(self.atom())
            else:
                raise FormulaError("\\frac needs two parts in braces")
        return self.divide(*parts)

    def function(self, name: str) -> Any:
        if self.peek() not in CLOSING and name != "sqrt":
            raise FormulaError(f"{name} needs brackets")
        argument = self.atom()
        if name == "sqrt":
            return self.raise_to(argument, self.sympy.Rational(1, 2))
        if name == "exp" and argument.has(self.sympy.Pow, self.sympy.exp):
            raise FormulaError("a power in an exponent")
        if name in ("log", "ln") and argument == 0:
            raise FormulaError("logarithm of zero")
        apply: Callable[[Any], Any] = getattr(self.sympy, {"ln": "log", "abs": "Abs"}.get(name, name))
        return self.checked(apply(argument))

    def name(self, token: str) -> Any:
        sympy = self.sympy
        known = {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "oo": sympy.oo}
        if token in known:
            return known[token]
        if not token or not token[0].isalpha():
            raise FormulaError(f"expected a number or a name, found {token or 'the end'!r}")
        return sympy.Symbol(token)

    def checked(self, value: Any) -> Any:
        if value is self.sympy.nan or value is self.sympy.zoo:
            raise FormulaError("undefined")
        if value.is_Rational and max(abs(int(value.p)).bit_length(), int(value.q).bit_length()) > MAX_BITS:
            raise FormulaError("a number beyond the size limit")
        return value
