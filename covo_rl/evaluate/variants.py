"""The same questions with other sound: silenced, swapped with another row's, or none at all.

What the audio contributes is the accuracy with it minus the accuracy without it.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, get_args

from covo_rl.types import Clip, Example

if TYPE_CHECKING:
    from covo_rl.audio import ClipStore

Audio = Literal["real", "silent", "swapped", "none"]
AUDIO_CONDITIONS: tuple[str, ...] = get_args(Audio)


def with_audio(examples: Sequence[Example], audio: str, clips: ClipStore, *, seed: int = 0) -> list[Example]:
    """The rows under one audio condition; ids, questions and answers are unchanged.

    Raises:
        ValueError: an unknown condition, or nothing to swap with (named).
    """
    if audio == "real":
        return list(examples)
    if audio == "none":
        return [replace(example, clips=()) for example in examples]
    if audio == "silent":
        return [replace(e, clips=tuple(_silence(clip, clips) for clip in e.clips)) for e in examples]
    if audio == "swapped":
        return _swapped(examples, seed)
    raise ValueError(f"audio={audio!r}: choose one of {', '.join(AUDIO_CONDITIONS)}")


def _silence(clip: Clip, clips: ClipStore) -> Clip:
    import numpy as np

    waveform, rate = clips.waveform(clips.key(clip))
    return Clip(array=np.zeros(len(waveform), dtype=np.float32), sampling_rate=rate)


def _identity(clip: Clip) -> str:
    """Which clip this is, without decoding it."""
    if clip.path is not None:
        return clip.path
    return hashlib.sha256(clip.data).hexdigest() if clip.data is not None else f"array {id(clip.array)}"


def _swapped(examples: Sequence[Example], seed: int) -> list[Example]:
    """Every row with audio gets the clips of another row; see `derangement`."""
    heard = [i for i, example in enumerate(examples) if example.clips]
    if not heard:
        return list(examples)
    items = [(" ".join(map(_identity, examples[i].clips)), examples[i].answer or "") for i in heard]
    result = list(examples)
    for i, j in zip(heard, derangement(items, seed), strict=True):
        result[i] = replace(examples[i], clips=examples[heard[j]].clips)
    return result


def derangement(items: Sequence[tuple[str, str]], seed: int) -> list[int]:
    """For each (clip, answer) the index of a partner: a permutation in which few keep their clip (none, where that is
    found possible) and then few have a partner with the same answer. Deterministic in `seed`.

    Raises ValueError when all items have the same clip, so that nothing can be swapped.
    """
    if len({clip for clip, _ in items}) < 2:
        raise ValueError(f"swapped audio needs at least two different clips; the {len(items)} rows share one")
    tries = [_attempt(items, f"swap:{seed}:{attempt}") for attempt in range(1 + 400 // len(items))]
    return min(tries, key=lambda partner: sum(_cost(items, i, j) for i, j in enumerate(partner)))


def _attempt(items: Sequence[tuple[str, str]], seed: str) -> list[int]:
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda i: items[i][1])
    # Sorted by answer and shifted by the largest block, equal answers cannot meet where that is possible.
    shift = max(Counter(answer for _, answer in items).values()) % len(items) or 1
    partner = [0] * len(items)
    for place, i in enumerate(order):
        partner[i] = order[(place + shift) % len(items)]
    _exchange(partner, items)
    return partner


def _cost(items: Sequence[tuple[str, str]], i: int, j: int) -> int:
    return 3 * (items[i][0] == items[j][0]) + (items[i][1] == items[j][1])


def _exchange(partner: list[int], items: Sequence[tuple[str, str]]) -> None:
    """Exchange two partners wherever a row still has its own clip or answer and that lowers the total cost."""
    for i in range(len(items)):
        for k in range(len(items)) if _cost(items, i, partner[i]) else ():
            now = _cost(items, i, partner[i]) + _cost(items, k, partner[k])
            if _cost(items, i, partner[k]) + _cost(items, k, partner[i]) < now:
                partner[i], partner[k] = partner[k], partner[i]
                break
