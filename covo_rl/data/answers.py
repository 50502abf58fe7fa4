"""What the answers of a whole set say together: whether numbers are places that count from 0, from 1, or texts."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from covo_rl.data.read import DataNote, Problem, Row, some
from covo_rl.data.rows import answer_of, first_value, option_list, place_number
from covo_rl.data.schemas import Schema


class _Number(NamedTuple):
    """A row whose answer is a number. `is_text`: it is also the text of an option."""

    name: str
    value: int
    choices: Sequence[str]

    @property
    def is_text(self) -> bool:
        return str(self.value) in self.choices

    def choice(self, base: int) -> str | None:
        place = self.value - base
        return self.choices[place] if 0 <= place < len(self.choices) else None


def index_bases(rows: Sequence[tuple[str, Row, Schema]], problems: list[Problem]) -> dict[str, int | None]:
    """Of every answer field that holds places: 0 or 1, from which they count, or None where all numbers are texts.

    `rows` are (name, row, schema). What is uncertain, and numbers among texts, is added to `problems` with row names.
    """
    numbers: dict[str, list[_Number]] = defaultdict(list)
    texts: dict[str, list[str]] = defaultdict(list)
    may_be_text: dict[str, bool] = {}
    for name, row, schema in rows:
        field, value, kinds = answer_of(row, schema)
        if field is None or "index" not in kinds:
            continue
        if (number := place_number(value, kinds)) is not None:
            options = option_list(first_value(row, schema.choices)[1])
            choices = tuple(map(str, options)) if isinstance(options, list) else ()
            numbers[field].append(_Number(name, number, choices))
            may_be_text[field] = "text" in kinds
        elif isinstance(value, str) and value.strip():
            texts[field].append(name)
    bases: dict[str, int | None] = {}
    for field, group in numbers.items():
        bases[field], doubt = _index_base(field, group, may_be_text=may_be_text[field])
        if texts[field]:
            names = some([number.name for number in group])
            doubt = f"{field}: numbers ({names}) and texts ({some(texts[field])}) are mixed; write one or the other"
        if doubt:
            problems.append(Problem("file", doubt))
    return bases


def _index_base(field: str, numbers: Sequence[_Number], *, may_be_text: bool) -> tuple[int | None, str]:
    """(0 or 1 where numbers are places that count from there, None where they are texts; what is uncertain)."""
    all_text = may_be_text and all(number.is_text for number in numbers)
    if all(number.choice(0) is not None for number in numbers):
        unclear = [number.name for number in numbers if number.choice(0) != str(number.value)]
        if all_text and unclear and all(choice.strip().isdigit() for number in numbers for choice in number.choices):
            return 0, (
                f"{field}: the numbers may be places that count from 0, from 1, or the options' texts, which differ "
                f"({some(unclear)}); write the text of the option"
            )
        return 0, ""
    fits_1 = all(number.choice(1) is not None for number in numbers)
    differs = may_be_text and any(number.is_text and number.choice(1) != str(number.value) for number in numbers)
    if all_text and (not fits_1 or not differs):
        return None, ""
    size = max(len(number.choices) for number in numbers)
    if fits_1 and not differs and {number.value for number in numbers} == set(range(1, size + 1)):
        warnings.warn(
            f"{field}: 1 to {size} occur and 0 does not, so places are counted from 1", DataNote, stacklevel=4
        )
        return 1, ""
    return 0, ""
