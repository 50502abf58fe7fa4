"""Official files in which it matters when the model speaks: Full-Duplex-Bench and MTR-DuplexBench.

Full-Duplex-Bench   SUBSET/ITEM/: input.wav; turn_taking.json or interrupt.json (a list; of its first
                    entry's `timestamp` the user's turn ends at the first time, an interruption at the second);
                    v1.5 also clean_input.wav.
                    A model's output.wav and output.json {text, chunks: [{text, timestamp: [s, e]}]} lie beside them,
                    or at the same place below --predictions FOLDER.
MTR-DuplexBench     {smooth|interruption|pause|background}.jsonl, a row a turn of a dialogue: id, timestamps
                    {user_start, user_end, model_start, model_end, interruption_*, pause_*, background_*}, audio?,
                    segments? (the reply: [{timestamp: [s, e], text, words: [{word, start, end}]}])
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from covo_rl.data.folder import AudioFolder
from covo_rl.data.read import printable
from covo_rl.evaluate.speech.reading import SetReader
from covo_rl.evaluate.speech.row_fields import RowFields, is_finite, is_time
from covo_rl.evaluate.speech.rows import GivenReply, SpokenRound
from covo_rl.evaluate.speech.sets import Subset
from covo_rl.evaluate.speech.timed_words import timed_segments, timed_words
from covo_rl.types import Clip

#: task kind -> its file of times, and whether its rows need it
_TIMES = {
    "fdb_pause": ("pause.json", False), "fdb_turn_taking": ("turn_taking.json", True),
    "fdb_interruption": ("interrupt.json", True),
}  # fmt: skip
#: back-channels of people in each item, as the benchmark publishes them beside its scripts
DISTRIBUTIONS = "icc_gt_distribution.json"
_MTR_TIMES = tuple(f"{what}_{end}" for what in ("user", "model", "interruption", "pause", "background")
                   for end in ("start", "end"))  # fmt: skip
#: without these the official script ends with an error; others count as not there
_MTR_NEEDS = {"mtr_background": ("background_start", "background_end")}


def read_fdb(reader: SetReader) -> None:
    """Full-Duplex-Bench, a folder an item, whose input and output are paired by that folder's name."""
    sounds = AudioFolder(reader.root, reader.allow_outside, ())
    for folder, (subset, *_) in reader.parts():
        items = sorted(place for place in folder.iterdir() if place.is_dir()) if folder.is_dir() else []
        if not items:
            reader.problems.append(f"{folder}: no folders of items in it")
        people = _distributions(reader, folder) if subset.kind == "fdb_backchannel" else {}
        for number, item in enumerate(items):
            _read_item(reader, subset, sounds, item, number, people)


def _distributions(reader: SetReader, folder: Path) -> Mapping[str, Any]:
    path = next((p for p in (folder / DISTRIBUTIONS, reader.root / DISTRIBUTIONS) if p.is_file()), None)
    if path is None:
        reader.notes.append(
            f"{folder}: no {DISTRIBUTIONS} (item -> a list of shares): no divergence from people's timing"
        )
        return {}
    reader.files.append(path)
    content = reader.load_json(path)
    if content is not None and not isinstance(content, dict):
        reader.problems.append(f"{path}: expected an object, item -> a list of shares; found {printable(content)}")
    return content if isinstance(content, dict) else {}


def _read_item(
    reader: SetReader, subset: Subset, sounds: AudioFolder, item: Path, number: int, people: Mapping[str, Any]
) -> None:
    fields = RowFields(reader, {"item": item.name}, str(item), number)
    if not (sound := item / "input.wav").is_file():
        fields.wrong("no input.wav")
    _check_inside(fields, sounds, sound)
    times: dict[str, Any] = {}
    file, required = _TIMES.get(subset.kind, ("", False))
    if file and (item / file).is_file():
        reader.files.append(item / file)
        times = _first_timestamp(fields, item / file, reader.load_json(item / file))
    elif required:
        fields.wrong(f"no {file}")
    if item.name in people:
        times["distribution"] = _shares(fields, people[item.name])
    if (clean := item / "clean_input.wav").is_file():
        _check_inside(fields, sounds, clean)
        times["clean_input"] = str(clean)
    text = times.pop("interrupt", None)
    rounds = [SpokenRound((Clip(path=str(sound)),), text, times.pop("context", None))]
    row = reader.add(fields, subset, rounds, row_id=item.name, times=times)
    outputs = item if reader.replies_in == reader.root else _output_folder(reader.replies_in, subset, item)
    if row is not None and (reply := _output(reader, outputs)) is not None:
        reader.replies[row.name] = reply


