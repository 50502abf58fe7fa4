"""The policy before training: a frozen copy of what trains, or with LoRA the base model under its adapters."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from covo_rl.models.base import AudioFamily


def frozen_copy(family: AudioFamily) -> tuple[AudioFamily, nn.Module]:
    """The family over a frozen copy of the model; modules without trainable parameters are shared."""
    memo: dict[int, Any] = {
        id(module): module
        for module in family.model.modules()
        if any(True for _ in module.parameters()) and not any(p.requires_grad for p in module.parameters())
    }
    model = copy.deepcopy(family.model, memo)
    twin = copy.copy(family)
    twin.model = model
    model.requires_grad_(False)
    return twin, model.eval()


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
