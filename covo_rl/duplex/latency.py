"""What a chunk costs, against the 0.16 s that it has; and how long after the user a reply is heard.

A feature is complete 13 ms after its chunk. SHIFT in chunk k makes the first codes in chunk k + 1, which sound from
0.16 (k + 2) + 0.013 s on, and later by what computing them takes, and the decoder. After BREAK in chunk k it is quiet
0.16 (k + 1) + 0.013 s and what deciding took, once the player has thrown away what it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from covo_rl.duplex.grid import CHUNK_SECONDS, LOOK_AHEAD_SECONDS, decision_time
from covo_rl.types import UserError


class RealTimeError(UserError, RuntimeError):
    """This model on this machine is slower than sound."""


@dataclass(frozen=True)
class ChunkCost:
    """Seconds that one chunk took: `encoder`, then `decoder` (decision and codes), and in real time the `vocoder`,
    which decodes sound once it has this chunk's codes; `speaking`: it has codes."""

    chunk: int
    speaking: bool
    encoder: float
    decoder: float
    vocoder: float = 0.0

    @property
    def seconds(self) -> float:
        return self.encoder + self.decoder + self.vocoder


def real_time_factors(costs: Sequence[ChunkCost]) -> dict[str, dict[str, float]]:
    """Seconds a chunk took / 0.16, listening and speaking apart: median, p95, max, and the number of chunks."""
    figures = {}
    for name, speaking in (("listening", False), ("speaking", True)):
        factors = [cost.seconds / CHUNK_SECONDS for cost in costs if cost.speaking == speaking]
        if factors:
            median, p95 = np.percentile(factors, [50, 95])
            figures[name] = {
                "median": float(median), "p95": float(p95), "max": max(factors), "chunks": len(factors)
            }  # fmt: skip
    return figures


def check_real_time(costs: Sequence[ChunkCost]) -> dict[str, dict[str, float]]:
    """The factors, where 95 % of the chunks take less time than they last.

    Raises:
        RealTimeError: they do not; it says by how much.
    """
    figures = real_time_factors(costs)
    slow = [
        f"{name} takes {factor['p95'] * CHUNK_SECONDS:.3f} s (95 % of {factor['chunks']} chunks), "
        f"{factor['p95']:.2f} times as long as the sound"
        for name, factor in figures.items() if factor["p95"] >= 1
    ]  # fmt: skip
    if slow:
        raise RealTimeError(
            f"a chunk is {CHUNK_SECONDS} s of sound, and {' and '.join(slow)}: real time needs less than 1; take a "
            "faster device or a smaller model, or run without real time"
        )
    return figures


def reply_latencies(
    shifts: Sequence[int], breaks: Sequence[int], costs: Sequence[ChunkCost], vocoder_seconds: float | None = None
) -> dict[str, list[dict[str, Any]]]:
    """When replies begin to sound and end, in seconds of the stream, for SHIFT and BREAK in these chunks.

    `decided` and `algorithmic` as if computing took no time, `measured` with the chunk's own cost and, for the sound,
    `vocoder_seconds` of the decoder's first block (None: not measured, and not added). What no cost is known of is left
    out: a reply whose first codes the stream's end cuts, one of a history that was taken up.
    """
    took = {cost.chunk: cost.seconds for cost in costs}
    starts = []
    for k in (k for k in shifts if k + 1 in took):
        sound = decision_time(k + 1) + LOOK_AHEAD_SECONDS
        measured = sound + took[k + 1] + (vocoder_seconds or 0.0)
        starts.append({"chunk": k, "decided": decision_time(k), "algorithmic": sound, "measured": measured})
    stops = [
        {"chunk": k, "decided": decision_time(k), "algorithmic": decision_time(k) + LOOK_AHEAD_SECONDS,
         "measured": decision_time(k) + LOOK_AHEAD_SECONDS + took[k]}
        for k in breaks if k in took
    ]  # fmt: skip
    return {"starts": starts, "stops": stops}
