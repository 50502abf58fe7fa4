"""The policy's tensors under their published names, each made when it is asked for.

A LoRA layer is merged in float32 and rounded once to the wanted precision; the model in memory is left bit for bit as
it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from covo_rl.policy.published import ADAPTER, Parts, PublishedError, published_state
from covo_rl.policy.sharding import whole

MAX_SHARD_BYTES = 4 << 30
#: A shard is at most this share of the model, so that model + shard stay under 1.3 x the model.
SHARD_SHARE = 0.125
MIN_SHARD_BYTES = 64 << 20  # below this, pieces are only a nuisance


@dataclass(frozen=True)
class Entry:
    """One tensor to write: its published name, shape and precision, and how to make it (in any precision)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def tensor(self) -> torch.Tensor:
        """The tensor as it is written, on the CPU."""
        return self.make().to("cpu", self.dtype).contiguous()


def entry_of(name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None, make: Callable | None = None) -> Entry:
    """The entry of a tensor in memory, or of what `make` makes in its place; `dtype` only casts floating point."""
    precision = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return Entry(name, tuple(tensor.shape), precision, make or tensor.detach)


def published_entries(
    model: PreTrainedModel, state: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None,
    merge: Callable[[str], Callable[[], torch.Tensor] | None] = lambda name: None,
) -> list[Entry]:  # fmt: skip
    """Every tensor of the plain model under its published name, from `state`, or as `merge(name)` makes it."""
    parts, entries = Parts(model), []
    for key, origin in published_state(model).items():
        tensor = state[origin.name]
        entry = entry_of(key, tensor, dtype, merge(origin.name))
        if origin.part is not None:
            entry = Entry(key, origin.part, entry.dtype, partial(parts.get, key, origin.name, entry.make))
        entries.append(entry)
    return entries


def merged_entries(model: PreTrainedModel, dtype: torch.dtype | None = None) -> list[Entry]:
    """Every tensor of the plain model with the adapter merged in, under its published name.

    `dtype`: precision of floating-point tensors; None keeps that of the weights in memory.
    """

    def merge(name: str) -> Callable[[], torch.Tensor] | None:
        layer, leaf = adapter_on(model, name)
        return None if layer is None else partial(merged_parameter, layer, leaf)

    return published_entries(model, model.state_dict(), dtype, merge)


def published_weights(model: PreTrainedModel, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Published name and whole tensor, one after the other, of a model without adapter; `dtype` as in `merged_entries`.

    Where parameters are sharded each is gathered when it is asked for, so every rank must take all of them.
    """
    state = model.state_dict(keep_vars=True)
    for entry in published_entries(model, state, dtype, lambda name: partial(whole, state[name])):
        yield entry.name, entry.make().to(entry.dtype)


def adapter_on(model: nn.Module, name: str) -> tuple[Any, str]:
    """The PEFT layer that adapts a parameter, None where there is none, and the parameter's last name.

    Several may be wrapped around one module of stacked experts, one for each of its parameters.
    """
    path, _, leaf = name.rpartition(".base_layer.")
    while path:
        layer = model.get_submodule(path)
        if getattr(layer, "parameter_name", leaf) == leaf:
            return layer, leaf
        path = path.removesuffix(".base_layer") if path.endswith(".base_layer") else ""
    return None, leaf


@torch.no_grad()
def merged_parameter(layer: Any, leaf: str) -> torch.Tensor:
    """`weight` or `bias` of a PEFT layer with its adapter merged in float32; the layer itself is left unchanged.

    Raises:
        PublishedError: the base is quantised or sharded, so that there is nothing exact to merge into.
    """
    base = layer.get_base_layer()
    originals = {name: parameter.data for name, parameter in base.named_parameters(recurse=False)}
    for name, data in originals.items():
        if not data.is_floating_point() or hasattr(data, "full_tensor"):
            raise PublishedError(
                f"cannot merge into {type(base).__name__}.{name} of dtype {data.dtype}: load the base unquantised "
                "on one device (covo-rl export does) and merge there"
            )
    try:
        for name, parameter in base.named_parameters(recurse=False):
            parameter.data = originals[name].to(torch.float32, copy=True)
        layer.merge(adapter_names=[ADAPTER])
        return getattr(base, leaf).data
    finally:
        layer.merged_adapters.clear()  # instead of subtracting again: the originals come back exactly
        for name, parameter in base.named_parameters(recurse=False):
            parameter.data = originals[name]


def shards(entries: list[Entry], max_bytes: int | None = None) -> list[list[Entry]]:
    """Consecutive entries in groups of at most `max_bytes` (a larger tensor is alone in its group)."""
    if max_bytes is None:
        total = sum(entry.nbytes for entry in entries)
        max_bytes = max(MIN_SHARD_BYTES, min(MAX_SHARD_BYTES, int(SHARD_SHARE * total)))
    groups: list[list[Entry]] = []
    size = 0
    for entry in entries:
        size += entry.nbytes
        if not groups or size > max_bytes:
            groups.append([])
            size = entry.nbytes
        groups[-1].append(entry)
    return groups
