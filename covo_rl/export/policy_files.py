"""The policy of a checkpoint: a PEFT adapter, or all weights under their published names.

LoRA keys are in checkpoint naming, so that a plain PEFT on the published model, and servers that know only published
names, find every module. Trained copies (modules_to_save) keep the name in memory, which is where PEFT looks for them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from covo_rl.export.errors import ExportError
from covo_rl.export.weights import (
    ADAPTER,
    base_name,
    checkpoint_tensors,
    is_sharded,
    merged_entries,
    plain_class,
    published_names,
    read_into,
    whole,
    write_shards,
)
from covo_rl.policy.patterns import prefixes

if TYPE_CHECKING:
    from covo_rl.policy.trainable import Trainable

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."


def rank() -> int:
    """Rank of this process; 0 where nothing is distributed."""
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


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
        ExportError: parameters partitioned by ZeRO-3, without `state_dict`.
    """
    folder = Path(folder)
    model = modes.family.model
    if state_dict is None and any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ExportError("the parameters are partitioned by ZeRO-3: pass state_dict, from accelerator.get_state_dict")
    if modes.peft_model is not None:
        tensors = adapter_tensors(modes, state_dict)
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            _write_adapter(modes, tensors, folder, base_reference(modes) if base is None else base, dtype)
        return folder
    if state_dict is None and is_sharded(model):
        state_dict = {}
        for name, tensor in model.state_dict().items():
            full = whole(tensor)  # every rank takes part, rank 0 keeps it
            if rank() == 0:
                state_dict[name] = full.cpu()
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_full(modes, folder, state_dict=state_dict, dtype=dtype)
    return folder


def adapter_names(modes: Trainable) -> dict[str, str]:
    """Key in the adapter file -> parameter name in `modes.family.model`."""
    from peft import get_peft_model_state_dict

    assert modes.peft_model is not None
    model = modes.family.model
    markers = {name: torch.empty(0) for name, _ in model.named_parameters() if is_adapter(name)}
    prefixed = {f"{PREFIX}{name}": marker for name, marker in markers.items()}
    selected = get_peft_model_state_dict(modes.peft_model, state_dict=prefixed, save_embedding_layers=False)
    by_id = {id(marker): name for name, marker in markers.items()}
    keys = {key: by_id[id(marker)] for key, marker in selected.items()}
    published = _published_keys(modes, list(keys))
    return {published.get(key, key): name for key, name in keys.items()}


def is_adapter(name: str) -> bool:
    """True for parameters that a PEFT adapter file holds."""
    return ".lora_" in name or f".modules_to_save.{ADAPTER}." in name


def _published_keys(modes: Trainable, keys: list[str]) -> dict[str, str]:
    """LoRA key -> the key with its module path as published, which PEFT maps back to the path in memory."""
    paths = {key: key.removeprefix(PREFIX).split(".lora_", 1)[0] for key in keys if ".lora_" in key}
    published = published_names(modes.family.model, [f"{path}.weight" for path in dict.fromkeys(paths.values())])
    return {
        key: PREFIX + published[f"{path}.weight"].removesuffix(".weight") + ".lora_" + key.split(".lora_", 1)[1]
        for key, path in paths.items()
    }


