"""Groups of a run that learns when to speak, as a page draws them: what a rollouts file says of times, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from covo_rl.rewards.rules.turns import LISTENING, ROUNDING
from covo_rl.run.report.values import Notes, finite, mapping, readable

#: what a row says of times; the page draws it, and does not list it
TIMING_COLUMNS = frozenset({
    "timing", "speech", "kind", "chunk", "shift_time", "break_time", "turn_end", "onset", "pauses",
    "reply",
})  # fmt: skip
#: hazards and words of a group that a page draws: an hour is more than any stream has
_MOST = 25_000


def group_timing(rows: Sequence[Mapping[str, Any]], notes: Notes) -> dict[str, Any] | None:
    """The `timing` of a group, which one of its rows holds; None where none does, or, noted, it cannot be drawn."""
    held = next((timing for row in rows if (timing := row.get("timing")) is not None), None)
    if held is None:
        return None
    value = mapping(held)
    hazards, turns, pauses, first = (value.get(name) for name in ("hazards", "turns", "pauses", "first_chunk"))
    seconds, lists = finite(value.get("seconds")), (hazards, turns, pauses)
    if not (all(isinstance(each, list) and len(each) <= _MOST for each in lists) and type(first) is int and first >= 0):
        seconds = None
    if seconds is None or seconds <= 0:
        notes.count("groups have a `timing` that cannot be drawn")
        return None
    drawn = {
        "kind": readable(value.get("kind")), "seconds": seconds, "first_chunk": first,
        "hazards": [_share(hazard) for hazard in hazards or ()],
        "turn_end": finite(value.get("turn_end")), "onset": finite(value.get("onset")),
        "pauses": [_closed(pause) for pause in pauses or ()], "turns": [_turn(turn) for turn in turns or ()],
    }  # fmt: skip
    lost = sum(part is None for name in ("hazards", "pauses", "turns") for part in drawn[name])
    notes.count("parts of timelines cannot be drawn: they are no share, span or turn", lost)
    return {**drawn, **{name: [part for part in drawn[name] if part is not None] for name in ("pauses", "turns")}}


def rollout_timing(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a rollout of such a group has beside others: when it stopped, and when it sounds; None for never."""
    times = [finite(row.get(name)) for name in ("shift_time", "break_time")]
    return {"time": next((time for time in times if time is not None), None), "speech": _span(row.get("speech"))}


def timing_flags(rollout: Mapping[str, Any], timing: Mapping[str, Any]) -> list[str]:
    """`early_answer`, `no_answer`: of a rollout that listens, and answers before the user's turn is over, or never."""
    end, time = timing["turn_end"], rollout["time"]
    if timing["kind"] not in LISTENING or end is None:
        return []
    return ["no_answer"] if time is None else ["early_answer"] if time <= end + ROUNDING else []


def _share(value: Any) -> float | None:
    number = finite(value)
    return number if number is not None and 0 <= number <= 1 else None


def _span(value: Any) -> list[float | None] | None:
    """[start, end], where the end may be open."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    start, end = map(finite, value)
    if start is None or start < 0 or (value[1] is not None and (end is None or end < start)):
        return None
    return [start, end]


def _closed(value: Any) -> list[float | None] | None:
    span = _span(value)
    return None if span is None or span[1] is None else span


def _turn(value: Any) -> dict[str, Any] | None:
    turn = mapping(value)
    span = _closed([turn.get("start"), turn.get("end")])
    if span is None or turn.get("channel") not in ("user", "model"):
        return None
    return {"channel": turn["channel"], "start": span[0], "end": span[1], "text": readable(turn.get("text") or "")}
