"""The policy on disk: a PEFT adapter, or all weights under their published names; written, found and read back."""

from __future__ import annotations

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
from covo_rl.export.merged import stored_tensors, write_config, write_shards
from covo_rl.models import load_family
from covo_rl.models.builtin import resolve_model
from covo_rl.policy.entries import entry_of, published_entries
from covo_rl.policy.published import stack_parts
from covo_rl.policy.published_adapter import STEM, adapter_config, names_in_memory, whole_state
from covo_rl.policy.sharding import TensorPieces, local_tensor, own_part
from covo_rl.policy.trainable import Trainable, make_trainable
from covo_rl.records.folder import BEGUN
from covo_rl.resolve import meant
from covo_rl.train.checkpoint.manifest import MANIFEST, damage, moment_of, read_manifest
from covo_rl.train.checkpoint.tensors import saved_tensors
from covo_rl.train.ranks import Ranks


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
    names = names_in_memory(modes)
    state = whole_state(model, names.values(), keep=main)
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        if modes.peft_model is None:
            write_shards(published_entries(model, state, dtype), folder)
            write_config(model, folder, dtype)
        else:
            entries = [entry_of(key, state[name], dtype) for key, name in names.items()]
            write_shards(entries, folder, sys.maxsize, stem=STEM)
            adapter_config(modes, base).save_pretrained(str(folder))
    return folder


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
    read_into(modes.family.model, tensors, names_in_memory(modes), folder)


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
