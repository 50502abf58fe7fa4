"""Granite Speech (transformers): a conformer by blocks, a query transformer over every 15 frames, a Granite decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import SequenceFeatureExtractor

from covo_rl.models.transformers_family import TransformersFamily, parts_at

N_FFT, WINDOW, HOP = 512, 400, 160


class GraniteMel(SequenceFeatureExtractor):
    """The log-mel of GraniteSpeechFeatureExtractor, bit for bit, without torchaudio."""

    def __init__(
        self, feature_size: int = 80, sampling_rate: int = 16_000, padding_value: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(feature_size, sampling_rate, padding_value, **kwargs)

    def __call__(self, samples_T: np.ndarray) -> torch.Tensor:
        """Mono float32 -> (1, F, 2 M): two frames of 10 ms side by side, an odd last one left out; none of a click."""
        if len(samples_T) <= N_FFT // 2:  # too short to be mirrored at its ends
            return torch.zeros(1, 0, 2 * self.feature_size)
        wave_T, window = torch.as_tensor(samples_T), torch.hann_window(WINDOW)
        power_BF = torch.stft(wave_T, N_FFT, HOP, WINDOW, window, return_complex=True).abs().pow(2)
        mel_FM = (power_BF.T @ self.filters_BM()).clip(min=1e-10).log10()
        mel_FM = torch.maximum(mel_FM, mel_FM.amax() - 8.0).div(4).add(1)
        return mel_FM[: len(mel_FM) // 2 * 2].reshape(1, -1, 2 * self.feature_size)

    def filters_BM(self) -> torch.Tensor:
        """Triangles on the scale 2595 log10(1 + f / 700), in float32 as torchaudio computes them."""
        top = self.sampling_rate // 2
        bins_B = torch.linspace(0, top, N_FFT // 2 + 1)
        mels = torch.linspace(0.0, 2595.0 * np.log10(1.0 + top / 700.0), self.feature_size + 2)
        edges = 700.0 * (10.0 ** (mels / 2595.0) - 1.0)
        widths, slopes = edges.diff(), edges[None, :] - bins_B[:, None]
        return torch.minimum(-slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]).clamp(min=0.0)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "feature_extractor_type": "GraniteSpeechFeatureExtractor"}


class GraniteSpeech(TransformersFamily):
    """transformers' GraniteSpeechForConditionalGeneration, whose logits it forgets to divide by `logits_scaling`."""

    title: ClassVar[str] = "Granite Speech"
    model_type: ClassVar[str] = "granite_speech"
    model_class: ClassVar[Any] = "GraniteSpeechForConditionalGeneration"
    extractor_class: ClassVar[Any] = GraniteMel
    audio_token: ClassVar[str] = "<|audio|>"
    text_content: ClassVar[bool] = True
    parts: ClassVar[Mapping[str, str]] = parts_at("model.encoder.", "model.projector.")

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor)
        # GraniteForCausalLM and vLLM divide; without it sampling would run at temperature 1 / scale
        scale = self.stock_logits_divisor
        model.lm_head.register_forward_hook(lambda head, inputs, logits: logits / scale)

    @property
    def stock_logits_divisor(self) -> float:
        return self.model.config.get_text_config().logits_scaling

    @property
    def unsampled_ids(self) -> tuple[int, ...]:
        """The audio id where it has a row: the model's own forward embeds id 0 in its place."""
        return tuple(i for i in (self.audio_token_id,) if i < self.embedded_ids)

    def extract(self, samples_T: np.ndarray) -> dict[str, torch.Tensor]:
        return {"input_features": self.processor.feature_extractor(samples_T)}

    def slots(self, tensors: Mapping[str, torch.Tensor]) -> int:
        return self._slots_of(tensors["input_features"].shape[1])

    def slot_count(self, samples: int) -> int:
        return self._slots_of((samples // HOP + 1) // 2 if samples > N_FFT // 2 else 0)

    def _slots_of(self, frames: int) -> int:
        config = self.model.config
        return -(-frames // config.window_size) * (config.window_size // config.downsample_rate)

    def audio_embeddings(self, tensors: Mapping[str, torch.Tensor], slots: int) -> torch.Tensor:
        return super().audio_embeddings(tensors, slots)[0]


class GraniteSpeechPlus(GraniteSpeech):
    """The projector hears intermediate layers of the encoder too."""

    model_type: ClassVar[str] = "granite_speech_plus"
    model_class: ClassVar[Any] = "GraniteSpeechPlusForConditionalGeneration"
