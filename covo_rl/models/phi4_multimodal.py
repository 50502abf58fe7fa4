"""Phi-4-multimodal (transformers): encoder and projector inside `embed_tokens_extend`, a Phi-3 decoder.

A folder of the published layout holds the LoRA for speech in `speech-lora`; it is merged on loading. The checkpoint
with remote code (model_type `phi4mm`) has other names: convert it first, with transformers' own script.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from covo_rl.models.transformers_family import TransformersFamily, parts_at

_EXTEND = "model.embed_tokens_extend."
_AUDIO = _EXTEND + "audio_embed."


class Phi4Multimodal(TransformersFamily):
    """transformers' Phi4MultimodalForCausalLM, with its speech projector; one clip is one row, whatever its length."""

    title: ClassVar[str] = "Phi-4-multimodal"
    model_type: ClassVar[str] = "phi4_multimodal"
    model_class: ClassVar[Any] = "Phi4MultimodalForCausalLM"
    extractor_class: ClassVar[Any] = "Phi4MultimodalFeatureExtractor"
    audio_token: ClassVar[str] = "<|audio|>"
    text_content: ClassVar[bool] = True
    unheard: ClassVar[tuple[str, ...]] = (_EXTEND + "image_embed",)
    adapter_folder: ClassVar[str] = "speech-lora"
    parts: ClassVar[Mapping[str, str]] = parts_at(_AUDIO + "encoder.", _AUDIO, "model.")

    @property
    def audio_token_id(self) -> int:
        return self.model.config.audio_config.audio_token_id

    def extract(self, samples_T: np.ndarray) -> dict[str, torch.Tensor]:
        extractor = self.processor.feature_extractor
        if len(samples_T) < extractor.win_length:
            none = torch.zeros(1, 0, extractor.feature_size)
            return {"audio_input_features": none, "audio_embed_sizes": torch.zeros(1, dtype=torch.long)}
        return dict(extractor(samples_T, sampling_rate=self.sampling_rate, return_tensors="pt"))

    def slots(self, tensors: Mapping[str, torch.Tensor]) -> int:
        return int(tensors["audio_embed_sizes"])

    def audio_embeddings(self, tensors: Mapping[str, torch.Tensor], slots: int) -> torch.Tensor:
        audio = self.model.get_submodule(_AUDIO.rstrip("."))
        ids = torch.full((1, slots), self.audio_token_id, device=self.embed_tokens.weight.device)
        return audio(ids, self.embed_tokens.weight.new_zeros(1, slots, self.embed_tokens.embedding_dim), **tensors)[0]
