"""Rows made to fit: clips longer than a model takes, and a part of the rows held out for evaluation."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from covo_rl.audio import decode
from covo_rl.types import Clip, Example

MODES = ("error", "chunk", "crop")


def fit_clips(examples: Sequence[Example], max_seconds: float | None, mode: str) -> tuple[list[Example], list[str]]:
    """Rows whose clips are at most `max_seconds` long, and one line for every clip that was changed.

    `chunk` puts consecutive pieces in the clip's place, each a clip of its own, so that all of it is heard; `crop`
    keeps the first `max_seconds`; `error` changes nothing and leaves the report to `row_problems`.
    """
    if mode not in MODES:
        raise ValueError(f"long_audio {mode!r}: there are {', '.join(MODES)}")
    if mode == "error" or max_seconds is None:
        return list(examples), []
    fitted, notes = [], []
    for example in examples:
        clips: list[Clip] = []
        for clip in example.clips:
            waveform, rate = decode(clip)
            seconds, size = len(waveform) / rate, int(max_seconds * rate)
            pieces = [clip]
            if len(waveform) > size:  # the first part, or the fewest equal parts that fit
                count = math.ceil(len(waveform) / size)
                parts = [waveform[:size]] if mode == "crop" else np.array_split(waveform, count)
                pieces = [Clip(array=part.copy(), sampling_rate=rate) for part in parts]
            if seconds > max_seconds:
                change = f"cut into {len(pieces)} clips" if mode == "chunk" else f"cropped to {max_seconds:g} s"
                notes.append(f"row {example.id}: {clip.name}: {seconds:.2f} s long, {change}")
            clips += pieces
        fitted.append(replace(example, clips=tuple(clips)))
    return fitted, notes


def hold_out(examples: Sequence[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """(training rows, held-out rows): about `fraction` of the rows, all rows of a file on the same side.

    A row's side depends on its clip's name alone (its id where it has no file), not on the other rows or their order.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"eval_fraction {fraction}: must be in [0, 1)")
    train, held_out = [], []
    for example in examples:
        name = next((clip.path for clip in example.clips if clip.path), example.id)
        draw = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
        (held_out if draw < fraction else train).append(example)
    return train, held_out
