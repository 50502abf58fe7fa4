"""How long recordings are, without decoding them."""

from __future__ import annotations

import soundfile

from covo_rl.audio.decode import MAX_RATE, MAX_SECONDS, MIN_RATE, regular_file
from covo_rl.types import Clip


def stored_length(clip: Clip) -> tuple[int, int] | None:
    """(samples, rate) by the head of a wav or flac file, nothing of which is decoded; None where no head says it.

    `decode` gives as many, or an error where the head is not true.

    Raises:
        AudioError: there is no such file.
    """
    if clip.path is None:
        return None
    try:
        head = soundfile.info(regular_file(clip))
    except RuntimeError:
        return None  # decoding says why
    known = head.format in ("WAV", "WAVEX", "FLAC") and "MPEG" not in head.subtype
    usable = MIN_RATE <= head.samplerate <= MAX_RATE and 0 < head.frames <= MAX_SECONDS * head.samplerate
    return (head.frames, head.samplerate) if known and usable else None


def resampled_length(samples: int, rate: int, new_rate: int) -> int:
    """How many samples `resample` makes of so many."""
    return (2 * samples * new_rate + rate) // (2 * rate)
