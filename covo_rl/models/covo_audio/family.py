"""Covo-Audio behind the interface that the policy, the sampler, evaluation and export talk to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from covo_rl.models.base import AudioFamily, ClipFeatures
from covo_rl.models.covo_audio import CovoAudioForConditionalGeneration, CovoAudioProcessor


class CovoAudio(AudioFamily):
    """The published model or a tiny one; clips of any length, as several segments."""

    model_type: ClassVar[str] = "covo_audio"
    model_class: ClassVar[Any] = CovoAudioForConditionalGeneration
    processor_class: ClassVar[Any] = CovoAudioProcessor
    parts: ClassVar[Mapping[str, str]] = {
        "encoder": "encoder.",
        "audio_adapter": "audio_adapter.",
        "llm": "llm.model.",
        "lm_head": "llm.lm_head.",
    }

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The turn's end and the end of text: nothing useful follows either."""
        config = self.model.config
        return tuple(dict.fromkeys((config.turn_end_token_id, config.text_end_token_id)))

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
        rows = self.model.get_audio_features(**fields).pooler_output
        return list(rows.split([clip.slots for clip in clips]))
