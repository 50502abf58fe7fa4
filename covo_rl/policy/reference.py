"""The reference of a full policy: a frozen copy of what trains."""

from __future__ import annotations

import copy
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
