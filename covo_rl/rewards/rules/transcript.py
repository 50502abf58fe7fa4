"""Transcripts: the words that are compared of a text, and errors per word."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

DROPPED = re.compile("['\u2018\u2019\u02bc\u2032`\u00b4\u200b-\u200f\u2060\ufeff]")  # apostrophes, marks without width
BETWEEN_DIGITS = re.compile(r"(?<=\d)[.,:](?=\d)")
CJK = re.compile("[\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]")


def spoken_words(text: str, unit: str = "auto") -> list[str]:
    """What is compared of a text, in order; `unit` "char": its characters but spaces."""
    text = DROPPED.sub("", unicodedata.normalize("NFKC", text).casefold())
    kept = {match.start() for match in BETWEEN_DIGITS.finditer(text)}
    marks = (" " if unicodedata.category(c)[0] in "PCZ" and i not in kept else c for i, c in enumerate(text))
    text = "".join(marks)
    return [c for c in text if not c.isspace()] if unit == "char" else CJK.sub(r" \g<0> ", text).split()


def error_rate(reference: Sequence[str], said: Sequence[str]) -> float:
    """Errors per word of the reference, at most 1. Needs jiwer."""
    if not said or len(said) >= 2 * len(reference):  # as many words too many as there are words: nothing to compute
        return 1.0
    import jiwer

    return min(1.0, jiwer.wer(" ".join(reference), " ".join(said)))
