"""Short-lived states of the adapters: switched off for the reference, folded into the weights for decoding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[int]:
    """The base model: LoRA layers and modules_to_save are switched off; yields how many.

    PEFT's own context also toggles `requires_grad`, which a sharded parameter would remember for good.
    Raises RuntimeError if there is nothing to switch off, because the pass would then silently be the policy's.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    if not layers:
        raise RuntimeError("there is no adapter to switch off; a full policy needs keep_reference=True")
    before = [layer.disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        if not all(layer.disable_adapters for layer in layers):
            raise RuntimeError("this version of PEFT did not switch its adapters off")
        yield len(layers)
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._disable_adapters = state


def _foldable(layer: Any) -> bool:
    """A plain LoRA on a float linear layer, whose sum with the base weight is exact up to rounding."""
    from peft.tuners.lora import Linear

    if type(layer) is not Linear:
        return False
    base = layer.base_layer
    return (
        type(base) is nn.Linear
        and type(base.weight) is nn.Parameter
        and base.weight.dtype == torch.float32
        and not any(getattr(layer, "use_dora", {}).values())
        and not any(getattr(layer, "lora_bias", {}).values())
        and not layer.merged
        and not layer.disable_adapters
    )


@contextmanager
def folded(model: nn.Module, *, limit_bytes: int) -> Iterator[int]:
    """Fold LoRA into float32 base weights while decoding; the original tensors come back untouched.

    Yields how many layers were folded: 0 if the copies would need more than `limit_bytes`.
    """
    layers: list[Any] = [m for m in model.modules() if _foldable(m)]
    size = sum(layer.base_layer.weight.numel() * 4 for layer in layers)
    if not layers or size > limit_bytes:
        yield 0
        return
    originals = [layer.base_layer.weight.data for layer in layers]
    try:
        with torch.no_grad():
            for layer, weight in zip(layers, originals, strict=True):
                total = weight.clone()
                for name in layer.active_adapters:
                    if name in layer.lora_A:
                        total += layer.get_delta_weight(name).to(total.dtype)
                layer.base_layer.weight.data = total
                layer._disable_adapters = True
        yield len(layers)
    finally:
        for layer, weight in zip(layers, originals, strict=True):
            layer.base_layer.weight.data = weight
            layer._disable_adapters = False
