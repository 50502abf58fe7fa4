"""Tiny Gemma 4 and Gemma 3n: two layers with keys of their own, two that share them, and a window of 16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import Gemma3nAudioFeatureExtractor, Gemma4AudioFeatureExtractor

from covo_rl.models.gemma import Gemma, Gemma3n, Gemma4
from covo_rl.models.gemma3n_model import Gemma3nForConditionalGeneration
from covo_rl.models.processor import AudioProcessor
from covo_rl.models.tiny.tokenizer import TEMPLATE, tiny_tokenizer
from covo_rl.models.tiny.weights import random_weights

MEL_BINS = 16
#: Gemma 3n's ids beyond the per-layer table: pictures', then audio's, whose last one fills short clips
PICTURE_TOKENS = ("<end_of_image>", "<image_soft_token>", "<unused0>", "<unused1>")
AUDIO_TOKENS = ("<end_of_audio>", Gemma3n.audio_token, "<unused2>", "<unused3>")


def tiny_gemma4(*, seed: int = 0) -> tuple[Any, Any]:
    """A Gemma4ForConditionalGeneration with random weights (float32), and its extractor and tokenizer."""
    names = (Gemma4.audio_token, *Gemma4.frame, "<|image|>", "<|video|>")
    tokenizer = _tokenizer(Gemma4, names)
    audio, begin, end, image, video = tokenizer.convert_tokens_to_ids(list(names))
    config = transformers.Gemma4Config(
        text_config={
            **_decoder(tokenizer), "vocab_size_per_layer_input": len(tokenizer), "global_head_dim": 32,
            "use_double_wide_mlp": True,
        },
        audio_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "output_proj_dims": 24,
            "subsampling_conv_channels": [MEL_BINS, 4],
        },
        vision_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 4,
        },
        audio_token_id=audio, boa_token_id=begin, eoa_token_index=end, image_token_id=image, video_token_id=video,
        dtype="float32",
    )  # fmt: skip
    model = _model(transformers.Gemma4ForConditionalGeneration, config, seed)
    return model, AudioProcessor(Gemma4AudioFeatureExtractor(feature_size=MEL_BINS), tokenizer, Gemma4.audio_token)


def tiny_gemma3n(*, seed: int = 0) -> tuple[Any, Any]:
    """A Gemma 3n without vision tower, with random weights (float32), and its extractor and tokenizer."""
    tokenizer = _tokenizer(Gemma3n, ("<start_of_audio>",))
    vision_offset = len(tokenizer)
    tokenizer.add_tokens([*PICTURE_TOKENS, *AUDIO_TOKENS], special_tokens=True)
    audio_offset = vision_offset + len(PICTURE_TOKENS)
    config = transformers.Gemma3nConfig(
        text_config={
            **_decoder(tokenizer), "vocab_size_per_layer_input": vision_offset, "altup_num_inputs": 3,
            "laurel_rank": 4, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
        },
        audio_config={
            "hidden_size": 32, "input_feat_size": MEL_BINS, "conf_num_hidden_layers": 2, "conf_num_attention_heads": 4,
            "sscp_conv_channel_size": [8, 4], "conf_reduction_factor": 8, "vocab_offset": audio_offset,
            "vocab_size": len(AUDIO_TOKENS),
        },
        vision_config={
            "hidden_size": 16, "vocab_offset": vision_offset, "vocab_size": len(PICTURE_TOKENS), "num_labels": 2,
        },
        audio_soft_tokens_per_image=94, boa_token_id=tokenizer.convert_tokens_to_ids("<start_of_audio>"),
        eoi_token_id=vision_offset, image_token_id=vision_offset + 1, eoa_token_id=audio_offset,
        audio_token_id=audio_offset + 1, dtype="float32",
    )  # fmt: skip
    model = _model(Gemma3nForConditionalGeneration, config, seed)
    return model, AudioProcessor(Gemma3nAudioFeatureExtractor(feature_size=MEL_BINS), tokenizer, Gemma3n.audio_token)


def _tokenizer(family: type[Gemma], names: Sequence[str]) -> Any:
    """The template writes the audio token alone: what frames it is the processor's."""
    return tiny_tokenizer(audio_tokens=names, template=TEMPLATE.replace("AUDIO", family.audio_token))


def _decoder(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2, "sliding_window": 16,
        "final_logit_softcapping": 4.0, "initializer_range": 0.1, "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip


def _model(model_class: Any, config: Any, seed: int) -> Any:
    """Random in every number: vectors, layer scales and clip bounds start as ones, zeros and infinities.

    Queries and what a layer adds are kept small, or four random layers would make ten times the rounding of it.
    """
    model, generator = random_weights(model_class, config, seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, vector in ((name, p) for name, p in model.named_parameters() if p.ndim == 1):
            vector.add_(0.3 * torch.randn(vector.shape, generator=generator))
            if ".language_model.layers." in name and ("q_norm" in name or ".post_" in name):
                vector.mul_(0.3)
        for name, bound in model.named_buffers():
            if name.endswith(("_min", "_max")):
                bound.fill_(4.0 if name.endswith("max") else -4.0)
            elif name.endswith("layer_scalar"):
                bound.fill_(0.9)
    model.generation_config.eos_token_id = model.config.text_config.eos_token_id
    model.generation_config.pad_token_id = model.config.text_config.pad_token_id
    return model
