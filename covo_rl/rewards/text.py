"""What every reward needs from a completion: its text and its parts, in our form and in TRL's conversational one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from covo_rl.prompt import Parsed, parse


def completion_text(completion: Any) -> str:
    """A completion as text: a string, or TRL's list of messages (their contents, joined)."""
    if isinstance(completion, str):
        return completion
    contents = [message["content"] or "" for message in completion]
    parts = [[{"text": content}] if isinstance(content, str) else content for content in contents]
    return "".join(part.get("text", "") for content in parts for part in content)


def completion_rows(
    completions: Sequence[Any], parsed: Sequence[Parsed] | None, *columns: Sequence[Any] | None
) -> list[tuple[Any, ...]]:
    """(parts, value of every column) by completion. `parsed` where the runner has the parts; no column is all None."""
    parts = [parse(completion_text(c)) for c in completions] if parsed is None else parsed
    return list(zip(parts, *([None] * len(parts) if c is None else c for c in columns), strict=True))
