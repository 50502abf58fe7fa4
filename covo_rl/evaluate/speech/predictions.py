"""Replies of a model to the rows of a speech set, from a predictions file.

A line is {"id": ROW, ...}; ROW is the row's id, its number from 0 in four digits, or SUBSET/ either, where a set has
several sub-sets. Everything else may be left out; what a row needs depends on its kind (`covo-rl eval --list`):

    reply_text           what the model wrote (also under model_output, response, answer_prediction ...)
    reply_audio          its audio: a path, from the folder of the file and inside it
    asr_text             a finished transcript of that audio: no --transcriber is needed
    words                [{"text", "start", "end"}]: the transcript with times in seconds
    segments             [{"timestamp": [start, end], "text", "words": [{"word", "start", "end"}]}]
    events               the turns of a live session: [{"channel", "start", "end", "text"?}], or its events.json
    thinking_prediction  the reasoning before the answer, of sets that score it
    logps                [[...], [...]]: log-probs of the tokens of each candidate, of pairs and stories

Of a row with several rounds the first four are lists, an entry a round (null: none). A file of official results also
repeats the row's own fields, which are passed over. `--predictions FOLDER` holds SUBSET.jsonl, or a model's outputs in
the layout of the data (Full-Duplex-Bench).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TypeVar

from covo_rl.data.folder import AudioFolder
from covo_rl.data.read import printable, some
from covo_rl.evaluate.inputs import count_rows
from covo_rl.evaluate.sets import REPLY_KEYS
from covo_rl.evaluate.speech.reading import SetReader
from covo_rl.evaluate.speech.row_fields import RowFields, is_finite, is_time
from covo_rl.evaluate.speech.rows import GivenReply, SpeechItem, Word, round_count
from covo_rl.evaluate.speech.sets import KINDS
from covo_rl.evaluate.speech.timed_words import timed_segments, timed_words
from covo_rl.types import visible

PREDICTION_KEYS = (
    "id", "reply_text", "reply_audio", "asr_text", "words", "segments", "events", "thinking_prediction", "logps",
)  # fmt: skip


T = TypeVar("T")


class _Names:
    """Which row an id means. All ids of a file follow one custom: rows' own ids, or their numbers."""

    def __init__(self, rows: Sequence[SpeechItem], subset: str | None) -> None:
        chosen = [row for row in rows if subset is None or row.subset == subset]
        self.customs: list[dict[str, list[SpeechItem]]] = []
        for name_of in (lambda row: row.id, lambda row: row.key):
            names: dict[str, list[SpeechItem]] = {}
            for row in chosen:
                for name in dict.fromkeys((name_of(row), f"{row.subset}/{name_of(row)}")):
                    names.setdefault(name, []).append(row)
            self.customs.append(names)

    def custom(self, ids: Sequence[str]) -> dict[str, list[SpeechItem]]:
        """The custom by which the most ids mean one row, then the most mean any; own ids where both do as well."""

        def fit(names: Mapping[str, Sequence[SpeechItem]]) -> tuple[int, int]:
            meant = [len(names.get(name, ())) for name in ids]
            return meant.count(1), len(meant) - meant.count(0)

        return max(self.customs, key=fit)


def read_spoken_predictions(path: Path, reader: SetReader) -> dict[str, GivenReply]:
    """Replies by the name of their row (SUBSET/ID); what is wrong goes to the reader's problems.

    A row of the file without any reply in it gives none: it counts as missing.
    """
    if not path.is_dir():
        return _read_file(path, reader, None)
    files = {name: path / f"{name}.jsonl" for name in dict.fromkeys(row.subset for row in reader.rows)}
    present = {name: file for name, file in files.items() if file.is_file()}
    if not present and not reader.replies:
        expected = some([f"{name}.jsonl" for name in files], 3)
        reader.problems.append(f"--predictions {path}: neither {expected} nor outputs in the layout of the data in it")
    replies = dict(reader.replies)
    for name, file in present.items():
        replies |= _read_file(file, reader, name)
    return replies


def _is_of_another_part(name: str, reader: SetReader) -> bool:
    """Whether an id, SUBSET/ID, is of a part that was not asked for, though others were."""
    asked = {row.subset for row in reader.rows}
    return bool(reader.wanted) and any(name.startswith(f"{part}/") for part in reader.subsets if part not in asked)


def _read_file(path: Path, reader: SetReader, subset: str | None) -> dict[str, GivenReply]:
    if not path.is_file():
        reader.problems.append(f"--predictions {path}: no such file (looked in {Path.cwd()})")
        return {}
    lines = [RowFields(reader, row, place, number) for number, place, row in reader.numbered_rows(path)]
    named = [(fields, fields.text("id")) for fields in lines]
    named = [(fields, name) for fields, name in named if not fields.failed]
    rows = _Names(reader.rows, subset).custom([name for _, name in named])
    unknown = [name for _, name in named if name not in rows]
    if others := [name for name in unknown if _is_of_another_part(name, reader)]:
        reader.notes.append(f"{path}: {len(others)} replies are of parts that --subset does not name")
        unknown = [name for name in unknown if name not in set(others)]
    several = {name: rows[name] for _, name in named if len(rows.get(name, ())) > 1}
    if unknown:
        where = f"; ids are like {some([*rows], 3)}" if rows else ""
        reader.problems.append(f"{path}: predictions for unknown ids in {count_rows(unknown)}; not in the data{where}")
    for name, meant in several.items():
        parts = some([row.name for row in meant], 3)
        reader.problems.append(f"{path}: id {visible(name)} means {len(meant)} rows: write {parts}")
    replies: dict[str, GivenReply] = {}
    taken: dict[str, str] = {}
    sounds = AudioFolder(path.parent, reader.allow_outside, ())
    for fields, name in named:
        if len(rows.get(name, ())) != 1:
            continue
        row = rows[name][0]
        if row.name in taken:
            fields.wrong(f"the id {name!r} again, after {taken[row.name]}")
        taken[row.name] = fields.place
        reply = _reply(fields, row, sounds)
        if not fields.failed and not reply.is_empty:
            replies[row.name] = reply
    return replies


