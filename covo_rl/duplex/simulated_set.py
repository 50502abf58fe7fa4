"""A folder of simulated streams: OUT/sft and OUT/rl from one part of the dialogues, OUT/test from the other. No torch.

OUT/sft/000000/stereo.wav, events.json     OUT/statistics.json
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from covo_rl.audio import AudioError
from covo_rl.data.files import fill_folder, write_json
from covo_rl.data.read import DataError, Problem
from covo_rl.duplex.data import DuplexStream
from covo_rl.duplex.digits import digit_dialogues
from covo_rl.duplex.presets import PRESETS
from covo_rl.duplex.simulate import Simulator
from covo_rl.duplex.sources import SourceDialogue, Split, Surroundings, split_dialogues
from covo_rl.duplex.stream_files import write_stream
from covo_rl.resolve import cache_folder
from covo_rl.types import UserError

STATISTICS = "statistics.json"
#: preset -> the part of the dialogues that it is made of
PART: dict[str, Split] = {"sft": "train", "rl": "train", "test": "test"}


class SimulationError(UserError, ValueError):
    """A folder that is there already, or a preset that does not exist."""


def write_simulated_set(
    output: Path, dialogues: Sequence[SourceDialogue], seed: int, *, presets: Sequence[str] = tuple(PRESETS),
    test_share: float = 0.2, around: Surroundings | None = None, progress: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Simulate the presets and write them, whole or not at all; returns what OUT/statistics.json holds.

    Args:
        around: recorded back-channels and echo; its dialogues are those of the part.

    Raises:
        SimulationError: the folder is not empty, or no preset has the name.
        DataError, SplitError: dialogues that cannot be used or split; a recording that cannot be read.
    """
    if strange := [name for name in presets if name not in PRESETS]:
        raise SimulationError(f"no preset is called {strange[0]!r}; there are {', '.join(PRESETS)}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SimulationError(f"{output} is there already: name a new folder")
    parts = split_dialogues(dialogues, test_share, seed)
    statistics: dict[str, Any] = {"seed": seed, "dialogues": {}, "speakers": {}}
    for part, members in parts.items():
        statistics["dialogues"][part] = [dialogue.id for dialogue in members]
        statistics["speakers"][part] = sorted({name for dialogue in members for name in dialogue.speakers})

    def write(partial: Path) -> None:
        for name in presets:
            members = parts[PART[name]]
            settings = replace(around, dialogues=members) if around else Surroundings(members)
            simulator = Simulator(members, PRESETS[name], seed, settings)
            streams = _write_streams(partial / name, simulator)
            statistics[name] = stream_statistics(streams) | {"missed": dict(simulator.missed)}
            progress(f"{name}: {len(streams)} streams, {statistics[name]['hours']:.2f} h")
        write_json(partial / STATISTICS, statistics)

    if output.is_dir():
        output.rmdir()  # it is empty, and only one that is not there is filled
    fill_folder(output, write)
    return statistics


def builtin_test_streams(dialogues: int) -> Path:
    """The folder of the test preset's streams of so many dialogues of digits, by voices that train nothing: rendered on
    first use, again whenever what renders them is another."""
    here = Path(__file__).parent
    sources = [path.read_bytes() for room in (here, here.parent / "synth") for path in sorted(room.glob("*.py"))]
    digest = hashlib.sha256(b"".join(sources)).hexdigest()[:8]
    members = digit_dialogues("test", dialogues)
    simulator = Simulator(members, PRESETS["test"], 0, Surroundings(members))
    folder = cache_folder() / f"duplex-test-{digest}-{dialogues}"
    return fill_folder(folder, lambda partial: _write_streams(partial, simulator))


def _write_streams(folder: Path, simulator: Simulator) -> list[DuplexStream]:
    streams: list[DuplexStream] = []
    try:
        for stream, wave_T2 in simulator.streams():
            write_stream(folder / f"{len(streams):06d}", stream, wave_T2)
            streams.append(stream)
    except AudioError as error:
        raise DataError("dialogues", [Problem("recording", str(error))]) from error
    return streams


def stream_statistics(streams: Iterable[DuplexStream]) -> dict[str, Any]:
    """Counts, shares and the 10th, 50th and 90th percentiles of lengths, in seconds, of what streams hold.

    `gap`: from the end of the user's turn to the sound of the reply, of those replies that follow one in silence.
    """
    streams = list(streams)
    users = [turn for stream in streams for turn in stream.turns_of("user")]
    replies = [turn for stream in streams for turn in stream.turns_of("model")]
    marks = Counter(mark.type for stream in streams for mark in stream.events)
    pauses = [pause for turn in users for pause in turn.pauses]
    return {
        "streams": len(streams),
        "hours": sum(stream.seconds for stream in streams) / 3600,
        "languages": dict(Counter(stream.language or "unknown" for stream in streams)),
        "user_turns": len(users),
        "replies": len(replies),
        "interrupted": sum(turn.interrupted_at is not None for turn in replies),
        "turns_with_pause": sum(bool(turn.pauses) for turn in users),
        "events": dict(marks),
        "stream_seconds": _spread(stream.seconds for stream in streams),
        "turn_seconds": _spread(turn.end - turn.start for turn in users),
        "reply_seconds": _spread(turn.end - turn.start for turn in replies),
        "pause_seconds": _spread(end - start for start, end in pauses),
        "gap_seconds": _spread(gap for stream in streams for gap in _gaps(stream)),
        "back_channel_seconds": _spread(
            mark.end - mark.start for stream in streams for mark in stream.marks("back_channel")
        ),
        "overlap_share": sum(map(_overlap, streams)) / max(sum(stream.seconds for stream in streams), 1e-9),
    }


def _spread(values: Iterable[float]) -> dict[str, float] | None:
    numbers = list(values)
    if not numbers:
        return None
    return dict(zip(("p10", "p50", "p90"), np.round(np.quantile(numbers, (0.1, 0.5, 0.9)), 4).tolist(), strict=True))


def _gaps(stream: DuplexStream) -> Iterable[float]:
    before = None
    for turn in stream.turns:
        if turn.channel == "model" and before is not None and before.channel == "user":
            yield turn.start - before.end
        before = turn


def _overlap(stream: DuplexStream) -> float:
    """Seconds in which both speak."""
    return sum(
        max(min(user.end, reply.end) - max(user.start, reply.start), 0.0)
        for user in stream.turns_of("user") for reply in stream.turns_of("model")
    )  # fmt: skip
