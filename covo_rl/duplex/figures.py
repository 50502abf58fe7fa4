"""What a policy does on streams that ask when to stop: how often early, how often right, how fast.

    figures = timing_figures(streams, z)          greedy; under "expected" the same over rollouts that are sampled
    line = threshold_line(streams, z, ...)        the same policy with b less on every SHIFT logit

`z` holds one (K,) of logits per stream (trunk.py). Shares are in 0..1, delays in seconds on the clock of the chunks:
t(SHIFT) - end of the user's turn; the sound begins 0.173 s after it. What no stream asks is None.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from covo_rl.duplex.grid import CHUNK_SECONDS, chunk_of
from covo_rl.duplex.rollout import TimingStream, greedy_stop, stop_logps
from covo_rl.rewards.rules.turns import LISTENING, ROUNDING, SPEAKING

TURN_LIMIT, BREAK_LIMIT, BACK_CHANNEL_AFTER = 2.4, 1.0, 1.0
PAUSE_BINS = (0.0, 0.7, 1.5, 2.5, float("inf"))
CALIBRATION_BINS = 10
KINDS = (*LISTENING, *SPEAKING)


class _Case(NamedTuple):
    """A stream, what each of its stops (S) means, and how likely each is; delays from the turn's end or the onset."""

    stream: TimingStream
    early_S: np.ndarray
    right_S: np.ndarray
    held_S: np.ndarray
    delay_S: np.ndarray
    weights_S: np.ndarray


def timing_figures(streams: Sequence[TimingStream], z: Sequence[torch.Tensor]) -> dict[str, Any]:
    """All figures of one policy; of streams with pauses, those of kind `pause`, which the set's maker makes long.

    Raises:
        ValueError: streams and logits do not fit.
    """
    for stream, z_K in zip(streams, z, strict=True):
        if len(z_K) != stream.decisions:
            raise ValueError(f"stream {stream.id} has {stream.decisions} decisions and {len(z_K)} logits")
    rows = [z_K.detach().double().cpu() for z_K in z]
    greedy = [np.eye(len(z_K) + 1)[greedy_stop(z_K)] for z_K in rows]
    sampled = [stop_logps(z_K).exp().numpy() for z_K in rows]
    kinds = dict.fromkeys(stream.kind for stream in streams)
    return {
        **_figures([_case(*pair) for pair in zip(streams, greedy, strict=True)]),
        "expected": _figures([_case(*pair) for pair in zip(streams, sampled, strict=True)]),
        "calibration": hazard_calibration(streams, rows),
        "streams": {kind: sum(stream.kind == kind for stream in streams) for kind in kinds},
    }


def is_early(stream: TimingStream, stop: int) -> bool:
    """Whether a listening stream is answered before its user's turn is over."""
    time = stream.time(stop)
    return time is not None and time - (stream.turn_end or 0.0) <= ROUNDING


def _case(stream: TimingStream, weights_S: np.ndarray) -> _Case:
    """Right: to take the turn, to stop for a barge-in, not to for a back-channel. Held: not to stop in silence."""
    times = [stream.time(stop) for stop in range(stream.decisions + 1)]
    time_S = np.array([np.inf if time is None else time for time in times])
    if stream.listening:
        from_end_S = time_S - (stream.turn_end or 0.0)
        early_S = from_end_S <= ROUNDING
        right_S = ~early_S & (from_end_S <= TURN_LIMIT + ROUNDING)
        return _Case(stream, early_S, right_S, right_S, from_end_S, weights_S)
    if stream.onset is None:
        never_S = np.isinf(time_S)
        return _Case(stream, ~never_S, never_S, never_S, np.full(len(time_S), np.nan), weights_S)
    delay_S = time_S - stream.onset
    early_S = delay_S <= ROUNDING
    if stream.kind == "barge_in":
        right_S = ~early_S & (delay_S <= BREAK_LIMIT + ROUNDING)
        return _Case(stream, early_S, right_S, ~early_S, delay_S, weights_S)
    from_end_S = time_S - (stream.turn_end or 0.0)
    after_S = (from_end_S >= CHUNK_SECONDS - ROUNDING) & np.isfinite(time_S)
    ignored_S = from_end_S > BACK_CHANNEL_AFTER + ROUNDING
    return _Case(stream, early_S, ignored_S, ~early_S & ~after_S, delay_S, weights_S)


def _figures(cases: Sequence[_Case]) -> dict[str, Any]:
    by_kind = {name: [case for case in cases if case.stream.kind == name] for name in KINDS}
    paused, single, barged = by_kind["pause"], by_kind["single"], by_kind["barge_in"]
    speaking = [case for case in cases if not case.stream.listening]
    cues = sorted({case.stream.cue for case in paused} - {""})
    return {
        "early_long_pause": _share(paused, "early_S"),
        "early_by_pause": _by_pause(paused),
        "early_by_cue": {cue: _share([case for case in paused if case.stream.cue == cue], "early_S") for cue in cues},
        "long_pause_success": _share(paused, "right_S"),
        "single_turn_success": _share(single, "right_S"),
        "early_single_turn": _share(single, "early_S"),
        "delay_p50": _delay(single, 0.5),
        "delay_p90": _delay(single, 0.9),
        "barge_in_success": _share(barged, "right_S"),
        "barge_in_delay_p50": _delay(barged, 0.5),
        "back_channel_ignored": _share(by_kind["back_channel"], "right_S"),
        "floor_held": _share(speaking, "held_S"),
    }


