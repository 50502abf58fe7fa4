"""A tiny GLM-ASR."""

from __future__ import annotations

from typing import Any

import transformers

from covo_rl.models.processor import AudioProcessor
from covo_rl.models.tiny.tokenizer import tiny_tokenizer
from covo_rl.models.tiny.weights import decoder_sizes, random_weights

AUDIO_TOKEN = "<|pad|>"


def tiny_glmasr(*, seed: int = 0) -> tuple[Any, Any]:
    """A GlmAsrForConditionalGeneration (float32) and its processor; 12.5 slots for each second."""
    tokenizer = tiny_tokenizer(audio_tokens=(AUDIO_TOKEN,))
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = transformers.GlmAsrConfig(
        text_config={"model_type": "llama", **decoder_sizes(), "vocab_size": len(tokenizer), **ends},
        audio_config={
            "model_type": "glmasr_encoder", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 128, "num_mel_bins": 16,
        },
        audio_token_id=tokenizer.get_vocab()[AUDIO_TOKEN], dtype="float32",
    )  # fmt: skip
    model = random_weights(transformers.GlmAsrForConditionalGeneration, config, seed)
    model.generation_config.update(**ends)
    return model, AudioProcessor(transformers.WhisperFeatureExtractor(feature_size=16), tokenizer, AUDIO_TOKEN)
