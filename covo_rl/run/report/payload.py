"""What a report holds, read from run folders: see `report_payload`. No torch.

The form of the payload is written down, and checked, in tests/report_contract.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

#: which sounds go into the page: those of groups that call for attention, none, or all that the budget allows
Sounds = Literal["interest", "none", "all"]


def report_payload(
    folders: Sequence[str | Path], *, max_mb: float = 20.0, sounds: Sounds = "interest", page: str | Path | None = None
) -> dict[str, Any]:
    """Everything that a report of these run folders shows, JSON-ready.

    Args:
        folders: run folders; a run may be under way, cut, damaged, or of an older version. What is missing is in
            `notes`, with counts.
        max_mb: MB of 10^6 bytes that the page may weigh.
        page: where the page will lie; links to sounds that are not embedded are relative to it. Default: the first
            run folder.
    """
    raise NotImplementedError
