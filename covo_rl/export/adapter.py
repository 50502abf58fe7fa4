"""The policy on disk: a PEFT adapter, or all weights under their published names; written, found and read back.

LoRA keys are in checkpoint naming, so that a plain PEFT on the published model, and servers that know only published
names, find every module. Trained copies (modules_to_save) keep the name in memory, which is where PEFT looks for them.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from covo_rl.config import AdapterConfig, PromptConfig, taught_prompt
from covo_rl.data.files import read_record
from covo_rl.export import ExportError
from covo_rl.export.merged import entry_of, published_entries, stored_tensors, write_config, write_shards
from covo_rl.export.names import ADAPTER, published_names, published_state, renamed, stack_parts
from covo_rl.models import load_family
from covo_rl.models.builtin import resolve_model
from covo_rl.policy.lora import adapted_modules
from covo_rl.policy.saved_adapter import kind_of
from covo_rl.policy.sharding import TensorPieces, is_sharded, local_tensor, own_part, whole
from covo_rl.policy.trainable import Trainable, make_trainable
from covo_rl.records.folder import BEGUN
from covo_rl.resolve import meant
from covo_rl.train.checkpoint.manifest import MANIFEST, damage, moment_of, read_manifest
from covo_rl.train.checkpoint.tensors import saved_tensors
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
    base: str | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the policy: `adapter_model.safetensors` + `adapter_config.json`, or `model*.safetensors` + config.

    Parameters sharded by FSDP2 or ZeRO-3 are gathered, so every rank must call this; rank 0 writes. `base` is the
    base-model reference (default: where the model came from). `dtype` casts floating-point tensors (default: as
    trained).

    Raises:
        ExportError: the disk is full.
    """
    folder, model, main = Path(folder), modes.family.model, Ranks.current().main
    names = _names_in_memory(modes)
    state = model.state_dict(keep_vars=True)
    if is_sharded(model):
        for name in dict.fromkeys(names.values()):
            full = whole(state[name])  # every rank takes part, rank 0 keeps it
            state[name] = full.cpu() if main else torch.empty(0)
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        if modes.peft_model is None:
            write_shards(published_entries(model, state, dtype), folder)
            write_config(model, folder, dtype)
        else:
            entries = [entry_of(key, state[name], dtype) for key, name in names.items()]
            write_shards(entries, folder, sys.maxsize, stem=STEM)
            config: Any = copy.deepcopy(modes.peft_model.peft_config[ADAPTER])
            config.inference_mode = True
            config.base_model_name_or_path = base_reference(modes) if base is None else base
            config.target_modules = _both_namings(model) or config.target_modules
            config.save_pretrained(str(folder))
    return folder


def _names_in_memory(modes: Trainable) -> dict[str, str]:
    """Key in the files -> name in `modes.family.model`; several keys with one name are the parts of that tensor."""
    model = modes.family.model
    if modes.peft_model is None:
        return {key: origin.name for key, origin in published_state(model).items()}
    from peft import get_peft_model_state_dict

    def chosen_by_peft(state: dict[str, torch.Tensor]) -> Mapping[str, Any]:
        prefixed = {PREFIX + name: tensor for name, tensor in state.items()}
        return get_peft_model_state_dict(modes.peft_model, state_dict=prefixed, save_embedding_layers=False)

    held = [name for name, _ in model.named_parameters() if kind_of(name)]
    keys = {name: key.removeprefix(PREFIX) for name, key in renamed(held, chosen_by_peft).items()}
    paths = {key.split(".lora_", 1)[0] for key in keys.values() if ".lora_" in key}
    published = published_names(model, [f"{path}.weight" for path in paths])
    for name, key in keys.items():
        path, lora, leaf = key.partition(".lora_")
        if lora:  # PEFT maps the published path of the module back to the one in memory
            keys[name] = published[f"{path}.weight"].removesuffix(".weight") + lora + leaf
    return {PREFIX + key: name for name, key in (keys | {name: name for name in modes.replaced}).items()}


def _both_namings(model: Any) -> list[str]:
    """Names of the adapted modules, in memory and as published where they differ.

    Other versions of transformers hold the same model under other names: PEFT then still finds its modules. No regular
    expression: for mixtures of experts PEFT 0.21 reads one as last names, which the audio encoder has too.
    """
    adapted = adapted_modules(model)
    published = published_names(model, [f"{name}.weight" for name in adapted]).values()
    return sorted({*adapted, *(name.removesuffix(".weight") for name in published)})


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
    model: Any,
    tensors: Mapping[str, Callable[[], torch.Tensor | TensorPieces]],
    names: Mapping[str, str],
    source: Path,
) -> None:
    """Copy full tensors into parameters and buffers, sharded or not, whatever their precision.

    `tensors`: key -> reader; `names`: key -> name in the model, all of which must be there; keys with one name are
    the parts of that tensor.

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
    keys: dict[str, list[str]] = {}
    for key, name in names.items():
        keys.setdefault(name, []).append(key)
    for name, (key, *others) in keys.items():
        place = state[name]
        tensor: Any = stack_parts(model, {k: tensors[k]() for k in (key, *others)}) if others else tensors[key]()
        if place.shape != tensor.shape:
            raise ExportError(
                f"{source} does not fit the policy in memory: {name} has shape {tuple(place.shape)} in memory "
                f"and {tuple(tensor.shape)} in the file"
            )
        local_tensor(place.detach()).copy_(own_part(place, tensor))


# -- from a run, a checkpoint or an adapter folder back to the policy in memory ---------------------------------


@dataclass(frozen=True)
class Opened:
    """A policy read from `folder`, the run it belongs to (if known), the base model's recorded name, the prompt that
    it was trained with (if known), and whether it was trained on a 4-bit base."""

    modes: Trainable
    folder: Path
    run_folder: Path | None
    base_model: str
    wording: PromptConfig | None = None
    load_in_4bit: bool = False


def wording_of(folder: Path, options: Mapping[str, Any]) -> PromptConfig | None:
    """The prompt of training: prompt.yaml beside the policy, else the run's options; None where neither says."""
    if (path := folder / "prompt.yaml").is_file():
        return taught_prompt(path)
    said = {f.name: options[f.name] for f in fields(PromptConfig) if f.name in options}
    return PromptConfig(**said) if said else None


