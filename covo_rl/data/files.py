"""Files that are whole or absent, and values that JSON can hold. No torch."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any


def file_sha256(path: str | Path) -> str:
    """Hex digest of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain(value: Any) -> Any:
    """JSON-ready copy: numpy and torch scalars become numbers, NaN and infinities null, functions their names."""
    if isinstance(value, Mapping):
        return {_name(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return _name(value)


def _name(value: Any) -> str:
    """Text without addresses: the same function has the same name in the process that resumes."""
    return f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else str(value)


def write_atomically(path: Path, write: Callable[[IO[str]], object]) -> None:
    """Call `write(text_file)` on a temporary neighbour, flush it to disk, rename it to `path`: never half a file."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
