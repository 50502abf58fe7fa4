"""The policy of a checkpoint: a PEFT adapter, or all weights under their published names; written and read back.

LoRA keys are in checkpoint naming, so that a plain PEFT on the published model, and servers that know only published
names, find every module. Trained copies (modules_to_save) keep the name in memory, which is where PEFT looks for them.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import distribute_tensor

from covo_rl.export import ExportError
from covo_rl.export.merged import (
    ADAPTER,
    base_name,
    entry_of,
    published_names,
    published_state,
    renamed,
    stored_tensors,
    write_config,
    write_shards,
)
from covo_rl.policy.patterns import prefixes
from covo_rl.policy.sharding import is_sharded, whole
from covo_rl.policy.trainable import Trainable
from covo_rl.train.ranks import Ranks

STEM = "adapter_model"
PREFIX = "base_model.model."


def base_reference(modes: Trainable) -> str:
    """Where the base model was loaded from: a folder as absolute path, or a hub name."""
    name = modes.family.model.name_or_path or ""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def save_policy(
    modes: Trainable,
    folder: str | Path,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    base: str | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the policy: `adapter_model.safetensors` + `adapter_config.json`, or `model*.safetensors` + config.

    Parameters sharded by FSDP2 are gathered, so every rank must call this; rank 0 writes. For ZeRO-3 pass
    `state_dict`, the gathered parameters under the names of `modes.family.model`. `base` is the base-model reference
    (default: where the model came from). `dtype` casts floating-point tensors (default: as trained).

    Raises:
        ExportError: parameters partitioned by ZeRO-3, without `state_dict`; or the disk is full.
    """
    folder, model, main = Path(folder), modes.family.model, Ranks.current().main
    if state_dict is None and any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ExportError("the parameters are partitioned by ZeRO-3: pass state_dict, from accelerator.get_state_dict")
    names = _names_in_memory(modes)
    state = dict(model.state_dict() if state_dict is None else state_dict)
    if is_sharded(model):
        for name in names.values():
            full = whole(state[name].detach())  # every rank takes part, rank 0 keeps it
            state[name] = full.cpu() if main else torch.empty(0)
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        entries = [entry_of(key, state[name], dtype) for key, name in names.items()]
        if modes.peft_model is None:
            write_shards(entries, folder)
            write_config(model, folder, dtype)
        else:
            write_shards(entries, folder, sys.maxsize, stem=STEM)
            _write_adapter_config(modes, folder, base_reference(modes) if base is None else base)
    return folder


def _names_in_memory(modes: Trainable) -> dict[str, str]:
    """Key in the policy's files -> name in `modes.family.model`."""
    model = modes.family.model
    if modes.peft_model is None:
        return published_state(model)
    from peft import get_peft_model_state_dict

    def chosen_by_peft(state: dict[str, torch.Tensor]) -> Mapping[str, Any]:
        prefixed = {PREFIX + name: tensor for name, tensor in state.items()}
        return get_peft_model_state_dict(modes.peft_model, state_dict=prefixed, save_embedding_layers=False)

    held = (n for n, _ in model.named_parameters() if ".lora_" in n or f".modules_to_save.{ADAPTER}." in n)
    keys = {name: key.removeprefix(PREFIX) for name, key in renamed(held, chosen_by_peft).items()}
    paths = {key.split(".lora_", 1)[0] for key in keys.values() if ".lora_" in key}
    published = published_names(model, [f"{path}.weight" for path in paths])
    for name, key in keys.items():
        path, lora, leaf = key.partition(".lora_")
        if lora:  # PEFT maps the published path of the module back to the one in memory
            keys[name] = published[f"{path}.weight"].removesuffix(".weight") + lora + leaf
    return {PREFIX + key: name for name, key in keys.items()}


def _write_adapter_config(modes: Trainable, folder: Path, base: str) -> None:
    assert modes.peft_model is not None
    config: Any = copy.deepcopy(modes.peft_model.peft_config[ADAPTER])
    config.inference_mode = True
    config.base_model_name_or_path = base
    if isinstance(config.target_modules, str):
        config.target_modules = _both_namings(modes, config.target_modules)
    config.save_pretrained(str(folder))


def _both_namings(modes: Trainable, pattern: str) -> str:
    """The pattern, with the decoder's path also as published where it differs in memory.

    Other versions of transformers hold the same model under other names: the pattern then still finds its modules.
    """
    path = prefixes(modes.family)["llm"]
    name = next(n for n, _ in modes.family.model.named_parameters() if n.startswith(f"{path}.") and base_name(n) == n)
    published = published_names(modes.family.model, [name])[name].removesuffix(name.removeprefix(path))
    here, there = re.escape(path), re.escape(published)
    if path == published or not pattern.startswith(here) or not published:
        return pattern
    return f"(?:{here}|{there}){pattern.removeprefix(here)}"


def load_policy_state(modes: Trainable, folder: str | Path) -> None:
    """Read what `save_policy` wrote into the policy in memory, in place; every tensor must find its place.

    Raises:
        FileNotFoundError: the folder holds no policy of this kind; the message lists what it holds.
        ExportError: tensors are missing, unexpected, or have another shape.
    """
    folder, adapter = Path(folder), modes.peft_model is not None
    pattern = f"{STEM}.safetensors" if adapter else "model*.safetensors"
    tensors = stored_tensors(folder, pattern)
    if not tensors:
        content = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"{folder}: no {pattern}, which a {'LoRA' if adapter else 'full-parameter'} policy is saved as; "
            f"found {content}"
        )
    read_into(modes.family.model, tensors, _names_in_memory(modes), folder)


def read_into(
    model: nn.Module, tensors: Mapping[str, Callable[[], torch.Tensor]], names: Mapping[str, str], source: Path
) -> None:
    """Copy full tensors into parameters and buffers, sharded or not, whatever their precision.

    `tensors`: key -> reader; `names`: key -> name in the model, all of which must be there.

    Raises:
        ExportError: keys are missing or unexpected, or shapes differ.
    """
    missing, unexpected = sorted(names.keys() - tensors.keys()), sorted(tensors.keys() - names.keys())
    if missing or unexpected:
        raise ExportError(
            f"{source} does not fit the policy in memory: missing {missing[:5]} ({len(missing)} in all), unexpected "
            f"{unexpected[:5]} ({len(unexpected)} in all); were rank, targets or modules_to_save changed?"
        )
    state = model.state_dict()
    for key, read in tensors.items():
        tensor, place = read(), state[names[key]]
        if place.shape != tensor.shape:
            raise ExportError(
                f"{source} does not fit the policy in memory: {names[key]} has shape {tuple(place.shape)} in memory "
                f"and {tuple(tensor.shape)} in the file"
            )
        if hasattr(place, "full_tensor"):
            tensor = distribute_tensor(tensor.to(place.device, place.dtype), place.device_mesh, place.placements)
        place.detach().copy_(tensor)
