"""When a full-duplex model speaks, by the rules of Full-Duplex-Bench and MTR-DuplexBench: pure functions of times.

    took_turn(words), turn_latency(words, turn_end)         Full-Duplex-Bench v1 (arXiv 2503.04721)
    backchannel_figures(segments, words, seconds, human)    v1, back-channels
    overlap_intervals(user, model)                          v1.5: stop and response intervals
    mtr_verdict(kind, segments, times)                      MTR-DuplexBench: success, latency, frequency

Words of Full-Duplex-Bench are {text, timestamp: [start, end]}, segments of voice activity [start, end]; segments of
MTR-DuplexBench are {timestamp, text, words: [{word, start, end}]} of the model's channel. All times are seconds.
Full-Duplex-Bench's rules are from their written form (its code is CC-BY-NC), MTR's match its published scripts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from covo_rl.evaluate.speech.fields import MalformedRow, checked, field, span

Segment = Mapping[str, Any]
#: a turn is taken by that many seconds, or by more words; a pause between segments of one speaker, in seconds
TURN_SECONDS, TURN_WORDS, USER_GAP, MODEL_GAP = 1.0, 3, 0.6, 0.5
BACKCHANNEL_SECONDS, BACKCHANNEL_WORDS, BIN_SECONDS = 3.0, 2, 0.2
MTR_KINDS = ("turn", "interruption", "pause", "background")

# -- Full-Duplex-Bench -----------------------------------------------------------------------------------------------


def took_turn(words: Sequence[Mapping[str, Any]], *, open_end: bool = False) -> bool:
    """Not with no words, nor with at most 3 words from whose first start to last end less than 1 s passes.

    `open_end`: a last end that is null counts as its start, as in the pause task.

    >>> took_turn([{"text": "mm", "timestamp": [0.0, 0.9]}]), took_turn([{"text": "mm", "timestamp": [0.0, 1.0]}])
    (False, True)

    Raises:
        MalformedRow: a word without its times.
    """
    if not words:
        return False
    start, _ = _word_times(words[0], 0, open_end=True)
    _, end = _word_times(words[-1], len(words) - 1, open_end=open_end)
    return end - start >= TURN_SECONDS or len(words) > TURN_WORDS


def turn_latency(words: Sequence[Mapping[str, Any]], turn_end: float) -> float | None:
    """Seconds from the end of the user's turn (of an interruption: of what interrupts) to the first word, 0 where it
    came before; None where no turn was taken."""
    checked(turn_end, "the end of the turn", float)
    return max(0, _word_times(words[0], 0, open_end=True)[0] - turn_end) if took_turn(words) else None


def _word_times(word: Mapping[str, Any], index: int, *, open_end: bool) -> tuple[float, float]:
    times = field(word, "timestamp", Sequence)
    if len(times) != 2:
        raise MalformedRow(f"word {index}: timestamp {times}; it must be [start, end]")
    start = checked(times[0], f"the start of word {index}", float)
    return start, start if open_end and times[1] is None else checked(times[1], f"the end of word {index}", float)


def backchannel_figures(
    segments: Sequence[Sequence[float]], words: Sequence[Mapping[str, Any]], seconds: float,
    human_B: Sequence[float] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`took_turn`, `frequency` (per second) and `jsd` of one item; `human_B`: its human distribution over the bins.

    A segment above 3 s takes the turn, and nothing after it is read; one whose words are more than 2, or take 1 s from
    the first start to the last end, takes it too. Every segment of at most 3 s is a back-channel. (The script lets each
    segment overwrite what the ones before it said; here one that takes the turn is enough.)
    """
    if checked(seconds, "the length of the item", float) <= 0:
        raise MalformedRow(f"the length of the item is {seconds} s; it must be above 0")
    taken, short = False, []
    times = [_word_times(word, i, open_end=True) for i, word in enumerate(words)]
    for index, segment in enumerate(segments):
        start, end = span(segment, f"segment {index}")
        if end - start > BACKCHANNEL_SECONDS:
            taken = True
            break
        short.append((start, end))
        inside = [(a, b) for a, b in times if a < end and b > start]
        taken |= len(inside) > BACKCHANNEL_WORDS or bool(inside and inside[-1][1] - inside[0][0] >= TURN_SECONDS)
    return {
        "took_turn": taken,
        "frequency": len(short) / seconds,
        "jsd": None if human_B is None else _divergence(short, seconds, human_B),
    }


