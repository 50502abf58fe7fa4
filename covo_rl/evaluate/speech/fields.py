"""What a scorer needs of a row, or an error that names what the row has instead."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from covo_rl.types import UserError, shown, visible

_NAMES = {str: "text", Sequence: "a list", Mapping: "an object", bool: "true or false", float: "a finite number"}


class MalformedRow(UserError, ValueError):
    """A row, or a list of numbers, that no rule can score."""


def field(row: Mapping[str, Any], name: str, kind: type) -> Any:
    """`row[name]` of a kind: str, Sequence (a list), Mapping, bool, or float (a finite number).

    Raises:
        MalformedRow: it is not there, or something else.
    """
    if name not in checked(row, f"what should hold {name!r}", Mapping):
        raise MalformedRow(f"the row has no {name!r}; it has {visible(', '.join(map(str, row))) or 'nothing'}")
    return checked(row[name], repr(name), kind)


def optional_text(row: Mapping[str, Any], name: str) -> str | None:
    """The text under a name; None where it is null or not there."""
    return None if row.get(name) is None else field(row, name, str)


def checked(value: Any, name: str, kind: type) -> Any:
    """The value, where it is of the kind (see `field`)."""
    fits = isinstance(value, kind) and not (kind is Sequence and isinstance(value, (str, bytes)))
    if kind is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits:
        raise MalformedRow(f"{name} is {visible(shown(value))}; it must be {_NAMES[kind]}")
    return value


def span(value: Any, name: str) -> tuple[float, float]:
    """[start, end] in seconds, the end not before the start."""
    ends = checked(value, name, Sequence)
    if len(ends) != 2:
        raise MalformedRow(f"{name} is {visible(shown(value))}; it must be [start, end]")
    start, end = (checked(end, f"{side} of {name}", float) for side, end in zip(("start", "end"), ends, strict=True))
    if end < start:
        raise MalformedRow(f"{name} ends at {end} s before it starts at {start} s")
    return start, end
