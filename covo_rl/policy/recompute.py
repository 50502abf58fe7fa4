"""What the backward pass computes a second time instead of keeping it.

Of a decoder layer's activations nine tenths are those of its MLP and of its norms (which keep float32 copies); the rest
are the attention's. So norms and MLP are recomputed, each by itself, and attention is not. The MLP's last product is
not made again either: torch stops once all that the backward needs is there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from covo_rl.policy.products import mix_in


class Recomputed:
    """Mixed into a module's class: while it trains, its input is all that it keeps."""

    gradient_checkpointing = True

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        forward = super().forward  # pyright: ignore[reportAttributeAccessIssue]
        if self.training and torch.is_grad_enabled():
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return forward(*args, **kwargs)


def recompute_activations(decoder: Any, what: str = "mlp") -> None:
    """Make the layers of a transformers decoder recompute `what`: "mlp" (with the norms), or the whole "layer".

    Layers without a module named `mlp` are recomputed whole. A frozen encoder stays out of autograd.
    """
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    if what == "layer" or not all(isinstance(getattr(layer, "mlp", None), nn.Module) for layer in layers):
        _switch(decoder, "enable", {"use_reentrant": False})
        return
    for layer in layers:
        for name, child in layer.named_children():
            if name == "mlp" or "norm" in name:
                mix_in(child, Recomputed)


def keep_activations(decoder: Any) -> None:
    """Undo `recompute_activations`."""
    _switch(decoder, "disable")
    for module in decoder.modules():
        if isinstance(module, Recomputed):
            module.__class__ = type(module).__bases__[1]


def _switch(decoder: Any, verb: str, *args: Any) -> None:
    """transformers' own recomputation of whole layers, whose name changes in version 6."""
    name = f"activation_checkpointing_{verb}"
    getattr(decoder, name if hasattr(decoder, name) else f"gradient_checkpointing_{verb}")(*args)
