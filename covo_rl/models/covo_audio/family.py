"""Covo-Audio behind the interface that the policy, the sampler, evaluation and export talk to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import nn

from covo_rl.models.base import AudioFamily, ClipFeatures
from covo_rl.models.covo_audio import CovoAudioForConditionalGeneration, CovoAudioProcessor


class CovoAudio(AudioFamily):
    """The published model or a tiny one; clips of any length, as several segments."""

    model_type: ClassVar[str] = "covo_audio"
    parts: ClassVar[Mapping[str, str]] = {
        "encoder": "encoder.",
        "audio_adapter": "audio_adapter.",
        "llm": "llm.model.",
        "lm_head": "llm.lm_head.",
    }
    max_clip_seconds: float | None = None

    @classmethod
    def classes(cls) -> tuple[Any, Any]:
        return CovoAudioForConditionalGeneration, CovoAudioProcessor

    @property
    def _net(self) -> CovoAudioForConditionalGeneration:
        return cast(CovoAudioForConditionalGeneration, self.model)

    @property
    def audio_token_id(self) -> int:
        return self.model.config.audio_placeholder_token_id

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The turn's end and the end of text: nothing useful follows either."""
        config = self.model.config
        return tuple(dict.fromkeys((config.turn_end_token_id, config.text_end_token_id)))

    @property
    def pad_token_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.model.config.text_end_token_id if pad is None else pad

    def clip_features(self, waveform: np.ndarray, sampling_rate: int) -> ClipFeatures:
        features, mask = self.processor.feature_extractor.clip(waveform, sampling_rate)
        return ClipFeatures({"input_features": features, "input_features_mask": mask}, slots=int(mask.sum()))

    def clip_slots(self, waveform: np.ndarray, sampling_rate: int) -> int:
        extractor = self.processor.feature_extractor
        return sum(extractor.slot_counts(extractor.waveform(waveform, sampling_rate).shape[0]))

    def encode(self, clips: Sequence[ClipFeatures]) -> list[torch.Tensor]:
        if not clips:
            return []
        fields = {name: torch.cat([clip.tensors[name] for clip in clips]) for name in clips[0].tensors}
        rows, _ = self._net.get_audio_embeds(**fields)
        return list(rows.split([clip.slots for clip in clips]))

    def tokenize(self, text: str, slots: Sequence[int]) -> list[int]:
        expanded = self.processor.expand([text], slots)[0]
        return self.tokenizer(expanded, add_special_tokens=False)["input_ids"]

    @property
    def decoder(self) -> nn.Module:
        return self._net.llm.model

    @property
    def lm_head(self) -> nn.Module:
        return self._net.llm.lm_head
