"""Parameters that live in pieces on several ranks, and what those ranks must agree on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

_LINEAR = functional.linear


def is_sharded(module: nn.Module) -> bool:
    """Parameters live in pieces on several ranks: FSDP2 (DTensor) or DeepSpeed ZeRO-3."""
    pieces = any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in module.parameters())
    return pieces or bool(_fsdp_modules(module))  # whose parameters are plain while they are gathered


def layer_classes(model: nn.Module) -> list[str]:
    """Names of the classes in the model's lists of layers, of encoder and decoder: FSDP2 gives each layer a unit.

    What transformers names for it (`_no_split_modules`) holds classes that an audio family does not load, which
    accelerate refuses, and lacks the encoders of some.
    """
    lists = [m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and not re.search(r"\.\d+\.", name)]
    entries = [entry for modules in lists for entry in modules if next(entry.children(), None) is not None]
    return sorted({type(entry).__name__ for entry in entries})


def most(value: int, device: torch.device) -> int:
    """The largest value over all ranks. A collective: every rank must call it."""
    flag = torch.tensor([value], device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return int(flag.item())


def every_rank(value: Any) -> list[Any]:
    """The values of all ranks, in rank order. A collective: every rank must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of one that FSDP2 or ZeRO-3 shards (a collective: every rank must call it), or the tensor."""
    if hasattr(tensor, "ds_id"):
        import deepspeed  # type: ignore[import-not-found]

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    gather = getattr(tensor, "full_tensor", None)
    return tensor.detach() if gather is None else gather().detach()


def whole_shape(tensor: torch.Tensor) -> torch.Size:
    """The shape of the full tensor."""
    return getattr(tensor, "ds_shape", tensor.shape)


class TensorPiece(NamedTuple):
    """What one rank holds of a tensor of `shape`, in which it begins at `start`."""

    tensor: torch.Tensor
    start: Sequence[int]
    shape: Sequence[int]


class TensorPieces:
    """A tensor out of the pieces of several ranks; indexed with a slice a dimension, it reads what lies there alone."""

    def __init__(self, pieces: Sequence[TensorPiece]) -> None:
        self.pieces, self.shape = pieces, torch.Size(pieces[0].shape)

    @property
    def complete(self) -> bool:
        """Whether the pieces agree on dtype and shape and fill it, each place once.

        Corners counted with alternating signs are then those of the whole, and only then.
        """
        first, corners = self.pieces[0].tensor, Counter[tuple[int, ...]]()
        whole_box = ([0] * len(self.shape), self.shape, -1)
        for start, sizes, sign in [*((piece.start, piece.tensor.shape, 1) for piece in self.pieces), whole_box]:
            for ends in product((0, 1), repeat=len(sizes)):
                corner = (low + end * size for low, end, size in zip(start, ends, sizes, strict=False))
                corners[tuple(corner)] += sign * (-1) ** sum(ends)
        alike = all(
            piece.tensor.dtype == first.dtype and torch.Size(piece.shape) == self.shape
            and len(piece.start) == piece.tensor.dim() == len(self.shape)
            for piece in self.pieces
        )  # fmt: skip
        return alike and not any(corners.values())

    def __getitem__(self, box: Sequence[slice]) -> torch.Tensor:
        joined = self.pieces[0].tensor.new_empty([side.stop - side.start for side in box])
        for tensor, start, _ in self.pieces:
            edges = [(max(side.start, first), min(side.stop, first + size), first, side.start)
                     for side, first, size in zip(box, start, tensor.shape, strict=True)]  # fmt: skip
            if all(low < high for low, high, *_ in edges):
                here = tensor[tuple(slice(low - first, high - first) for low, high, first, _ in edges)]
                joined[tuple(slice(low - origin, high - origin) for low, high, _, origin in edges)] = here
        return joined


def reshard(module: nn.Module) -> None:
    """Give up what FSDP2 still holds gathered after a forward pass without a backward one."""
    for part in _fsdp_modules(module):
        part.reshard()


def _fsdp_modules(module: nn.Module) -> list[Any]:
    if not (dist.is_available() and dist.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_piece(tensor: DTensor) -> TensorPiece | None:
    """This rank's piece; None where that is empty, or where a rank before it holds the same."""
    coordinate = tensor.device_mesh.get_coordinate() or ()
    again = any(place for place, how in zip(coordinate, tensor.placements, strict=True) if how.is_replicate())
    held = tensor.to_local()
    return None if again or not held.numel() else TensorPiece(held, [side.start for side in _box(tensor)], tensor.shape)


def own_part(parameter: torch.Tensor, value: torch.Tensor | TensorPieces) -> torch.Tensor:
    """This rank's part of `value`, if that has the shape of a sharded parameter; else all of it."""
    if isinstance(parameter, DTensor) and parameter.shape == value.shape:
        return value[_box(parameter)]
    return value[tuple(slice(0, size) for size in value.shape)]


def sharded_as(parameter: torch.Tensor, value: torch.Tensor | TensorPieces) -> torch.Tensor:
    """Inverse of `whole`: `own_part`, as a DTensor if the parameter is one of the shape of `value`."""
    part = own_part(parameter, value)
    if not isinstance(parameter, DTensor) or parameter.shape != value.shape:
        return part
    return DTensor.from_local(part.to(parameter.device), parameter.device_mesh, parameter.placements,
                              shape=parameter.shape, stride=parameter.stride())  # fmt: skip


def _box(tensor: DTensor) -> tuple[slice, ...]:
    """Where this rank's piece lies in the whole."""
    (chunk,) = tensor.__create_chunk_list__()  # how torch.distributed.checkpoint asks
    return tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))


@torch.no_grad()
def put(parameter: torch.Tensor, part: torch.Tensor) -> None:
    """Copy what `own_part` gave into a parameter; a collective under ZeRO-3."""
    if hasattr(parameter, "ds_id"):
        import deepspeed  # type: ignore[import-not-found]

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(part)
    else:
        local_tensor(parameter).copy_(part)


@contextmanager
def torch_linear() -> Iterator[None]:
    """Torch's linear function, which ZeRO-3 replaces in the whole process by one that rounds before a bias."""
    replaced, functional.linear = functional.linear, _LINEAR
    try:
        yield
    finally:
        functional.linear = replaced