def _divergence(short: Sequence[tuple[float, float]], seconds: float, human_B: Sequence[float]) -> float:
    """Jensen-Shannon distance (natural logarithm) between where back-channels lie and where people's do; 1 with none.

    `human_B` is resized linearly to the bins of the item; 1e-10 is added to every bin of both.
    """
    if not short:
        return 1.0
    if not len(human_B):
        raise MalformedRow("the human distribution has no bins")
    bins = max(1, round(seconds / BIN_SECONDS))
    p_B = np.zeros(bins)
    for start, end in short:
        p_B[int(start / BIN_SECONDS) : max(int(np.ceil(end / BIN_SECONDS)), int(start / BIN_SECONDS) + 1)] += 1
    q_B = np.interp(np.linspace(0, 1, bins), np.linspace(0, 1, len(human_B)), np.asarray(human_B, float))
    p_B, q_B = ((x_B + 1e-10) / (x_B + 1e-10).sum() for x_B in (p_B, q_B))
    m_B = (p_B + q_B) / 2
    return float(np.sqrt(max(0.0, (p_B * np.log(p_B / m_B) + q_B * np.log(q_B / m_B)).sum() / 2)))


def merged(segments: Sequence[Sequence[float]], gap: float) -> list[list[float]]:
    """Segments in order of time, joined where at most `gap` seconds lie between them.

    >>> merged([[0.0, 1.0], [1.5, 2.0], [3.0, 4.0]], 0.5)
    [[0.0, 2.0], [3.0, 4.0]]
    """
    joined: list[list[float]] = []
    for start, end in sorted(span(segment, f"segment {i}") for i, segment in enumerate(segments)):
        if joined and start - joined[-1][1] <= gap:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([start, end])
    return joined


def overlap_intervals(user: Sequence[Sequence[float]], model: Sequence[Sequence[float]]) -> dict[str, list]:
    """`stop_intervals`: where both speak, one for each end, the shortest. `response_intervals`: from each end of the
    user to the next start of the model after it, one for each start, from the latest end. Latencies are their lengths.
    """
    users, models = merged(user, USER_GAP), merged(model, MODEL_GAP)
    stops: dict[float, list[float]] = {}
    for u_start, u_end in users:
        for m_start, m_end in models:
            start, end = max(u_start, m_start), min(u_end, m_end)
            known = stops.get(round(end, 3))
            if start < end and (known is None or end - start < known[1] - known[0]):
                stops[round(end, 3)] = [start, end]
    responses: dict[float, list[float]] = {}
    for _, end in users:
        if later := [start for start, _ in models if start > end]:
            responses[min(later)] = [end, min(later)]
    return {"stop_intervals": sorted(stops.values()), "response_intervals": sorted(responses.values())}


# -- MTR-DuplexBench -------------------------------------------------------------------------------------------------


def speaks(segments: Sequence[Segment], start: float, end: float) -> bool:
    """Some segment that overlaps [start, end] has 1 s of words wholly inside, or more than 3 of them."""
    for segment in segments:
        first, last = _mtr_times(segment)
        if not ((first < end and last > start) or (last < end and first > start)):
            continue
        inside = [word for word in _mtr_words(segment) if word[0] >= start and word[1] <= end]
        seconds = 0.0
        for word in inside:  # in this order, as the script adds them: 1.0 decides
            seconds += word[1] - word[0]
        if seconds >= TURN_SECONDS or len(inside) > TURN_WORDS:
            return True
    return False


