"""Linear layers made for decoding: LoRA folded in, weights in the layout that few rows are fastest with.

A decode step multiplies a handful of rows with every weight, which on a CPU is twice as fast with weights packed
for oneDNN. The layers themselves are not touched: they come back bit by bit when decoding ends. float32 only,
where the folded sum is exact up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

if TYPE_CHECKING:
    from covo_rl.models.base import AudioFamily

#: smaller weights stay in the cache and gain nothing from packing (measured on AVX-512)
PACKED_ELEMENTS = 2**18
#: torch's compiler uses the same two operators
ONEDNN = ("_reorder_linear_weight", "_linear_pointwise")


class PackedLinear(nn.Module):
    """`nn.Linear` without gradient, its weight packed for oneDNN."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, rows: int) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


@contextmanager
def decode_layers(family: AudioFamily, *, rows: int, limit_bytes: int) -> Iterator[int]:
    """Decoder and head with such layers where they help, for batches of about `rows`; yields how many there are.

    None where their weights would need more than `limit_bytes` together.
    """
    pack = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in ONEDNN)
    pack = pack and family.embed_tokens.weight.device.type == "cpu"
    inside = {id(module) for module in family.decoder.modules()} | {id(family.lm_head)}
    adapted = [layer for layer in family.model.modules() if isinstance(layer, BaseTunerLayer)]
    inside -= {id(part) for layer in adapted if isinstance(layer, nn.Module) for part in list(layer.modules())[1:]}
    layers = [
        (parent, name, child)
        for parent in family.model.modules()
        for name, child in parent.named_children()
        if id(child) in inside and (_foldable(child) or (pack and _plain(child) and _large(child.weight)))
    ]
    size = sum(_base(child).weight.numel() * 4 for _, _, child in layers)
    if not layers or size > limit_bytes:
        yield 0
        return
    try:
        with torch.no_grad():
            for parent, name, child in layers:
                parent._modules[name] = _decode_layer(child, rows, pack)
        yield len(layers)
    finally:
        for parent, name, child in layers:
            parent._modules[name] = child


def _large(weight: torch.Tensor) -> bool:
    return weight.numel() >= PACKED_ELEMENTS


def _plain(layer: Any) -> bool:
    """A float32 linear layer whose call does nothing else."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and layer.weight.dtype == torch.float32
        and not (layer._forward_hooks or layer._forward_pre_hooks)
    )


def _foldable(layer: Any) -> bool:
    """A plain LoRA on a float32 linear layer."""
    return (
        isinstance(layer, LoraLinear)
        and _plain(layer.base_layer)
        and not any(getattr(layer, "use_dora", {}).values())
        and not any(getattr(layer, "lora_bias", {}).values())
        and not layer.merged
        and not layer.disable_adapters
    )


def _base(layer: Any) -> Any:
    return layer if type(layer) is nn.Linear else layer.base_layer


def _decode_layer(layer: Any, rows: int, pack: bool) -> nn.Module:
    base = _base(layer)
    weight = base.weight.detach()
    for name in getattr(layer, "active_adapters", ()):
        if name in layer.lora_A:
            weight = weight + layer.get_delta_weight(name).to(weight.dtype)
    if pack and _large(weight):
        return PackedLinear(weight, base.bias, rows)
    plain = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = base.bias
    return plain.eval()
