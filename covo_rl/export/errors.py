"""What can go wrong between a trained policy and a folder that others load."""

from __future__ import annotations


class ExportError(RuntimeError):
    """An export that was not made; nothing is left under its final name."""
