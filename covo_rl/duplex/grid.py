"""The one clock of full duplex: chunks of 0.16 s, the same for what is heard and for what is said. No torch.

Chunk k is [0.16 k, 0.16 (k + 1)) of both channels: one feature in, and while the model speaks four codes out.
"""

from __future__ import annotations

from covo_rl.rewards.rules.turns import CHUNK_SECONDS as CHUNK_SECONDS
from covo_rl.speech.grid import RATE

#: a chunk in samples at 24 kHz, and in codes (25 Hz)
CHUNK_SAMPLES = 3840
CHUNK_CODES = 4
#: samples at 24 kHz after a chunk that its feature waits for: 200 at 16 kHz of the encoder, and the resampler's taps
LOOK_AHEAD_SAMPLES = 308
LOOK_AHEAD_SECONDS = LOOK_AHEAD_SAMPLES / RATE


def chunk_of(seconds: float) -> int:
    """The chunk that holds this time, exact to a sample: a time on a border begins a chunk.

    >>> chunk_of(0.70), chunk_of(0.80), chunk_of(3 * 0.16)
    (4, 5, 3)
    """
    return round(seconds * RATE) // CHUNK_SAMPLES


def decision_time(chunk: int) -> float:
    """When the decision of a chunk falls, in seconds: at its end.

    >>> round(decision_time(4), 2)
    0.8
    """
    return CHUNK_SECONDS * (chunk + 1)


def sound_start(chunk: int) -> int:
    """The sample at 24 kHz at which the codes of a chunk begin to sound, if computing them takes no time.

    >>> sound_start(5) - CHUNK_SAMPLES * 6
    308
    """
    return CHUNK_SAMPLES * (chunk + 1) + LOOK_AHEAD_SAMPLES
