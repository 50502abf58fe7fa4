"""GLM-ASR (Z.ai): an encoder with rotary positions over 30 s windows, four positions to a slot, into Llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from covo_rl.models.transformers_family import WindowedFamily, conv_positions


class GlmAsr(WindowedFamily):
    """12.5 slots for each second; the stock processor cuts at 655 s with a warning, here longer clips are refused."""

    title: ClassVar[str] = "GLM-ASR"
    model_type: ClassVar[str] = "glmasr"
    model_class: ClassVar[Any] = "GlmAsrForConditionalGeneration"
    audio_token: ClassVar[str] = "<|pad|>"
    rows_independent: ClassVar[bool] = True
    max_clip_seconds: float | None = 630.0  # whole windows in 655 s: the stock processor takes no more

    def slots(self, tensors: Mapping[str, torch.Tensor]) -> int:
        positions = conv_positions(tensors["input_features_mask"].sum(-1))
        return int((positions // 4).sum())