def _reply(fields: RowFields, row: SpeechItem, sounds: AudioFolder) -> GivenReply:
    own = set(row.columns)
    allowed = (*PREDICTION_KEYS, *REPLY_KEYS)
    if unknown := [key for key in fields.values if key not in allowed and key not in own]:
        fields.wrong(f"unknown key {some([*map(str, unknown)])}; known are {', '.join(PREDICTION_KEYS)}")
    key = _text_key(fields, own)
    rounds = round_count(row)

    def audio(one: RowFields, name: str) -> str | None:
        path = one.maybe(name)
        try:
            return None if path is None else sounds.resolve(path)
        except ValueError as error:
            one.wrong(f"{name}: {error}")
        return None

    def words(one: RowFields, name: str) -> tuple[Word, ...] | None:
        return timed_words(one, name) if one.has(name) else None

    return GivenReply(
        texts=_by_round(fields, key, rounds, RowFields.maybe),
        audio=_by_round(fields, "reply_audio", rounds, audio),
        asr_texts=_by_round(fields, "asr_text", rounds, RowFields.maybe),
        words=_by_round(fields, "words", rounds, words, is_list=True),
        segments=timed_segments(fields, "segments") if fields.has("segments") else None,
        turns=_turns(fields),
        thinking=fields.maybe("thinking_prediction"),
        logps=_logps(fields, row) if fields.has("logps") else None,
    )


def _text_key(fields: RowFields, own: Set[str]) -> str:
    """The key that the text is under. Keys of the row itself, which VoiceBench calls its reference by, come last."""
    given = [key for key in ("reply_text", *REPLY_KEYS) if fields.has(key)]
    theirs = [key for key in given if key not in own]
    if any(fields.values[key] != fields.values[theirs[0]] for key in theirs):
        fields.wrong(f"{' and '.join(theirs)} hold different replies; write one of them")
    return next(iter([*theirs, *given]), "reply_text")


def _by_round(
    fields: RowFields, name: str, rounds: int, take: Callable[[RowFields, str], T | None], *, is_list: bool = False
) -> tuple[T | None, ...]:
    """The values of a field, one a round. `is_list`: the value of one round is a list itself."""
    value = fields.values.get(name)
    if value is None:
        return (None,) * rounds
    in_list = isinstance(value, list) and len(value) == 1 and (not is_list or isinstance(value[0], list))
    if rounds == 1 and not in_list:
        return (take(fields, name),)
    if not isinstance(value, list) or len(value) != rounds:
        fields.wrong(f"{name} is {printable(value)}, not a list with an entry for each of the {rounds} rounds")
        return (None,) * rounds
    parts = [RowFields(fields.reader, {name: item}, f"{fields.place}, round {i}", above=fields)
             for i, item in enumerate(value)]  # fmt: skip
    return tuple(take(part, name) if part.has(name) else None for part in parts)


def _turns(fields: RowFields) -> tuple[Mapping[str, Any], ...] | None:
    """Turns with channel, start and end; of an events.json its `turns`."""
    if not fields.has("events"):
        return None
    value = fields.values["events"]
    inner = RowFields(fields.reader, {"events": value.get("turns") if isinstance(value, dict) else value},
                      fields.place, above=fields)  # fmt: skip
    turns = [] if inner.values["events"] == [] else inner.parts("events")
    for turn in turns:
        start, end = turn.number("start"), turn.number("end")
        if turn.text("channel") not in ("user", "model") and not turn.failed:
            turn.wrong(f"channel is {printable(turn.values['channel'])}; choose user or model")
        turn.maybe("text")
        if not (is_time(start) and is_time(end) and start <= end) and not turn.failed:
            turn.wrong(f"it goes from {printable(start)} to {printable(end)}")
    return tuple(turn.values for turn in turns)


def _logps(fields: RowFields, row: SpeechItem) -> tuple[tuple[float, ...], ...]:
    """Token log-probs of the two candidates."""
    value = fields.values["logps"]
    lists = value if isinstance(value, list) else []
    fits = len(lists) == 2 and all(isinstance(item, list) and item for item in lists)
    if not KINDS[row.kind].likelihood:
        fields.wrong(f"logps: {row.kind} is not scored by them")
    elif not fits or not all(is_finite(x) for item in lists for x in item):
        fields.wrong(
            f"logps is {printable(value)}, not two lists of log-probs: of the right candidate and of the wrong"
        )
    else:
        return tuple(tuple(map(float, item)) for item in lists)
    return ()
