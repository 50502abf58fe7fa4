"""One row as an official script scores it: SCORERS[fixture](row without its outputs) -> the outputs, by their names.

SCORERS["uro_wer"]({"language": "en", "first": "he's gone", "second": "he is gone"}) gives {"official_wer": 0.333...}.
Where a script ends on a row, the output says how: "stops: exit 1", "raises NotImplementedError".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from covo_rl.evaluate.speech.aggregate import uro_conclusion, vstyle_conclusion
from covo_rl.evaluate.speech.choices import OfficialStop, air_chat, air_choice, air_foundation
from covo_rl.evaluate.speech.fields import MalformedRow, checked, field
from covo_rl.evaluate.speech.judged import (
    REFUSALS,
    voicebench_letter,
    voicebench_majority,
    voicebench_rating,
    voicebench_refused,
    vstyle_score_text,
)
from covo_rl.evaluate.speech.timing import mtr_verdict, overlap_intervals, took_turn, turn_latency
from covo_rl.evaluate.speech.wer import seed_tts_wer, uro_wer
from covo_rl.types import visible

Row = Mapping[str, Any]


def _uro_wer(row: Row) -> dict[str, Any]:
    return {"official_wer": uro_wer(*(field(row, name, str) for name in ("language", "first", "second")))}


def _uro_aggregate(row: Row) -> dict[str, Any]:
    return {"official": uro_conclusion(*(field(row, name, Mapping) for name in ("last_lines", "utmos", "wer")))}


def _vstyle(row: Row) -> dict[str, Any]:
    if _kind(row, "parse", "aggregate") == "parse":
        return {"official_score_text": vstyle_score_text(field(row, "reply", str))}
    return {"official": vstyle_conclusion(_rows(row, "records"))}


def _mtr_duplex(row: Row) -> dict[str, Any]:
    times = field(row, "timestamps", Mapping)
    return {"official": mtr_verdict(field(row, "kind", str), _rows(row, "segments"), times)}


def _air_bench(row: Row) -> dict[str, Any]:
    kind = _kind(row, "foundation", "foundation_file", "chat_file")
    try:
        if kind == "foundation":
            return {"official": air_choice(field(row, "row", Mapping))}
        if kind == "foundation_file":
            return {"official": air_foundation(_rows(row, "rows"))}
        return {"official": air_chat(_rows(row, "rows"), swapped=field(row, "swapped", bool))}
    except OfficialStop as stop:
        return {"official": f"stops: {stop}"}


def _voicebench(row: Row) -> dict[str, Any]:
    """Phrase lists are the user's: `patterns` and `phrases` of the row, else what the rules have without them."""
    kind = _kind(row, "mcq", "harm", "open", "qa")
    if kind == "mcq":
        return {"official_letter": voicebench_letter(field(row, "response", str), row.get("patterns"))}
    if kind == "harm":
        return {"official_refused": voicebench_refused(field(row, "response", str), row.get("phrases", REFUSALS))}
    replies = field(row, "scores", Sequence)
    if kind == "qa":
        return {"official_majority": voicebench_majority([checked(reply, "a reply", str) for reply in replies])}
    scores = [voicebench_rating(reply) for reply in replies]
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        is_text = isinstance(replies[scores.index(None)], str)
        return {"official_mean": f"raises {'NotImplementedError' if is_text else 'TypeError'}"}
    return {"official_mean": fmean(known) if known else float("nan")}


def _fdb_timing(row: Row) -> dict[str, Any]:
    kind = _kind(row, "turn_taking", "interruption", "pause", "timing")
    if kind == "timing":
        return {**overlap_intervals(field(row, "user_vad", Sequence), field(row, "model_vad", Sequence))}
    words = _rows(row, "words")
    if kind == "pause":
        return {"took_turn": int(took_turn(words, open_end=True))}
    end = field(row, "turn_end", float)
    return {"took_turn": int(took_turn(words)), "latency": turn_latency(words, end)}


def _seed_tts_wer(row: Row) -> dict[str, Any]:
    return {"wer": seed_tts_wer(*(field(row, name, str) for name in ("language", "reference", "hypothesis")))}


def _kind(row: Row, *kinds: str) -> str:
    if (kind := field(row, "kind", str)) not in kinds:
        raise MalformedRow(f"kind {visible(kind)!r}; there are {', '.join(kinds)}")
    return kind


def _rows(row: Row, name: str) -> list[Row]:
    return [checked(item, f"item {i} of {name}", Mapping) for i, item in enumerate(field(row, name, Sequence))]


#: fixture -> scorer of one of its rows
SCORERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "uro_wer": _uro_wer,
    "uro_aggregate": _uro_aggregate,
    "vstyle": _vstyle,
    "mtr_duplex": _mtr_duplex,
    "air_bench": _air_bench,
    "voicebench": _voicebench,
    "fdb_timing_derived": _fdb_timing,
    "seed_tts_wer_derived": _seed_tts_wer,
}
