"""Numbers and formulas as answers: read from untrusted text by formula_parser.py, compared in bounded time.

Equality of formulas with symbols is decided by evaluation at fixed points to 30 digits (Schwartz-Zippel): sound for
polynomials up to chance, and it takes bounded time, which simplification does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from covo_rl.rewards.rules.formula_parser import CLOSING, MAX_CHARS, FormulaError, Parser, tokenize

TOLERANCE = 1e-6  # relative, where one side is a decimal and the other has no finite decimal form


@dataclass(frozen=True)
class Formula:
    """`sides`: one expression, or two of an equation, or the elements of a list in `brackets`."""

    sides: tuple[Any, ...]
    kind: str  # value, equation, list
    brackets: str = ""
    decimal: bool = False  # written with a decimal point: may be rounded


@lru_cache(maxsize=8192)
def read(text: str) -> Formula | None:
    """The formula that `text` is, or None."""
    try:
        return _read(text)
    except FormulaError:
        return None


def _read(text: str) -> Formula:
    text = text.strip().rstrip(".").strip()
    for opening, closing in (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if len(text) > 2 and text.startswith(opening) and text.endswith(closing):
            text = text[len(opening) : -len(closing)]
    tokens = tokenize(text)
    if not tokens:
        raise FormulaError("empty")
    decimal = any("." in token for token in tokens)
    elements, brackets = _list_elements(tokens)
    if elements:
        return Formula(tuple(_expression(part) for part in elements), "list", brackets, decimal)
    if tokens.count("=") == 1:
        at = tokens.index("=")
        return Formula((_expression(tokens[:at]), _expression(tokens[at + 1 :])), "equation", "", decimal)
    return Formula((_expression(tokens),), "value", "", decimal)


def _expression(tokens: list[str]) -> Any:
    parser = Parser(tokens)
    value = parser.sum()
    if parser.at != len(tokens):
        raise FormulaError(f"{parser.peek()!r} is left over")
    return value


def _list_elements(tokens: list[str]) -> tuple[list[list[str]], str]:
    """Elements of `(1, 2)` or `1, 2` and their brackets; no elements if there is no comma on the top level."""
    brackets = ""
    if tokens[0] in CLOSING and tokens[-1] in (")", "]", "}"):
        depth = 0
        for i, token in enumerate(tokens):
            depth += (token in CLOSING) - (token in (")", "]", "}"))
            if depth == 0 and i < len(tokens) - 1:
                break
        else:
            brackets, tokens = tokens[0] + tokens[-1], tokens[1:-1]
    parts: list[list[str]] = [[]]
    depth = 0
    for token in tokens:
        depth += (token in CLOSING) - (token in (")", "]", "}"))
        if token == "," and depth == 0:
            parts.append([])
        else:
            parts[-1].append(token)
    return (parts, brackets) if len(parts) > 1 else ([], "")


def equal(a: Formula, b: Formula) -> bool:
    """Same value; `x = 5` equals 5; lists by element, sets in any order."""
    if a.kind == b.kind == "list":
        return _equal_lists(a, b)
    if "list" in (a.kind, b.kind):
        return False
    decimal = a.decimal or b.decimal
    if a.kind == b.kind == "equation":
        one, other = a.sides[0] - a.sides[1], b.sides[0] - b.sides[1]
        return _same(one, other, decimal) or _same(one, -other, decimal)
    values = []
    for formula in (a, b):
        if formula.kind == "equation" and not formula.sides[0].is_Symbol:
            return False
        values.append(formula.sides[-1])
    return _same(values[0], values[1], decimal)


def _equal_lists(a: Formula, b: Formula) -> bool:
    decimal = a.decimal or b.decimal
    if len(a.sides) != len(b.sides) or (a.brackets or "()") != (b.brackets or "()"):
        return False
    if a.brackets != "{}":
        return all(_same(x, y, decimal) for x, y in zip(a.sides, b.sides, strict=True))
    rest = list(b.sides)
    for x in a.sides:
        match = next((i for i, y in enumerate(rest) if _same(x, y, decimal)), None)
        if match is None:
            return False
        rest.pop(match)
    return True


def _same(a: Any, b: Any, decimal: bool) -> bool:
    if a == b:
        return True
    if a.is_Rational and b.is_Rational and (_finite_decimal(a) == _finite_decimal(b)):
        return False
    if a.is_infinite or b.is_infinite:
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
    q = int(value.q)
    for prime in (2, 5):
        while q % prime == 0:
            q //= prime
    return q == 1


def _close(x: Any, y: Any, tolerance: float) -> bool:
    try:
        difference, size = abs(complex(x - y)), max(abs(complex(x)), abs(complex(y)))
    except (TypeError, OverflowError):
        return False
    return difference <= tolerance * size


__all__ = ["MAX_CHARS", "Formula", "FormulaError", "equal", "read", "tokenize"]
