"""Streams that lie in folders, recorded or simulated, as a model meets them: beside FeatureWorld, of one's own sound.

    world, taken = take_recorded(family, {"rl_data": "data/duplex/rl", "test_data": "data/duplex/test"})
    world.questions(taken["rl_data"])       of each stream the last question, for RL
    world.lessons(taken["sft_data"])        whole streams, for supervised updates

What is heard are the features of the user's channel by the model's own encoder, computed once per stream, and a
dialogue begins with the system message of a session. `take_recorded` names all that is wrong before anything is done.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from covo_rl.config import ConfigError
from covo_rl.data.files import file_sha256
from covo_rl.data.read import DataError, some
from covo_rl.duplex.data import DuplexStream
from covo_rl.duplex.ids import DuplexIds
from covo_rl.duplex.layout import CHUNK_POSITIONS, ChunkDecision, chunk_ids, system_block
from covo_rl.duplex.plan import PlanError, ReplyPlan, overflow_problem
from covo_rl.duplex.probe import FOLDS, PROBE_AFTER
from covo_rl.duplex.questions import DuplexLesson, TimingQuestion, reply_chunks
from covo_rl.duplex.rollout import TimingStream
from covo_rl.duplex.stream_files import EVENTS, STEREO, read_stereo, read_stream, read_streams
from covo_rl.duplex.targets import coded_replies, is_answered, last_question, plan_stream
from covo_rl.duplex.trunk import Trunk, listening_trunk, speaking_trunk
from covo_rl.duplex.waves import hear
from covo_rl.models.covo_audio.persona import SPOKEN_SYSTEM
from covo_rl.models.covo_audio.streaming_encoder import StreamingEncoder
from covo_rl.models.text import text_ids
from covo_rl.policy.rows import evaluation_mode
from covo_rl.prompt import position_limit
from covo_rl.types import UserError

if TYPE_CHECKING:
    from covo_rl.models.base import AudioFamily

#: folder of a stream -> the stream, as `read_streams` gives them
Recorded = Mapping[Path, DuplexStream]
#: the option whose streams are supervised lessons, whole; those of others ask one question each
LESSONS, TEST = "sft_data", "test_data"
#: lines of one option's problems that are shown
SHOWN_PROBLEMS = 20


@dataclass(frozen=True, kw_only=True)
class RecordedStream(TimingStream):
    """The question of a stream that lies in `folder`; `content` is a sha256 of its files.

    `said`: (channel, start, end, text) of every fragment of speech and back-channel.
    """

    folder: str
    content: str
    said: tuple[tuple[str, float, float, str], ...] = ()

    def user_channel(self) -> np.ndarray:
        """What the user says, (T,) float32 at 24 kHz; raises OSError where the file can no longer be read."""
        try:
            return read_stereo(Path(self.folder) / STEREO)[:, 0]
        except DataError as error:
            raise OSError(str(error)) from error


@dataclass(frozen=True)
class RecordedWorld:
    """How streams of folders are written for a model: `prefix` before the first chunk, `limit` positions at most."""

    family: AudioFamily
    ids: DuplexIds
    prefix: tuple[int, ...]
    encoder: StreamingEncoder
    limit: int | None

    @classmethod
    def of(cls, family: AudioFamily) -> RecordedWorld:
        """For this model; raises DuplexIdsError or DuplexSectionError where it is not of full duplex."""
        ids = DuplexIds.of(family)
        limit = position_limit(family.model.config)
        return cls(family, ids, system_block(family, SPOKEN_SYSTEM, ids), StreamingEncoder.of(family.model), limit)

    def questions(self, streams: Recorded) -> list[TimingQuestion]:
        """Of each stream the last question; what was said before is its context."""
        return [self._question(folder, stream) for folder, stream in streams.items()]

    def lessons(self, streams: Recorded) -> list[DuplexLesson]:
        """Each stream whole: the model answers and stops where it does there."""
        return [self._lesson(folder, stream) for folder, stream in streams.items()]

    def plan(self, stream: DuplexStream) -> tuple[list[ReplyPlan], list[ChunkDecision]]:
        """As `plan_stream` has it, in this model's ids."""
        return plan_stream(stream, self.ids, partial(text_ids, self.family.tokenizer))

    def path(self, stream: DuplexStream) -> list[int]:
        """All ids of a stream, up to the BREAK of its last reply where the user's last turn is not answered: the rest
        would teach silence.

        Raises:
            DataError, PlanError: its replies cannot be laid out, or there are none.
        """
        replies, plan = self.plan(stream)
        if not replies:
            raise PlanError("the model never speaks in it: it would teach silence")
        taught = plan if is_answered(stream) else plan[: replies[-1].end + 1]
        return [*self.prefix, *chunk_ids(taught, self.ids)]

    def ask(self, stream: DuplexStream) -> tuple[TimingStream, Trunk]:
        """What a stream asks, as far as it has chunks, and the path of ids up to the last decision of that.

        Raises:
            DataError, PlanError: it asks nothing, or its replies cannot be laid out.
        """
        last, (_, plan) = answerable_question(stream), self.plan(stream)
        first, end = last.first_chunk, min(last.first_chunk + last.decisions, len(plan))
        if last.listening:
            # a reply whose text outlasts its codes ends later than its sound; after a last turn there is none
            spoken = [chunk for chunk, decision in enumerate(plan) if decision.token != self.ids.think]
            first = max([first, *(chunk + 1 for chunk in spoken)])
        if end <= first:
            raise PlanError(f"its last question, {last.kind}, has no decision: chunk {first} would hold the first, "
                            f"and there are {len(plan)} chunks")  # fmt: skip
        answer = stream.answer if last.listening else None
        asked = replace(last, first_chunk=first, decisions=end - first, answer=answer)
        # of a reply the chunk before is that of SHIFT, which speaking_trunk writes
        prefix = (*self.prefix, *chunk_ids(plan[: first if last.listening else first - 1], self.ids))
        if last.listening:
            return asked, listening_trunk(prefix, asked.decisions, self.ids)
        return asked, speaking_trunk(prefix, 0, reply_chunks(plan[first:end], self.ids), self.ids)

    def _question(self, folder: Path, stream: DuplexStream) -> TimingQuestion:
        asked, trunk = self.ask(stream)
        content = recorded_sha256([folder])
        recorded = RecordedStream(**vars(asked), folder=str(folder), content=content, said=_said(stream))
        return TimingQuestion(recorded, trunk, self._features(folder)[: len(trunk.places)])

    def _lesson(self, folder: Path, stream: DuplexStream) -> DuplexLesson:
        return DuplexLesson.of(self.path(stream), len(self.prefix), self._features(folder), self.ids)

    def _features(self, folder: Path) -> torch.Tensor:
        """(chunks, D), of a last chunk that is not whole too."""
        with evaluation_mode(self.family.model):
            return hear(self.encoder, read_stereo(folder / STEREO)[:, 0].copy())