def mtr_verdict(kind: str, segments: Sequence[Segment], times: Mapping[str, Any]) -> dict[str, float]:
    """`success` (0 or 1), `latency` (s) and `frequency` (back-channels per second) of one item.

    turn: silent while the user speaks, and speaks after; without user_end, model_start or model_end (or with 0) all is
    0. interruption: silent during it, and speaks after; latency from its end. pause: silent from its start to 1 s past
    its end; where both are absent or 0, through the user's turn. background: speaks through the noise.

    Raises:
        MalformedRow: an unknown kind, or a time that is needed and not there.
    """
    if kind not in MTR_KINDS:
        raise MalformedRow(f"kind {kind!r}; MTR-DuplexBench has {', '.join(MTR_KINDS)}")
    user_end, model_start = times.get("user_end"), times.get("model_start")
    after = user_end
    if kind in ("turn", "background") and not all((user_end, model_start, times.get("model_end"))):
        timed = False
    elif kind == "interruption":
        after = times.get("interruption_end")
        timed = times.get("interruption_start") is not None and after is not None
    else:
        timed = True
    return {
        "success": int((timed or kind == "background") and _MTR_RULES[kind](segments, times)),
        "latency": float(_mtr_latency(segments, after, model_start)) if timed else 0.0,
        "frequency": float(_mtr_frequency(segments)) if timed else 0.0,
    }


def _silent(segments: Sequence[Segment], times: Mapping[str, Any], start: str, end: str, longer: float = 0.0) -> bool:
    """The start is not asked for, as in the script, where no segment begins or ends before the end."""
    if not segments:
        return True
    till = field(times, end, float) + longer
    return all(min(_mtr_times(segment)) >= till for segment in segments) or not speaks(
        segments, field(times, start, float), till
    )


def _turn(segments: Sequence[Segment], times: Mapping[str, Any], before: str = "user") -> bool:
    return _silent(segments, times, f"{before}_start", f"{before}_end") and not _silent(
        segments, times, "model_start", "model_end"
    )


def _pause(segments: Sequence[Segment], times: Mapping[str, Any]) -> bool:
    pause = {name: times.get(name) or 0.0 for name in ("pause_start", "pause_end")}
    if not any(pause.values()):
        return _silent(segments, times, "user_start", "user_end")
    return _silent(segments, pause, "pause_start", "pause_end", longer=1.0)


def _background(segments: Sequence[Segment], times: Mapping[str, Any], tolerance: float = 0.1) -> bool:
    """[background_start + 0.3, background_end] lies in one segment that its words cover without a gap above 2 s."""
    if times.get("background_end") is None:
        return False
    start, end = field(times, "background_start", float) + 0.3, field(times, "background_end", float)
    for segment in segments if start < end else ():
        first, last = _mtr_times(segment)
        if not first <= start or not end <= last - tolerance or not segment.get("words"):
            continue
        touching = (word for word in _mtr_words(segment) if word[1] > start and word[0] < end + tolerance)
        words = sorted(touching, key=lambda word: word[0])
        covers = words and words[0][0] <= start and words[-1][1] >= end - tolerance
        if covers and all(b[0] - a[1] <= 20 * tolerance for a, b in pairwise(words)):
            return True
    return False


_MTR_RULES = {
    "turn": _turn,
    "interruption": lambda segments, times: _turn(segments, times, before="interruption"),
    "pause": _pause,
    "background": _background,
}


def _mtr_latency(segments: Sequence[Segment], user_end: float | None, model_start: float | None) -> float:
    """The earliest start among segments that end after `user_end`, minus it; 0 with none, or before it."""
    if user_end is None or model_start is None:
        return 0
    checked(user_end, "the user's end", float)
    starts = [first for first, last in map(_mtr_times, segments) if last > user_end]
    return max(0, min(starts) - user_end) if starts else 0


def _mtr_frequency(segments: Sequence[Segment]) -> float:
    """Segments below 3 s with at most 2 words, per second of all segments."""
    spans = [(*_mtr_times(segment), field(segment, "text", str)) for segment in segments]
    total = sum(last - first for first, last, _ in spans)
    short = [text for first, last, text in spans if last - first < BACKCHANNEL_SECONDS
             and len(re.sub(r"[^\w\s\[\]]", "", text).split()) <= BACKCHANNEL_WORDS]  # fmt: skip
    return len(short) / total if total else 0


def _mtr_times(segment: Segment) -> tuple[float, float]:
    times = field(segment, "timestamp", Sequence)
    if len(times) != 2:
        raise MalformedRow(f"a segment's timestamp is {times}; it must be [start, end]")
    first, last = (checked(time, "a segment's time", float) for time in times)
    return first, last


def _mtr_words(segment: Segment) -> list[tuple[float, float]]:
    return [(field(word, "start", float), field(word, "end", float)) for word in field(segment, "words", Sequence)]
