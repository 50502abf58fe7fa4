"""A decoder held in 4-bit NF4 by bitsandbytes (QLoRA, arXiv 2305.14314): what is quantised, and how it computes.

On a card it saves memory. On a CPU every product unpacks its weight first, so it only shows that a run works.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from covo_rl.types import UserError

#: of a parameter: 4 bits, one byte of scale for 64 of them, four bytes for 256 scales
BYTES_IN_4BIT = 0.5 + (1 + 4 / 256) / 64


class QuantisationError(UserError, ValueError):
    """A model cannot be held in 4 bits here; the message says what to do."""


def check_quantisation() -> None:
    """Raises QuantisationError where bitsandbytes is missing, or does not compute on this machine's device."""
    try:
        import bitsandbytes  # type: ignore[import-not-found]
    except ImportError as error:
        raise QuantisationError(
            "a base in 4 bits (load_in_4bit) needs bitsandbytes: pip install 'covo-rl[qlora]'; an adapter trains on an "
            "unquantised base too, and covo-rl export --merged merges into one"
        ) from error
    device = torch.accelerator.current_accelerator(check_available=True)
    kind, known = device.type if device else "cpu", getattr(bitsandbytes, "supported_torch_devices", ())
    if kind not in known:
        raise QuantisationError(
            f"load_in_4bit: bitsandbytes {bitsandbytes.__version__} computes on {', '.join(sorted(known)) or 'cuda'}, "
            f"not on {kind}: pip install -U 'covo-rl[qlora]', or leave it out"
        )


def quantisation_of(parts: Mapping[str, str], dtype: str, others: Iterable[Mapping[str, str]] = ()) -> Any:
    """The `quantization_config` that holds the decoder's linear layers in NF4, and no other part; products in `dtype`.

    `others`: the same parts as other releases of transformers call them.
    """
    from transformers import BitsAndBytesConfig

    layouts = (parts, *others)
    skip = list(dict.fromkeys(prefix.rstrip(".") for p in layouts for part, prefix in p.items() if part != "llm"))
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype), llm_int8_skip_modules=skip,
    )  # fmt: skip


def keep_one_arithmetic(model: nn.Module) -> None:
    """Sampling, scoring and the gradient use the same products on a CPU too.

    On AVX512-BF16 bitsandbytes repacks a layer at its first call without a gradient: from then on it multiplies in
    bfloat16, whatever the compute dtype, and passes no gradient on.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def element_count(parameter: nn.Parameter) -> int:
    """Numbers that a parameter stands for; two of a quantised one share a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()
