"""Arithmetic of fixed cost: numbers of fixed size go into every step, and a number of fixed size comes out.

A value is an exact fraction of at most MAX_BITS where it is rational, and in any case known to 40 digits at fixed
points of its symbols (Schwartz-Zippel: sound for polynomials up to chance). What is beyond 2**MAX_BITS, or the sine of
an angle beyond MAX_ANGLE, has no value: no step can take longer than the slowest of these.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import mpmath

TOLERANCE = 1e-6  # relative, where one side is a decimal and the other has no finite decimal form
MAX_BITS = 4096
MAX_ANGLE = 1e6

_MP: Any = mpmath.MPContext()  # one of our own: its precision is nobody else's
_MP.dps = 40


class FormulaError(ValueError):
    """The text is no formula we read, or it is beyond a limit."""


def refuse(wrong: Any, why: str) -> None:
    """Raise a FormulaError if something is wrong."""
    if wrong:
        raise FormulaError(why)


@dataclass(frozen=True)
class Value:
    """A subexpression: its fraction where it is one, its values at the points (None: undefined there), or at one."""

    exact: Fraction | None
    at: tuple[Any, ...]
    symbol: str = ""  # the name, if it is nothing but a symbol

    def point(self, i: int) -> Any:
        """Its value at point i."""
        return self.at[i % len(self.at)]


def constant(token: str) -> Value:
    """The value of a decimal."""
    return _rational(Fraction(token))


def _rational(exact: Fraction) -> Value:
    refuse(_bits(exact) > MAX_BITS, "a number beyond the size limit")
    return Value(exact, (_MP.mpf(exact.numerator) / exact.denominator,))


def symbol(name: str) -> Value:
    """An unknown: positive, and not rational, at every point."""
    code = int.from_bytes(name.encode(), "big")
    return Value(None, tuple(0.1 + 2 * _MP.frac(code * _MP.sqrt(prime)) for prime in (7, 11, 13, 17)), name)


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def apply(name: str, *operands: Value) -> Value:
    """A step: exact where it can be, else at each point.

    Raises:
        FormulaError: it is undefined, or beyond the size limit, everywhere.
    """
    fractions = [operand.exact for operand in operands]
    if name in _EXACT and None not in fractions:
        exact = _EXACT[name](*fractions)
        if exact is not None:
            return _rational(exact)
    points = max(len(operand.at) for operand in operands)
    at = tuple(_at_point(name, [operand.point(i) for operand in operands]) for i in range(points))
    refuse(all(value is None for value in at), f"{name} is undefined or beyond the size limit")
    return Value(None, at)


def _at_point(name: str, numbers: list[Any]) -> Any:
    infinite = any(number is None or _MP.isinf(number) for number in numbers)
    if infinite and (name != "neg" or None in numbers):
        return None
    try:
        value = _NUMERIC[name](*numbers)
    except (ArithmeticError, ValueError):
        return None
    return value if infinite or not value or _MP.mag(value) <= MAX_BITS else None


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    refuse(not base and exponent <= 0, "division by zero, or zero to the power of zero")
    refuse(_bits(base) * abs(exponent) > MAX_BITS, "a power beyond the size limit")
    if exponent.denominator == 2 and base > 0:
        root = Fraction(math.isqrt(base.numerator), math.isqrt(base.denominator))
        return root**exponent.numerator if root * root == base else None
    return base**exponent.numerator if exponent.denominator == 1 else None


def _exact_quotient(a: Fraction, b: Fraction) -> Fraction:
    refuse(not b, "division by zero")
    return a / b


def _power(base: Any, exponent: Any) -> Any:
    if not base:
        return base if _MP.re(exponent) > 0 else None
    return _exp(exponent * _MP.log(base))


def _exp(x: Any) -> Any:
    return _MP.exp(x) if abs(x) < MAX_BITS * math.log(2) else None


def _periodic(function: Callable[[Any], Any], x: Any) -> Any:
    return function(x) if abs(x) <= MAX_ANGLE and abs(_MP.im(x)) < 64 else None


_EXACT: dict[str, Any] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": _exact_quotient, "^": _exact_power,
    "neg": operator.neg, "abs": abs,
}  # fmt: skip
_NUMERIC: dict[str, Any] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "^": _power, "neg": operator.neg,
    "abs": abs, "exp": _exp, "log": _MP.log, "ln": _MP.log,
    **{name: partial(_periodic, getattr(_MP, name)) for name in ("sin", "cos", "tan")},
}  # fmt: skip
CONSTANTS = {
    name: Value(None, (value,)) for name, value in
    {"pi": +_MP.pi, "e": +_MP.e, "i": _MP.mpc(0, 1), "oo": _MP.inf}.items()
}  # fmt: skip


def same_value(a: Value, b: Value, decimal: bool) -> bool:
    """Equal fractions, or close at every point where both are defined; `decimal`: one of them may be rounded."""
    exact = a.exact is not None and b.exact is not None
    if exact and (a.exact == b.exact or _finite_decimal(a.exact) == _finite_decimal(b.exact)):  # type: ignore[arg-type]
        return a.exact == b.exact
    points = max(len(a.at), len(b.at))
    tolerance = 1e-18 if points > 1 else TOLERANCE if decimal else 1e-20
    pairs = [(a.point(i), b.point(i)) for i in range(points)]
    defined = [_close(x, y, tolerance) for x, y in pairs if x is not None and y is not None]
    return len(defined) >= min(points, 2) and all(defined)


def _finite_decimal(value: Fraction) -> bool:
    return pow(10, value.denominator.bit_length(), value.denominator) == 0  # no prime factor but 2 and 5


def _close(x: Any, y: Any, tolerance: float) -> bool:
    if _MP.isinf(x) or _MP.isinf(y):
        return x == y
    return abs(x - y) <= tolerance * max(abs(x), abs(y), _MP.mpf("1e-10"))  # the floor: sin(pi) is 0
