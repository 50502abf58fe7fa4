"""What the assistant says in dialogues, as rows of speech, and what was found out about these put back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from covo_rl.data.read import Row


def replies_of(dialogues: Iterable[Row]) -> list[Row]:
    """The assistant's turns that have a recording, as rows of speech named `ID#NUMBER`, turns being numbered from 1."""
    return [
        {**turn, "id": f"{row.get('id')}#{number}"}
        for row in dialogues
        for number, turn in _turns(row)
        if turn.get("role") == "assistant" and turn.get("audio") is not None
    ]


def with_replies(dialogues: Iterable[Row], columns: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Dialogues whose turns have further columns: those of their names, as `replies_of` gives them."""
    made = []
    for row in dialogues:
        turns = dict(_turns(row))
        further = {number: columns.get(f"{row.get('id')}#{number}", {}) for number in turns}
        every = [{**turns[n], **further[n]} if n in turns else turn for n, turn in enumerate(row.get("turns") or (), 1)]
        made.append({**row, "turns": every} if turns else row)
    return made


def _turns(row: Row) -> list[tuple[int, Mapping[str, Any]]]:
    turns = row.get("turns")
    numbered = enumerate(turns, 1) if isinstance(turns, list) else ()
    return [(number, turn) for number, turn in numbered if isinstance(turn, Mapping)]
