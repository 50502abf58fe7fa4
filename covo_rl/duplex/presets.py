"""How often what happens in a simulated stream, and how long it lasts: the three presets, and the draws. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from covo_rl.duplex.grid import CHUNK_SECONDS, chunk_of
from covo_rl.duplex.sound import Rng

StreamKind = Literal["dialogue", "single", "pause", "back_channel", "barge_in", "hold"]
#: of the response gap of people, end of the user's speech to SHIFT: median, least and most seconds
GAP_SECONDS, GAP_MEDIAN = (0.3, 1.0), 0.5
#: chunks after that of a barge-in's onset in which the model stops
BREAK_CHUNKS = 3
#: seconds of a reply before something happens in it, and after
BEFORE, AFTER = 0.3, 1.0
#: of logarithms, where a median is given
SPREAD = 0.4


@dataclass(frozen=True)
class SimulationPreset:
    """How often what is drawn.

    `kinds`: what streams are made, one drawn by its share; without shares each of them from every dialogue. Of a whole
    dialogue: the shares of turns with a pause, of replies with a back-channel and with a barge-in. `pause_median` none:
    log-uniform.
    """

    name: str
    pause_seconds: tuple[float, float]
    kinds: dict[StreamKind, float | None]
    pause_median: float | None = None
    pause_share: float = 0.0
    back_channel_share: float = 0.0
    barge_in_share: float = 0.0


#: of RL listening to speaking is 2 : 1; of the former 60 % have pauses, of the latter 40 % each of the first two
RL_SHARES: dict[StreamKind, float | None] = {
    "single": 4 / 15, "pause": 6 / 15, "back_channel": 2 / 15, "barge_in": 2 / 15, "hold": 1 / 15,
}  # fmt: skip
PRESETS = {
    "sft": SimulationPreset("sft", (0.18, 0.7), {"dialogue": None}, 0.35, 0.3, 0.3, 0.3),
    "rl": SimulationPreset("rl", (0.3, 3.0), RL_SHARES),
    "test": SimulationPreset("test", (1.0, 4.0), dict.fromkeys(RL_SHARES)),
}


def draw_log_normal(rng: Rng, median: float, limits: tuple[float, float]) -> float:
    """Log-normal of a median and SPREAD; what is outside the limits is drawn again."""
    while True:
        if limits[0] <= (value := median * math.exp(SPREAD * rng.standard_normal())) <= limits[1]:
            return value


def draw_pause(rng: Rng, preset: SimulationPreset) -> float:
    """Seconds of a pause."""
    if preset.pause_median is not None:
        return draw_log_normal(rng, preset.pause_median, preset.pause_seconds)
    low, high = preset.pause_seconds
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def shift_chunk(end: float, rng: Rng, least: int = 0) -> int:
    """In which chunk people would answer a turn that ends then: never sooner than 0.3 s, rarely later than 1 s."""
    gap = draw_log_normal(rng, GAP_MEDIAN, GAP_SECONDS)
    first = math.ceil((end + GAP_SECONDS[0]) / CHUNK_SECONDS - 1e-6) - 1
    last = chunk_of(end + GAP_SECONDS[1]) - 1
    return max(min(max(round((end + gap) / CHUNK_SECONDS) - 1, first), last), least)
