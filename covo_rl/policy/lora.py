"""The reference of a LoRA policy: the base model, with every adapter switched off for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
