"""The same questions with other sound: silenced, swapped with another row's, or none at all.

What the audio contributes is the accuracy with it minus the accuracy without it.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from covo_rl.types import Clip, Example

if TYPE_CHECKING:
    from covo_rl.audio import ClipStore

#: audio condition -> what a report calls it
CONDITIONS = {
    "real": "real audio",
    "silent": "silence of the same length",
    "swapped": "another row's audio",
    "none": "no audio (text only)",
}


def with_audio(examples: Sequence[Example], audio: str, clips: ClipStore | None) -> list[Example]:
    """The rows under one audio condition; ids, questions and answers are unchanged. `clips` is for silence alone.

    Raises:
        ValueError: an unknown condition, or nothing to swap with (named).
    """
    if audio not in CONDITIONS:
        raise ValueError(f"audio={audio!r}: choose one of {', '.join(CONDITIONS)}")
    if audio == "real":
        return list(examples)
    if audio == "swapped":
        return _swapped(examples)
    if audio == "none":
        return [replace(example, clips=()) for example in examples]
    assert clips is not None, "silence needs the ClipStore that knows how long each clip is"
    return [replace(e, clips=tuple(_silence(*clips.waveform(clips.key(c))) for c in e.clips)) for e in examples]


def _silence(waveform: np.ndarray, rate: int) -> Clip:
    return Clip(array=np.zeros(len(waveform), dtype=np.float32), sampling_rate=rate)


def _identity(clip: Clip) -> str:
    """Which clip this is, without decoding it."""
    if clip.path is not None:
        return clip.path
    return hashlib.sha256(clip.data).hexdigest() if clip.data is not None else f"array {id(clip.array)}"


def _swapped(examples: Sequence[Example]) -> list[Example]:
    """Every row with audio gets the clips of another row; see `derangement`."""
    sounding = [example for example in examples if example.clips]
    items = [(" ".join(map(_identity, example.clips)), example.answer or "") for example in sounding]
    partners = iter(derangement(items, seed=0) if sounding else ())
    return [replace(e, clips=sounding[next(partners)].clips) if e.clips else e for e in examples]


def derangement(items: Sequence[tuple[str, str]], seed: int) -> list[int]:
    """For each (clip, answer) the index of a partner: a permutation in which few keep their clip (none, where that is
    found possible) and then few have a partner with the same answer. Deterministic in `seed`.

    Raises ValueError when all items have the same clip, so that nothing can be swapped.
    """
    if len({clip for clip, _ in items}) < 2:
        raise ValueError(f"swapped audio needs at least two different clips; the {len(items)} rows share one")
    tries = [_attempt(items, f"swap:{seed}:{attempt}") for attempt in range(1 + 400 // len(items))]
    return min(tries, key=lambda partner: sum(_cost(items[i], items[j]) for i, j in enumerate(partner)))


def _cost(item: tuple[str, str], other: tuple[str, str]) -> int:
    return 3 * (item[0] == other[0]) + (item[1] == other[1])


def _attempt(items: Sequence[tuple[str, str]], seed: str) -> list[int]:
    places = range(len(items))
    order = list(places)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda i: items[i][1])
    # Sorted by answer and shifted by the largest block, equal answers cannot meet where that is possible.
    shift = max(Counter(answer for _, answer in items).values()) % len(items) or 1
    partner = [0] * len(items)
    for place, i in enumerate(order):
        partner[i] = order[(place + shift) % len(items)]
    # Exchange two partners wherever a row still has its own clip or answer and that lowers the total cost.
    for i in places:
        mine = items[i]
        for k in places if _cost(mine, items[partner[i]]) else ():
            now = _cost(mine, items[partner[i]]) + _cost(items[k], items[partner[k]])
            if _cost(mine, items[partner[k]]) + _cost(items[k], items[partner[i]]) < now:
                partner[i], partner[k] = partner[k], partner[i]
                break
    return partner
