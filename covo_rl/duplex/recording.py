"""What a session leaves behind: a wav of both channels, events.json of its turns, session.json to build it again.

stereo.wav     24 kHz, 16 bit; left what was heard, right what was said, where it sounds if computing took no time
events.json    the form of all streams: {"id", "seconds", "language", "turns", "events", "source", "seed"}
session.json   system ids, every chunk's decision and codes, latency
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from covo_rl.data.files import RecordError, write_json
from covo_rl.duplex.grid import LOOK_AHEAD_SECONDS, decision_time, sound_start
from covo_rl.duplex.ids import DuplexIds, TokenKind
from covo_rl.duplex.latency import ChunkCost, real_time_factors, reply_latencies
from covo_rl.duplex.layout import ChunkDecision, chunk_ids
from covo_rl.duplex.machine import LayoutError
from covo_rl.speech.grid import CODE_SAMPLES, RATE

STEREO, EVENTS, SESSION = "stereo.wav", "events.json", "session.json"


@dataclass(frozen=True)
class SpokenReply:
    """A reply of a session: chunks of its SHIFT, its first codes and its BREAK (None: the stream ended first)."""

    shift: int
    end: int | None
    text_ids: tuple[int, ...]
    codes: tuple[int, ...]

    @property
    def start_sample(self) -> int:
        """Where it begins to sound, at 24 kHz."""
        return sound_start(self.shift + 1)


def spoken_replies(decisions: Sequence[ChunkDecision], ids: DuplexIds) -> list[SpokenReply]:
    """The replies of a session's chunks, in order; one of SHIFT and BREAK alone has no codes."""
    replies = []
    shift: int | None = None
    text: list[int] = []
    codes: list[int] = []
    for chunk, decision in enumerate(decisions):
        kind = ids.kind(decision.token)
        if kind is TokenKind.SHIFT:
            shift, text, codes = chunk, [], []
        text += [decision.token] if kind is TokenKind.TEXT else []
        codes += decision.codes
        if kind is TokenKind.BREAK and shift is not None:
            replies.append(SpokenReply(shift, chunk, tuple(text), tuple(codes)))
            shift = None
    return [*replies, *([] if shift is None else [SpokenReply(shift, None, tuple(text), tuple(codes))])]


def stereo(
    heard_T: np.ndarray, replies: Iterable[SpokenReply], say: Callable[[Sequence[int]], np.ndarray]
) -> np.ndarray:
    """(T, 2) float32 at 24 kHz: left `heard_T`, right what `say` makes of each reply's codes; as long as the longer."""
    waves = [(reply.start_sample, say(reply.codes)[: len(reply.codes) * CODE_SAMPLES]) for reply in replies]
    length = max([len(heard_T), *(start + len(wave) for start, wave in waves if len(wave))])
    both_T2 = np.zeros((length, 2), np.float32)
    both_T2[: len(heard_T), 0] = heard_T
    for start, wave in waves:
        both_T2[start : start + len(wave), 1] = wave
    return both_T2


def stream_events(
    name: str, samples: int, replies: Iterable[SpokenReply], tokenizer: Any, *, source: str, seed: int,
    language: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The content of events.json: the model's turns. The user's are not known; somebody else has to say them."""
    turns = []
    for reply in (reply for reply in replies if reply.codes):
        start = reply.start_sample / RATE
        turns.append({
            "channel": "model", "start": start, "end": start + len(reply.codes) * CODE_SAMPLES / RATE,
            "text": tokenizer.decode(list(reply.text_ids)), "codes": list(reply.codes),
        })  # fmt: skip
    return {
        "id": name, "seconds": samples / RATE, "language": language, "turns": turns, "events": [], "source": [source],
        "seed": seed,
    }  # fmt: skip


def latency_record(
    replies: Sequence[SpokenReply],
    costs: Sequence[ChunkCost],
    vocoder_seconds: float | None,
    late: Sequence[float] = (),
) -> dict[str, Any]:
    """Latency of a session: look-ahead, real-time factors, when replies began and ended; of a stream in real time also
    how late each chunk's events came, in seconds after its decision's time."""
    shifts = [reply.shift for reply in replies if reply.codes]
    breaks = [reply.end for reply in replies if reply.end is not None]
    record = {
        "look_ahead": LOOK_AHEAD_SECONDS, "vocoder": vocoder_seconds, "real_time_factors": real_time_factors(costs),
        **reply_latencies(shifts, breaks, costs, vocoder_seconds),
    }  # fmt: skip
    if late:
        median, p95 = np.percentile(late, [50, 95])
        record["late"] = {"median": float(median), "p95": float(p95), "max": max(late)}
    return record


def write_session(
    path: Path, system_ids: Sequence[int], decisions: Sequence[ChunkDecision], latency: Mapping[str, Any]
) -> None:
    """Write session.json."""
    rows = [
        {"time": decision_time(chunk), "token": decision.token}
        | ({"codes": list(decision.codes)} if decision.codes else {}) | ({"forced": True} if decision.forced else {})
        for chunk, decision in enumerate(decisions)
    ]  # fmt: skip
    write_json(path, {"system_ids": list(system_ids), "chunks": rows, "latency": latency}, indent=1)


def read_session(path: Path, ids: DuplexIds) -> tuple[tuple[int, ...], list[ChunkDecision]]:
    """System ids and decisions of a session.json.

    Raises:
        RecordError: it is no such file, or its chunks are no dialogue in these ids.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path} cannot be read, was it cut? {error}") from error
    system, rows = (record.get("system_ids"), record.get("chunks")) if isinstance(record, dict) else (None, None)
    if not _whole_numbers(system) or not isinstance(rows, list):
        raise RecordError(f"{path}: expected system_ids and chunks of a session of full duplex")
    decisions = []
    for chunk, row in enumerate(rows):
        fits = isinstance(row, dict) and _whole_numbers([row.get("token")]) and _whole_numbers(row.get("codes", []))
        if not fits:
            raise RecordError(f"{path}: chunk {chunk} has no token, or codes that are no list of whole numbers")
        decisions.append(ChunkDecision(row["token"], tuple(row.get("codes", [])), row.get("forced") is True))
    try:
        chunk_ids(decisions, ids)
    except LayoutError as error:
        raise RecordError(f"{path}: {error}; is it a session of this model?") from error
    return tuple(system or ()), decisions


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
