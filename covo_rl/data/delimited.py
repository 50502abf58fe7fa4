"""Rows of CSV and TSV files. Every cell is text, an empty one is missing; the options of a question are told apart for
the whole file, or refused.

| options                         | as                                                                          |
|---------------------------------|-----------------------------------------------------------------------------|
| one cell, all of them JSON      | `["dog", "cat"]` or `{"A": "dog", "B": "cat"}`                              |
| one cell, all with `|` or `;`   | `dog|cat`: one of the two separators parts every cell, and the other does not |
| one column each                 | `A`, `B`, ...; `choice_a`, ...; `option_1`, ...: without a gap              |
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from covo_rl.data.read import DataError, Problem, Row, broken, printable, read_text, row_name, some
from covo_rl.data.rows import option_list
from covo_rl.data.schemas import SCHEMAS

#: What separates the cells, by the suffix; of a CSV the header tells.
SUFFIXES: Mapping[str, str] = {".csv": ",;", ".tsv": "\t"}
_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
#: Longer cells are no text of a question: a quote that is never closed, or sound.
MAX_CELL = 100_000
#: The line that Excel reads, and that some programs write for it, before the header.
_EXCEL = re.compile(r'"?sep=([,;\t|])"?\r?\n')
_OPTION = re.compile(r"(?:(choice|option|opt)([ _-]?))?([A-Za-z]|\d{1,2})", re.IGNORECASE | re.ASCII)


class _Record(NamedTuple):
    """A row by its first line, from 1; `text` is what stands in the file."""

    line: int
    cells: list[str]
    text: str


def delimited_rows(path: Path, columns: Mapping[str, str]) -> list[Row]:
    """The rows of a CSV or TSV file with a header; `columns` maps fields to its columns. Empty lines are no rows.

    Raises:
        DataError: not UTF-8; a header without names, with a name twice or of unclear separators; rows with more or
            fewer cells, NUL bytes, unclosed quotes, huge cells, unclear options: all of them, with their lines.
    """
    first, *records = _records(path)
    header = [name.strip() for name in first.cells]
    rows: list[Row] = [dict(zip(header, (cell or None for cell in record.cells), strict=True)) for record in records]
    _read_audio_lists(rows, columns)
    if problems := _read_options(rows, header, columns):
        raise DataError(str(path), problems)
    return rows


def selected_text(path: Path, places: Iterable[int]) -> str:
    """The header of a CSV or TSV file and its rows at these places, from 0, as they stand there."""
    first, *records = _records(path)
    return "".join(text if text.endswith(("\n", "\r")) else text + "\n"
                   for text in [first.text, *(records[place].text for place in places)])  # fmt: skip


def _records(path: Path) -> list[_Record]:
    """Header and rows, all with as many cells; see `delimited_rows`."""
    text = read_text(path, "CSV and TSV are read as UTF-8")
    start = _EXCEL.match(text)
    text = text[start.end() :] if start else text
    delimiter = start[1] if start and start[1] in SUFFIXES[path.suffix.lower()] else _delimiter(path, text)
    lines, first = io.StringIO(text, newline="").readlines(), 2 if start else 1
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=delimiter != "\t", strict=True)
    records, problems, line = [], [], 0
    try:
        for cells in reader:
            if any(cells):
                records.append(_Record(line + first, cells, "".join(lines[line : reader.line_num])))
            line = reader.line_num
    except csv.Error as error:
        what = f"cannot be read: {error}; is a quote missing, or one too many?"
        problems.append(Problem(f"line {line + first}", what))
    if not records and not problems:
        raise broken(path, "it holds no rows")
    width = len(records[0].cells) if records else 0
    names = [name.strip() for record in records[:1] for name in record.cells]
    # Excel writes columns without name or content for cells that were once used
    content = {place for record in records for place, cell in enumerate(record.cells) if cell.strip()}
    for place, name in enumerate(names):
        if not name and place in content:
            hint = "write one (pandas leaves its index nameless: to_csv(..., index=False))"
            problems.append(Problem(f"line {first}", f"column {place + 1} has no name in the header; {hint}"))
        elif name and name in names[:place]:
            problems.append(Problem(f"line {first}", f"the column {printable(name)} occurs twice in the header"))
    for record in records:
        problems += [Problem(f"line {record.line}", what) for what in _faults(record.cells, width, delimiter)]
    if problems:
        raise DataError(str(path), sorted(problems, key=lambda problem: int(problem.row_id.split()[1])))
    return [record._replace(cells=[cell for name, cell in zip(names, record.cells, strict=True) if name])
            for record in records]  # fmt: skip


def _faults(cells: Sequence[str], width: int, delimiter: str) -> Iterator[str]:
    if len(cells) != width:
        hint = f"; a cell that holds one of the {_NAMES[delimiter]} needs quotes" * (len(cells) > width)
        yield f"has {len(cells)} cells, the header {width}{hint}"
    if (size := max(map(len, cells))) > MAX_CELL:
        yield f"has a cell of {size} characters, at most {MAX_CELL} are read: is a quote missing?"
    if any("\0" in cell for cell in cells):
        yield "holds a NUL byte: was the file damaged, or is it UTF-16?"


def _delimiter(path: Path, text: str) -> str:
    """What separates the cells of the header.

    Raises:
        DataError: nothing does, another than the suffix says, or two may.
    """
    allowed = SUFFIXES[path.suffix.lower()]
    header = re.sub(r'"(?:[^"]|"")*"', "", text[:MAX_CELL].lstrip("\r\n"))
    header = re.split(r"[\r\n]", header, maxsplit=1)[0]
    present = [sign for sign in _NAMES if sign in header]
    fitting = [sign for sign in present if sign in allowed]
    if len(fitting) == 1:
        return fitting[0]
    names = " or ".join(_NAMES[sign] for sign in allowed)
    if fitting:
        what = f"its header {printable(header)} may be separated by {' or '.join(_NAMES[sign] for sign in fitting)}"
        raise broken(path, f"{what}; put names that hold one of them in quotes")
    seems = f"; it seems to be separated by {_NAMES[present[0]]}" if present else ""
    hint = {",": "name it .csv", ";": "name it .csv", "\t": "name it .tsv"}.get((present or [""])[0], "")
    hint = hint or "the first line must name the columns (id, audio, question, choices, answer)"
    raise broken(path, f"its header {printable(header)} is one column, not separated by {names}{seems}: {hint}")


def _read_audio_lists(rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Several clips of a row are a JSON list in its cell."""
    for row in rows:
        for name in [columns["audio"]] if "audio" in columns else SCHEMAS["covo"].audio:
            cell = row.get(name)
            if cell and cell.startswith("["):
                value = _json(cell)
                row[name] = value if isinstance(value, list) and all(isinstance(v, str) for v in value) else cell


