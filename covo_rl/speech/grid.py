"""The one time grid of speech out: a code is 40 ms, which is 960 samples at 24 kHz, 4 frames of 10 ms, a quarter slot.

Every cut of speech into pieces lies on it. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np

from covo_rl.types import UserError

#: Hz of speech out; samples of one code, and of one frame of latents, mel and pitch
RATE, CODE_SAMPLES, FRAME_SAMPLES = 24_000, 960, 240
CODE_FRAMES = CODE_SAMPLES // FRAME_SAMPLES
CODE_SECONDS = CODE_SAMPLES / RATE
SLOT_CODES = 4  # a slot of audio in is 160 ms


class CodeError(UserError, ValueError):
    """Codes that this codebook or this tokenizer does not have."""


def count_codes(samples: int) -> int:
    """Codes of so many samples at 24 kHz; the last may be begun only."""
    return -(-samples // CODE_SAMPLES)


def count_slots(codes: int) -> int:
    """Slots of audio in that so many codes fill."""
    return -(-codes // SLOT_CODES)


def pad_to_codes(wave_T: np.ndarray) -> np.ndarray:
    """Samples at 24 kHz, zeros after them up to a whole number of codes."""
    return np.pad(wave_T, (0, -len(wave_T) % CODE_SAMPLES))


def check_codes(rows: Sequence[Sequence[Any]], codebook: int, names: Sequence[str] | None = None) -> None:
    """Raise CodeError that names, for every row at once, the first that is no whole number of 0..codebook-1."""
    problems = []
    for index, codes in enumerate(rows):
        for i, code in enumerate(codes):
            if isinstance(code, bool) or not isinstance(code, Integral) or not 0 <= int(code) < codebook:
                name = names[index] if names else f"row {index}"
                problems.append(f"{name}: code {code!r:.40} at position {i}; there are 0 to {codebook - 1}")
                break
    if problems:
        raise CodeError("\n".join(problems))
