"""A tiny Qwen2-Audio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers

from covo_rl.models.tiny.tokenizer import tiny_tokenizer
from covo_rl.models.tiny.weights import decoder_sizes, encoder_sizes, random_weights

QWEN2_AUDIO_TOKENS = ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")


def tiny_qwen2_audio(
    texts: Sequence[str] = ("What do you hear?",), *, vocab_size: int = 512, encoder_width: int = 64,
    encoder_layers: int = 2, decoder_width: int = 64, decoder_layers: int = 2, mel_bins: int = 32, scale: float = 1.0,
    seed: int = 0,
) -> tuple[Any, Any]:  # fmt: skip
    """A Qwen2AudioForConditionalGeneration with random weights (float32) and its Qwen2AudioProcessor.

    Segments are of 30 s, as transformers fixes them. `scale` multiplies the matrices.
    """
    tokenizer = tiny_tokenizer(texts, vocab_size, audio_tokens=QWEN2_AUDIO_TOKENS)
    config = transformers.Qwen2AudioConfig(
        text_config={
            "model_type": "qwen2",
            **decoder_sizes(decoder_width, decoder_layers),
            "vocab_size": len(tokenizer), "bos_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        },
        audio_config={
            "model_type": "qwen2_audio_encoder",
            **encoder_sizes(encoder_width, encoder_layers, 4, 2 * encoder_width, mel_bins),
        },
        audio_token_index=tokenizer.get_vocab()["<|AUDIO|>"], dtype="float32",
    )  # fmt: skip
    model = random_weights(transformers.Qwen2AudioForConditionalGeneration, config, seed, scale)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    extractor = transformers.WhisperFeatureExtractor(feature_size=mel_bins)
    return model, transformers.Qwen2AudioProcessor(extractor, tokenizer)
