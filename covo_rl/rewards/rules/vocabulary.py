"""Closed word lists of the deterministic checkers."""

from __future__ import annotations


def word_list(text: str) -> list[str]:
    """The words of a string, in order."""
    return text.split()


def word_set(text: str) -> frozenset[str]:
    """The words of a string."""
    return frozenset(text.split())