def _check_inside(fields: RowFields, sounds: AudioFolder, path: Path) -> None:
    """A link that came with the data leads nowhere else."""
    try:
        sounds.resolve(str(path.relative_to(sounds.root)))
    except ValueError as error:
        fields.wrong(f"{path.name}: {error}")


def _output_folder(replies_in: Path, subset: Subset, item: Path) -> Path:
    places = [replies_in / subset.path / item.name, replies_in / item.parent.name / item.name, replies_in / item.name]
    return next((place for place in places if place.is_dir()), places[0])


def _first_timestamp(fields: RowFields, path: Path, content: Any) -> dict[str, Any]:
    """start and end in seconds of the first entry, and what an interruption says."""
    entry = content[0] if isinstance(content, list) and content else None
    span = entry.get("timestamp") if isinstance(entry, dict) else None
    numbers = [t for t in span if is_time(t)] if isinstance(span, list) else []
    if not isinstance(entry, dict) or len(numbers) != 2 or numbers[0] > numbers[1]:
        if content is not None:
            fields.wrong(f"{path.name}: timestamp of the first entry is {printable(span)}, not [start, end] in seconds")
        fields.failed = True
        return {}
    texts = {name: entry[name] for name in ("context", "interrupt") if isinstance(entry.get(name), str)}
    return {"start": float(numbers[0]), "end": float(numbers[1]), **texts}


def _shares(fields: RowFields, value: Any) -> list[float]:
    if not isinstance(value, list) or not value or not all(is_finite(share) and share >= 0 for share in value):
        fields.wrong(f"{DISTRIBUTIONS}: its shares are {printable(value)}, not a list of numbers")
        return []
    return [float(share) for share in value]


def _output(reader: SetReader, folder: Path) -> GivenReply | None:
    """What a model's folder holds; None where it holds neither file."""
    sound, transcript = folder / "output.wav", folder / "output.json"
    words, text = None, None
    if transcript.is_file():
        reader.reply_files.append(transcript)
        content = reader.load_json(transcript)
        fields = RowFields(reader, content if content is not None else {}, str(transcript))
        if content is not None:
            text = fields.maybe("text")
            words = timed_words(fields, "chunks")
    if words is None and not sound.is_file():
        return None
    if sound.is_file():
        _check_inside(RowFields(reader, {}, str(folder)), AudioFolder(folder.parent, reader.allow_outside, ()), sound)
    return GivenReply(audio=(str(sound) if sound.is_file() else None,), asr_texts=(text,), words=(words,))


# -- MTR-DuplexBench -------------------------------------------------------------------------------------------------


def read_mtr(reader: SetReader) -> None:
    """MTR-DuplexBench. Its encodings of scenarios are flattened to a row a turn, which is what its functions take."""
    for path, (subset, *_) in reader.parts():
        for fields in reader.lines(path, "audio"):
            stamps = fields.values.get("timestamps")
            inner = RowFields(reader, stamps, f"{fields.place}, timestamps", above=fields)
            if unknown := [name for name in inner.values if name not in _MTR_TIMES]:
                inner.wrong(f"unknown {', '.join(map(str, unknown))}; known are {', '.join(_MTR_TIMES)}")
            times = {name: inner.number(name) for name in inner.values if name in _MTR_TIMES}
            if wrong := [name for name, time in times.items() if time is not None and not is_time(time)]:
                inner.wrong(f"{wrong[0]} is {times[wrong[0]]:g}; times are seconds from 0 on")
            for name in _MTR_NEEDS.get(subset.kind, ()):
                if times.get(name) is None and not fields.failed:
                    inner.wrong(f"no {name}")
            segments = timed_segments(fields, "segments") if fields.has("segments") else None
            rounds = [SpokenRound(fields.maybe_clip("audio"))]
            row = reader.add(fields, subset, rounds, row_id=fields.text("id"), times=times)
            reader.keep_reply(row, GivenReply(segments=segments))
