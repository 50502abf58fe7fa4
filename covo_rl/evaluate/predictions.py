"""Replies from a file, of this tool or another: JSON or JSONL, `id` and one of several reply keys."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from covo_rl.evaluate.problems import SHOWN, EvalInputError, duplicates, named


def read_rows(path: str | Path) -> list[Any]:
    """The rows of a JSON list, a JSON object with one list in it, or JSON lines.

    Raises:
        EvalInputError: the file does not exist or is half-written: every unreadable line is named.
    """
    path = Path(path)
    if not path.is_file():
        raise EvalInputError([f"{path}: no such file (looked in {Path.cwd()})"])
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise EvalInputError([f"{path}: not UTF-8 at byte {error.start}; was the file cut or is it binary?"]) from None
    if text.lstrip()[:1] == "[":
        return _json_list(text, path)
    try:
        whole = json.loads(text)  # one object over several lines
    except ValueError:
        return _json_lines(text, path)
    lists = [value for value in whole.values() if isinstance(value, list)] if isinstance(whole, dict) else []
    return lists[0] if "id" not in whole and len(lists) == 1 else [whole]


def _json_list(text: str, path: Path) -> list[Any]:
    try:
        return json.loads(text)
    except ValueError as error:
        whole = text.count('"id"')
        raise EvalInputError(
            [f"{path}: not valid JSON, half-written? {error}; {whole} rows begin before the end of the file"]
        ) from None


def _json_lines(text: str, path: Path) -> list[Any]:
    rows, problems = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError:
            problems.append(f"{path}, line {number}: not JSON, half-written? It begins {line[:60]!r}")
    if problems:
        raise EvalInputError(problems[:SHOWN])
    return rows


def reply_of(row: dict[str, Any], keys: Sequence[str]) -> Any:
    """The first reply among `keys`; a list of samples under `replies` (written by this tool) wins."""
    if isinstance(row.get("replies"), list) and len(row["replies"]) > 1:
        return row["replies"]
    return next((row[key] for key in keys if key in row and row[key] is not None), None)


def read_predictions(path: str | Path, keys: Sequence[str]) -> dict[str, list[str]]:
    """id -> replies (usually one). Rows whose reply is absent, null or not text give no entry: they count as missing.

    Raises:
        EvalInputError: unreadable file, rows without id, no reply key anywhere, duplicate ids; all at once, rows named.
    """
    rows = read_rows(path)
    problems = []
    if strange := [str(n) for n, row in enumerate(rows, 1) if not isinstance(row, dict) or "id" not in row]:
        problems.append(f"{path}: no id in {named(strange)} (counted from 1)")
    rows = [row for row in rows if isinstance(row, dict) and "id" in row]
    silent = [str(row["id"]) for row in rows if not any(key in row for key in (*keys, "replies"))]
    if silent and len(silent) == len(rows):
        problems.append(f"{path}: none of the keys {', '.join(keys)} in {named(silent)}")
    if twice := duplicates([str(row["id"]) for row in rows]):
        problems.append(f"{path}: duplicate ids in {named(twice)}")
    if problems:
        raise EvalInputError(problems)
    replies = {str(row["id"]): reply_of(row, keys) for row in rows}
    texts = {i: reply if isinstance(reply, list) else [reply] for i, reply in replies.items()}
    return {i: list(reply) for i, reply in texts.items() if all(isinstance(text, str) for text in reply)}
