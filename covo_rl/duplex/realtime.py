"""A session in real time: sound comes as it is spoken, and replies are decoded while their codes come.

    paced(blocks, clock)                  blocks of sound, none before it was spoken
    live = LiveRun(session, voice, clock)
    live.listen(blocks)                   the session hears; what it says is decoded chunk by chunk, and sounds
    rehearse(session, voice)              whether it keeps up: tried before anybody waits for it

The decoder is asked for a chunk's sound once it has the codes that it looks ahead, those of the next chunk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch

from covo_rl.duplex.grid import CHUNK_CODES, CHUNK_SAMPLES, decision_time
from covo_rl.duplex.latency import ChunkCost
from covo_rl.duplex.layout import ChunkDecision
from covo_rl.duplex.session import DuplexEvent, DuplexSession
from covo_rl.models.covo_audio.voice import Voice
from covo_rl.speech.grid import RATE

#: how the decoder is asked: a chunk at a time, behind 2 s of the reply
BLOCKS = {"blocks": (CHUNK_CODES,), "past": 50}


class WallClock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.began = time.monotonic()

    def now(self) -> float:
        return time.monotonic() - self.began

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def paced(blocks: Iterable[np.ndarray], clock: WallClock) -> Iterator[np.ndarray]:
    """The blocks, each not before the time that it has lasted has passed, as from a microphone."""
    samples = 0
    for block in blocks:
        samples += len(block)
        clock.sleep(max(0.0, samples / RATE - clock.now()))
        yield block


class LiveRun:
    """What a session says while it hears, and when it sounds.

    `interrupted(chunk)` says whether a BREAK there is an interruption: what has not sounded by then never does, while
    a reply that is over is heard to its end. `show` is told every event.

    `late`: seconds by which each chunk's decision came after its time. `sounds`: of each reply with codes the sample at
    which it begins to sound, and its wave (T,). `gaps`: seconds in which the player had to wait for a piece, which the
    waves do not have.
    """

    def __init__(
        self, session: DuplexSession, voice: Voice, clock: WallClock, *,
        interrupted: Callable[[int], bool] = lambda chunk: False,
        show: Callable[[DuplexEvent], object] = lambda event: None,
    ) -> None:  # fmt: skip
        self.session, self.clock, self.interrupted, self.show = session, clock, interrupted, show
        self.voice = replace(voice, options={**voice.options, **BLOCKS})
        self.late: list[float] = []
        self.sounds: list[tuple[int, np.ndarray]] = []
        self.gaps = 0.0
        self._decoding: dict[int, float] = {}  # chunk -> seconds of the decoder once it had that chunk's codes
        # of what the decoder was told last of a reply: its chunk, when, and whether it was a BREAK
        self._chunk, self._told, self._broken = 0, 0.0, False
        self._free = 0  # the sample from which on the player has nothing to play

    @property
    def costs(self) -> list[ChunkCost]:
        """What each chunk took, the decoder of sound included."""
        return [replace(cost, vocoder=self._decoding.get(cost.chunk, 0.0)) for cost in self.session.costs]

    def record(self) -> dict[str, Any]:
        """How late decisions were, when replies were heard, and the gaps in them, in seconds."""
        median, p95 = np.percentile(self.late, [50, 95]) if self.late else (0.0, 0.0)
        late = {"median": float(median), "p95": float(p95), "max": max(self.late, default=0.0)}
        return {"late": late, "heard": [start / RATE for start, _ in self.sounds], "gaps": self.gaps}

    def listen(self, blocks: Iterable[np.ndarray]) -> None:
        """Hear the blocks, to their end, and speak."""
        events = self._events(blocks)
        for event in events:
            if event.type == "codes":
                self._speak(self._codes(event, events))

    def _events(self, blocks: Iterable[np.ndarray]) -> Iterator[DuplexEvent]:
        yield from self._shown(event for block in blocks for event in self.session.push(block))
        yield from self._shown(self.session.end())

    def _shown(self, events: Iterable[DuplexEvent]) -> Iterator[DuplexEvent]:
        for event in events:
            if event.type == "decision":
                self.late.append(self.clock.now() - decision_time(event.chunk))
            self.show(event)
            yield event

    def _codes(self, first: DuplexEvent, events: Iterator[DuplexEvent]) -> Iterator[int]:
        """The codes of a reply, until it is over: to ask for one that is not there yet is to listen on."""
        for event in chain([first], events):
            if event.type in ("codes", "flush", "end"):
                self._chunk, self._told, self._broken = event.chunk, self.clock.now(), event.type == "flush"
                yield from event.codes
            if event.type in ("flush", "end"):
                return

    def _speak(self, codes: Iterator[int]) -> None:
        """Decode a reply and let it sound, behind what sounds still."""
        pieces: list[tuple[int, np.ndarray]] = []
        before = 0.0
        for piece in self.voice.stream(codes):
            now = self.clock.now()
            self._decoding[self._chunk] = self._decoding.get(self._chunk, 0.0) + now - max(self._told, before)
            at, before = max(round(now * RATE), self._free), now
            self.gaps += (at - self._free) / RATE if pieces else 0.0
            pieces.append((at, piece.numpy()))
            self._free = at + len(piece)
        if self._broken and self.interrupted(self._chunk):
            self._free = min(self._free, round(self._told * RATE))
        wave_T = np.concatenate([piece_T[: max(0, self._free - at)] for at, piece_T in pieces])
        self.sounds.append((pieces[0][0], wave_T))


def rehearse(session: DuplexSession, voice: Voice, chunks: int = 20) -> list[ChunkCost]:
    """What chunks of listening and of speaking cost, on noise, so many of each; the session is new before and after.

    The first of each warm up, and are left out.
    """
    ids = session.ids
    count = min(chunks, session.max_turn_chunks)
    session.reset()
    session.follow([ChunkDecision(ids.think)] * (chunks + 1))
    session.follow([ChunkDecision(ids.shift), *[ChunkDecision(ids.text_pad)] * (count + 1)])
    noise = torch.randn((chunks + count + 4) * CHUNK_SAMPLES, generator=torch.Generator().manual_seed(0)) / 100
    live = LiveRun(session, voice, WallClock())
    live.listen(block.numpy() for block in noise.split(CHUNK_SAMPLES))
    listening = [cost for cost in live.costs if not cost.speaking][1:]
    speaking = [cost for cost in live.costs if cost.speaking][1:]
    session.reset()
    return [*listening[:chunks], *speaking[:count]]
