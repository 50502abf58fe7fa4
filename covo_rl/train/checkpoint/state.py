"""Parameters, optimiser, schedule and random states <-> plain dicts of JSON values and tensors.

Everything is keyed by parameter name, so it does not depend on the number of ranks. Sharded parameters (DTensor, as
FSDP2 makes them) are gathered on the way out and sharded again on the way in; both are collectives.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from covo_rl.train.checkpoint.files import CheckpointError

WRAPPERS = ("module.", "_orig_mod.", "_checkpoint_wrapped_module.")


def clean_name(name: str) -> str:
    """Parameter name without what DDP, torch.compile and checkpoint wrappers put into it."""
    for wrapper in WRAPPERS:
        name = ".".join(part for part in name.split(".") if f"{part}." != wrapper)
    return name


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {clean_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def whole(value: Tensor) -> Tensor:
    """A full copy on the CPU; gathers shards."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().to("cpu", copy=True)


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """`value` on the parameter's device, sharded as the parameter is if it has its shape."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trained parameters."""
    return {name: whole(p) for name, p in trained(model).items()}


def load_weights(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Put saved values into the trained parameters; all of them must match by name and shape."""
    parameters = trained(model)
    _same(parameters, saved, "trained parameters")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if saved[name].shape != parameter.shape:
                raise CheckpointError(f"{name} is {tuple(saved[name].shape)} in the checkpoint and "
                                      f"{tuple(parameter.shape)} in the model: the configuration differs")  # fmt: skip
            parameter.copy_(like(saved[name], parameter))


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors keyed `parameter/entry`, and JSON: options and parameter names of each group, plain numbers."""
    inner = _inner(optimizer)
    names: dict[Tensor, str] = {p: name for name, p in trained(model).items()}
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for parameter, entries in inner.state.items():
        for entry, value in entries.items():
            key = f"{names[parameter]}/{entry}"
            if isinstance(value, Tensor):
                tensors[key] = whole(value)
            else:
                numbers[key] = value
    groups = [
        {"names": [names[p] for p in group["params"]],
         "options": {k: _plain(v) for k, v in group.items() if k != "params"}}
        for group in inner.param_groups
    ]  # fmt: skip
    return tensors, {"groups": groups, "numbers": numbers}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor], about: Mapping[str, Any]
) -> None:
    """Inverse of `optimizer_state`, for the same parameters in the same groups."""
    inner = _inner(optimizer)
    parameters = trained(model)
    names = {p: name for name, p in parameters.items()}
    ours = [[names[p] for p in group["params"]] for group in inner.param_groups]
    theirs = [group["names"] for group in about["groups"]]
    if ours != theirs:
        _same([n for group in ours for n in group], [n for group in theirs for n in group], "optimiser parameters")
        raise CheckpointError("the optimiser's parameter groups differ from those of the checkpoint")
    state: dict[int, dict[str, Any]] = {}
    index = {name: i for i, name in enumerate(n for group in ours for n in group)}
    for key, value in {**about["numbers"], **tensors}.items():
        name, _, entry = key.rpartition("/")
        restored = like(value, parameters[name]) if isinstance(value, Tensor) else value
        state.setdefault(index[name], {})[entry] = restored
    groups, start = [], 0
    for group, saved in zip(inner.param_groups, about["groups"], strict=True):
        ids = list(range(start, start + len(saved["names"])))
        start += len(ids)
        options = {k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in saved["options"].items()}
        groups.append({**options, "params": ids})
    inner.load_state_dict({"state": state, "param_groups": groups})


def random_state() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """States of python, numpy, torch and this process's accelerator."""
    version, numbers, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    about = {
        "python": [version, list(numbers), gauss],
        "numpy": {**numpy_state, "state": {k: _plain(v) for k, v in numpy_state["state"].items()}},
    }
    tensors = {"random/torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        tensors["random/mps"] = torch.mps.get_rng_state()
    return about, tensors


def load_random_state(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `random_state`; a device that is absent here is left out."""
    version, numbers, gauss = about["python"]
    random.setstate((version, tuple(numbers), gauss))
    key = np.array(about["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state({**about["numpy"], "state": {**about["numpy"]["state"], "key": key}})
    torch.set_rng_state(tensors["random/torch"])
    if torch.cuda.is_available() and "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"])
    if torch.backends.mps.is_available() and "random/mps" in tensors:
        torch.mps.set_rng_state(tensors["random/mps"])


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimiser inside accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _same(ours: Iterable[str], theirs: Iterable[str], what: str) -> None:
    """Raise with the first names that only one side has."""
    here, there = set(ours), set(theirs)
    if here != there:
        only = [f"only in the {side}: {', '.join(sorted(some)[:3])} ({len(some)})"
                for side, some in (("model", here - there), ("checkpoint", there - here)) if some]  # fmt: skip
        raise CheckpointError(f"the {what} differ; {'; '.join(only)}. Was it saved with other adapter options?")
