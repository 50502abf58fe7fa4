"""Voxtral (transformers): Whisper's encoder on windows of 30 s, a Llama decoder, Mistral's tokenizer.

Published folders hold tekken.json, the file of mistral-common, and no chat template, which is code of that package.
transformers reads the file without it; the template is written out here, and checked against it (docs/models.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from covo_rl.models.transformers_family import TransformersFamily

# It refuses a system message beside audio, as mistral-common does: Voxtral never saw one.
TEMPLATE = (
    "{{ bos_token }}{% set told = messages | selectattr('role', 'equalto', 'system') | list %}"
    "{% for message in messages %}"
    "{% set opens, ends = {'user': ('[INST]', '[/INST]'), 'system': ('[SYSTEM_PROMPT]', '[/SYSTEM_PROMPT]')}"
    ".get(message['role'], ('', eos_token)) %}{{ opens }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'audio' and told %}{{ raise_exception("
    "'Voxtral takes no system message beside audio; put its text into the question (instruction)') }}{% endif %}"
    "{{ '[BEGIN_AUDIO][AUDIO]' if part['type'] == 'audio' else part['text'] }}"
    "{% endfor %}{% endif %}{{ ends }}{% endfor %}"
)


class Voxtral(TransformersFamily):
    """transformers' VoxtralForConditionalGeneration; every started window of 30 s fills 375 slots."""

    title: ClassVar[str] = "Voxtral"
    model_type: ClassVar[str] = "voxtral"
    model_class: ClassVar[Any] = "VoxtralForConditionalGeneration"
    # AutoTokenizer returns mistral-common's own where that is installed, which makes no special tokens of text
    tokenizer_class: ClassVar[Any] = "PreTrainedTokenizerFast"
    audio_token: ClassVar[str] = "[AUDIO]"
    max_clip_seconds: float | None = 2400.0  # "40 minutes for understanding", says the model card

    @classmethod
    def load_processor(cls, path: str, **options: Any) -> Any:
        processor = super().load_processor(path, **options)
        if processor.tokenizer.eos_token is None:  # tekken.json does not say which token is which
            names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
            processor.tokenizer.add_special_tokens(names)
        processor.chat_template = processor.chat_template or TEMPLATE
        return processor

    def extract(self, samples_T: np.ndarray) -> dict[str, torch.Tensor]:
        extractor = self.processor.feature_extractor
        options = {"truncation": False, "pad_to_multiple_of": extractor.n_samples, "return_tensors": "pt"}
        out = extractor(samples_T, sampling_rate=self.sampling_rate, padding=True, **options)
        mel_MWF = out["input_features"][0].unflatten(1, (-1, extractor.nb_max_frames))  # of the whole clip, then cut
        return {"input_features": mel_MWF.transpose(0, 1).contiguous()}

    def slots(self, tensors: Mapping[str, torch.Tensor]) -> int:
        config = self.model.config.audio_config  # as many positions go into a slot as fill the projector's input
        width = len(tensors["input_features"]) * config.max_source_positions * config.hidden_size
        return width // config.intermediate_size
