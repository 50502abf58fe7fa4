"""What a point of the conformance suite says: figures with their limits, and what could not be looked at."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter
from traceback import extract_tb
from typing import Literal

from covo_rl.types import UserError, visible

State = Literal["passed", "in part", "not run", "failed"]
#: what a family's code, its files or a library raise where they do not fit; a point that ends so has failed
RAISED = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NotImplementedError, OSError,
    RuntimeError, TypeError, UserError, ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One number and its limit: at most, or with `least` at least that. `cause`: what it usually is where it fails."""

    name: str
    value: float
    limit: float
    cause: str
    least: bool = False

    @property
    def ok(self) -> bool:
        """A number that is not finite is never good."""
        return math.isfinite(self.value) and (self.value >= self.limit if self.least else self.value <= self.limit)

    def __str__(self) -> str:
        bound = f"at {'least' if self.least else 'most'} {self.limit:g}"
        return f"{self.name} {self.value:.3g} ({bound})" + ("" if self.ok else f": {self.cause}")


@dataclass(frozen=True)
class Gap:
    """Something that could not be looked at here, and why. It is never counted as passed."""

    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.what}: not run: {self.why}"


@dataclass(frozen=True)
class PointOutcome:
    """One point: its figures, its gaps, and what was raised instead."""

    point: str
    figures: tuple[Figure, ...] = ()
    gaps: tuple[Gap, ...] = ()
    error: str | None = None
    seconds: float = 0.0

    @property
    def state(self) -> State:
        if self.error or not all(figure.ok for figure in self.figures):
            return "failed"
        if self.gaps:
            return "in part" if self.figures else "not run"
        return "passed" if self.figures else "not run"

    def lines(self) -> list[str]:
        """What failed first, then what was not looked at, then the rest."""
        order = sorted(self.figures, key=lambda figure: figure.ok)
        bad = [str(figure) for figure in order if not figure.ok]
        good = [str(figure) for figure in order if figure.ok]
        return [*([self.error] if self.error else []), *bad, *map(str, self.gaps), *good]


def outcome_of(point: str, findings: Iterable[Figure | Gap]) -> PointOutcome:
    """Run a point to its end, or to what it raises."""
    start, figures, gaps, error = perf_counter(), [], [], None
    steps: Iterator[Figure | Gap] = iter(findings)
    while True:
        try:
            finding = next(steps)
        except StopIteration:
            break
        except RAISED as problem:
            where = extract_tb(problem.__traceback__)[-1]
            text = " ".join(str(problem).split())[:400]
            error = visible(f"{type(problem).__name__}: {text} ({where.filename}:{where.lineno})")
            break
        (gaps if isinstance(finding, Gap) else figures).append(finding)
    return PointOutcome(point, tuple(figures), tuple(gaps), error, perf_counter() - start)
