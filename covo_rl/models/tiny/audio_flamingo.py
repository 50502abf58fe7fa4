"""Tiny Audio Flamingo 3 and Music Flamingo."""

from __future__ import annotations

from typing import Any

import transformers

from covo_rl.models.processor import AudioProcessor
from covo_rl.models.tiny.tokenizer import TEMPLATE, tiny_tokenizer
from covo_rl.models.tiny.weights import decoder_sizes, random_weights


def tiny_audioflamingo3(*, seed: int = 0) -> tuple[Any, Any]:
    """An AudioFlamingo3ForConditionalGeneration (float32) and its processor; 25 slots for each second."""
    return _tiny("AudioFlamingo3", seed)


def tiny_musicflamingo(*, seed: int = 0) -> tuple[Any, Any]:
    """A MusicFlamingoForConditionalGeneration (float32) and its processor; 25 slots for each second."""
    return _tiny("MusicFlamingo", seed)


def _tiny(name: str, seed: int) -> tuple[Any, Any]:
    tokens = ("<sound>", "<|sound_bos|>", "<|sound_eos|>")
    tokenizer = tiny_tokenizer(audio_tokens=tokens, template=TEMPLATE.replace("AUDIO", tokens[0]))
    names, vocab = ("audio_token_id", "audio_bos_token_id", "audio_eos_token_id"), tokenizer.get_vocab()
    sounds = {name: vocab[token] for name, token in zip(names, tokens, strict=True)}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = getattr(transformers, f"{name}Config")(
        text_config={
            "model_type": "qwen2", **decoder_sizes(), "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.pad_token_id, **ends,
        },
        audio_config={
            "model_type": "audioflamingo3_encoder", "hidden_size": 40, "num_hidden_layers": 2,
            "num_attention_heads": 4, "intermediate_size": 64, "num_mel_bins": 16,
        },
        **sounds, dtype="float32",
    )  # fmt: skip
    model = random_weights(getattr(transformers, f"{name}ForConditionalGeneration"), config, seed)
    model.generation_config.update(**ends)
    return model, AudioProcessor(transformers.WhisperFeatureExtractor(feature_size=16), tokenizer, tokens[0])
