"""What trains and what does not: parts by name, each of which must be there, and a proof that the others stayed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from covo_rl.policy.patterns import PatternError, check_parts, part_of
from covo_rl.policy.sharding import local_tensor

if TYPE_CHECKING:
    from covo_rl.models.base import AudioFamily


def train_parts(family: AudioFamily, parts: Sequence[str]) -> dict[str, int]:
    """Freeze all but `parts`; the number of parameters of each that now trains.

    Raises:
        PatternError: the family has no such part, or no parameter lies in it.
    """
    check_parts(parts, family, "train_parts")
    counts = dict.fromkeys(parts, 0)
    for name, parameter in family.model.named_parameters():
        part = part_of(name, family)
        parameter.requires_grad_(part in counts)
        if part in counts:
            counts[part] += parameter.numel()
    if empty := [part for part, count in counts.items() if not count]:
        raise PatternError(f"train_parts: no parameter of {family.model_type} lies in {', '.join(empty)}")
    return counts


def decay_groups(family: AudioFamily, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser groups of what trains in `model`, which may wrap the family's: norms, biases, embeddings do not decay.

    `model` is asked for the parameters, so that those are its own after it was wrapped.
    """
    embeddings = {id(m.weight) for m in family.model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[parameter.ndim > 1 and id(parameter) not in embeddings].append(parameter)
    return [
        {"name": "decay" if decayed else "no decay", "params": parameters,
         "weight_decay": weight_decay if decayed else 0.0}
        for decayed, parameters in groups.items() if parameters
    ]  # fmt: skip


def frozen_digests(family: AudioFamily) -> dict[str, str]:
    """Part -> sha256 over all that this rank holds of its frozen parameters, bit for bit."""
    digests: dict[str, Any] = {}
    for name, parameter in family.model.named_parameters():
        if not parameter.requires_grad:
            digest = digests.setdefault(part_of(name, family), hashlib.sha256())
            digest.update(name.encode())
            for piece in _bytes(local_tensor(parameter.detach())):
                digest.update(piece)
    return {part: digest.hexdigest() for part, digest in digests.items()}


def _bytes(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The tensor's bytes, 64 MiB at a time."""
    flat = tensor.contiguous().flatten().view(torch.uint8)
    for piece in flat.split(2**26):
        yield piece.cpu().numpy().data