# -- options ---------------------------------------------------------------------------------------------------------


def _read_options(rows: Sequence[Row], header: Sequence[str], columns: Mapping[str, str]) -> list[Problem]:
    """Make the options of every row a list in its column; what is unclear about them."""
    if "choices" in columns:
        return _split_cells(rows, columns["choices"])
    cells = [name for name in SCHEMAS["covo"].choices if name in header]
    groups = option_columns(header, small=False)
    ways = [*cells, *(", ".join(names) for names in groups)]
    if len(ways) > 1:
        hint = f"say which: --columns choices={cells[0] if cells else 'NAME'}, or leave the others out"
        return [Problem("file", f"its options may be in {' or in '.join(ways)}; {hint}")]
    if cells:
        return _split_cells(rows, cells[0])
    if not groups or (groups[0][0] == "choice_a" and "answer_gt" in header):  # MMSU's own layout
        return []
    labels = [_label(name) for name in groups[0]]
    start = labels[0] if labels[0] in "a01" else "a"
    wanted = [chr(ord("a") + n) if start == "a" else str(int(start) + n) for n in range(len(labels))]
    if labels != wanted:
        what = f"the options' columns {', '.join(groups[0])} are not in order, without a gap, from the first on"
        return [Problem("file", f"{what}; rename them, or name the column of the options: --columns choices=NAME")]
    problems = []
    for number, row in enumerate(rows, 1):
        options = [row.pop(name) for name in groups[0]]
        while options and options[-1] is None:
            options.pop()
        if None in options:
            what = f"its option {groups[0][options.index(None)]} is empty, later ones are not"
            problems.append(Problem(row_name(number, row), what))
        row["choices"] = options
    return problems


def option_columns(header: Sequence[str], *, small: bool = True) -> list[list[str]]:
    """Columns that hold one option each: groups of two or more with the same words, and letters or numbers.

    With `small` also single letters that are small.
    """
    groups = defaultdict(list)
    for name in header:
        if (match := _OPTION.fullmatch(name)) and (match[1] or match[3].isupper() or (small and name.isalpha())):
            groups[(match[1] or "").lower(), match[2], match[3].isdigit()].append(name)
    return [names for names in groups.values() if len(names) > 1]


def _label(name: str) -> str:
    """`choice_A` -> a, `option_1` -> 1."""
    match = _OPTION.fullmatch(name)
    assert match is not None
    return str(int(match[3])) if match[3].isdigit() else match[3].lower()


def _split_cells(rows: Sequence[Row], column: str) -> list[Problem]:
    """Split the cells of a column in the one way that fits all of them."""
    cells = {number: row[column] for number, row in enumerate(rows, 1) if row.get(column) is not None}
    lists = {number: value for number, cell in cells.items() if isinstance(value := _json(cell), (list, dict))}
    if cells and len(lists) == len(cells):
        for number, value in lists.items():
            rows[number - 1][column] = value
        return []
    fitting = [sign for sign in "|;" if all(_parts(cell, sign) for cell in cells.values())]
    if len(fitting) == 1 and not lists:
        for number, cell in cells.items():
            rows[number - 1][column] = _parts(cell, fitting[0])
    if (len(fitting) == 1 and not lists) or not cells:
        return []
    ways = {
        "a JSON list": list(lists),
        "separated by |": [n for n, cell in cells.items() if n not in lists and _parts(cell, "|")],
        "separated by ;": [n for n, cell in cells.items() if n not in lists and _parts(cell, ";")],
        "none of these": [n for n, cell in cells.items() if n not in lists and not any(_parts(cell, s) for s in "|;")],
    }
    described = [f"{way}: rows {some(list(map(str, numbers)))}" for way, numbers in ways.items() if numbers]
    what = f"the cells of {column} are not all written in one way ({'; '.join(described)}), e.g. "
    hint = 'write JSON lists, ["dog", "cat"], or one option a column'
    return [Problem("file", f"{what}{printable(next(iter(cells.values())))}; {hint}")]


def _json(cell: str) -> object:
    """The list or object that a cell writes as JSON (pandas writes lists as Python does); None where it is none."""
    if cell.lstrip()[:1] != "{":
        return option_list(cell)

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len(content := dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice")
        return content

    try:
        return json.loads(cell, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        return None


def _parts(cell: str, sign: str) -> list[str]:
    """Two or more texts between the signs; none where a part is empty."""
    parts = [part.strip() for part in cell.split(sign)]
    return parts if len(parts) > 1 and all(parts) else []
