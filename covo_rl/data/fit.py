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
    keeps the first `max_seconds`; `error` changes nothing and leaves the report to `check`.
    """
    if mode not in MODES:
        raise ValueError(f"long_audio {mode!r}: there are {', '.join(MODES)}")
    if mode == "error" or max_seconds is None:
        return list(examples), []
    fitted, notes = [], []
    for example in examples:
        clips: list[Clip] = []
        for clip in example.clips:
            pieces, seconds = _pieces(clip, max_seconds, mode)
            clips += pieces
            if seconds > max_seconds:
                kept = f"cut into {len(pieces)} clips" if mode == "chunk" else f"cropped to {max_seconds:g} s"
                notes.append(f"row {example.id}: {clip.name}: {seconds:.2f} s long, {kept}")
        fitted.append(replace(example, clips=tuple(clips)))
    return fitted, notes


def _pieces(clip: Clip, max_seconds: float, mode: str) -> tuple[list[Clip], float]:
    """The clip itself, its first part, or the fewest equal parts that fit; and its length in seconds."""
    waveform, rate = decode(clip)
    size = int(max_seconds * rate)
    if len(waveform) <= size:
        return [clip], len(waveform) / rate
    parts = [waveform[:size]] if mode == "crop" else np.array_split(waveform, math.ceil(len(waveform) / size))
    return [Clip(array=part.copy(), sampling_rate=rate) for part in parts], len(waveform) / rate


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
