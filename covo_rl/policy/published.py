"""Published tensors and those in memory: the same ones under other names, or parts of one (stacked experts).

published_state(model)                    published name -> Origin, the tensor in memory that holds it
Parts(model).get(key, name, tensor)       that published tensor, where it is a part of the one in memory
stack_parts(model, parts)                 back again: the tensor in memory that such parts make
whole_config(model)                       the configuration around it, where the checkpoint holds more than this model
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from covo_rl.models.processor import local_folder
from covo_rl.types import UserError

ADAPTER = "default"
#: in names of tensors that the plain model does not have
ADAPTER_MARKS = (".modules_to_save.", ".original_module.", ".lora_", ".trainable_tokens_")
_WRAPPERS = re.compile(rf"(?:\.token_adapter)?(?:\.base_layer)+\.|\.modules_to_save\.{ADAPTER}\.")
#: transformers 5.17 undoes the renaming of Qwen2-Audio's decoder twice; the published name has one `model`.
TWICE = re.compile(r"^(language_model\.model)\.model\.")


class PublishedError(UserError, RuntimeError):
    """The policy has no exact form under published names; the message says which tensor and what to do."""


class Origin(NamedTuple):
    """The tensor in memory that holds a published one: its name there; the shape of the part, where it is one."""

    name: str
    part: tuple[int, ...] | None = None


def renamed(names: Iterable[str], rename: Callable[[dict[str, torch.Tensor]], Mapping[str, Any]]) -> dict[str, str]:
    """Old key -> new key under a function that renames state dicts; keys that it drops are left out."""
    return _renamed({name: torch.empty(0) for name in names}, rename)


def _renamed(
    markers: Mapping[str, torch.Tensor], rename: Callable[[dict[str, torch.Tensor]], Mapping[str, Any]]
) -> dict[str, str]:
    new = {id(marker): name for name, marker in rename(dict(markers)).items()}
    return {name: new[id(marker)] for name, marker in markers.items() if id(marker) in new}


def published_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Parameter name in memory -> name in the published checkpoint, by transformers' own conversion table.

    These are the names by which PEFT finds the modules of the model again, with this release of transformers.

    Raises:
        PublishedError: the conversion does more than rename.
    """
    names = list(names)
    published = renamed(names, lambda state: revert_weight_conversion(model, state))
    lost = [name for name in names if name not in published]
    if lost:
        raise PublishedError(
            f"transformers converts {len(lost)} tensors of {type(model).__name__} by more than a renaming "
            f"({lost[0]!r} for example); export the adapter instead and merge it with PEFT"
        )
    return {name: TWICE.sub(r"\1.", new) for name, new in published.items()}


def base_folder(model: PreTrainedModel) -> Path | None:
    """Where the checkpoint lies that the model was loaded from: its folder, or its place in the hub's cache."""
    return local_folder(model.name_or_path) if model.name_or_path else None


def whole_config(model: PreTrainedModel) -> dict[str, Any]:
    """config.json of a checkpoint that the model is a part of (an Omni's thinker); empty where it is all of it."""
    folder = base_folder(model)
    path = folder / "config.json" if folder else None
    whole = json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}
    return whole if _place(model, whole) else {}


def whole_around(model: PreTrainedModel, config: dict[str, Any]) -> dict[str, Any]:
    """`whole_config` with the model's own configuration, and its dtype, in their places; or that alone."""
    if not (whole := whole_config(model)):
        return config
    whole.pop("torch_dtype", None)  # as older releases say it
    return {**whole, "dtype": config.get("dtype"), _place(model, whole): config}


def _place(model: PreTrainedModel, whole: Mapping[str, Any]) -> str:
    kind = model.config.model_type
    return next((key for key, part in whole.items() if isinstance(part, dict) and part.get("model_type") == kind), "")


def _forgotten_prefix(model: PreTrainedModel) -> str:
    """transformers 5.17 finds a part of a checkpoint by its prefix (`thinker.`), and leaves it out on the way back.

    Of weights alone: the PEFT beside it looks for adapters without it.
    """
    prefix = model.base_model_prefix
    return f"{prefix}." if prefix and not hasattr(model, prefix) and whole_config(model) else ""


def base_name(name: str) -> str | None:
    """Name that a tensor of a PEFT-injected model has in the plain model; None for adapter-only tensors.

    A trained copy (modules_to_save) takes the place of its original.
    """
    plain = _WRAPPERS.sub(".", name)
    return None if any(mark in plain for mark in ADAPTER_MARKS) else plain


def published_state(model: PreTrainedModel) -> dict[str, Origin]:
    """Published name -> origin of every tensor of the plain model; of tied ones the original only.

    Raises:
        PublishedError: two tensors have the same published name.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    shapes, names = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if (plain := base_name(name)) is not None and plain not in tied:
            # ZeRO-3 leaves nothing of a tensor but this
            shapes[plain] = torch.empty(getattr(tensor, "ds_shape", tensor.shape), device="meta")
            names[plain] = name
    published, prefix = _renamed(shapes, lambda state: revert_weight_conversion(model, state)), _forgotten_prefix(model)
    state = [(prefix + TWICE.sub(r"\1.", key), Origin(names[plain])) for plain, key in published.items()]
    for plain in (plain for plain in names if plain not in published):
        parts = revert_weight_conversion(model, {plain: shapes[plain]})
        state += [(prefix + key, Origin(names[plain], tuple(part.shape))) for key, part in parts.items()]
    if len(dict(state)) != len(state):
        raise PublishedError(f"two tensors of {type(model).__name__} have the same published name")
    return dict(state)


class Parts:
    """Published tensors that are parts of one in memory: a tensor is taken apart once while its parts are asked for."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.name, self.parts = model, "", {}

    def get(self, key: str, name: str, tensor: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The published tensor `key`, a part of what is called `name` in memory, and made by `tensor`."""
        if name != self.name:
            self.parts = {}  # not two of them at a time
            parts = revert_weight_conversion(self.model, {base_name(name) or name: tensor()})
            self.parts = {_forgotten_prefix(self.model) + part: value for part, value in parts.items()}
            self.name = name
        return self.parts[key].clone()  # of its own storage, as safetensors wants it


def stack_parts(model: PreTrainedModel, parts: Mapping[str, Any]) -> torch.Tensor:
    """The one tensor in memory that published tensors are the parts of, as transformers makes it on loading.

    Raises:
        PublishedError: they are not the parts of one.
    """
    conversions = getattr(model, "_weight_conversions", None) or get_model_conversion_mapping(model)
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    jobs: dict[str, WeightConverter] = {}
    for key in sorted(parts, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters)
        if pattern is None:
            raise PublishedError(f"{key} is no part of a tensor of {type(model).__name__}")
        jobs.setdefault(name, copy.deepcopy(by_pattern[pattern])).add_tensor(name, key, pattern, parts[key])
    made = [
        value for name, job in jobs.items() for value in job.convert(name, model=model, config=model.config).values()
    ]
    if len(made) != 1:
        raise PublishedError(f"{', '.join(list(parts)[:3])} are the parts of {len(made)} tensors, not of one")
    return made[0][0] if isinstance(made[0], list) else made[0]
