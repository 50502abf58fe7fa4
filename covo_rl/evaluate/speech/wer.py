"""Error rates of transcripts by the rules of URO-Bench, Seed-TTS-eval and of ASR leaderboards.

    uro_wer("en", reply, reference)         words after Whisper's normaliser; the reply is the reference of the rate
    seed_tts_wer("zh", reference, heard)    per character; the benchmark's number is the plain mean over utterances
    asr_report("en", references, heard)     corpus rate: summed edits by summed reference units, with S, D and I

Edits are counted by jiwer. The rate over an empty reference is the number of inserted units, as in jiwer 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from covo_rl.evaluate.speech.texts import asr_text, check_language, spoken_numbers, whisper_english, without_marks
from covo_rl.evaluate.summary import bootstrap_ratio

#: a repetition counts where its error rate is at most this (URO-Bench, Repeat)
REPEATED = 0.5


@dataclass(frozen=True)
class Edits:
    """What makes a hypothesis of a reference of so many `units` (words or characters)."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    units: int = 0

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors per unit of the reference; over an empty one their number."""
        return self.errors / (self.units or 1)

    def __add__(self, other: Edits) -> Edits:
        return Edits(
            self.substitutions + other.substitutions, self.deletions + other.deletions,
            self.insertions + other.insertions, self.units + other.units,
        )  # fmt: skip


def count_edits(reference: str, hypothesis: str, *, characters: bool = False) -> Edits:
    """Edits between the words of two texts, or between their characters (inner spaces are characters too).

    >>> count_edits("a b c", "a x c d")
    Edits(substitutions=1, deletions=0, insertions=1, units=3)

    Raises:
        ImportError: jiwer is not installed.
    """
    try:
        import jiwer
    except ImportError as error:
        raise ImportError("error rates need jiwer: pip install 'covo-rl[wer]'") from error
    found = (jiwer.process_characters if characters else jiwer.process_words)(reference, hypothesis)
    units = found.hits + found.substitutions + found.deletions
    return Edits(found.substitutions, found.deletions, found.insertions, units)


def uro_wer(language: str, first: str, second: str) -> float:
    """URO-Bench's `get_wer` (metrics/mark_wer.py @9e74bc0): words in English, characters in Chinese.

    `first` is the reference of the rate: the reply in Repeat, the model's text in the WER of its own speech.

    >>> uro_wer("en", "minus five degrees", "-5 degrees"), uro_wer("zh", "我有3个", "我有三")
    (0.5, 0.25)
    """
    check_language(language)
    if language == "en":
        return count_edits(*(whisper_english(text.strip().lower()) for text in (first, second))).rate
    pair = (spoken_numbers(without_marks(text).strip().lower()) for text in (first, second))
    return count_edits(*pair, characters=True).rate


def repeat_figures(rates: Sequence[float]) -> dict[str, float]:
    """URO-Bench's Repeat: `ok_rate`, `final_WER_for_ok_case` and the score made of them, in percent.

    >>> repeat_figures([0.0, 0.5, 0.9, 2.0])
    {'ok_rate': 0.5, 'final_WER_for_ok_case': 0.25, 'score': 37.5}
    """
    good = [rate for rate in rates if rate <= REPEATED]
    share, mean = len(good) / len(rates) if rates else 0.0, sum(good) / len(good) if good else 0.0
    return {"ok_rate": share, "final_WER_for_ok_case": mean, "score": repeat_score(share, mean)}


def repeat_score(ok_rate: float, wer_of_ok: float) -> float:
    return ok_rate * (1 - wer_of_ok) * 100


def emotion_score(probability: float, wer: float) -> float:
    """URO-Bench's GenEmotion, of 100: the wanted emotion's probability, less where other words were said."""
    if not 0 <= probability <= 1 or not wer >= 0:
        raise ValueError(f"GenEmotion: probability {probability} and WER {wer}; from 0 to 1, and from 0 on")
    return probability * (1 - min(wer, 1.0)) * 100


def seed_tts_wer(language: str, reference: str, hypothesis: str) -> float:
    """Seed-TTS-eval's WER of one utterance, from its written rule (its script has no licence): English in words, lower
    case; Chinese in characters, case kept, the hypothesis already in simplified script.

    >>> seed_tts_wer("zh", "三个", "3个"), seed_tts_wer("en", "Don't", "dont")
    (0.5, 1.0)
    """
    check_language(language)
    pair = [without_marks(text, kept="'") for text in (reference, hypothesis)]
    return count_edits(*(text.lower() if language == "en" else " ".join(text) for text in pair)).rate


def asr_edits(language: str, reference: str, hypothesis: str, numbers: str = "written") -> Edits:
    """Edits of one row: English words after Whisper's normaliser, Chinese characters of `texts.asr_text`."""
    pair = (asr_text(language, text, numbers) for text in (reference, hypothesis))
    return count_edits(*pair, characters=language == "zh")


def asr_report(
    language: str, references: Sequence[str], hypotheses: Sequence[str | None], numbers: str = "written"
) -> dict[str, Any]:
    """The corpus rate of rows in the same order; None, nothing heard, deletes the whole reference and is counted.

    `score`: percent of the summed reference units, `ci95` over draws of rows; `hallucinated`: rows with a rate above 1.
    Where no reference has a unit there is no rate, and the score is None.
    """
    rows = [asr_edits(language, reference, heard or "", numbers)
            for reference, heard in zip(references, hypotheses, strict=True)]  # fmt: skip
    total = sum(rows, Edits())
    ends = bootstrap_ratio([row.errors for row in rows], [row.units for row in rows]) if total.units else None
    return {
        "score": 100 * total.rate if total.units else None,
        "ci95": [100 * end for end in ends] if ends else None,
        "substitutions": total.substitutions, "deletions": total.deletions, "insertions": total.insertions,
        "units": total.units, "n": len(rows), "missing": sum(heard is None for heard in hypotheses),
        "hallucinated": sum(row.rate > 1 for row in rows),
    }  # fmt: skip
