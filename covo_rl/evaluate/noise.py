"""The same questions with noise under them: `covo-rl eval --noise-snr DB`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from covo_rl.audio import decode
from covo_rl.duplex.sound import measure_levels, noise_floor
from covo_rl.duplex.sources import seeded
from covo_rl.rewards.program import write_pcm
from covo_rl.types import Clip, Example


def add_noise(wave_T: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """(T,) float32: the wave and noise somewhere between white and brown, `snr_db` below the level of its speech.

    The level is that of its loud 10 ms pieces, so that silence around the speech changes nothing. Where the wave is
    silent all through the noise is of two steps of 16 bits.
    """
    level = measure_levels(wave_T).speech * 10 ** (-snr_db / 20)
    return (wave_T + noise_floor(len(wave_T), level, rng)).astype(np.float32)


@contextmanager
def noisy_rows(examples: Sequence[Example], snr_db: float | None, seed: int) -> Iterator[Sequence[Example]]:
    """The rows with noise under their clips, in files while the block runs: a whole set would fill memory or a disk.

    What a row hears hangs on the seed and the row alone. None: the rows as they are.
    """
    if snr_db is None:
        yield examples
        return
    with TemporaryDirectory() as folder:
        rows = []
        for example in examples:
            clips = []
            for place, clip in enumerate(example.clips):
                wave_T, rate = decode(clip)
                file = Path(folder) / f"{len(rows)}-{place}.wav"
                write_pcm(file, add_noise(wave_T, snr_db, seeded(seed, "noise", example.id, str(place))), rate)
                clips.append(Clip(path=str(file)))
            rows.append(replace(example, clips=tuple(clips)))
        yield rows