def answerable_question(stream: DuplexStream) -> TimingStream:
    """What a stream is about.

    Raises:
        DataError, PlanError: it asks nothing, or ends with the user's turn.
    """
    last = last_question(stream)
    if last.listening and last.decision_of((last.turn_end or 0.0) + PROBE_AFTER) >= last.decisions:
        raise PlanError("it ends with the user's turn: an answer needs seconds of sound after it, 4 are good")
    return last


def _said(stream: DuplexStream) -> tuple[tuple[str, float, float, str], ...]:
    """The text of a turn stands at its first fragment."""
    said = []
    for turn in stream.turns:
        for number, (start, end) in enumerate(turn.fragments or [(turn.start, turn.end)]):
            said.append((turn.channel, start, end, "" if number else turn.text))
    said += [(mark.channel, mark.start, mark.end, mark.text or "") for mark in stream.marks("back_channel")]
    return tuple(sorted(said, key=lambda part: part[1:3]))


def recorded_sha256(folders: Iterable[Path]) -> str:
    """One sha256 over both files of each of these streams."""
    digests = [file_sha256(folder / name) for folder in folders for name in (EVENTS, STEREO)]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def take_recorded(
    family: AudioFamily, folders: Mapping[str, str], *, allow_overlap: bool = False, answer_chunks: int = 0
) -> tuple[RecordedWorld, dict[str, Recorded]]:
    """The streams of each option's folder, and how this model meets them.

    `answer_chunks`: of replies to their questions that will be decoded, and compared with the answers expected there.

    Raises:
        ConfigError: all that is wrong with any of them, or the model.
    """
    taken: dict[str, Recorded] = {}
    problems: list[str] = []
    world = None
    try:
        world = RecordedWorld.of(family)
    except (UserError, ValueError) as error:
        problems.append(str(error))
    for name, folder in folders.items():
        try:
            taken[name] = read_streams(folder)
            replies = None if name == LESSONS else answer_chunks
            problems += [f"{name}: {line}" for line in _problems(world, taken[name], replies)]
        except DataError as error:
            problems.append(f"{name}: {error}")
    if TEST in taken:
        problems += _shortage(taken[TEST])
        others = {name: each for name, each in taken.items() if name != TEST}
        problems += [] if allow_overlap else _overlaps(others, taken[TEST])
    if problems or world is None:
        raise ConfigError(problems)
    return world, taken


