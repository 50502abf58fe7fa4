"""QLoRA: a decoder held in 4 bits under trainable LoRA matrices (arXiv 2305.14314). CUDA only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from covo_rl.config import AdapterConfig
from covo_rl.policy.patterns import PatternError

if TYPE_CHECKING:
    from covo_rl.models.base import AudioFamily


def check_quantised(family: AudioFamily, config: AdapterConfig) -> None:
    quantised = bool(getattr(family.model, "is_loaded_in_4bit", False))
    if config.load_in_4bit and not quantised:
        raise PatternError(
            "load_in_4bit: the model in memory is not quantised; load it with "
            "covo_rl.models.load(path, **covo_rl.policy.quantised.quantization_kwargs())"
        )
    if quantised and not config.lora:
        raise PatternError("a 4-bit model cannot train its own parameters: use LoRA, or load it unquantised for --full")


def quantization_kwargs(skip: Sequence[str] = ("encoder", "audio_tower", "audio_adapter", "multi_modal_projector",
                                               "lm_head")) -> dict[str, Any]:  # fmt: skip
    """Keyword arguments that make `covo_rl.models.load` hold the decoder in 4-bit NF4 (QLoRA, arXiv 2305.14314).

    Raises:
        PatternError: no CUDA device, or bitsandbytes is not installed.
    """
    if not torch.cuda.is_available():
        raise PatternError("load_in_4bit needs a CUDA device; drop it, the adapter trains on a 16-bit base too")
    try:
        import bitsandbytes  # noqa: F401  # type: ignore[import-not-found]
    except ImportError as error:
        raise PatternError("load_in_4bit needs bitsandbytes: pip install 'covo-rl[qlora]'") from error
    from transformers import BitsAndBytesConfig

    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=list(skip),
        )
    }
