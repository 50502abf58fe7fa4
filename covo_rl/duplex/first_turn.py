"""A recorded question asked in a live session: when does it begin to answer, and what does it say in its first turn?

The recording is heard as it is, then the tone of its room goes on, so that nothing but what was said tells its end. The
session decides by itself: it may answer in the middle of the question, late, or never.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from covo_rl.duplex.grid import CHUNK_SAMPLES, CHUNK_SECONDS, decision_time
from covo_rl.duplex.recording import spoken_replies
from covo_rl.duplex.session import DuplexSession
from covo_rl.duplex.sound import Rng, measure_levels, speech_islands, with_tail
from covo_rl.speech.grid import RATE

#: seconds after the recording's end by which an answer must have begun; else the session never answers
WAIT_SECONDS = 10.0
TurnEnding = Literal["break", "limit", "never"]


@dataclass(frozen=True)
class HeardQuestion:
    """A recording, then the tone of its room: `wave_T` float32 at 24 kHz; the recording's own length is `seconds`.

    `speech_end` is where the last that stands out of its quiet ends, `longest_pause` the longest quiet before. Seconds.
    """

    wave_T: np.ndarray
    seconds: float
    speech_end: float
    longest_pause: float


@dataclass(frozen=True)
class FirstTurn:
    """What a session said in its first turn. `shift_time`: when it began to, in seconds; None where it never did.

    `ending`: its own BREAK; the limit of a turn, which may have cut it; or it never began, and has no text. `dropped`:
    chunks that left the context.
    """

    text: str
    codes: tuple[int, ...]
    shift_time: float | None
    ending: TurnEnding
    dropped: int


def heard_question(wave_T: np.ndarray, tail_seconds: float, rng: Rng) -> HeardQuestion:
    """The recording (T,) at 24 kHz, with so many seconds of its room's tone after it."""
    islands = speech_islands(wave_T, None, measure_levels(wave_T))
    longest = max((after[0] - before[1] for before, after in pairwise(islands)), default=0.0)
    return HeardQuestion(with_tail(wave_T, tail_seconds, rng), len(wave_T) / RATE, islands[-1][1], longest)


def tail_for(session: DuplexSession) -> float:
    """Seconds of room tone that a question needs: an answer may begin late, and be as long as a turn may."""
    return WAIT_SECONDS + (session.max_turn_chunks + 4) * CHUNK_SECONDS


def first_turn(session: DuplexSession, heard: HeardQuestion) -> FirstTurn:
    """Ask a session, which begins anew; it hears no more once its first turn is over."""
    session.reset()
    began, dropped = False, 0
    for start in range(0, len(heard.wave_T), CHUNK_SAMPLES):
        events = session.push(heard.wave_T[start : start + CHUNK_SAMPLES])
        dropped += sum(event.count for event in events)
        kinds = {event.decision for event in events}
        began = began or "shift" in kinds
        waited = decision_time(len(session.decisions) - 1) - heard.seconds
        if "break" in kinds or (not began and waited > WAIT_SECONDS):
            break
    replies = spoken_replies(session.decisions, session.ids)
    if not replies:
        return FirstTurn("", (), None, "never", dropped)
    reply = replies[0]
    at_limit = reply.end is None or reply.end - reply.shift > session.max_turn_chunks
    text = session.family.tokenizer.decode(list(reply.text_ids))
    return FirstTurn(text, reply.codes, decision_time(reply.shift), "limit" if at_limit else "break", dropped)
