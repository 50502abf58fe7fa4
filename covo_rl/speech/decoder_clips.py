"""What training of a decoder reads of recordings: sequences of one speaker for the flow, crops for the vocoder."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from covo_rl.data.read import DataError, Problem
from covo_rl.speech.decoder_training import DecoderTraining
from covo_rl.speech.grid import CODE_FRAMES, FRAME_SAMPLES, pad_to_codes
from covo_rl.speech.latents import latents_of, speaker_of
from covo_rl.speech.rows import SpeechRow

#: clips of a speaker that tell the voice in training: one alone may be all high tones or all low ones
VOICE_CLIPS = 3


class Speech(NamedTuple):
    """Codes `first` to `first + length` of the rows `rows` one after the other; the rows `voice` tell the speaker."""

    rows: tuple[int, ...]
    first: int
    length: int
    voice: tuple[int, ...]


class Crop(NamedTuple):
    """Frames of a row."""

    row: int
    first: int
    length: int


def speaker_width(rows: Sequence[SpeechRow]) -> int | None:
    """How many numbers the `speaker_vector` of every row has; None where no row brings one.

    Raises:
        DataError: rows whose vector is missing, is no list of finite numbers, or has another number of them.
    """
    vectors = [row.source.get("speaker_vector") for row in rows]
    if all(vector is None for vector in vectors):
        return None
    lists = [
        vector if isinstance(vector, list) and all(type(x) in (int, float) and isfinite(x) for x in vector) else []
        for vector in vectors
    ]
    width = next((len(vector) for vector in lists if vector), 0)
    what = f"its speaker_vector is no list of {width or 'finite'} numbers: every row brings one, alike, or none does"
    problems = [Problem(row.id, what) for row, v in zip(rows, lists, strict=True) if not v or len(v) != width]
    if problems:
        raise DataError("rows", problems)
    return width


class DecoderClips(Dataset):
    """Item: Speech -> (latents (Z, E) normalised, codes (L,), speaker (S,)); Crop -> (latents (Z, E), wave (T,)).

    Recordings and latents are kept in memory up to `cache_mb`; later ones are made again each time.
    """

    def __init__(self, rows: Sequence[SpeechRow], codes: Sequence[Tensor], config: DecoderTraining) -> None:
        self.rows, self.codes, self.config = rows, codes, config
        self.mean_E, self.deviation_E = torch.zeros(1), torch.ones(1)  # to normalise by
        self.room, self.clips = config.cache_mb * 2**20, {}
        speakers: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            speakers.setdefault(row.speaker or f"row {i}", []).append(i)
        self.same = [np.array(speakers[row.speaker or f"row {i}"]) for i, row in enumerate(rows)]
        frames = np.array([CODE_FRAMES * len(part) for part in codes])
        self.long = np.flatnonzero(frames >= config.vocoder_frames)
        if config.vocoder_steps and not len(self.long):
            text = f"no row has {config.vocoder_frames} frames ({config.vocoder_frames / 100} s): lower vocoder_frames"
            raise DataError("rows", [Problem(rows[int(frames.argmax())].id if len(rows) else "rows", text)])

    def clip(self, row: int) -> tuple[Tensor, Tensor]:
        """(latents (Z, E) as they are, wave (T,)) of a row, up to a whole code.

        Raises:
            AudioError: its recording cannot be read.
        """
        if row in self.clips:
            return self.clips[row]
        wave_T = torch.from_numpy(pad_to_codes(self.rows[row].wave()))
        latents_ZE = latents_of(wave_T.numpy(), self.config.latent)
        size = 4 * (wave_T.numel() + latents_ZE.numel())
        if size <= self.room:
            self.clips[row], self.room = (latents_ZE, wave_T), self.room - size
        return latents_ZE, wave_T

    def __getitem__(self, item: Speech | Crop) -> tuple[Tensor, ...]:
        if isinstance(item, Crop):
            latents_ZE, wave_T = self.clip(item.row)
            last = item.first + item.length
            return latents_ZE[item.first : last], wave_T[FRAME_SAMPLES * item.first : FRAME_SAMPLES * last]
        latents_ZE = torch.cat([self.clip(row)[0] for row in item.rows])
        codes_L = torch.cat([self.codes[row] for row in item.rows])
        last = item.first + item.length
        latents_ZE = latents_ZE[CODE_FRAMES * item.first : CODE_FRAMES * last]
        return (latents_ZE - self.mean_E) / self.deviation_E, codes_L[item.first : last], self.speaker(item.voice)

    def speaker(self, rows: Sequence[int]) -> Tensor:
        """The speaker vector that the first row brings (`speaker_vector`: numbers), else that of all their latents."""
        if (vector := self.rows[rows[0]].source.get("speaker_vector")) is not None:
            return torch.tensor(vector, dtype=torch.float32)
        return speaker_of((torch.cat([self.clip(row)[0] for row in rows]) - self.mean_E) / self.deviation_E)

    # -- what an update reads: it depends on seed and step alone, so that a resumed run reads what it would have read

    def sequences(self, step: int, rank: int = 0, world: int = 1) -> list[Speech | Crop]:
        """`flow_frames` frames for each rank; the rows of a sequence are of one speaker, in any order."""
        rng = np.random.default_rng([self.config.seed, step, 0])
        length = int(self.config.sequence_frames * rng.choice([2 / 3, 1, 4 / 3])) // CODE_FRAMES
        batch: list[Speech | Crop] = []
        for _ in range(world * (self.config.flow_frames // (CODE_FRAMES * length))):
            same = self.same[int(rng.integers(len(self.rows)))]
            rows, codes = [], 0
            while codes < length + length // 4:  # so that it seldom begins at a clip's beginning
                rows.append(int(rng.choice(same)))
                codes += len(self.codes[rows[-1]])
            voice = tuple(map(int, rng.choice(same, VOICE_CLIPS)))
            batch.append(Speech(tuple(rows), int(rng.integers(codes - length + 1)), length, voice))
        return batch[rank::world]

    def crops(self, step: int, rank: int = 0, world: int = 1) -> list[Speech | Crop]:
        """`vocoder_batch` crops for each rank."""
        rng = np.random.default_rng([self.config.seed, step, 1])
        batch: list[Speech | Crop] = []
        for row in rng.choice(self.long, world * self.config.vocoder_batch):
            room = CODE_FRAMES * len(self.codes[row]) - self.config.vocoder_frames
            batch.append(Crop(int(row), int(rng.integers(room + 1)), self.config.vocoder_frames))
        return batch[rank::world]
