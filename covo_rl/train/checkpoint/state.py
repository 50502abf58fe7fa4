"""Parameters, optimiser, random states and the batch in use <-> JSON values and tensors.

Parameters are keyed by name, so nothing depends on the number of ranks. Of sharded ones (DTensor, as FSDP2 makes them)
a rank gives its own piece and takes its own part: none ever holds a whole one. Under DeepSpeed they are gathered one at
a time, which is a collective.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from covo_rl.algo.advantage import Advantages
from covo_rl.data.files import plain
from covo_rl.models.weights import check_finite
from covo_rl.policy.sharding import (
    TensorPieces,
    local_tensor,
    own_part,
    own_piece,
    put,
    sharded_as,
    whole,
    whole_shape,
)
from covo_rl.train import zero
from covo_rl.train.batch import Batch
from covo_rl.train.checkpoint.manifest import CheckpointError
from covo_rl.types import Group, Prompt, RewardTable, Rollout

#: what DDP, torch.compile and checkpoint wrappers put into a parameter's name
WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod|_checkpoint_wrapped_module)\.")


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name without wrappers."""
    return {WRAPPERS.sub("", name): p for name, p in model.named_parameters() if p.requires_grad}


def weights(model: nn.Module, *, keep: bool = True) -> dict[str, Any]:
    """Copies on the CPU of the trained parameters: this rank's pieces of sharded ones, with `keep` whole others."""
    return _copies(trained_parameters(model).items(), keep)


def load_weights(model: nn.Module, saved: Mapping[str, Tensor | TensorPieces]) -> None:
    """Put saved values into the trained parameters; all of them must match by name and shape."""
    parameters = trained_parameters(model)
    _match(parameters, saved, "trained parameters")
    for name, parameter in parameters.items():
        if saved[name].shape != (shape := whole_shape(parameter)):
            raise CheckpointError(f"{name} is {tuple(saved[name].shape)} in the checkpoint and "
                                  f"{tuple(shape)} in the model: the configuration differs")  # fmt: skip
    parts = {name: own_part(parameter, saved[name]) for name, parameter in parameters.items()}
    check_finite(parts.items(), "the checkpoint's weights")
    for name, parameter in parameters.items():
        put(parameter, parts[name])


