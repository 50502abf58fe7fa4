"""Benchmarks of speech and of taking turns: their official rules as pure functions of text, times and scores.

    SCORERS["uro_wer"](row)          one row, as the official script scores it
    score_set("rating", rows)       all rows of a set: score, n, missing, interval

No model, no sound and no network here: transcripts, judges' replies and log-probabilities come from elsewhere.
"""

from covo_rl.evaluate.speech.scorers import SCORERS
from covo_rl.evaluate.speech.tasks import TASKS, score_set

__all__ = ["SCORERS", "TASKS", "score_set"]
