"""Qwen3-ASR (transformers): 13 positions a second, no limit of its own.

Of the two published layouts transformers reads the one whose names end in -hf. The template of the checkpoint drops
whatever text a user writes beside the audio; ours puts it where this model reads text, into the system turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import torch

from covo_rl.models import ModelError
from covo_rl.models.transformers_family import TransformersFamily

# As published where users say nothing: one system turn, then the turns in their order.
CHAT_TEMPLATE = (
    "{% set told = namespace(text='') %}"
    "{% for message in messages %}{% if message['role'] != 'assistant' %}"
    "{% set parts = [{'type': 'text', 'text': message['content']}] if message['content'] is string "
    "else message['content'] %}"
    "{% for part in parts %}{% if part['type'] == 'text' and part['text'] %}"
    "{% set told.text = told.text + ('\n' if told.text else '') + part['text'] %}"
    "{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{{ '<|im_start|>system\n' + told.text + '<|im_end|>\n' }}"
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and message['content'] is string %}{{ message['content'] }}"
    "{% elif message['content'] is not string %}{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}{{ '<|audio_start|><|audio_pad|><|audio_end|>' }}"
    "{% elif message['role'] == 'assistant' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Qwen3Asr(TransformersFamily):
    """transformers' Qwen3ASRForConditionalGeneration: chunks of one second, attention over windows of 8 s."""

    model_type: ClassVar[str] = "qwen3_asr"
    model_class: ClassVar[Any] = "Qwen3ASRForConditionalGeneration"
    title: ClassVar[str] = "Qwen3-ASR"
    audio_token: ClassVar[str] = "<|audio_pad|>"
    chat_template: ClassVar[str | None] = CHAT_TEMPLATE

    @classmethod
    def load(cls, path: str, **options: Any) -> Self:
        """Raises ModelError for the layout of the qwen-asr package, whose names transformers does not know."""
        from transformers import PreTrainedConfig

        if "thinker_config" in PreTrainedConfig.get_config_dict(path)[0]:
            raise ModelError(
                f"model {path}: its config.json has a thinker_config, the layout of the qwen-asr package; transformers "
                "reads the other one that Qwen publishes: give the repository whose name ends in -hf"
            )
        return super().load(path, **options)

    def extract(self, samples_T: np.ndarray) -> dict[str, torch.Tensor]:
        options = {"padding": True, "return_attention_mask": True, "return_tensors": "pt", "n_window": self.n_window}
        out = self.processor.feature_extractor(samples_T, sampling_rate=self.sampling_rate, **options)
        return {"input_features": out["input_features"], "input_features_mask": out["attention_mask"]}

    def slots(self, tensors: Mapping[str, torch.Tensor]) -> int:
        return chunked_positions(int(tensors["input_features_mask"].sum()), self.n_window)

    def slot_count(self, samples: int) -> int:
        extractor = self.processor.feature_extractor
        return chunked_positions(max(samples, extractor.min_length) // extractor.hop_length, self.n_window)

    @property
    def n_window(self) -> int:
        """Half the mel frames of one chunk of the encoder."""
        return self.model.config.audio_config.n_window


def chunked_positions(frames: int, n_window: int) -> int:
    """Mel frames -> positions after three convolutions of stride 2 in each chunk of 2 n_window frames.

    >>> chunked_positions(100, 50), chunked_positions(101, 50), chunked_positions(235, 50)
    (13, 14, 31)
    """
    chunks, rest = divmod(frames, 2 * n_window)
    return chunks * _thrice_halved(2 * n_window) + _thrice_halved(rest)


def _thrice_halved(frames: int) -> int:
    return -(-frames // 8)
