"""Linear layers made for decoding: layers of one input as one product, LoRA folded in or as two small products.

In float32, within a limit of memory, adapters are folded into copies, which a CPU packs for oneDNN: with few rows that
is twice as fast. Otherwise the layers' own weights become slices of one tensor (no copy: the parameters stay, their
storage moves once), with rows behind them for the adapters' A, so that one product gives x W and x A. Folding is for
float32 only: in 16-bit weights small updates vanish.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

#: smaller weights stay in the cache and gain nothing from packing (measured on AVX-512)
PACKED_ELEMENTS = 2**18
#: ranks are padded to a multiple of this, so that rows of a 16-bit product begin where the flash kernel can read: at a
#: multiple of 16 bytes
ALIGNMENT = 8
#: torch's compiler uses the same two operators
ONEDNN = ("_reorder_linear_weight", "_linear_pointwise")


def is_plain(layer: Any) -> bool:
    """A linear layer whose call does nothing else, or such a one under plain LoRA."""
    if isinstance(layer, LoraLinear):
        more = (layer.lora_variant, layer.merged_adapters, layer.fan_in_fan_out, any(layer.lora_bias.values()))
        return not any(more) and not _hooked(layer) and is_plain(layer.base_layer)
    flat = hasattr(getattr(layer, "weight", None), "_hp_mapping")  # trained by DeepSpeed, as a slice of its tensor
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and not flat and not _hooked(layer)


def _hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))


def base_linear(layer: Any) -> nn.Linear:
    """The layer, or what its adapters are on."""
    base: Any = layer.base_layer if isinstance(layer, LoraLinear) else layer
    return base


def _low_rank(layer: Any) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """A (r, in), B (out, r) and the scale of each adapter in force."""
    if not isinstance(layer, LoraLinear) or layer.disable_adapters:
        return []
    a, b = (cast("Mapping[str, nn.Linear]", parts) for parts in (layer.lora_A, layer.lora_B))
    return [(a[name].weight, b[name].weight, layer.scaling[name]) for name in layer.active_adapters if name in a]


class DecodeLinear:
    """x (R, in) -> (R, out) of `layers`, one after the other, in `dtype`."""

    def __init__(self, layers: Sequence[Any], dtype: torch.dtype, *, fold: bool, rows: int) -> None:
        bases, pairs = [base_linear(layer) for layer in layers], [_low_rank(layer) for layer in layers]
        self.out = sum(base.out_features for base in bases)
        ranks = sum(len(a) for some in pairs for a, _, _ in some)
        ranks += -ranks % ALIGNMENT
        self.up: torch.Tensor | None = None  # (ranks, out): each adapter's B, scaled, under its own layer's columns
        if fold:
            weights = [
                torch.stack([base.weight, *(s * (b @ a) for a, b, s in some)]).sum(0) if some else base.weight
                for base, some in zip(bases, pairs, strict=True)
            ]
            self.weight = torch.cat(weights) if len(weights) > 1 else weights[0]
            ranks = 0
        else:
            self.weight = _adjacent(bases, ranks, dtype)
        biases = [base.weight.new_zeros(base.out_features) if base.bias is None else base.bias for base in bases]
        empty = self.weight.new_zeros(ranks)
        self.bias = None if all(base.bias is None for base in bases) else torch.cat([*biases, empty]).to(dtype)
        if ranks:
            self.up, row, column = self.weight.new_zeros(ranks, self.out), 0, 0
            for base, some in zip(bases, pairs, strict=True):
                for a, b, scale in some:
                    self.weight[self.out + row : self.out + row + len(a)] = a
                    self.up[row : row + len(a), column : column + len(b)] = (b * scale).t()
                    row += len(a)
                column += base.out_features
            self.weight[self.out + row :] = 0
        self.packed = None
        if fold and can_pack(self.weight):
            self.packed, self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, rows), self.weight[:0]
        self.turned = self.weight.t()

    def __call__(self, x_RD: torch.Tensor) -> torch.Tensor:
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x_RD, self.packed, self.bias, "none", [], "")
        y_RO = x_RD.mm(self.turned) if self.bias is None else torch.addmm(self.bias, x_RD, self.turned)
        return y_RO if self.up is None else y_RO[:, : self.out].addmm_(y_RO[:, self.out :], self.up)

    def add_to(self, sum_RO: torch.Tensor, x_RD: torch.Tensor) -> None:
        """sum += self(x), in place."""
        plain = self.packed is None and self.up is None and self.bias is None and sum_RO.dtype == x_RD.dtype
        _ = sum_RO.addmm_(x_RD, self.turned) if plain else sum_RO.add_(self(x_RD))


def can_pack(weight: torch.Tensor) -> bool:
    """float32 on a CPU whose torch has oneDNN's packed layout, and large enough to gain by it."""
    has = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in ONEDNN)
    return has and weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= PACKED_ELEMENTS


def _adjacent(bases: Sequence[nn.Linear], spare: int, dtype: torch.dtype) -> torch.Tensor:
    """The layers' weights as one (out + spare, in): in `dtype` a view of them, whose storage is moved if need be."""
    weights = [base.weight for base in bases]
    total, width = sum(len(w) for w in weights) + spare, weights[0].shape[1]
    if weights[0].dtype != dtype:
        return torch.cat([*(w.to(dtype) for w in weights), weights[0].new_empty(spare, width, dtype=dtype)])
    first = weights[0].data
    starts = [first.data_ptr() + first.element_size() * width * sum(len(w) for w in weights[:n])
              for n in range(len(weights))]  # fmt: skip
    whole = first.untyped_storage().nbytes() == first.element_size() * width * total and first.storage_offset() == 0
    if not whole or [w.data_ptr() for w in weights] != starts or not all(w.is_contiguous() for w in weights):
        joined = torch.cat([*(w.data for w in weights), first.new_zeros(spare, width)])
        for weight, part in zip(
            weights, joined.split([*(len(w) for w in weights), spare])[: len(weights)], strict=True
        ):
            weight.data = part
        return joined
    return first.as_strided((total, width), (width, 1))
