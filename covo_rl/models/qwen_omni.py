"""The thinkers of Qwen2.5-Omni and Qwen3-Omni (transformers): audio in, text out.

They load from a full published checkpoint (config.json with a thinker_config) and from a thinker alone. Talker and
vocoder are not read, and the vision tower (0.7 of the 8.9 billion parameters at 7B) is let go, as rows with pictures
are refused; whatever is written carries them over. With audio alone M-RoPE has the same plain position in all its axes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from covo_rl.models.qwen3_asr import chunked_positions
from covo_rl.models.transformers_family import TransformersFamily, paired_positions


class _Thinker(TransformersFamily):
    """What both share: features of the clip's own mel frames, and two layouts of transformers."""

    parts: ClassVar[Mapping[str, str]] = {
        "encoder": "model.audio_tower.", "llm": "model.language_model.", "lm_head": "lm_head.",
    }  # fmt: skip
    #: of transformers 5.17
    other_parts: ClassVar[tuple[Mapping[str, str], ...]] = (
        {"encoder": "audio_tower.", "llm": "model.", "lm_head": "lm_head."},
    )

    unheard: ClassVar[tuple[str, ...]] = ("model.visual", "visual")

    @abstractmethod
    def frames(self, samples: int) -> int:
        """Mel frames of a clip of so many samples."""

    @abstractmethod
    def positions(self, frames: int) -> int:
        """Slots of so many mel frames."""

    @abstractmethod
    def options(self, frames: int) -> dict[str, Any]:
        """What the feature extractor is told."""

    def extract(self, samples_T: np.ndarray) -> dict[str, torch.Tensor]:
        frames = self.frames(len(samples_T))
        if self.positions(frames) < 1:  # too short, for the extractor too
            return {"feature_attention_mask": torch.zeros(1, 0, dtype=torch.int32)}
        mel_1MF = self.processor.feature_extractor(
            samples_T, sampling_rate=self.sampling_rate, return_tensors="pt", **self.options(frames)
        )["input_features"][..., :frames]
        return {"input_features": mel_1MF, "feature_attention_mask": torch.ones(1, frames, dtype=torch.int32)}

    def audio_embeddings(self, tensors: Mapping[str, torch.Tensor], slots: int) -> torch.Tensor:
        return self.model.get_audio_features(**tensors).last_hidden_state  # 5.17 has no pooler_output

    def slots(self, tensors: Mapping[str, torch.Tensor]) -> int:
        return self.positions(int(tensors["feature_attention_mask"].sum()))

    def slot_count(self, samples: int) -> int:
        return self.positions(self.frames(samples))


class Qwen25Omni(_Thinker):
    """Qwen2.5-Omni's thinker: 25 positions a second, in chunks of 2 s that do not see each other. No talker."""

    model_type: ClassVar[str] = "qwen2_5_omni"
    model_class: ClassVar[Any] = "Qwen2_5OmniThinkerForConditionalGeneration"
    title: ClassVar[str] = "Qwen2.5-Omni"
    audio_token: ClassVar[str] = "<|AUDIO|>"
    max_clip_seconds: float | None = 300.0

    def frames(self, samples: int) -> int:
        return -(-samples // self.processor.feature_extractor.hop_length)

    def positions(self, frames: int) -> int:
        return paired_positions(frames)

    def options(self, frames: int) -> dict[str, Any]:
        """Silence for one more window, as the last frame sees it in the stock padding to 300 s (15 MB a clip)."""
        extractor = self.processor.feature_extractor
        return {"padding": "max_length", "max_length": frames * extractor.hop_length + extractor.n_fft}


class Qwen3OmniMoe(_Thinker):
    """Qwen3-Omni's thinker: 13 positions a second, attention over windows of 8 s, an MoE decoder. No talker.

    LoRA reaches its attention alone: the experts are stacked tensors, no modules. Its extractor is Whisper's of 30 s,
    which cuts unless told not to.
    """

    model_type: ClassVar[str] = "qwen3_omni_moe"
    lora_leaves: ClassVar[tuple[str, ...] | None] = ("q_proj", "k_proj", "v_proj", "o_proj")  # experts are no modules
    model_class: ClassVar[Any] = "Qwen3OmniMoeThinkerForConditionalGeneration"
    title: ClassVar[str] = "Qwen3-Omni"
    audio_token: ClassVar[str] = "<|audio_pad|>"

    def frames(self, samples: int) -> int:
        extractor = self.processor.feature_extractor
        if samples <= extractor.n_fft // 2:  # its STFT reflects half a window
            return 0
        return samples // extractor.hop_length

    def positions(self, frames: int) -> int:
        return chunked_positions(frames, self.model.config.audio_config.n_window)

    def options(self, frames: int) -> dict[str, Any]:
        return {"padding": True, "truncation": False}