def pause_class(seconds: float) -> str:
    """The class of a pause's length in which early answers are counted.

    >>> pause_class(0.7), pause_class(4.0)
    ('0.7-1.5 s', '2.5-inf s')
    """
    low, high = next(pair for pair in pairwise(PAUSE_BINS) if seconds < pair[1])
    return f"{low:g}-{high:g} s"


def _by_pause(cases: Sequence[_Case]) -> dict[str, float | None]:
    """Early share by the longest pause of the stream."""
    parts: dict[str, list[_Case]] = {}
    longest = [max((end - start for start, end in case.stream.pauses), default=0.0) for case in cases]
    for place in np.argsort(longest, kind="stable"):
        parts.setdefault(pause_class(longest[place]), []).append(cases[place])
    return {name: _share(part, "early_S") for name, part in parts.items()}


def _share(cases: Sequence[_Case], name: str) -> float | None:
    """The mean over streams of how likely this is."""
    return float(np.mean([case.weights_S @ getattr(case, name) for case in cases])) if cases else None


def _delay(cases: Sequence[_Case], quantile: float) -> float | None:
    """A quantile of the delays of stops that come, and not before what is waited for; None where none does."""
    delays, weights = [], []
    for case in cases:
        counted = np.isfinite(case.delay_S) & ~case.early_S & (case.weights_S > 0)
        delays += case.delay_S[counted].tolist()
        weights += case.weights_S[counted].tolist()
    if not delays:
        return None
    order = np.argsort(delays)
    reached = np.cumsum(np.array(weights)[order])
    return float(np.array(delays)[order][np.searchsorted(reached, quantile * reached[-1])])


def hazard_calibration(streams: Sequence[TimingStream], z: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Do hazards of SHIFT tell how often the turn is over? Over decisions in silence: in a pause it is not, after the
    turn's end it is. `bins` of the hazard with count, mean hazard and share over; `error`: their mean distance,
    None without such decisions."""
    hazards, over = [], []
    for stream, z_K in zip(streams, z, strict=True):
        if stream.listening and stream.turn_end is not None:
            silent = silent_decisions(stream)
            hazards += z_K.sigmoid()[silent].tolist()
            over += [stream.first_chunk + k > chunk_of(stream.turn_end) for k in silent]
    if not hazards:
        return {"error": None, "bins": []}
    h, is_over = np.array(hazards), np.array(over)
    places = np.minimum((h * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    bins = [
        {"count": int(here.sum()), "hazard": float(h[here].mean()), "over": float(is_over[here].mean())}
        for place in range(CALIBRATION_BINS) if (here := places == place).any()
    ]  # fmt: skip
    error = sum(row["count"] * abs(row["hazard"] - row["over"]) for row in bins) / len(h)
    return {"error": float(error), "bins": bins}


def silent_decisions(stream: TimingStream) -> list[int]:
    """Decisions of chunks that lie whole in a pause, or after the turn's end but not later than an answer may come."""
    end = stream.turn_end
    quiet = [*stream.pauses] if end is None else [*stream.pauses, (end, end + TURN_LIMIT)]
    chunks = [range(chunk_of(start) + 1, chunk_of(stop)) for start, stop in quiet]
    return sorted({chunk - stream.first_chunk for each in chunks for chunk in each} & {*range(stream.decisions)})


def threshold_line(
    streams: Sequence[TimingStream], z: Sequence[torch.Tensor], shifts: Iterable[float] = range(1, 11)
) -> list[dict[str, Any]]:
    """Figures of the policy with `b` less on every SHIFT logit, b = 1 to 10: what needs no training."""
    line = []
    for b in shifts:
        moved = [z_K - b if stream.listening else z_K for stream, z_K in zip(streams, z, strict=True)]
        line.append({"b": b, **timing_figures(streams, moved)})
    return line


def success_at_early(line: Sequence[dict[str, Any]], early: float) -> float:
    """Single-turn success of a threshold line (b = 0 among it) where it is as early on long pauses: the best of its
    points that are no earlier, or of the straight lines between neighbours; 0 where none is."""
    points = sorted((row["early_long_pause"], row["single_turn_success"]) for row in line)
    best = max((success for at, success in points if at <= early), default=0.0)
    for (low, first), (high, second) in pairwise(points):
        if low <= early < high:
            best = max(best, first + (second - first) * (early - low) / (high - low))
    return best
