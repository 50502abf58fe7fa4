"""Words with times, in each of the forms that transcribers and benchmarks write.

{"text", "start", "end"}           ours
{"word", "start", "end"}           whisper-timestamped, MTR-DuplexBench
{"text", "timestamp": [s, e]}      transformers, Full-Duplex-Bench; the last e may be null
"""

from __future__ import annotations

from typing import Any

from covo_rl.data.folder import LONE_SURROGATE
from covo_rl.data.read import printable
from covo_rl.evaluate.speech.row_fields import RowFields, is_time
from covo_rl.evaluate.speech.rows import Word


def timed_words(fields: RowFields, name: str) -> tuple[Word, ...]:
    """The words under a field, in the order of the file; what is none is a problem of the row."""
    value = fields.values.get(name)
    if not isinstance(value, list):
        fields.wrong(f"{name} is {printable(value)}, not a list of words")
        return ()
    words = [timed_word(item) for item in value]
    for place, word in enumerate(words):
        if isinstance(word, str):
            fields.wrong(f"{name}[{place}]: {word}")
    return tuple(word for word in words if isinstance(word, Word))


def timed_word(value: Any) -> Word | str:
    """One word, or what is wrong with it."""
    if not isinstance(value, dict):
        return f"{printable(value)} is no word with times"
    text = value.get("text", value.get("word"))
    span = value.get("timestamp", [value.get("start"), value.get("end")])
    if not isinstance(text, str) or LONE_SURROGATE.search(text):
        return f"its text is {printable(text)}, not text"
    if not isinstance(span, (list, tuple)) or len(span) != 2 or not is_time(span[0]):
        return f"its times are {printable(span)}, not [start, end] in seconds"
    start, end = span
    if end is not None and (not is_time(end) or end < start):
        return f"it ends at {printable(end)} and starts at {printable(start)}"
    return Word(text, float(start), None if end is None else float(end))


def timed_segments(fields: RowFields, name: str) -> tuple[dict[str, Any], ...] | None:
    """Segments as MTR-DuplexBench counts them, or None after a problem: [{timestamp, text, words}]."""
    value, segments = fields.values.get(name), []
    if not isinstance(value, list):
        fields.wrong(f"{name} is {printable(value)}, not a list of segments")
        return None
    for place, item in enumerate(value):
        whole = timed_word({"text": "", **item}) if isinstance(item, dict) else "it is no object"
        if isinstance(whole, str) or whole.end is None:
            fields.wrong(f"{name}[{place}]: {whole if isinstance(whole, str) else 'it has no end'}")
            continue
        inner = RowFields(fields.reader, {"words": [], **item}, f"{fields.place}, {name}[{place}]", above=fields)
        words = timed_words(inner, "words")
        if any(word.end is None for word in words):
            inner.wrong("a word has no end")
        spoken = [{"word": word.text, "start": word.start, "end": word.end} for word in words]
        segments.append({"timestamp": [whole.start, whole.end], "text": whole.text, "words": spoken})
    return None if fields.failed else tuple(segments)
