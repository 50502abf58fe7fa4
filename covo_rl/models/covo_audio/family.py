"""Covo-Audio behind the interface that the policy, the sampler, evaluation and export talk to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from covo_rl.models.covo_audio import CovoAudioForConditionalGeneration, CovoAudioProcessor
from covo_rl.models.covo_audio.duplex_tokens import control_rows
from covo_rl.models.covo_audio.processing import AUDIO_TOKEN
from covo_rl.models.transformers_family import TransformersFamily


class CovoAudio(TransformersFamily):
    """The published model or a tiny one; clips of any length, as several segments."""

    title: ClassVar[str] = "Covo-Audio"
    model_type: ClassVar[str] = "covo_audio"
    model_class: ClassVar[Any] = CovoAudioForConditionalGeneration
    processor_class: ClassVar[Any] = CovoAudioProcessor
    audio_token: ClassVar[str] = AUDIO_TOKEN
    rows_independent: ClassVar[bool] = True
    vllm_architecture: ClassVar[str] = "CovoAudioForConditionalGeneration"
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

    @property
    def code_ids(self) -> range:
        config = self.model.config
        return range(config.audio_token_index, config.audio_token_index + config.num_audio_codes)

    @property
    def unsampled_ids(self) -> tuple[int, ...]:
        return () if self.speaks else tuple(self.code_ids)

    @property
    def trained_rows(self) -> Mapping[str, list[int]]:
        return control_rows(self.model.config)

    def extract(self, samples_T: np.ndarray) -> dict[str, torch.Tensor]:
        features, mask = self.processor.feature_extractor.clip(samples_T, self.sampling_rate)
        return {"input_features": features, "input_features_mask": mask}

    def slots(self, tensors: Mapping[str, torch.Tensor]) -> int:
        return int(tensors["input_features_mask"].sum())

    def slot_count(self, samples: int) -> int:
        extractor = self.processor.feature_extractor
        frames = samples // extractor.frame_samples
        return sum(extractor.slot_counts(extractor.frame_samples * (frames + frames % 2)))
