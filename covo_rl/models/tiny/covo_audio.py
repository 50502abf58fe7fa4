"""A tiny Covo-Audio."""

from __future__ import annotations

from typing import Any

import torch

from covo_rl.models.covo_audio import CovoAudioConfig, CovoAudioForConditionalGeneration, CovoAudioProcessor
from covo_rl.models.tiny.tokenizer import COVO_AUDIO_TOKENS, SPECIAL_TOKENS, tiny_tokenizer
from covo_rl.models.tiny.weights import decoder_sizes, encoder_sizes, random_weights

POSITIONS_PER_SECOND = 50


def tiny_covo_audio(
    tokenizer: Any = None, *, encoder_width: int = 96, encoder_layers: int = 2, encoder_heads: int = 4,
    decoder_width: int = 128, decoder_layers: int = 4, decoder_heads: int = 4, segment_seconds: float = 3.0,
    mel_bins: int = 128, adapter_hidden: int = 256, adapter_downsample: int = 8, audio_codes: int = 0,
    initializer_range: float = 0.02, max_position_embeddings: int = 4096, rope_theta: float = 1e6, seed: int = 0,
) -> tuple[Any, Any]:  # fmt: skip
    """A CovoAudioForConditionalGeneration of about 1.5 M parameters (float32) and its CovoAudioProcessor.

    A 3 s clip fills 19 slots. `segment_seconds` fixes the encoder's length, as 30 s does in the published model: a
    longer clip becomes several segments. `audio_codes` output codes follow the tokenizer's ids. The caller's random
    state is left alone.
    """
    tokenizer = tiny_tokenizer() if tokenizer is None else tokenizer
    end_of_text, _, turn_end, audio_bos, placeholder, audio_eos = tokenizer.convert_tokens_to_ids(
        [*SPECIAL_TOKENS, *COVO_AUDIO_TOKENS]
    )
    config = CovoAudioConfig(
        llm_config={
            **decoder_sizes(decoder_width, decoder_layers, decoder_heads),
            "vocab_size": len(tokenizer) + audio_codes,
            "initializer_range": initializer_range, "max_position_embeddings": max_position_embeddings,
            "rope_theta": rope_theta,
            "bos_token_id": end_of_text, "pad_token_id": end_of_text, "eos_token_id": turn_end,
        },
        encoder_config={
            **encoder_sizes(encoder_width, encoder_layers, encoder_heads, 4 * encoder_width, mel_bins),
            "max_source_positions": round(segment_seconds * POSITIONS_PER_SECOND),
            "init_std": initializer_range,
        },
        adapter_hidden_dim=adapter_hidden, adapter_downsample=adapter_downsample, audio_token_index=len(tokenizer),
        audio_bos_token_id=audio_bos, audio_placeholder_token_id=placeholder, audio_eos_token_id=audio_eos,
        turn_end_token_id=turn_end, text_end_token_id=end_of_text, dtype="float32",
    )  # fmt: skip
    model = random_weights(CovoAudioForConditionalGeneration, config, seed, scale=1)
    return model, CovoAudioProcessor.from_model_config(config, tokenizer)


@torch.no_grad()
def fold_feature_statistics(model: Any, mean: torch.Tensor | float, std: torch.Tensor | float) -> None:
    """Make the encoder standardise its log-mel: `conv1((mel - mean) / std)`, folded into conv1's weights in place.

    `mean` and `std` are scalars or (M,), of the log-mel over the training clips. A network that learns from scratch
    on few clips needs inputs of mean 0 and deviation 1; the front end stays as specified. Exact for every frame but
    the first and the last, where the convolution's zero padding stands for mel 0, not for the mean.
    Raises ValueError for a deviation that is not positive.
    """
    conv = model.encoder.conv1
    bins = conv.weight.shape[1]
    mean_M = torch.as_tensor(mean, dtype=torch.float64).expand(bins)
    std_M = torch.as_tensor(std, dtype=torch.float64).expand(bins)
    if not bool((std_M > 0).all()):
        raise ValueError("every deviation must be positive: a bin that never changes cannot be standardised")
    weight = conv.weight.cpu().double() / std_M[None, :, None]
    shift = (weight * mean_M[None, :, None]).sum((1, 2))
    conv.bias.copy_(conv.bias.cpu().double() - shift)
    conv.weight.copy_(weight)
