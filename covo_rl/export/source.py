"""From a run, a checkpoint or an adapter folder back to the policy in memory."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from covo_rl.config import AdapterConfig
from covo_rl.export import ExportError
from covo_rl.export.adapter import load_policy_state, read_into
from covo_rl.export.merged import stored_tensors
from covo_rl.models import load_family
from covo_rl.policy.trainable import Trainable, make_trainable
from covo_rl.resolve import resolve_model

STEP = re.compile(r"step_(\d+)(?:\.(\d+))?")
CHECKPOINT_FILES = ("weights.safetensors", "state.json")  # what a checkpoint of the trainer holds


@dataclass(frozen=True)
class Opened:
    """A policy read from `folder`, the run it belongs to (if known) and the base model's recorded name."""

    modes: Trainable
    folder: Path
    run_folder: Path | None
    base_model: str


def read_record(path: Path) -> dict[str, Any]:
    """What a JSON or YAML file says; empty where there is none."""
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text) or {}


def policy_kind(folder: Path) -> str | None:
    """`adapter` for a PEFT folder, `checkpoint` for one of the trainer, `full` for weights, None for neither."""
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    if all((folder / name).is_file() for name in CHECKPOINT_FILES):
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
        raise ExportError(f"{path}: no such folder; give a run folder, a checkpoint or an adapter folder")

    def age(step: Path) -> tuple[int, int]:
        match = STEP.fullmatch(step.name)
        return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)

    steps = sorted(path.glob("checkpoints/step_*"), key=age, reverse=True)
    places = [path, path / "adapter", path / "model", path / "policy"]
    for folder in [*places, *(place for step in steps for place in (step, step / "policy"))]:
        if policy_kind(folder):
            return folder
    raise ExportError(
        f"{path}: no policy in the folder itself, adapter, model, policy or checkpoints/step_*; "
        f"the folder holds {sorted(p.name for p in path.iterdir())[:10]}"
    )


def run_of(folder: Path) -> Path | None:
    """The nearest folder above (or the folder itself) that holds a run's config.yaml."""
    return next((p for p in [folder, *folder.resolve().parents][:5] if (p / "config.yaml").is_file()), None)


def run_options(folder: Path) -> dict[str, Any]:
    """Resolved options of the run that a folder belongs to; empty where there is none."""
    run = run_of(folder)
    return read_record(run / "config.yaml") if run else {}


def base_of(folder: Path) -> str:
    """Base model that an export records: export.json, adapter_config.json, or the run's configuration.

    Raises:
        ExportError: none of them names one.
    """
    name = (
        read_record(folder / "export.json").get("base_model")
        or read_record(folder / "adapter_config.json").get("base_model_name_or_path")
        or run_options(folder).get("model")
    )
    if not name:
        raise ExportError(f"{folder}: no base model is recorded; give --base-model")
    return resolve_model(name)


def hub_name(model: str | None) -> str | None:
    """The model as an export records it, if that is a hub name; None: record the folder that it was loaded from."""
    return model if model and not model.startswith("builtin:") and not Path(model).is_dir() else None


def open_policy(path: str | Path, *, base_model: str | None = None) -> Opened:
    """Load the base in the run's precision and put the saved policy on it, on the CPU.

    `base_model` overrides what the run or the adapter records.

    Raises:
        ExportError: no policy, no known base model, or tensors that do not fit it.
    """
    folder = policy_folder(path)
    kind = policy_kind(folder)
    options = read_record(folder / "state.json")["config"] if kind == "checkpoint" else run_options(folder)
    name = base_model or options.get("model") or base_of(folder)
    family = load_family(resolve_model(name), dtype=options.get("dtype") or "auto")
    if kind == "adapter":
        modes = make_trainable(family, AdapterConfig(adapter=str(folder)))
    elif kind == "checkpoint":
        names = {f.name for f in fields(AdapterConfig)} - {"load_in_4bit"}
        modes = make_trainable(family, AdapterConfig(**{k: v for k, v in options.items() if k in names}))
        _load_trained(modes, folder / CHECKPOINT_FILES[0])
    else:
        parts = options.get("train_parts") or list(family.parts)
        modes = make_trainable(family, AdapterConfig(lora=False, train_parts=parts))
        load_policy_state(modes, folder)
    return Opened(modes, folder, run_of(folder), name)


def _load_trained(modes: Trainable, file: Path) -> None:
    """Put the trained parameters of a checkpoint into the policy, whatever wrapped the model when it was saved."""
    trained = {name: name for name, p in modes.family.model.named_parameters() if p.requires_grad}
    tensors = {}
    for key, read in stored_tensors(file.parent, file.name).items():
        endings = (key.split(".", i)[-1] for i in range(key.count(".") + 1))
        tensors[next((ending for ending in endings if ending in trained), key)] = read
    read_into(modes.family.model, tensors, trained, file)