def _problems(world: RecordedWorld | None, streams: Recorded, answer_chunks: int | None) -> list[str]:
    """What is wrong, one line each, with the folders of which it is; without `answer_chunks` they are lessons."""
    wrong: dict[str, list[str]] = {}
    for folder, stream in streams.items():
        if what := _fault(world, folder, stream, answer_chunks):
            wrong.setdefault(what, []).append(folder.name)
    lines = [f"{some(names)}: {what}" for what, names in wrong.items()]
    if len(lines) > SHOWN_PROBLEMS:
        lines[SHOWN_PROBLEMS:] = [f"... and {len(lines) - SHOWN_PROBLEMS} more kinds of problems"]
    if world is not None and not wrong:
        replies = [reply for stream in streams.values() for reply in world.plan(stream)[0]]
        what = overflow_problem(sum(reply.overflows for reply in replies), len(replies))
        lines += [what] if what else []
    return lines


def _fault(world: RecordedWorld | None, folder: Path, stream: DuplexStream, answer_chunks: int | None) -> str:
    """What is wrong with one stream, "" where nothing is; without a world as far as no model is needed."""
    answers = 0
    try:
        coded_replies(stream)
        if answer_chunks is not None and answerable_question(stream).listening:
            answers = answer_chunks
        if answers and not (stream.answer or "").strip():
            return "it has no `answer`, with which is compared what the model says: write it, or simulate it again"
        read_stream(folder)
        if world is None:
            return ""
        length = len(world.path(stream) if answer_chunks is None else world.ask(stream)[1].ids)
        length, limit = length + CHUNK_POSITIONS * answers, world.limit
    except DataError as error:
        return "; ".join(problem.what for problem in error.problems)
    except (UserError, ValueError) as error:  # ValueError: a tokenizer that cannot be used
        return str(error).replace("\n", "; ")
    return f"its {length} positions are more than the model's {limit}: cut it" if limit and length > limit else ""


def _shortage(streams: Recorded) -> list[str]:
    """Which kinds of questions the figures lack."""
    counts = Counter(map(_kind, streams.values()))
    needed = {"pause": FOLDS, "single": 1}
    return [
        f"{TEST}: {counts[kind]} streams end with a question of kind {kind}; the figures need {count} or more"
        for kind, count in needed.items() if counts[kind] < count
    ]  # fmt: skip


def _kind(stream: DuplexStream) -> str:
    try:
        return answerable_question(stream).kind
    except UserError:
        return ""


def _overlaps(others: Mapping[str, Recorded], test: Recorded) -> list[str]:
    """What is learnt from and tested on: streams, dialogues that they are made of, or sounds under another name."""
    held_out = {name for folder, stream in test.items() for name in _names(folder, stream)}
    lines = []
    for option, streams in others.items():
        shared = [folder.name for folder, stream in streams.items() if held_out & _names(folder, stream)]
        if shared:
            lines.append(f"{option} and {TEST} have streams, dialogues or sounds in common: {some(shared)} of "
                         f"{option}; --allow_overlap goes on")  # fmt: skip
    return lines


def _names(folder: Path, stream: DuplexStream) -> set[str]:
    """What a stream has in common with another that is made of the same."""
    return {stream.id, *stream.source, file_sha256(folder / STEREO)}
