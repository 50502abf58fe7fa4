"""Rows that a program holds: a sequence of mappings, or a `datasets.Dataset`. They are copied, never changed."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from covo_rl.data.read import DataError, Problem, Row, broken, printable

if TYPE_CHECKING:
    import os

    import datasets

    #: What `load_examples` reads.
    Source: TypeAlias = str | os.PathLike[str] | Sequence[Mapping[str, Any]] | datasets.Dataset

#: What messages call rows that no file holds.
IN_MEMORY = "rows in memory"


def memory_rows(source: Any) -> list[Row]:
    """The rows of a sequence of mappings, a `datasets.Dataset` or a pandas DataFrame.

    Raises:
        DataError: it is something else, several splits, or rows are not mappings with texts as names.
    """
    if problems := source_problems(source):
        raise broken(IN_MEMORY, problems[0])
    if _is_of(source, "datasets", "Dataset"):
        return dataset_rows(source, IN_MEMORY)
    if _is_of(source, "pandas", "DataFrame"):
        # what is missing there is NaN, also among texts
        source = source.astype(object).where(source.notna(), None).to_dict("records")
    problems = [Problem(f"row {number}", what) for number, row in enumerate(source, 1) if (what := _fault(row))]
    if problems:
        raise DataError(IN_MEMORY, problems)
    return [{name: v.item() if isinstance(v, np.generic) else v for name, v in row.items()} for row in source]


def source_problems(source: Any) -> list[str]:
    """Why something holds no rows, by its type alone; nothing where it may."""
    if _is_of(source, "datasets", "Dataset") or _is_of(source, "pandas", "DataFrame"):
        return []
    if _is_of(source, "datasets", "DatasetDict", "IterableDatasetDict"):
        return [f"a DatasetDict holds several splits; hand in one: {', '.join(map(repr, source))}"]
    if isinstance(source, Sequence) and not isinstance(source, (str, bytes, bytearray)):
        return []
    hints = {"DataFrame": "hand in frame.to_dict('records')", "IterableDataset": "hand in list(dataset.take(N))"}
    hint = hints.get(type(source).__name__, "hand in a list of rows, each a mapping of field: value")
    return [f"a {type(source).__name__} is no list of rows; {hint}"]


def _is_of(source: Any, module: str, *names: str) -> bool:
    """Whether it is of one of these classes; where the package was never imported, nobody has one."""
    package = sys.modules.get(module)
    return package is not None and isinstance(source, tuple(getattr(package, name) for name in names))


def _fault(row: object) -> str:
    """Why something is no row; empty where it is one."""
    if not isinstance(row, Mapping):
        return f"is {printable(row)}, not a mapping of field: value"
    others = [name for name in row if not isinstance(name, str)]
    return f"its field {printable(others[0])} has no text as name" if others else ""


def dataset_rows(dataset: datasets.Dataset, name: str) -> list[Row]:
    """The rows as the table stores them, in the order of the data set: audio as {bytes, path}, labels by name.

    `datasets` itself decodes audio with torchcodec only; what a format (torch, numpy) would convert is not converted.

    Raises:
        DataError: a transform would make the rows, and may do anything; or a label has no name.
    """
    if dataset.format["type"] == "custom":
        hint = "apply it by map(), or hand in dataset.with_format(None)"
        raise broken(name, f"the data set has a transform, which is not applied here: {hint}")
    rows = dataset.to_list()
    labels = {column: names for column, feature in dataset.features.items() if (names := getattr(feature, "names", ()))}
    name_labels(rows, labels, name)
    return rows


def name_labels(rows: Sequence[Row], labels: Mapping[str, Sequence[str]], source: str) -> None:
    """Put the names of labels in the place of their numbers; -1 is none.

    Raises:
        DataError: a number without a name.
    """
    for column, names in labels.items():
        for number, row in enumerate(rows, 1):
            value = row.get(column)
            if value is not None and not (isinstance(value, int) and value < len(names)):
                raise DataError(source, [Problem(f"row {number}", f"its {column} {value} is none of {names}")])
            row[column] = None if value is None or value < 0 else names[value]
