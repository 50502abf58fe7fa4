"""Files that are whole or absent, JSON lines, and values that JSON can hold: used by every room. No torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from covo_rl.resolve import ConfigError, read_yaml
from covo_rl.types import UserError


class RecordError(UserError, ValueError):
    """A file that this package wrote and that cannot be read any more."""


def file_sha256(path: str | Path) -> str:
    """Hex digest of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(path: str | Path) -> str | None:
    """One hash over the weight files of a local folder; None for a hub name, whose revision is not known here."""
    files = next(filter(None, (sorted(Path(path).glob(f"*.{kind}")) for kind in ("safetensors", "bin", "pt"))), [])
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest() if files else None


def json_values(
    lines: Iterable[str | bytes], parse: Callable[[str], Any] = json.loads
) -> Iterator[tuple[int, Any, Any, str]]:
    """(line number, line, value, "") of every line that is not blank; where it is no JSON (.., None, what is wrong).

    The first line may begin with a byte order mark.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        encoding = "utf-8-sig" if number == 1 else "utf-8"
        try:
            yield number, line, parse(line if isinstance(line, str) else line.decode(encoding)), ""
        except (ValueError, RecursionError) as error:
            yield number, line, None, str(error)


def _parse_once(text: str) -> Any:
    """JSON. Raises ValueError: also where a key occurs twice, of which Python would take the last."""

    def of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise ValueError(f"the key {twice!r:.80} occurs twice")
        return content

    return json.loads(text, object_pairs_hook=of_pairs)


def json_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any] | None, str]]:
    """(line number, object, "") of every line that is not blank, or (line number, None, what is wrong with it)."""
    with open(path, "rb") as file:  # a damaged line is named, and does not hide those before it
        for number, _, value, error in json_values(file, _parse_once):
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


def whole_lines(path: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """(objects, notes) of a log that may have been cut: every damaged line is left out, and has a note. None: empty."""
    if not Path(path).is_file():
        return [], []
    lines = list(json_lines(path))
    notes = [f"{path}, line {number} is left out: {problem}" for number, row, problem in lines if row is None]
    return [row for _, row, _ in lines if row is not None], notes


def read_record(path: Path) -> dict[str, Any]:
    """What a JSON or YAML file of a run, an export or an evaluation says; empty where there is none.

    Raises:
        RecordError: it cannot be read, or is no mapping.
    """
    if not path.is_file():
        return {}
    try:
        return read_yaml(path)
    except ConfigError as error:
        why = error.problems[0].removeprefix(str(path)).lstrip(",: ")
        raise RecordError(f"{path} cannot be read, was it cut? {why}") from None


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append lines, each ending in a newline, and flush them to disk: all of them, or none where the disk is full.

    Half a line that is there already, from a process that was killed, stays a line of its own.
    """
    with open(path, "a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            file.seek(max(size - 1, 0))
            start = "" if file.read(1) in (b"", b"\n") else "\n"
            rest = memoryview((start + "".join(lines)).encode("utf-8", "backslashreplace"))
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(size)
            raise


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


def fill_folder(folder: Path, write: Callable[[Path], object]) -> Path:
    """`folder`, made on first use: `write(partial)` fills a neighbour that is renamed when whole, so never half of it.

    Processes that start at once may each fill one; the first to rename it wins, and the others are dropped.
    """
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=folder.name, ignore_cleanup_errors=True) as partial:
            write(Path(partial))
            os.chmod(partial, 0o755)  # it was made with 700
            try:
                os.replace(partial, folder)
            except OSError:
                if not folder.is_dir():
                    raise
    return folder


def write_json(path: Path, content: Any, *, indent: int | None = 2) -> Path:
    """Write `content` as a whole; what JSON cannot hold goes through `plain`, so NaN becomes null."""
    write_atomically(path, lambda file: json.dump(plain(content), file, indent=indent, ensure_ascii=False))
    return path


def json_line(content: Any) -> str:
    """`content` as a line of JSON; what JSON cannot hold goes through `plain`, which takes three times as long."""
    try:
        return json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"
    except (ValueError, TypeError):
        return json.dumps(plain(content), ensure_ascii=False) + "\n"


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
    named = value if hasattr(value, "__qualname__") else type(value) if callable(value) else None
    return f"{named.__module__}.{named.__qualname__}" if named is not None else str(value)
