"""Qwen2-Audio (transformers) behind the family interface.

Its feature extractor cuts at 30 s without a word, so longer clips are refused here; it has no `get_audio_features`,
so the projector's output is taken, with the encoder's own padding mask per clip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor
from transformers.masking_utils import create_bidirectional_mask

from covo_rl.models.base import AudioFamily, ClipFeatures
from covo_rl.models.covo_audio.waveform import mono_float, sinc_resample
from covo_rl.models.slots import part_output

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
    model_class: ClassVar[Any] = Qwen2AudioForConditionalGeneration
    processor_class: ClassVar[Any] = Qwen2AudioProcessor
    parts: ClassVar[Mapping[str, str]] = {
        "encoder": "model.audio_tower.",
        "audio_adapter": "model.multi_modal_projector.",
        "llm": "model.language_model.",
        "lm_head": "lm_head.",
    }
    max_clip_seconds: float | None = 30.0
    chat_template: ClassVar[str | None] = CHAT_TEMPLATE

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        ends = self.model.generation_config.eos_token_id
        ids = ends if isinstance(ends, (list, tuple)) else [ends, self.tokenizer.eos_token_id]
        return tuple(dict.fromkeys(int(i) for i in ids if i is not None))

    def clip_features(self, waveform: np.ndarray, sampling_rate: int) -> ClipFeatures:
        extractor = self.processor.feature_extractor
        samples, slots = self._resampled(waveform, sampling_rate)
        options = {"return_attention_mask": True, "padding": "max_length", "return_tensors": "pt"}
        out = extractor(samples.numpy(), sampling_rate=extractor.sampling_rate, **options)
        tensors = {"input_features": out["input_features"], "feature_attention_mask": out["attention_mask"]}
        return ClipFeatures(tensors, slots)

    def clip_slots(self, waveform: np.ndarray, sampling_rate: int) -> int:
        return self._resampled(waveform, sampling_rate)[1]

    def _resampled(self, waveform: np.ndarray, sampling_rate: int) -> tuple[torch.Tensor, int]:
        """Mono samples at the model's rate, and the slots that they fill."""
        extractor = self.processor.feature_extractor
        rate = extractor.sampling_rate
        samples = sinc_resample(mono_float(waveform), sampling_rate, rate)
        count = samples.shape[0]
        if count > extractor.n_samples:
            raise ValueError(
                f"a clip of {count / rate:.2f} s: Qwen2-Audio takes {extractor.chunk_length} s and would cut the rest "
                "without a word; crop or chunk it first"
            )
        frames = -(-count // extractor.hop_length)
        slots = (_positions(frames) - 2) // 2 + 1  # after the average pooling
        if slots < 1:
            raise ValueError(f"a clip of {1000 * count / rate:.1f} ms is too short for one audio slot of Qwen2-Audio")
        return samples, slots

    def encode(self, clips: Sequence[ClipFeatures]) -> list[torch.Tensor]:
        if not clips:
            return []
        tower = self.model.model.audio_tower
        features = torch.cat([clip.tensors["input_features"] for clip in clips])
        features = features.to(tower.conv1.weight.device, tower.conv1.weight.dtype)
        frames = torch.cat([clip.tensors["feature_attention_mask"] for clip in clips]).sum(1).to(features.device)
        positions = _positions(features.shape[-1])
        valid = torch.arange(positions, device=features.device)[None, :] < _positions(frames)[:, None]
        mask = create_bidirectional_mask(
            config=tower.config, inputs_embeds=features.new_zeros(len(clips), positions, 1), attention_mask=valid.long()
        )
        encoded = part_output(tower, features, attention_mask=mask).last_hidden_state
        rows = part_output(self.model.model.multi_modal_projector, encoded)
        return [row[: clip.slots] for row, clip in zip(rows, clips, strict=True)]


def _positions(frames: Any) -> Any:
    """Mel frames (a number or a tensor) -> positions after the convolution of stride 2."""
    return (frames - 1) // 2 + 1
