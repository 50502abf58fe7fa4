"""Random weights from a seed, and the sizes that the tiny models share."""

from __future__ import annotations

from typing import Any

import torch

#: larger than an initialiser's: audio then moves the logits, and greedy text does not repeat one token
SCALE = 3.0


def random_weights(model_class: Any, config: Any, seed: int, scale: float = SCALE) -> Any:
    """`model_class(config)` in eval mode, matrices times `scale`; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = model_class(config).eval()
        for weight in model.parameters():
            if weight.ndim > 1 and scale != 1:
                weight.mul_(scale)
    return model


def decoder_sizes(width: int = 64, layers: int = 2, heads: int = 4) -> dict[str, Any]:
    """The names that the text decoders of transformers agree on; half as many key heads as query heads."""
    return {
        "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 2),
    }  # fmt: skip


def encoder_sizes(width: int, layers: int, heads: int, inner: int, mel_bins: int) -> dict[str, Any]:
    """Those of Whisper's encoder, and of what descends from it."""
    return {
        "d_model": width, "encoder_layers": layers, "encoder_attention_heads": heads, "encoder_ffn_dim": inner,
        "num_mel_bins": mel_bins,
    }  # fmt: skip
