"""Parameters that live in pieces on several ranks, and what those ranks must agree on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional

_LINEAR = functional.linear


def is_sharded(module: nn.Module) -> bool:
    """Parameters live in pieces on several ranks: FSDP2 (DTensor) or DeepSpeed ZeRO-3."""
    if any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in module.parameters()):
        return True
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule  # its parameters are plain while they are gathered

    return any(isinstance(m, FSDPModule) for m in module.modules())


def most(value: int, device: torch.device) -> int:
    """The largest value over all ranks. A collective: every rank must call it."""
    flag = torch.tensor([value], device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return int(flag.item())


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


def sharded_as(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Inverse of `whole`: `value` sharded as the parameter is, if that is a DTensor of its shape; a collective."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


@torch.no_grad()
def put(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a full tensor, the same on every rank, into a parameter, sharded or not; a collective."""
    if hasattr(parameter, "ds_id"):
        import deepspeed  # type: ignore[import-not-found]

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)
    else:
        parameter.copy_(sharded_as(parameter, value))


@contextmanager
def torch_linear() -> Iterator[None]:
    """Torch's linear function, which ZeRO-3 replaces in the whole process by one that rounds before a bias."""
    replaced, functional.linear = functional.linear, _LINEAR
    try:
        yield
    finally:
        functional.linear = replaced
