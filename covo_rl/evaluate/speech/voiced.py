"""Sound of the codes that a model replied with, by the decoder of `--voice`, in files of the evaluation's folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from covo_rl.rewards.program import write_pcm
from covo_rl.rewards.replies import AnswerError


def voiced_codes(codes: Mapping[str, Sequence[int]], decoder: str) -> dict[str, np.ndarray]:
    """Name -> (T,) float32 at 24 kHz; a reply without codes has none.

    Raises:
        AnswerError: the decoder gave no sound for some.
    """
    from covo_rl.speech.replies import map_batches, speak_replies, voice_at

    spoken = {name: own for name, own in codes.items() if own}

    def speak(batch: list[Sequence[int]]) -> Sequence[Any]:
        return speak_replies(batch, voice_at(decoder))

    waves: dict[str, np.ndarray] = {}
    for name, wave in zip(spoken, map_batches(speak, list(spoken.values()), f"--voice {decoder}"), strict=True):
        if isinstance(wave, AnswerError):
            raise wave
        waves[name] = wave
    return waves


def sound_files(waves: Mapping[str, np.ndarray], folder: Path) -> dict[str, str]:
    """Name -> the wav file below `folder`/audio that each wave is written to."""
    from covo_rl.speech.grid import RATE

    (folder / "audio").mkdir(parents=True, exist_ok=True)
    files: dict[str, str] = {}
    for name, wave_T in waves.items():
        file = folder / "audio" / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.wav"
        write_pcm(file, wave_T, RATE)
        files[name] = str(file)
    return files
