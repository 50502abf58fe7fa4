"""Streams as rows: two channels and what is true of them, read and checked once, read again when the task draws them.

store = StreamStore("data/duplex/sft", vocabulary)      # every problem of every stream, or none
store[7].wave()                                         # the user's channel
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from covo_rl.data.read import DataError, Problem, broken, printable
from covo_rl.data.shards import row_digest
from covo_rl.duplex.data import DuplexStream
from covo_rl.duplex.ids import DuplexIdsError
from covo_rl.duplex.plan import PlanError, ReplyPlan, overflow_problem
from covo_rl.duplex.stream_files import EVENTS, STEREO, checked_streams, read_events, read_stream
from covo_rl.duplex.targets import plan_stream
from covo_rl.resolve import meant
from covo_rl.supervised.pretrain.document import Vocabulary
from covo_rl.supervised.pretrain.full_duplex import duplex_ids
from covo_rl.types import Clip


@dataclass(frozen=True)
class StreamRow:
    """A stream and the folder that holds its two files."""

    stream: DuplexStream
    folder: Path

    @property
    def id(self) -> str:
        """The stream's."""
        return self.stream.id

    @property
    def clip(self) -> Clip:
        """The file of both channels."""
        return Clip(path=str(self.folder / STEREO))

    @property
    def recordings(self) -> dict[str, StreamRow]:
        """What its document hears, by the name that the clip has."""
        return {self.id: self}

    def wave(self) -> np.ndarray:
        """The user's channel at 24 kHz, (T,) float32.

        Raises:
            DataError: everything that is wrong with either file.
        """
        return np.ascontiguousarray(read_stream(self.folder)[1][:, 0])


class StreamStore:
    """The streams of folders, of which only places are in memory. Making it reads and checks all events.

    Args:
        data: a folder of streams, as `covo-rl data simulate-duplex` writes OUT/sft; a pattern of such, or several.
        tokenizer: digest of the one that must have made the codes; None: any.

    `replies`: of all streams; `padded`: those whose text outlasts their codes.

    Raises:
        DataError: every problem of every stream.
    """

    def __init__(self, data: str | Path | Sequence[str | Path], vocabulary: Vocabulary, tokenizer: str | None = None):
        self.name = str(data) if isinstance(data, (str, os.PathLike)) else ", ".join(map(str, data))
        self.tokenizers: dict[str | None, str] = {}  # of codes -> the first stream that names it
        self.replies = self.padded = 0
        self._folders = stream_folders(data)
        self._digests = np.fromiter((_digest(Path(folder)) for folder in self._folders), np.uint64)
        #: of the content of all events
        self.fingerprint = hashlib.sha256(self._digests.tobytes()).hexdigest()[:16]
        problems: list[Problem] = []
        for folder, stream in checked_streams({name: Path(name) for name in self._folders}, problems):
            wrong = self._stream_problems(stream, vocabulary, tokenizer)
            problems += [Problem(str(folder), what) for what in wrong]
        if what := overflow_problem(self.padded, self.replies):
            problems.append(Problem("all streams", what))
        if problems:
            raise DataError(self.name, problems)

    def __len__(self) -> int:
        return len(self._folders)

    def __getitem__(self, index: int) -> StreamRow:
        """A stream.

        Raises:
            DataError: its events are others now.
        """
        folder = Path(self._folders[index])
        if _digest(folder) != int(self._digests[index]):
            what = "it has changed since it was read and checked; put the old file back, or start anew"
            raise broken(folder / EVENTS, what)
        return StreamRow(read_events(folder / EVENTS), folder)

    def heard_problems(self, rank: int = 0, world: int = 1) -> list[Problem]:
        """What is wrong with the recordings of a rank's share of the streams, each of which is read."""
        problems = []
        for index in range(rank, len(self), world):
            row = self[index]
            try:
                row.wave()
            except DataError as error:
                problems += [Problem(row.id, f"{error.source}: {problem.what}") for problem in error.problems]
        return problems

    def _stream_problems(self, stream: DuplexStream, vocabulary: Vocabulary, tokenizer: str | None) -> Iterator[str]:
        """What keeps a stream from being written; its replies are counted."""
        if any(turn.codes is not None for turn in stream.turns_of("model")):
            self.tokenizers.setdefault(stream.tokenizer, stream.id)
            if tokenizer is not None and stream.tokenizer != tokenizer:
                yield f"its codes are of tokenizer {printable(stream.tokenizer)}, not of {tokenizer}: encode them again"
        plans: list[ReplyPlan] = []
        try:
            plans, _ = plan_stream(stream, duplex_ids(vocabulary), vocabulary.text)
        except DataError as error:
            yield from (problem.what for problem in error.problems)
        except (PlanError, DuplexIdsError) as error:
            yield from str(error).splitlines()
        self.replies += len(plans)
        self.padded += sum(plan.overflows for plan in plans)


def stream_folders(data: str | Path | Sequence[str | Path]) -> list[str]:
    """The folders of the streams that lie in one or several folders, or in those of a pattern, each in sorted order.

    Raises:
        DataError: there are none.
    """
    found: dict[str, None] = {}
    for name in [data] if isinstance(data, (str, os.PathLike)) else data:
        parents = [str(name)] if Path(name).is_dir() else sorted(filter(os.path.isdir, glob.glob(str(name))))
        if not parents:
            raise broken(str(name), f"no such folder or pattern of folders (looked in {Path.cwd()}){meant(Path(name))}")
        streams = [str(path.parent) for parent in parents for path in sorted(Path(parent).glob(f"*/{EVENTS}"))]
        if not streams:
            what = f"no streams: expected folders that hold {STEREO} and {EVENTS}, as those in OUT/sft of"
            raise broken(str(name), f"{what} `covo-rl data simulate-duplex --output OUT`")
        found |= dict.fromkeys(streams)
    return list(found)


def _digest(folder: Path) -> int:
    try:
        return row_digest((folder / EVENTS).read_bytes())
    except OSError as error:
        raise broken(folder / EVENTS, f"cannot be read: {error}") from error
