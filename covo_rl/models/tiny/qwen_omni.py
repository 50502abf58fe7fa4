"""Tiny thinkers of Qwen2.5-Omni and Qwen3-Omni."""

from __future__ import annotations

from typing import Any

import transformers

from covo_rl.models.processor import AudioProcessor
from covo_rl.models.tiny.qwen2_audio import QWEN2_AUDIO_TOKENS
from covo_rl.models.tiny.qwen3_asr import QWEN3_AUDIO_TOKENS
from covo_rl.models.tiny.tokenizer import TEMPLATE, tiny_tokenizer
from covo_rl.models.tiny.weights import decoder_sizes, encoder_sizes, random_weights

#: as Qwen2.5-Omni's: where the messages bring no system turn, it writes one
SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}"
)
#: named by the published configurations beside the fields of the class, whose own forward asks for them
VISION_IDS: dict[str, Any] = {"vision_start_token_id": 151652, "vision_end_token_id": 151653}
#: the class has a vision tower, which idles
VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64, "patch_size": 2,
}  # fmt: skip


def tiny_qwen2_5_omni(*, seed: int = 0) -> tuple[Any, Any]:
    """A Qwen2_5OmniThinkerForConditionalGeneration with random weights (float32) and its processor."""
    template = SYSTEM + TEMPLATE.replace("AUDIO", "".join(QWEN2_AUDIO_TOKENS))
    tokenizer = tiny_tokenizer(audio_tokens=QWEN2_AUDIO_TOKENS, template=template)
    config = transformers.Qwen2_5OmniThinkerConfig(
        text_config=_text(tokenizer, {}),
        audio_config={**encoder_sizes(32, 2, 2, 64, 16), "output_dim": 64},
        vision_config={**VISION, "fullatt_block_indexes": [0]},
        audio_token_index=tokenizer.get_vocab()["<|AUDIO|>"], dtype="float32", **VISION_IDS,
    )  # fmt: skip
    model = random_weights(transformers.Qwen2_5OmniThinkerForConditionalGeneration, config, seed)
    extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=300)
    return model, AudioProcessor(extractor, tokenizer, "<|AUDIO|>")


def tiny_qwen3_omni_moe(*, seed: int = 0) -> tuple[Any, Any]:
    """A Qwen3OmniMoeThinkerForConditionalGeneration, two of four experts a token, and its processor."""
    tokenizer = tiny_tokenizer(audio_tokens=QWEN3_AUDIO_TOKENS)
    experts = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    config = transformers.Qwen3OmniMoeThinkerConfig(
        text_config={**_text(tokenizer, {"mrope_interleaved": True}), **experts},
        audio_config={**encoder_sizes(32, 2, 2, 64, 16), "output_dim": 64, "downsample_hidden_size": 8},
        vision_config={**VISION, "num_position_embeddings": 4, "deepstack_visual_indexes": [0]},
        audio_token_id=tokenizer.get_vocab()["<|audio_pad|>"], dtype="float32", **VISION_IDS,
    )  # fmt: skip
    model = random_weights(transformers.Qwen3OmniMoeThinkerForConditionalGeneration, config, seed)
    return model, AudioProcessor(transformers.WhisperFeatureExtractor(feature_size=16), tokenizer, "<|audio_pad|>")


def _text(tokenizer: Any, rope: dict[str, Any]) -> dict[str, Any]:
    """Sizes of the decoder; of the published configurations neither names an end, the tokenizer does."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3], **rope}
    return {**decoder_sizes(), "vocab_size": len(tokenizer), "rope_parameters": rope}
