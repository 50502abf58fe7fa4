"""A tiny Voxtral."""

from __future__ import annotations

from typing import Any

import transformers

from covo_rl.models.processor import AudioProcessor
from covo_rl.models.tiny.tokenizer import tiny_tokenizer
from covo_rl.models.tiny.weights import decoder_sizes, encoder_sizes, random_weights
from covo_rl.models.voxtral import TEMPLATE

SPECIAL = ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[BEGIN_AUDIO]", "[AUDIO]")


def tiny_voxtral(*, seed: int = 0) -> tuple[Any, Any]:
    """A VoxtralForConditionalGeneration (float32) and its processor; 375 slots for every started 30 s."""
    tokenizer: Any = tiny_tokenizer(audio_tokens=SPECIAL, template=TEMPLATE)
    ends: dict[str, Any] = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = transformers.VoxtralConfig(
        text_config={"model_type": "llama", **decoder_sizes(), "head_dim": 16, "vocab_size": len(tokenizer), **ends},
        audio_config={"model_type": "voxtral_encoder", **encoder_sizes(32, 2, 4, 128, 16)},
        audio_token_id=tokenizer.convert_tokens_to_ids("[AUDIO]"), dtype="float32",
    )  # fmt: skip
    model = random_weights(transformers.VoxtralForConditionalGeneration, config, seed)
    model.generation_config.update(**ends)
    return model, AudioProcessor(transformers.WhisperFeatureExtractor(feature_size=16), tokenizer, "[AUDIO]")
