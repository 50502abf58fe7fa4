"""What a session leaves behind: the two files of a stream (stream_files.py), and session.json to build it again.

stereo.wav     left what was heard; right what was said, where it sounds if computing took no time, or when it did
events.json    the model's turns; the user's are not known
session.json   system ids, every chunk's decision and codes, latency
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from covo_rl.data.files import RecordError, write_json
from covo_rl.duplex.data import DuplexStream, DuplexTurn
from covo_rl.duplex.grid import CHUNK_SAMPLES, LOOK_AHEAD_SECONDS, decision_time, sound_start
from covo_rl.duplex.ids import DuplexIds, TokenKind
from covo_rl.duplex.latency import ChunkCost, real_time_factors, reply_latencies
from covo_rl.duplex.layout import ChunkDecision, chunk_ids
from covo_rl.duplex.machine import LayoutError
from covo_rl.duplex.sound import MIN_RANGE, two_channels
from covo_rl.prompt import CUT
from covo_rl.speech.grid import RATE

SESSION = "session.json"


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


@dataclass(frozen=True)
class ReplySound:
    """A reply with codes as it is heard: wave (T,) at 24 kHz from sample `start` on; whether it was `interrupted`."""

    reply: SpokenReply
    start: int
    wave_T: np.ndarray
    interrupted: bool = False

    @property
    def end(self) -> int:
        return self.start + len(self.wave_T)


def heard_chunks(wave_T: np.ndarray) -> np.ndarray:
    """(C,) bool: the whole chunks in which somebody is heard, louder than halfway, in dB, from the quietest twentieth
    of chunks, at most 60 dB down, to the loudest. Of a wave of one loudness nobody can say, so none."""
    chunks_CT = wave_T[: len(wave_T) // CHUNK_SAMPLES * CHUNK_SAMPLES].reshape(-1, CHUNK_SAMPLES)
    level_C = 20 * np.log10(np.sqrt(np.mean(np.square(chunks_CT, dtype=np.float64), axis=1)) + 1e-7)
    if not len(level_C):
        return np.zeros(0, bool)
    high = level_C.max()
    low = max(np.quantile(level_C, 0.05), high - 60)
    return level_C > (low + high) / 2 if high - low >= MIN_RANGE else np.zeros(len(level_C), bool)


def in_heard(chunk: int, heard_C: np.ndarray) -> bool:
    """Whether somebody is heard in this chunk or the one before: a BREAK there gives way."""
    return bool(heard_C[max(chunk - 1, 0) : chunk + 1].any())


def was_interrupted(reply: SpokenReply, decisions: Sequence[ChunkDecision], heard_C: np.ndarray) -> bool:
    """Whether a reply did not end by itself: the user was heard at its BREAK, a limit made it, or the stream ended."""
    return reply.end is None or decisions[reply.end].forced or in_heard(reply.end, heard_C)


def stereo(heard_T: np.ndarray, sounds: Sequence[ReplySound]) -> np.ndarray:
    """(T, 2) float32 at 24 kHz: left `heard_T`, right the replies; as long as the longer."""
    user_T, model_T = np.zeros((2, max([len(heard_T), *(sound.end for sound in sounds)])), np.float32)
    user_T[: len(heard_T)] = heard_T
    for sound in sounds:
        model_T[sound.start : sound.end] = sound.wave_T
    return two_channels(user_T, model_T)


def session_stream(
    name: str, samples: int, sounds: Iterable[ReplySound], tokenizer: Any, *, source: str, seed: int,
    language: str | None = None,
) -> DuplexStream:  # fmt: skip
    """The stream of a session's stereo wave: the model's turns. The user's are not known to it."""
    turns = []
    for sound in sounds:
        start, end = sound.start / RATE, sound.end / RATE
        text = tokenizer.decode(list(sound.reply.text_ids)).replace(CUT, "\ufffd")  # no file may hold that one
        stop = end if sound.interrupted else None
        turns.append(DuplexTurn("model", start, end, text, codes=sound.reply.codes, interrupted_at=stop))
    return DuplexStream(name, samples / RATE, language, tuple(turns), source=(source,), seed=seed)


def latency_record(
    replies: Sequence[SpokenReply], costs: Sequence[ChunkCost], vocoder_seconds: float | None
) -> dict[str, Any]:
    """Latency of a session: look-ahead, real-time factors, when replies began and ended."""
    shifts = [reply.shift for reply in replies if reply.codes]
    breaks = [reply.end for reply in replies if reply.end is not None]
    return {
        "look_ahead": LOOK_AHEAD_SECONDS, "vocoder": vocoder_seconds, "real_time_factors": real_time_factors(costs),
        **reply_latencies(shifts, breaks, costs, vocoder_seconds),
    }  # fmt: skip


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
