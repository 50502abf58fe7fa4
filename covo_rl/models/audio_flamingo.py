"""Audio Flamingo 3 and Music Flamingo (NVIDIA): Whisper's encoder over 30 s windows, averaged in pairs, into Qwen2.

The stock processors cut at ten and twenty minutes with a warning; longer clips are refused here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from covo_rl.models.transformers_family import WindowedFamily, paired_positions


class AudioFlamingo3(WindowedFamily):
    """25 slots for each second."""

    title: ClassVar[str] = "Audio Flamingo 3"
    model_type: ClassVar[str] = "audioflamingo3"
    model_class: ClassVar[Any] = "AudioFlamingo3ForConditionalGeneration"
    audio_token: ClassVar[str] = "<sound>"
    max_clip_seconds: float | None = 600.0
    rows_independent: ClassVar[bool] = True

    def slots(self, tensors: Mapping[str, torch.Tensor]) -> int:
        return int(paired_positions(tensors["input_features_mask"].sum(-1)).sum())


class MusicFlamingo(AudioFlamingo3):
    """The same encoder; what it hears is turned by its time in the clip, and the clip stands between two tokens."""

    title: ClassVar[str] = "Music Flamingo"
    model_type: ClassVar[str] = "musicflamingo"
    model_class: ClassVar[Any] = "MusicFlamingoForConditionalGeneration"
    max_clip_seconds: float | None = 1200.0
    rows_independent: ClassVar[bool] = False  # the ids of one clip are its clock

    def tokenize(self, text: str, slots: Sequence[int]) -> list[int]:
        # the stock processor puts them there too, the template does not
        return super().tokenize(text.replace(self.audio_token, f"<|sound_bos|>{self.audio_token}<|sound_eos|>"), slots)

    def audio_embeddings(self, tensors: Mapping[str, torch.Tensor], slots: int) -> torch.Tensor:
        # its clock, read from the ids, takes a last window too short for a slot for that of the next clip
        filled = paired_positions(tensors["input_features_mask"].sum(-1)) > 0
        rows = {name: value[filled] for name, value in tensors.items()}
        ids = torch.full((1, slots), self.audio_token_id, device=filled.device)
        return self.model.get_audio_features(**rows, input_ids=ids).pooler_output