def policy_kind(folder: Path) -> str | None:
    """`adapter` for a PEFT folder, `checkpoint` for one of the trainer, `full` for weights, None for neither."""
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    if (folder / "state.json").is_file() and any(folder.glob("weights*.safetensors")):
        return "checkpoint"
    return "full" if any(folder.glob("model*.safetensors")) and (folder / "config.json").is_file() else None


def policy_folder(path: str | Path) -> Path:
    """The folder that holds the policy: of a run its adapter/ or model/, else its last checkpoint; of a checkpoint
    the folder itself or its policy/; or any folder with an adapter or weights.

    Raises:
        ExportError: there is none; the message lists what was looked for and what exists.
    """
    path = Path(path)
    if not path.is_dir():
        raise ExportError(f"{path}: no such folder; give a run folder, a checkpoint or an adapter folder{meant(path)}")

    steps = sorted(path.glob("checkpoints/step_*"), key=moment_of, reverse=True)
    places = [path, path / "adapter", path / "model", path / "policy"]
    for folder in [*places, *(place for step in steps for place in (step, step / "policy"))]:
        if policy_kind(folder):
            return folder
    raise ExportError(
        f"{path}: no policy in the folder itself, adapter, model, policy or checkpoints/step_*; "
        f"the folder holds {sorted(p.name for p in path.iterdir())[:10]}"
    )


def run_of(folder: Path) -> Path | None:
    """The nearest folder above (or the folder itself) that a run began; a config.yaml alone is anybody's."""
    return next((p for p in [folder, *folder.resolve().parents][:5] if all((p / n).is_file() for n in BEGUN)), None)


def base_of(folder: Path) -> str:
    """Base model that an export records: export.json, adapter_config.json, or the run's configuration.

    Raises:
        ExportError: none of them names one.
    """
    name = (
        read_record(folder / "export.json").get("base_model")
        or read_record(folder / "adapter_config.json").get("base_model_name_or_path")
        or read_record((run_of(folder) or folder) / "config.yaml").get("model")
    )
    if not name:
        raise ExportError(f"{folder}: no base model is recorded; give --base-model")
    return resolve_model(name)


def portable_name(model: str | None) -> str | None:
    """The model as an export records it, if that means the same elsewhere: a hub name or a shipped checkpoint.

    None: record the folder that it was loaded from.
    """
    return model if model and not Path(model).is_dir() else None


def open_policy(
    path: str | Path, *, base_model: str | None = None, unquantised: bool = False, trust_remote_code: bool = False
) -> Opened:
    """Load the base in the run's precision and put the saved policy on it, on the CPU.

    `base_model` overrides what the run or the adapter records. A base that was held in 4 bits is so again (where torch
    has a CUDA device on that, else on the CPU), or as published with `unquantised`.

    Raises:
        ExportError: no policy, no known base model, or tensors that do not fit it.
        QuantisationError: a 4-bit base cannot be had on this machine.
    """
    folder = policy_folder(path)
    kind, run = policy_kind(folder), run_of(folder)
    if kind == "checkpoint" and (folder / MANIFEST).is_file() and (problems := damage(folder)):
        raise ExportError(f"{folder} is damaged: {'; '.join(problems)}; name an older checkpoint")
    record = read_record(folder / "state.json" if kind == "checkpoint" else (run or folder) / "config.yaml")
    options = record["config"] if kind == "checkpoint" else record
    name = base_model or options.get("model") or base_of(folder)
    in_4bit = bool(options.get("load_in_4bit") or read_record(folder / "export.json").get("load_in_4bit"))
    dtype = options.get("dtype") or "auto"
    family = load_family(
        resolve_model(name), dtype=dtype, load_in_4bit=in_4bit and not unquantised, trust_remote_code=trust_remote_code
    )
    if kind == "adapter":
        modes = make_trainable(family, AdapterConfig(adapter=str(folder)))
    elif kind == "checkpoint":
        names = {f.name for f in fields(AdapterConfig)} - {"load_in_4bit"}
        modes = make_trainable(family, AdapterConfig(**{k: v for k, v in options.items() if k in names}))
        trained = {n: n for n, p in family.model.named_parameters() if p.requires_grad}
        files = read_manifest(folder)["files"] if (folder / MANIFEST).is_file() else os.listdir(folder)
        tensors = {}
        for key, value in saved_tensors(folder, "weights", files).items():  # whatever wrapped the saved model
            endings = (key.split(".", i)[-1] for i in range(key.count(".") + 1))
            tensors[next((ending for ending in endings if ending in trained), key)] = lambda value=value: value
        read_into(family.model, tensors, trained, folder)
    else:
        parts = options.get("train_parts") or list(family.parts)
        modes = make_trainable(family, AdapterConfig(lora=False, train_parts=parts))
        load_policy_state(modes, folder)
    return Opened(modes, folder, run, name, wording_of(folder, options), in_4bit)
