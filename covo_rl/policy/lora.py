"""LoRA whose masters are float32 and whose products are made in the dtype of the activations.

PEFT copies a 16-bit activation to float32 for every layer and multiplies there: no tensor cores, and the copies stay
until the backward pass. Here A and B are rounded instead; gradients reach the float32 masters through the rounding. In
float32 nothing is rounded, and the numbers are PEFT's.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


class RoundedLinear(nn.Linear):
    """A linear layer that multiplies in the dtype of its input, whatever its weight is kept in."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # called as a module, not through its weight: ZeRO-3 gathers the weight in a hook of the call
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return nn.functional.linear(input, self.weight.to(input.dtype), bias)


class RoundedLora(Linear):
    """PEFT's layer without float32 copies of 16-bit inputs; for DoRA and other variants it is PEFT's own."""

    rounds = True

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        special = any(name in self.lora_variant or self.lora_bias[name] for name in names)
        if not self.rounds or special or args or kwargs or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        # scaled while it is r wide; before the base's product, which recomputation then leaves out: nothing needs it
        deltas = [self.lora_B[n](self.lora_A[n](self.lora_dropout[n](x)) * self.scaling[n]) for n in names]
        result = self.base_layer(x)
        for delta in deltas:
            result = result + delta
        return result

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        super().update_layer(*args, **kwargs)
        _round_products(self)


def _round_products(layer: Linear) -> None:
    for module in chain(layer.lora_A.values(), layer.lora_B.values()):
        if type(module) is nn.Linear:
            module.__class__ = RoundedLinear


@contextmanager
def peft_products(model: nn.Module) -> Iterator[None]:
    """Inside, adapters multiply as PEFT does elsewhere, in float32: to compare with a PEFT model that is loaded."""
    layers = [layer for layer in model.modules() if isinstance(layer, RoundedLora)]
    for layer in layers:
        layer.rounds = False
    try:
        yield
    finally:
        for layer in layers:
            layer.rounds = True


def inject(model: nn.Module, config: LoraConfig) -> PeftModel:
    """Put new LoRA layers into `model`, in place; those on plain linear layers are `RoundedLora`."""
    with warnings.catch_warnings():  # PEFT reads an attribute that transformers 5.23 renamed
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        peft_model: Any = get_peft_model(model, config)  # type: ignore[arg-type]
    for layer in model.modules():
        if type(layer) is Linear:
            _round_products(layer)
            layer.__class__ = RoundedLora
    return peft_model


def adapted_modules(model: nn.Module) -> list[str]:
    """Full names of the modules that carry LoRA; those where it is on single parameters (stacked experts) left out."""
    modules = model.named_modules()
    return [name for name, m in modules if isinstance(m, LoraLayer) and not isinstance(m, ParamWrapper)]
