"""`covo-rl eval --set duplex`: streams that ask when a model speaks, put to a live session; rows, figures, report.

A row of rows.jsonl holds the question, the logit of stopping at each of its decisions (`stop_logits`), and what the
greedy policy does: stop where the hazard first exceeds one half. All figures come from these rows (figures.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covo_rl.data.files import file_sha256, write_atomically, write_json
from covo_rl.data.read import DataError
from covo_rl.data.terminal import LAYOUT, say
from covo_rl.duplex.stream_files import EVENTS, STEREO, read_stream, read_streams
from covo_rl.evaluate.inputs import Inputs
from covo_rl.evaluate.records import Record
from covo_rl.evaluate.sets import EvalInputError, EvalSet, version_of
from covo_rl.evaluate.summary import accuracy_of, wilson
from covo_rl.evaluate.tables import provenance_lines, table_lines
from covo_rl.records.console import interval, number, percent
from covo_rl.types import Clip, Example, visible

if TYPE_CHECKING:
    from covo_rl.audio import ClipStore
    from covo_rl.duplex.session import DuplexSession

#: kind of stream -> the figure that says how many were answered, stopped or held as they should
RIGHT = {
    "pause": "long_pause_success", "single": "single_turn_success", "barge_in": "barge_in_success",
    "back_channel": "back_channel_ignored", "hold": "floor_held",
}  # fmt: skip
#: figure -> (what a report calls it, kinds of streams that it is over)
SHARES = {
    "early_long_pause": ("answered early, long pause", ("pause",)),
    "long_pause_success": ("right turn, long pause", ("pause",)),
    "early_single_turn": ("answered early, single turn", ("single",)),
    "single_turn_success": ("right turn, single turn", ("single",)),
    "barge_in_success": ("stopped within 1 s of a barge-in", ("barge_in",)),
    "back_channel_ignored": ("back-channel ignored", ("back_channel",)),
    "floor_held": ("floor held", ("barge_in", "back_channel", "hold")),
}
DELAYS = {
    "delay_p50": "answer after a single turn, median", "delay_p90": "answer after a single turn, 90 %",
    "barge_in_delay_p50": "stop after a barge-in, median",
}  # fmt: skip
NO_BACK_CHANNELS = (
    "back-channels of the model's own are not measured: the published layout has no place for them, a model either "
    "listens or has the turn"
)


def stream_inputs(eval_set: EvalSet, data: Path | None, limit: int | None) -> Inputs:
    """The streams of a folder, the set's own without one, as rows whose column `folder` says where each lies.

    Raises:
        EvalInputError: there is no such folder, or everything that is wrong with its streams.
    """
    if data is None:
        assert eval_set.prepare is not None
        data, _ = eval_set.prepare()
    if not data.is_dir():
        raise EvalInputError([f"--data {data}: no such folder. {eval_set.how_to_get}"])
    try:
        streams = read_streams(data)
    except DataError as error:
        raise EvalInputError([str(error)]) from error
    if problems := [problem for folder in streams for problem in _sound_problems(folder)]:
        raise EvalInputError(problems)
    rows = tuple(
        Example(stream.id, (Clip(path=str(folder / STEREO)),), "", columns={"folder": str(folder)})
        for folder, stream in streams.items()
    )
    events, sounds = ([file_sha256(folder / name) for folder in streams] for name in (EVENTS, STEREO))
    key, both = (hashlib.sha256("".join(names).encode()).hexdigest() for names in (events, [*events, *sounds]))
    meta = {"data": str(data), "data_sha256": both, "answer_key_sha256": key,
            "version": version_of(eval_set, both, rows), "limit": limit, "problems": []}  # fmt: skip
    return Inputs(eval_set, data, rows[:limit], meta=meta)


def _sound_problems(folder: Path) -> list[str]:
    """What is wrong with a stream's wave, which the examination would find only after hours."""
    try:
        read_stream(folder)
    except DataError as error:
        return [str(error)]
    return []


@dataclass
class StreamExaminer:
    """Puts streams to a session, one after the other."""

    session: DuplexSession
    clips: ClipStore

    def length_problems(self, examples: Sequence[Example]) -> list[str]:
        """Streams that do not fit the model, before any is heard."""
        from covo_rl.duplex.exam import exam_problems
        from covo_rl.duplex.stream_files import read_events

        streams = [read_events(Path(example.columns["folder"]) / EVENTS) for example in examples]
        return [text for stream in streams for text in exam_problems(self.session, stream)]

    def examine(self, examples: Sequence[Example], seconds: Sequence[float]) -> list[Record]:
        """One record per stream, in order."""
        from covo_rl.duplex.exam import examine

        records = []
        for example, length in zip(examples, seconds, strict=True):
            stream, wave_T2 = read_stream(example.columns["folder"])
            result = examine(self.session, stream, wave_T2[:, 0])
            more = {"text_cut": result.text_cut, "dropped_chunks": result.dropped, "seconds": round(length, 3)}
            records.append(stream_record(result.stream, result.z_K.tolist()) | more)
        return records


