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
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper
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


class TrainedRows(TrainableTokensLayer):
    """PEFT's layer of rows that train, without a copy of the base's weight; merged or switched off it is PEFT's own."""

    def forward_adapters(self, x: torch.Tensor, active_adapters: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters or self.merged or not active_adapters:
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        self._check_overlapping_tokens(active_adapters)
        base: Any = self.get_base_layer()
        result = base(x)
        for name in active_adapters:
            ids_R, rows_RD = self._ids(name, x.device), self.trainable_tokens_delta[name].to(base.weight.dtype)
            if isinstance(base, nn.Embedding):
                scale = self._get_embed_scale()
                rows_RD = rows_RD if scale is None else rows_RD * scale.to(rows_RD.dtype)
                is_row = x[..., None] == ids_R
                result = torch.where(is_row.any(-1, keepdim=True), rows_RD[is_row.int().argmax(-1)], result)
            else:
                result = result.index_copy(-1, ids_R, nn.functional.linear(x, rows_RD).to(result.dtype))
        return result

    def _ids(self, name: str, device: torch.device) -> torch.Tensor:
        """Made once: a CUDA graph cannot take them from the host."""
        made: dict[Any, torch.Tensor] = vars(self).setdefault("made_ids", {})
        if (name, device) not in made:
            made[name, device] = torch.tensor(self.token_indices[name], device=device)
        return made[name, device]


class TrainedRowsHolder(TrainableTokensWrapper):
    """What stands in the place of embeddings or head; `weight`, asked for its dtype or device, is the base's."""

    def _getattr_wrapped(self, name: str, modules: Any) -> Any:
        return modules["token_adapter"].get_base_layer().weight


OWN = {Linear: RoundedLora, TrainableTokensLayer: TrainedRows, TrainableTokensWrapper: TrainedRowsHolder}


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
    """Put new LoRA layers into `model`, in place: ours where PEFT has those of OWN."""
    with warnings.catch_warnings():  # PEFT reads an attribute that transformers 5.23 renamed
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        peft_model: Any = get_peft_model(model, config)  # type: ignore[arg-type]
    for layer in model.modules():
        if type(layer) is Linear:
            _round_products(layer)
        layer.__class__ = OWN.get(type(layer), type(layer))
    return peft_model


def adapted_modules(model: nn.Module) -> list[str]:
    """Full names of the modules that carry LoRA; those where it is on single parameters (stacked experts) left out."""
    modules = model.named_modules()
    return [name for name, m in modules if isinstance(m, LoraLayer) and not isinstance(m, ParamWrapper)]