def adapter_tensors(modes: Trainable, state_dict: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The adapter under its file keys, on the CPU; a collective where parameters are sharded."""
    state = modes.family.model.state_dict() if state_dict is None else state_dict
    return {key: whole(state[name].detach()).cpu().contiguous() for key, name in adapter_names(modes).items()}


def _write_adapter(
    modes: Trainable, tensors: Mapping[str, torch.Tensor], folder: Path, base: str, dtype: torch.dtype | None
) -> None:
    from safetensors.torch import save_file

    assert modes.peft_model is not None
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    save_file(dict(tensors), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config: Any = copy.deepcopy(modes.peft_model.peft_config[ADAPTER])
    config.inference_mode = True
    config.base_model_name_or_path = base
    if isinstance(config.target_modules, str):
        config.target_modules = both_namings(modes, config.target_modules)
    config.save_pretrained(str(folder))


def both_namings(modes: Trainable, pattern: str) -> str:
    """The pattern, with the decoder's path also as published where it differs in memory.

    Other versions of transformers hold the same model under other names: the pattern then still finds its modules.
    """
    path = prefixes(modes.family)["llm"]
    name = next(n for n, _ in modes.family.model.named_parameters() if n.startswith(f"{path}.") and base_name(n) == n)
    rest = name.removeprefix(path)
    published = published_names(modes.family.model, [name])[name].removesuffix(rest)
    here, there = re.escape(path), re.escape(published)
    if path == published or not pattern.startswith(here) or not published:
        return pattern
    return f"(?:{here}|{there}){pattern.removeprefix(here)}"


def write_full(
    modes: Trainable,
    folder: Path,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """All weights under their published names, streamed, and the model's config."""
    from dataclasses import replace

    model = modes.family.model
    entries = merged_entries(model, dtype)
    if state_dict is not None:
        names = [name for name in state_dict if name in model.state_dict()]
        gathered = {published: state_dict[name] for name, published in published_names(model, names).items()}
        entries = [replace(e, make=_cast(gathered[e.name], e.dtype)) for e in entries]
    write_shards(entries, folder)
    config = copy.deepcopy(model.config)
    if dtype is not None:
        set_dtype(config, dtype)
    config.architectures = [plain_class(model).__name__]
    config.save_pretrained(str(folder))


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> Any:
    return lambda: tensor.detach().to("cpu", dtype).contiguous()


def set_dtype(config: Any, dtype: torch.dtype) -> None:
    """Write the precision into a model config and its sub-configs."""
    config.dtype = dtype
    for name in getattr(config, "sub_configs", {}) or {}:
        if getattr(config, name, None) is not None:
            getattr(config, name).dtype = dtype


def load_policy_state(modes: Trainable, folder: str | Path) -> None:
    """Read what `save_policy` wrote into the policy in memory, in place; every tensor must find its place.

    Raises:
        FileNotFoundError: the folder holds no policy of this kind; the message lists what it holds.
        ExportError: tensors are missing, unexpected, or have another shape.
    """
    folder = Path(folder)
    wanted = ADAPTER_WEIGHTS if modes.peft_model is not None else "model*.safetensors"
    if not list(folder.glob(wanted)):
        found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"{folder}: no {wanted}, which a {'LoRA' if modes.peft_model is not None else 'full-parameter'} policy "
            f"is saved as; found {found}"
        )
    if modes.peft_model is None:
        _load_full(modes, folder)
        return
    from safetensors.torch import load_file

    saved = load_file(folder / ADAPTER_WEIGHTS)
    places = adapter_names(modes)
    _check_names(set(saved), set(places), folder)
    _copy(modes, {places[key]: tensor for key, tensor in saved.items()}, folder)


def _load_full(modes: Trainable, folder: Path) -> None:
    from safetensors import safe_open

    model = modes.family.model
    places = {published: name for name, published in published_names(model, list(model.state_dict())).items()}
    files = checkpoint_tensors(folder)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    _check_names(set(files), {published for published, name in places.items() if name not in tied}, folder)
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt") as opened:
            for key in (key for key, home in files.items() if home == file):
                _copy(modes, {places[key]: opened.get_tensor(key)}, folder)


def _check_names(saved: set[str], wanted: set[str], folder: Path) -> None:
    if saved != wanted:
        raise ExportError(
            f"{folder} does not fit the policy in memory: missing {sorted(wanted - saved)[:5]} "
            f"({len(wanted - saved)} in all), unexpected {sorted(saved - wanted)[:5]} ({len(saved - wanted)} in all); "
            "were rank, targets or modules_to_save changed?"
        )


def _copy(modes: Trainable, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    try:
        read_into(modes.family.model, tensors)
    except RuntimeError as error:  # copy_ on another shape
        raise ExportError(f"{folder} does not fit the policy in memory: {error}") from error
