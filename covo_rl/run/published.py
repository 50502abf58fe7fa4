"""What is known of published models without asking a hub: sizes, and the positions that a second of sound fills.

Only what differs from the defaults of the configuration's class. The parameters that they add up to were compared with
what the model cards say (docs/models.md); Gemma 4 is not here, because its card's sizes could not be read.
"""

from __future__ import annotations

from typing import Any

_BF16: dict[str, Any] = {"dtype": "bfloat16"}
_QWEN2_7B: dict[str, Any] = {
    "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "intermediate_size": 18944,
    "num_attention_heads": 28, "num_key_value_heads": 4,
}  # fmt: skip
_FLAMINGO = {**_BF16, "text_config": {**_QWEN2_7B, "vocab_size": 151672}}


def _granite(width: int, inner: int, scaling: float) -> dict[str, Any]:
    text = {
        "model_type": "granite", "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": 40,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 49160, "tie_word_embeddings": True,
        "logits_scaling": scaling, "max_position_embeddings": 131072,
    }  # fmt: skip
    return {**_BF16, "text_config": text, "encoder_config": {"num_layers": 16}}


#: hub name -> (model type, what its config.json says beside the class's defaults)
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "tencent/Covo-Audio-Chat": ("covo_audio", _BF16),
    "Qwen/Qwen2-Audio-7B-Instruct": (
        "qwen2_audio",
        {**_BF16, "audio_token_index": 151646, "text_config": {
            "model_type": "qwen2", "intermediate_size": 11008, "vocab_size": 156032, "max_position_embeddings": 8192}},
    ),
    "nvidia/audio-flamingo-3-hf": ("audioflamingo3", _FLAMINGO),
    "nvidia/music-flamingo-2601-hf": ("musicflamingo", _FLAMINGO),
    "zai-org/GLM-ASR-Nano-2512": ("glmasr", _BF16),
    "mistralai/Voxtral-Mini-3B-2507": ("voxtral", _BF16),
    "mistralai/Voxtral-Small-24B-2507": (
        "voxtral",
        {**_BF16, "text_config": {
            "model_type": "llama", "hidden_size": 5120, "num_hidden_layers": 40, "intermediate_size": 32768,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072,
            "max_position_embeddings": 131072}},
    ),
    "Qwen/Qwen3-ASR-1.7B-hf": ("qwen3_asr", _BF16),
    "Qwen/Qwen2.5-Omni-7B": (
        "qwen2_5_omni_thinker",
        {**_BF16, "vision_config": {"hidden_size": 1280},
         "text_config": {**_QWEN2_7B, "model_type": "qwen2_5_omni_text", "vocab_size": 152064}},
    ),
    "Qwen/Qwen2.5-Omni-3B": (
        "qwen2_5_omni_thinker",
        {**_BF16, "audio_config": {"output_dim": 2048}, "vision_config": {"hidden_size": 1280, "out_hidden_size": 2048},
         "text_config": {
            "hidden_size": 2048, "num_hidden_layers": 36, "intermediate_size": 11008, "num_attention_heads": 16,
            "num_key_value_heads": 2, "vocab_size": 151936}},
    ),
    "Qwen/Qwen3-Omni-30B-A3B-Instruct": (
        "qwen3_omni_moe_thinker",
        {**_BF16,
         "audio_config": {"output_dim": 2048, "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20,
                          "encoder_ffn_dim": 5120},
         "text_config": {"hidden_size": 2048, "num_hidden_layers": 48, "intermediate_size": 768,
                         "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
                         "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 152064}},
    ),
    "ibm-granite/granite-speech-3.3-2b": ("granite_speech", _granite(2048, 8192, 8.0)),
    "ibm-granite/granite-speech-3.3-8b": ("granite_speech", _granite(4096, 12800, 16.0)),
    "google/gemma-3n-E2B-it": (
        "gemma3n",
        {**_BF16, "text_config": {"num_hidden_layers": 30, "intermediate_size": 8192, "num_kv_shared_layers": 10}},
    ),
    "google/gemma-3n-E4B-it": ("gemma3n", _BF16),
    "microsoft/Phi-4-multimodal-instruct": ("phi4_multimodal", _BF16),
}  # fmt: skip
#: model type -> positions that a second of sound fills
PER_SECOND = {
    "qwen2_audio": 25.0, "audioflamingo3": 25.0, "musicflamingo": 25.0, "glmasr": 12.5, "qwen3_asr": 13.0,
    "qwen2_5_omni": 25.0, "qwen3_omni_moe": 13.0, "granite_speech": 10.0, "gemma4": 25.0, "phi4_multimodal": 12.5,
}  # fmt: skip


def published_of(kind: str) -> list[str]:
    """Hub names of a model type; a whole model with a voice and the thinker in it are the same checkpoint."""
    return [
        name for name, (held, _) in PUBLISHED.items() if held.removesuffix("_thinker") == kind.removesuffix("_thinker")
    ]
