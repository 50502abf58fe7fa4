"""A tiny Qwen3-ASR."""

from __future__ import annotations

from typing import Any

import transformers

from covo_rl.models.processor import AudioProcessor
from covo_rl.models.tiny.tokenizer import tiny_tokenizer
from covo_rl.models.tiny.weights import decoder_sizes, encoder_sizes, random_weights

#: also those of Qwen3-Omni
QWEN3_AUDIO_TOKENS = ("<|audio_start|>", "<|audio_pad|>", "<|audio_end|>")
NAMES = dict(zip(("audio_bos_token", "audio_token", "audio_eos_token"), QWEN3_AUDIO_TOKENS, strict=True))


def tiny_qwen3_asr(*, seed: int = 0) -> tuple[Any, Any]:
    """A Qwen3ASRForConditionalGeneration with random weights (float32) and its processor."""
    tokenizer = tiny_tokenizer(audio_tokens=QWEN3_AUDIO_TOKENS, **NAMES)
    ends = {"eos_token_id": [tokenizer.pad_token_id, tokenizer.eos_token_id], "pad_token_id": tokenizer.eos_token_id}
    config = transformers.Qwen3ASRConfig(
        text_config={
            "model_type": "qwen3", **decoder_sizes(), "head_dim": 16, "vocab_size": len(tokenizer),
            "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, **ends,
        },
        audio_config={"model_type": "qwen3_asr_encoder", **encoder_sizes(32, 2, 2, 64, 16), "output_dim": 64,
                      "downsample_hidden_size": 8},
        audio_token_id=tokenizer.get_vocab()["<|audio_pad|>"], dtype="float32", **ends,
    )  # fmt: skip
    model = random_weights(transformers.Qwen3ASRForConditionalGeneration, config, seed)
    extractor = transformers.Qwen3ASRFeatureExtractor(feature_size=16)
    return model, AudioProcessor(extractor, tokenizer, "<|audio_pad|>")
