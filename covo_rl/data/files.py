"""Files that are whole or absent, JSON lines, and values that JSON can hold: used by every room. No torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO


def file_sha256(path: str | Path) -> str:
    """Hex digest of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_values(
    lines: Iterable[str | bytes], parse: Callable[[str], Any] = json.loads
) -> Iterator[tuple[int, Any, Any, str]]:
    """(line number, line, value, "") of every line that is not blank; where it is no JSON (.., None, what is wrong)."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, line, parse(line if isinstance(line, str) else line.decode()), ""
        except (ValueError, RecursionError) as error:
            yield number, line, None, str(error)


def json_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any] | None, str]]:
    """(line number, object, "") of every line that is not blank, or (line number, None, what is wrong with it)."""
    with open(path, "rb") as file:  # a damaged line is named, and does not hide those before it
        for number, _, value, error in json_values(file):
            if error or not isinstance(value, dict):
                expected = f"expected an object, found {type(value).__name__}"
                yield number, None, f"not JSON: {error}" if error else expected
            else:
                yield number, value, ""


def read_json_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that must be whole. Raises ValueError naming the first line that is none."""
    for number, row, problem in json_lines(path):
        if row is None:
            raise ValueError(f"{path}, line {number}: {problem}")
        yield row


def write_atomically(path: Path, write: Callable[[TextIO], object]) -> None:
    """Call `write(text_file)` on a temporary neighbour, flush it to disk, rename it to `path`: never half a file."""
    partial = path.with_name(path.name + ".partial")
    try:
        # a lone surrogate, which a model can write, becomes its JSON escape
        with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any, *, indent: int | None = 2) -> Path:
    """Write `content` as a whole; what JSON cannot hold goes through `plain`, so NaN becomes null."""
    write_atomically(path, lambda file: json.dump(plain(content), file, indent=indent, ensure_ascii=False))
    return path


def plain(value: Any) -> Any:
    """JSON-ready copy: numpy and torch scalars become numbers, NaN and infinities null, functions their names."""
    if isinstance(value, Mapping):
        return {_text(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return _text(value)


def _text(value: Any) -> str:
    """Text without addresses: the same function has the same name in the process that resumes."""
    return f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else str(value)
