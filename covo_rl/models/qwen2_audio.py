"""Qwen2-Audio (transformers) behind the family interface.

Its feature extractor cuts at 30 s without a word, so longer clips are refused; it has no `get_audio_features`, so the
projector's output is taken, with the encoder's own padding mask per clip.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from covo_rl.models.transformers_family import WindowedFamily, conv_positions, paired_positions

# The template of the published checkpoints without their default system message, so that prompts say what they say.
CHAT_TEMPLATE = (
    "{% set audio = namespace(count=0) %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}{% set audio.count = audio.count + 1 %}"
    "{{ 'Audio ' ~ audio.count ~ ': <|audio_bos|><|AUDIO|><|audio_eos|>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Qwen2Audio(WindowedFamily):
    """transformers' Qwen2AudioForConditionalGeneration; one window of at most 30 s per clip."""

    title: ClassVar[str] = "Qwen2-Audio"
    model_type: ClassVar[str] = "qwen2_audio"
    model_class: ClassVar[Any] = "Qwen2AudioForConditionalGeneration"
    processor_class: ClassVar[Any] = "Qwen2AudioProcessor"
    audio_token: ClassVar[str] = "<|AUDIO|>"
    mask_field: ClassVar[str] = "feature_attention_mask"
    max_clip_seconds: float | None = 30.0
    rows_independent: ClassVar[bool] = True
    vllm_architecture: ClassVar[str] = "Qwen2AudioWithLoRA"
    chat_template: ClassVar[str | None] = CHAT_TEMPLATE

    def slots(self, tensors: Mapping[str, torch.Tensor]) -> int:
        return int(paired_positions(tensors[self.mask_field].sum(1)).sum())

    def audio_embeddings(self, tensors: Mapping[str, torch.Tensor], slots: int) -> torch.Tensor:
        from transformers.masking_utils import create_bidirectional_mask

        tower, features, mask_RF = self.model.model.audio_tower, *tensors.values()
        frames_R1 = mask_RF.sum(1)[:, None]
        positions = conv_positions(features.shape[-1])
        valid = torch.arange(positions, device=features.device)[None, :] < conv_positions(frames_R1)
        inputs = features.new_zeros(len(features), positions, 1)
        mask = create_bidirectional_mask(config=tower.config, inputs_embeds=inputs, attention_mask=valid.long())
        rows = self.model.model.multi_modal_projector(tower(features, attention_mask=mask).last_hidden_state)
        return rows[torch.arange(rows.shape[1], device=rows.device)[None, :] < paired_positions(frames_R1)]
