"""Qwen2-Audio (transformers) behind the family interface.

Its feature extractor cuts at 30 s without a word, so longer clips are refused here; it has no `get_audio_features`,
so the projector's output is taken, with the encoder's own padding mask per clip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from covo_rl.models.base import AudioFamily, ClipFeatures
from covo_rl.models.covo_audio.features import mono_float
from covo_rl.models.covo_audio.resampling import resample
from covo_rl.models.slots import expand_placeholders, trains

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


class Qwen2Audio(AudioFamily):
    """transformers' Qwen2AudioForConditionalGeneration; one segment of at most 30 s per clip."""

    model_type: ClassVar[str] = "qwen2_audio"
    parts: ClassVar[Mapping[str, str]] = {
        "encoder": "model.audio_tower.",
        "audio_adapter": "model.multi_modal_projector.",
        "llm": "model.language_model.",
        "lm_head": "lm_head.",
    }
    max_clip_seconds: float | None = 30.0

    @classmethod
    def classes(cls) -> tuple[Any, Any]:
        from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

        return Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

    @property
    def audio_token_id(self) -> int:
        return self.model.config.audio_token_id

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        given = self.model.generation_config.eos_token_id
        ids = given if isinstance(given, (list, tuple)) else [given, self.tokenizer.eos_token_id]
        return tuple(dict.fromkeys(int(i) for i in ids if i is not None))

    @property
    def pad_token_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.eos_token_ids[0] if pad is None else pad

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        return self.processor.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=CHAT_TEMPLATE,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )

    def clip_features(self, waveform: np.ndarray, sampling_rate: int) -> ClipFeatures:
        extractor = self.processor.feature_extractor
        samples, slots = self._resampled(waveform, sampling_rate)
        out = extractor(
            samples.numpy(),
            sampling_rate=extractor.sampling_rate,
            return_attention_mask=True,
            padding="max_length",
            return_tensors="pt",
        )
        mask = out["attention_mask"]
        return ClipFeatures({"input_features": out["input_features"], "feature_attention_mask": mask}, slots=slots)

    def clip_slots(self, waveform: np.ndarray, sampling_rate: int) -> int:
        return self._resampled(waveform, sampling_rate)[1]

    def _resampled(self, waveform: np.ndarray, sampling_rate: int) -> tuple[torch.Tensor, int]:
        """Mono samples at the model's rate, and the slots that they fill."""
        extractor = self.processor.feature_extractor
        samples = resample(mono_float(waveform), sampling_rate, extractor.sampling_rate)
        count, rate = samples.shape[0], extractor.sampling_rate
        if count > extractor.n_samples:
            raise ValueError(
                f"a clip of {count / rate:.2f} s: Qwen2-Audio takes {extractor.chunk_length} s and would cut the rest "
                "without a word; crop or chunk it first"
            )
        slots = self._slots(-(-count // extractor.hop_length))
        if slots < 1:
            raise ValueError(f"a clip of {1000 * count / rate:.1f} ms is too short for one audio slot of Qwen2-Audio")
        return samples, slots

    @staticmethod
    def _slots(frames: int) -> int:
        """Mel frames -> positions after the strided convolution and the average pooling."""
        return ((frames - 1) // 2 + 1 - 2) // 2 + 1

    def encode(self, clips: Sequence[ClipFeatures]) -> list[torch.Tensor]:
        from transformers.masking_utils import create_bidirectional_mask

        if not clips:
            return []
        base = self.model.model
        tower, projector = base.audio_tower, base.multi_modal_projector
        features = torch.cat([clip.tensors["input_features"] for clip in clips])
        features = features.to(tower.conv1.weight.device, tower.conv1.weight.dtype)
        frames = torch.cat([clip.tensors["feature_attention_mask"] for clip in clips]).sum(1).to(features.device)
        positions = (features.shape[-1] - 2) // 2 + 1
        valid = torch.arange(positions, device=features.device)[None, :] < ((frames - 1) // 2 + 1)[:, None]
        mask = create_bidirectional_mask(
            config=tower.config, inputs_embeds=features.new_zeros(len(clips), positions, 1), attention_mask=valid.long()
        )
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains(tower)):
            encoded = tower(features, attention_mask=mask).last_hidden_state
        with torch.set_grad_enabled(torch.is_grad_enabled() and (encoded.requires_grad or trains(projector))):
            rows = projector(encoded)
        return [row[: clip.slots] for row, clip in zip(rows, clips, strict=True)]

    def tokenize(self, text: str, slots: Sequence[int]) -> list[int]:
        expanded = expand_placeholders([text], slots, self.processor.audio_token)[0]
        return self.tokenizer(expanded, add_special_tokens=False)["input_ids"]

    @property
    def decoder(self) -> nn.Module:
        return self.model.model.language_model

    @property
    def lm_head(self) -> nn.Module:
        return self.model.lm_head