def stream_record(stream: Any, stop_logits: Sequence[float]) -> Record:
    """What a TimingStream asks, the logits at its decisions, and what the greedy policy does; JSON-ready."""
    import torch

    from covo_rl.duplex.figures import pause_class, timing_figures
    from covo_rl.duplex.rollout import greedy_stop

    z_K = torch.tensor(stop_logits, dtype=torch.float64)
    figures, time = timing_figures([stream], [z_K]), stream.time(greedy_stop(z_K))
    since = stream.turn_end if stream.listening else stream.onset
    right = figures[RIGHT[stream.kind]] == 1.0
    longest = pause_class(max((end - start for start, end in stream.pauses), default=0.0))
    return {
        "id": stream.id,
        "timing_correct": right,
        "verdicts": {"timing": [right]},
        "missing": False,
        "breakdown": {"kind": stream.kind, **({"longest pause": longest} if stream.kind == "pause" else {})},
        "stop_time": time,
        "delay": None if time is None or since is None else time - since,
        "question": asdict(stream),
        "stop_logits": list(stop_logits),
    }


def stream_figures(records: Sequence[Record]) -> dict[str, Any]:
    """Greedy figures, `expected` over sampling, calibration, intervals, and the threshold line, from records alone."""
    import torch

    from covo_rl.duplex.figures import threshold_line, timing_figures
    from covo_rl.duplex.rollout import TimingStream

    names = {field.name for field in fields(TimingStream)}
    questions = [{name: value for name, value in record["question"].items() if name in names} for record in records]
    streams = [TimingStream(**{**row, "pauses": tuple(map(tuple, row["pauses"]))}) for row in questions]
    z = [torch.tensor(record["stop_logits"], dtype=torch.float64) for record in records]
    figures = timing_figures(streams, z)
    line = threshold_line(streams, z)
    counts = {name: sum(figures["streams"].get(kind, 0) for kind in kinds) for name, (_, kinds) in SHARES.items()}
    return {
        **figures,
        "ci95": {name: list(wilson(figures[name] * n, n)) for name, n in counts.items() if n},
        "counts": counts,
        "threshold_line": [{"b": row["b"], **{name: row[name] for name in SHARES}} for row in line],
        "model_back_channels": None,
    }


def write_stream_report(
    inputs: Inputs, records: Sequence[Record], settings: Mapping[str, Any], folder: Path, *, quiet: bool = False
) -> None:
    """Write report.json and report.md; print the tables, unless `quiet`."""
    kinds = {kind: [record for record in records if record["breakdown"]["kind"] == kind] for kind in RIGHT}
    overall = accuracy_of(records, "timing")
    report = {
        "set": inputs.eval_set.name,
        **{name: getattr(inputs.eval_set, name) for name in ("title", "source", "licence")},
        **settings,
        "n": len(records),
        "accuracy": overall["accuracy"],
        "timing": overall,
        "breakdown": {"kind": {
            kind: {"n": len(rows), "timing": accuracy_of(rows, "timing")} for kind, rows in kinds.items() if rows
        }},
        **stream_figures(records),
        "notes": _notes(records),
    }  # fmt: skip
    write_json(folder / "report.json", report)
    text = visible("\n".join(_markdown(report)), LAYOUT)
    write_atomically(folder / "report.md", lambda file: file.write(text + "\n"))
    if not quiet:
        say(text)
        say(f"report: {folder / 'report.json'}")


def _notes(records: Sequence[Record]) -> list[str]:
    notes = [NO_BACK_CHANNELS]
    counts = {
        "have replies whose text outlasts their sound: the rest of it was not said": "text_cut",
        "were too long for the context: their oldest chunks left it": "dropped_chunks",
    }
    for what, name in counts.items():
        if number_of := sum(bool(record[name]) for record in records):
            notes.append(f"{number_of} of {len(records)} streams {what}")
    return notes


def _markdown(report: Mapping[str, Any]) -> list[str]:
    expected = report["expected"]
    rows = [
        [text, interval({"accuracy": report[name], "ci95": report["ci95"].get(name)}), percent(expected[name]),
         report["counts"][name]]
        for name, (text, _) in SHARES.items()
    ]  # fmt: skip
    lines = [f"# {report['title']}", ""]
    lines += table_lines(["%, 95 % Wilson interval", "greedy", "expected over sampling", "streams"], rows)
    delays = [[text, number(report[name]), number(expected[name])] for name, text in DELAYS.items()]
    lines += table_lines(["seconds, by the clock of chunks; sound comes 0.17 s later", "greedy", "expected"], delays)
    if by_pause := report["early_by_pause"]:
        shares = [[name, percent(value), percent(expected["early_by_pause"][name])] for name, value in by_pause.items()]
        lines += ["## Answered early, by the longest pause", ""]
        lines += table_lines(["pause", "greedy %", "expected %"], shares)
    lines += ["## The same model with b taken from the logit of SHIFT (greedy)", ""]
    names = ("early_long_pause", "long_pause_success", "single_turn_success")
    points = [{"b": 0, **report}, *report["threshold_line"]]
    line = [[row["b"], *(percent(row[name]) for name in names)] for row in points]
    lines += table_lines(["b", *(f"{SHARES[name][0]} %" for name in names)], line)
    error = number(report["calibration"]["error"], 3)
    lines += [f"Hazards in silence are off by {error} on average; at 0 they are how often the turn is over.", ""]
    return [*lines, *provenance_lines(report), "", "## Worth knowing", "", *(f"- {note}" for note in report["notes"])]
