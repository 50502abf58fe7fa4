"""What training reads of a recording: its wave as the tokenizer hears it, its log-mel, its pitch, its words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from covo_rl.data.read import DataError
from covo_rl.data.terminal import say
from covo_rl.models.covo_audio.token2wav.mel import log_mel
from covo_rl.speech.front_end import prepare_wave
from covo_rl.speech.grid import CODE_FRAMES, RATE, pad_to_codes
from covo_rl.speech.pieces import Pieces
from covo_rl.speech.pitch import track_f0
from covo_rl.speech.rows import SpeechRow, read_speech_rows, recording_problems
from covo_rl.synth.speech import Utterance, utterance
from covo_rl.train.ranks import Ranks
from covo_rl.types import Clip


def row_of(spoken: Utterance, id: str) -> SpeechRow:
    """An utterance of the synthesiser as a row; what else is true of it stands in `source`."""
    source = {"tones": spoken.tones, "sex": spoken.speaker.sex, "f0_Z": spoken.f0_Z}
    clip = Clip(array=spoken.wave, sampling_rate=RATE)
    return SpeechRow(id, spoken.text, clip, "en", spoken.speaker.name, words=spoken.words, source=source)


def digit_rows(split: str, count: int, seed: int = 0) -> list[SpeechRow]:
    """The first utterances of a split, without files."""
    return [row_of(utterance(split, i, seed), f"{split}-{seed}-{i:05d}") for i in range(count)]


def training_rows(
    data: str, audio_dir: str | None, ranks: Ranks, *, needs: Sequence[str], **limits: Any
) -> list[SpeechRow]:
    """`read_speech_rows`, and every recording is read once, a share of them by each rank.

    Raises:
        DataError: every problem of every row and recording.
    """
    rows = read_speech_rows(data, audio_dir, needs=needs, **limits)
    if ranks.main:
        say(f"{data}: reading all {len(rows)} recordings once, before anything is trained")
    if problems := ranks.joined(recording_problems(rows[ranks.rank :: ranks.world])):
        raise DataError(data, problems)
    return rows


@dataclass
class TrainingClip:
    """`input_T`: for the front end. mel_ZE: log-mel, Z = 4 L. f0_Z: Hz, 0 unvoiced. `ids`: pieces of its text."""

    id: str
    input_T: Tensor
    mel_ZE: Tensor
    f0_Z: Tensor
    ids: list[int]


@dataclass
class ClipBatch:
    """Clips side by side, padded on the right. `speaker_BE`: mean log-mel of another clip of each one's speaker."""

    ids: list[str]
    inputs: list[Tensor]
    mel_BZE: Tensor
    f0_BZ: Tensor
    mask_BZ: Tensor
    speaker_BE: Tensor
    targets: list[list[int]] = field(default_factory=list)

    @property
    def lengths_B(self) -> Tensor:
        """Codes of each clip."""
        return self.mask_BZ.sum(1) // CODE_FRAMES


class TrainingClips(Dataset):
    """Item (i, j): row i as a TrainingClip, and the mean log-mel (64,) of row j, of the same speaker.

    Clips are kept in memory up to `cache_mb`; later ones are made again each time.
    """

    def __init__(self, rows: Sequence[SpeechRow], pieces: Pieces, front_end: str, cache_mb: float = 2048) -> None:
        self.rows, self.pieces, self.front_end = rows, pieces, front_end
        self.room = cache_mb * 2**20
        self.clips: dict[int, TrainingClip] = {}
        speakers: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            speakers.setdefault(row.speaker or f"row {i}", []).append(i)
        self.others = [[j for j in speakers[row.speaker or f"row {i}"] if j != i] or [i] for i, row in enumerate(rows)]

    def __len__(self) -> int:
        return len(self.rows)

    def clip(self, i: int) -> TrainingClip:
        """Row i, made now or kept.

        Raises:
            AudioError: its recording cannot be read.
        """
        if i in self.clips:
            return self.clips[i]
        row = self.rows[i]
        wave_T = row.wave()
        padded_T = pad_to_codes(wave_T)
        mel_ZE = log_mel(torch.from_numpy(padded_T)[None])[0]
        f0_Z = torch.from_numpy(track_f0(padded_T, RATE))
        ids = [id for word in self.pieces.words(row.text) for id in word]
        clip = TrainingClip(row.id, prepare_wave(wave_T, self.front_end), mel_ZE, f0_Z, ids)
        size = 4 * (clip.input_T.numel() + mel_ZE.numel() + f0_Z.numel())
        if size <= self.room:
            self.clips[i], self.room = clip, self.room - size
        return clip

    def __getitem__(self, pair: tuple[int, int]) -> tuple[TrainingClip, Tensor]:
        return self.clip(pair[0]), self.clip(pair[1]).mel_ZE.mean(0)

    def draw(self, step: int, size: int, seed: int) -> list[tuple[int, int]]:
        """The pairs of one update: each epoch an order of its own, and each row's other clip by chance.

        It depends on (seed, step) only, so that a resumed run reads what it would have read.
        """
        pairs, orders = [], {}
        for place in range(step * size, (step + 1) * size):
            epoch, index = divmod(place, len(self))
            if epoch not in orders:
                orders[epoch] = np.random.default_rng([seed, epoch]).permutation(len(self))
            row = int(orders[epoch][index])
            others = self.others[row]
            pairs.append((row, others[int(np.random.default_rng([seed, place, 1]).integers(len(others)))]))
        return pairs


def collate(items: Sequence[tuple[TrainingClip, Tensor]]) -> ClipBatch:
    """Items of TrainingClips -> a batch on the CPU."""
    clips = [clip for clip, _ in items]
    pad: Any = torch.nn.utils.rnn.pad_sequence
    return ClipBatch(
        [clip.id for clip in clips],
        [clip.input_T for clip in clips],
        pad([clip.mel_ZE for clip in clips], batch_first=True),
        pad([clip.f0_Z for clip in clips], batch_first=True),
        pad([torch.ones(len(clip.f0_Z), dtype=torch.bool) for clip in clips], batch_first=True),
        torch.stack([speaker for _, speaker in items]),
        [clip.ids for clip in clips],
    )