def optimizer_state(optimizer: Any, model: nn.Module, *, keep: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors keyed `parameter/entry`, chosen as in `weights`, and the parameter names of each group, JSON-ready.

    Rates, betas and the like are options of the run, not state: a changed one is in force after a resume.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps torch's
    groups = _names_by_group(inner, model)
    if zero.is_zero(inner):
        return _copies(zero.gathered_state(inner, _names(model)), keep), {"groups": groups}
    names = list(chain(*groups))
    tensors = (
        (f"{names[index]}/{entry}", value)
        for index, entries in inner.state_dict()["state"].items()
        for entry, value in entries.items()
    )
    return _copies(tensors, keep), {"groups": groups}


def load_optimizer_state(
    optimizer: Any, model: nn.Module, tensors: Mapping[str, Tensor | TensorPieces], about: Mapping[str, Any]
) -> None:
    """Inverse of `optimizer_state`, for the same parameters in the same groups, whose options stay as they are."""
    inner, parameters = getattr(optimizer, "optimizer", optimizer), trained_parameters(model)
    ours, theirs = _names_by_group(inner, model), about["groups"]
    if ours != theirs:
        _match(chain(*ours), chain(*theirs), "optimiser parameters")
        raise CheckpointError("the optimiser's parameter groups differ from those of the checkpoint")
    if zero.is_zero(inner):
        whole_state: dict[nn.Parameter, dict[str, Tensor]] = defaultdict(dict)
        for key, value in tensors.items():
            name, _, entry = key.rpartition("/")
            whole_state[parameters[name]][entry] = part = own_part(parameters[name], value)
            check_finite([(key, part)], "the checkpoint's optimiser")
        return zero.load_state(inner, whole_state)
    index = {name: i for i, name in enumerate(chain(*ours))}
    state: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        state[index[name]][entry] = sharded_as(parameters[name], value)
        check_finite([(key, local_tensor(state[index[name]][entry]))], "the checkpoint's optimiser")
    inner.load_state_dict({"state": dict(state), "param_groups": inner.state_dict()["param_groups"]})


def _names(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in trained_parameters(model).items()}


def _names_by_group(optimizer: Any, model: nn.Module) -> list[list[str]]:
    names, own = _names(model), zero.is_zero(optimizer)
    groups = zero.parameter_groups(optimizer) if own else [group["params"] for group in optimizer.param_groups]
    return [[names[parameter] for parameter in group] for group in groups]


def _copies(tensors: Iterable[tuple[str, Any]], keep: bool) -> dict[str, Any]:
    """On the CPU: this rank's piece of a sharded tensor, and with `keep` one that every rank has whole."""
    copies: dict[str, Any] = {}
    for name, value in tensors:
        if isinstance(value, DTensor):
            if piece := own_piece(value):
                copies[name] = piece._replace(tensor=piece.tensor.detach().to("cpu", copy=True))
            continue
        full: Tensor = whole(value) if isinstance(value, Tensor) else value()  # under ZeRO a collective
        if keep:
            copies[name] = full.detach().to("cpu", copy=True)
    return copies


def _match(ours: Iterable[str], theirs: Iterable[str], what: str) -> None:
    """Raise with the first names that only one side has."""
    here, there = set(ours), set(theirs)
    if here != there:
        only = [f"only in the {side}: {', '.join(sorted(some)[:3])} ({len(some)})"
                for side, some in (("model", here - there), ("checkpoint", there - here)) if some]  # fmt: skip
        raise CheckpointError(f"the {what} differ; {'; '.join(only)}. Was it saved with other adapter options?")


def random_state() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """States of python, numpy, torch and this process's accelerator."""
    about = {"python": plain(random.getstate()), "numpy": plain(np.random.get_state(legacy=False))}
    tensors = {"random/torch": torch.get_rng_state()}
    if device := torch.accelerator.current_accelerator(check_available=True):
        tensors[f"random/{device.type}"] = torch.get_device_module(device).get_rng_state()
    return about, tensors


def load_random_state(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `random_state`; a device that is absent here is left out."""
    version, numbers, gauss = about["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(about["numpy"])
    torch.set_rng_state(tensors["random/torch"])
    device = torch.accelerator.current_accelerator(check_available=True)
    if device and f"random/{device.type}" in tensors:
        torch.get_device_module(device).set_rng_state(tensors[f"random/{device.type}"])


def pack_groups(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """JSON-ready. Log-probs are Python floats and survive JSON bit for bit. Prompts are rebuilt from the data set."""
    return [
        {"example": group.prompt.example.id, "prompt_tokens": len(group.prompt.input_ids),
         "rollouts": [vars(rollout) for rollout in group.rollouts]}
        for group in groups
    ]  # fmt: skip


def unpack_groups(about: Sequence[Mapping[str, Any]], prompt_of: Callable[[str], Prompt]) -> list[Group]:
    """Inverse of `pack_groups`; `prompt_of` builds the prompt of an example id.

    Raises:
        CheckpointError: a prompt has another length than when it was sampled from.
    """
    groups = []
    for saved in about:
        prompt = prompt_of(saved["example"])
        if len(prompt.input_ids) != saved["prompt_tokens"]:
            raise CheckpointError(
                f"row {saved['example']}: its prompt had {saved['prompt_tokens']} tokens when the rollouts in the "
                f"checkpoint were sampled and has {len(prompt.input_ids)} now; resume from a checkpoint without a dot"
            )
        groups.append(Group(prompt, tuple(Rollout(**_with_tuples(rollout)) for rollout in saved["rollouts"])))
    return groups


def pack_batch(batch: Batch) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Rollouts, rewards, advantages and log-probs -> (JSON-ready, tensors)."""
    about: dict[str, Any] = {"groups": pack_groups(batch.groups), "version": batch.version}
    tensors: dict[str, Tensor] = {}
    for part in ("table", "advantages"):
        values = dict(vars(getattr(batch, part)))
        arrays = [name for name, value in values.items() if isinstance(value, np.ndarray)]
        tensors |= {f"{part}/{name}": torch.from_numpy(np.array(values.pop(name))) for name in arrays}
        about[part] = values
    about["table"]["missing"] = [[*place, why] for place, why in batch.table.missing.items()]
    about["table"]["extras"] = plain(batch.table.extras)
    for name in ("old_logps", "ref_logps"):
        tensors |= {f"{name}/{p:06d}": logps_GC for p, logps_GC in enumerate(getattr(batch, name) or [])}
    return about, tensors


def unpack_batch(
    about: Mapping[str, Any], tensors: Mapping[str, Tensor], prompt_of: Callable[[str], Prompt], device: torch.device
) -> Batch:
    """Inverse of `pack_batch`. Raises as `unpack_groups`."""

    def under(part: str) -> dict[str, Tensor]:
        return {key.partition("/")[2]: value for key, value in sorted(tensors.items()) if key.startswith(f"{part}/")}

    def values(part: str) -> dict[str, Any]:
        return {**about[part], **{name: tensor.numpy() for name, tensor in under(part).items()}}

    missing = {(p, g, name): why for p, g, name, why in about["table"]["missing"]}
    table = RewardTable(**_with_tuples({**values("table"), "missing": missing}))
    logps = {name: [x.to(device) for x in under(name).values()] or None for name in ("old_logps", "ref_logps")}
    groups = unpack_groups(about["groups"], prompt_of)
    sampled_by = next((rollout.version for group in groups for rollout in group.rollouts), 0)
    version = about.get("version", sampled_by)  # before it was saved, the two were the same
    return Batch(groups, table, Advantages(**values("advantages")), **logps, version=version)


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Tuples again where JSON made lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
