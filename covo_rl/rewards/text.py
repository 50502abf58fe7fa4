"""What every reward needs from a completion: its text and its parts, in our form and in TRL's conversational one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from covo_rl.prompt import Parsed, parse


def completion_text(completion: Any) -> str:
    """A completion as text: a string, or TRL's list of messages (their contents, joined)."""
    if isinstance(completion, str):
        return completion
    pieces = []
    for message in completion:
        content = message["content"] or ""
        if not isinstance(content, str):  # a list of parts
            content = "".join(part.get("text", "") for part in content)
        pieces.append(content)
    return "".join(pieces)


def parsed_completions(
    completions: Sequence[Any], parsed: Sequence[Parsed] | None = None, stop_reason: Sequence[str] | None = None
) -> list[Parsed]:
    """The parts of every completion; `parsed` where the runner has them already."""
    if parsed is not None:
        return list(parsed)
    reasons = stop_reason or ["stop"] * len(completions)
    return [parse(completion_text(c), r) for c, r in zip(completions, reasons, strict=True)]


def column(values: Sequence[Any] | None, n: int) -> Sequence[Any]:
    """A dataset column, or `n` times None where the data set has none."""
    return [None] * n if values is None else values
