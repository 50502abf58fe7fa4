"""A model in a live session over a benchmark's recordings: when does it speak, and what does it say?

    recording -> session -> the model's turns: start, end, text, codes (a record) -> a reply with `turns`, and its sound

A session hears a recording as it is, and ends with it: what the model says lies on the recording's own clock. Rows of
one recording (the turns of a dialogue of MTR-DuplexBench) are of one session.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from covo_rl.evaluate.cascade import is_cascade
from covo_rl.evaluate.inputs import count_rows
from covo_rl.evaluate.records import Record
from covo_rl.evaluate.speech.inputs import SpeechInputs
from covo_rl.evaluate.speech.rows import GivenReply
from covo_rl.evaluate.speech.voiced import sound_files, voiced_codes
from covo_rl.evaluate.through_duplex import bounded_session, heard_wave, without_use
from covo_rl.types import Example

if TYPE_CHECKING:
    from covo_rl.audio import ClipStore
    from covo_rl.duplex.session import DuplexSession
    from covo_rl.evaluate.answer import PolicyAnswerer
    from covo_rl.evaluate.runner import Request

#: options of prompts and of several replies, which one session has no use for
_OF_REPLIES = ("speech_mode", "num_generations")


def is_live(inputs: SpeechInputs) -> bool:
    """Whether the rows ask when a model speaks, so that it must hear them in a live session."""
    return all(is_live_kind(row.kind) for row in inputs.rows)


def is_live_kind(kind: str) -> bool:
    """Whether a task kind is about when a model speaks."""
    return kind.startswith(("fdb_", "mtr_"))


def live_problems(request: Request, inputs: SpeechInputs) -> list[str]:
    """Why the model cannot hear these rows in a live session, before anything is loaded."""
    from covo_rl.models import model_config
    from covo_rl.models.builtin import resolve_model

    what = f"--set {inputs.speech_set.name}"
    mute = [row.name for row in inputs.rows if not row.clips]
    problems = [f"{what}: a session hears recordings, and there is none in {count_rows(mute)}"] if mute else []
    if is_cascade(request.model):
        return [*problems, f"--model {request.model}: {what} is a live session, and a cascade cannot take turns"]
    if model_config(resolve_model(str(request.model))).get("duplex") is None:
        problems.append(
            f"--model {request.model}: {what} is a live session, and this model cannot take turns: its config.json has "
            "no section duplex; train one that covo-rl duplex prepare has made, or give --predictions"
        )
    return [*problems, *without_use(request, _OF_REPLIES, f"{what} listens to a live session")]


@dataclass
class LiveExaminer:
    """Puts recordings to a session, one after the other. `seed`: of its draws, where it is not greedy."""

    session: DuplexSession
    clips: ClipStore
    seed: int = 0
    _last: tuple[tuple[str, ...], Record] | None = None

    @classmethod
    def of(cls, answerer: PolicyAnswerer, request: Request) -> LiveExaminer:
        """Raises EvalInputError, CodesError: a turn does not fit the context, the voice is another model's."""
        session = bounded_session(answerer.policy, request.rollout_config(), greedy=request.greedy)
        if request.voice:
            from covo_rl.speech.replies import voice_at

            voice_at(request.voice).fit(session.ids.num_codes)
        return cls(session, answerer.clips, request.seed)

    def examine(self, examples: Sequence[Example], seconds: Sequence[float]) -> list[Record]:
        """One record per row, in order: `turns` of the model, and how many `samples` (24 kHz) its recording has."""
        records = []
        for example, length in zip(examples, seconds, strict=True):
            keys = tuple(map(self.clips.key, example.clips))
            if self._last is None or self._last[0] != keys:
                self._last = keys, self._listen(heard_wave(example, self.clips), keys)
            records.append({"id": example.id, "missing": False, **self._last[1], "seconds": round(length, 3)})
        return records

    def _listen(self, wave_T: np.ndarray, keys: Sequence[str]) -> Record:
        from covo_rl.duplex.data import stream_content
        from covo_rl.duplex.grid import CHUNK_SAMPLES
        from covo_rl.duplex.recording import (
            ReplySound,
            heard_chunks,
            session_stream,
            spoken_replies,
            was_interrupted,
        )
        from covo_rl.duplex.sources import seeded
        from covo_rl.speech.grid import CODE_SAMPLES

        session = self.session
        session.seed = int(seeded(self.seed, *keys).integers(2**62))
        session.reset()
        events = []
        for start in range(0, len(wave_T), CHUNK_SAMPLES):
            events += session.push(wave_T[start : start + CHUNK_SAMPLES])
        events += session.end()
        heard_C = heard_chunks(wave_T)
        replies = [reply for reply in spoken_replies(session.decisions, session.ids) if reply.codes]
        sounds = [
            ReplySound(reply, reply.start_sample, np.zeros(len(reply.codes) * CODE_SAMPLES, np.float32),
                       was_interrupted(reply, session.decisions, heard_C))
            for reply in replies
        ]  # fmt: skip
        stream = session_stream("", len(wave_T), sounds, session.family.tokenizer, source="", seed=self.seed)
        dropped = sum(event.count for event in events)
        return {"turns": stream_content(stream)["turns"], "samples": len(wave_T), "dropped_chunks": dropped}


def live_replies(records: Iterable[Record], voice: str | None, folder: Path) -> dict[str, GivenReply]:
    """Row's name -> what was said in its session; with a `voice` also its sound, as long as the recording at least.

    Raises:
        AnswerError: the voice gave no sound for some turn.
    """
    records = list(records)
    files = sound_files(_session_waves(records, voice), folder) if voice else {}
    return {
        record["id"]: GivenReply(
            texts=(" ".join(turn["text"] for turn in record["turns"]),), audio=(files.get(record["id"]),),
            turns=tuple(record["turns"]),
        )
        for record in records
    }  # fmt: skip


def live_notes(records: Iterable[Record]) -> list[str]:
    """What a reader should know of the sessions."""
    cut = [record["id"] for record in records if record["dropped_chunks"]]
    return [f"too long for the context, whose oldest chunks left it, in {count_rows(cut)}"] if cut else []


def _session_waves(records: Sequence[Record], voice: str) -> dict[str, np.ndarray]:
    """Row's name -> (T,) at 24 kHz of the model's side: its turns where they begin, and zeros."""
    from covo_rl.speech.grid import RATE

    codes = {f"{record['id']}#{place}": turn["codes"] for record in records
             for place, turn in enumerate(record["turns"])}  # fmt: skip
    said = voiced_codes(codes, voice)
    waves: dict[str, np.ndarray] = {}
    for record in records:
        turns = [(round(turn["start"] * RATE), said[f"{record['id']}#{place}"])
                 for place, turn in enumerate(record["turns"])]  # fmt: skip
        wave_T = np.zeros(max([record["samples"], *(start + len(wave) for start, wave in turns)]), np.float32)
        for start, wave in turns:
            wave_T[start : start + len(wave)] = wave
        waves[record["id"]] = wave_T
    return waves
