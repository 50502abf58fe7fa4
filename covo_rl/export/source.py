"""From a run, a checkpoint or an adapter folder back to the policy in memory."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covo_rl.export.errors import ExportError

if TYPE_CHECKING:
    from covo_rl.policy.trainable import Trainable

STEP = re.compile(r"step_(\d+)(?:\.(\d+))?")
CHECKPOINT_FILES = ("weights.safetensors", "state.json")  # what a checkpoint of the trainer holds


@dataclass(frozen=True)
class Opened:
    """A policy read from `folder`, the run it belongs to (if known) and the base model's recorded name."""

    modes: Trainable
    folder: Path
    run_folder: Path | None
    base_model: str


def kind_of(folder: Path) -> str | None:
    """`adapter` for a PEFT folder, `checkpoint` for one of the trainer, `full` for weights, None for neither."""
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    if all((folder / name).is_file() for name in CHECKPOINT_FILES):
        return "checkpoint"
    return "full" if any(folder.glob("model*.safetensors")) and (folder / "config.json").is_file() else None


def _age(path: Path) -> tuple[int, int]:
    match = STEP.fullmatch(path.name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)


def policy_folder(path: str | Path) -> Path:
    """The folder that holds the policy: of a run its adapter/ or model/, else its last checkpoint; of a checkpoint
    the folder itself or its policy/; or any folder with an adapter or weights.

    Raises:
        ExportError: there is none; the message lists what was looked for and what exists.
    """
    path = Path(path)
    if not path.is_dir():
        raise ExportError(f"{path}: no such folder; give a run folder, a checkpoint or an adapter folder")
    steps = sorted(path.glob("checkpoints/step_*"), key=_age, reverse=True)
    here = [path, path / "adapter", path / "model", path / "policy"]
    for folder in [*here, *(place for step in steps for place in (step, step / "policy"))]:
        if kind_of(folder):
            return folder
    raise ExportError(
        f"{path}: no policy in the folder itself, adapter, model, policy or checkpoints/step_*; "
        f"the folder holds {sorted(p.name for p in path.iterdir())[:10]}"
    )


def run_of(folder: Path) -> Path | None:
    """The nearest folder above (or the folder itself) that holds a run's config.yaml."""
    return next((p for p in [folder, *folder.resolve().parents][:5] if (p / "config.yaml").is_file()), None)


def run_options(run: Path | None) -> dict[str, Any]:
    """Resolved options of a run; empty where there is no run."""
    if run is None:
        return {}
    import yaml

    return yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) or {}


def base_of(folder: Path) -> str:
    """Base model that an export records: export.json, adapter_config.json, or the run's configuration.

    Raises:
        ExportError: none of them names one.
    """
    from covo_rl.resolve import resolve_model

    names = []
    for file, key in (("export.json", "base_model"), ("adapter_config.json", "base_model_name_or_path")):
        if (folder / file).is_file():
            names.append(json.loads((folder / file).read_text(encoding="utf-8")).get(key))
    names.append(run_options(run_of(folder)).get("model"))
    name = next(filter(None, names), None)
    if name is None:
        raise ExportError(f"{folder}: no base model is recorded; give --base-model")
    return resolve_model(name)


def open_policy(path: str | Path, *, base_model: str | None = None, dtype: str | None = None) -> Opened:
    """Load the base and put the saved policy on it, on the CPU.

    `base_model` overrides what the run or the adapter records. `dtype` is the base's precision (default: the run's).

    Raises:
        ExportError: no policy, or no known base model.
    """
    from covo_rl.config import AdapterConfig
    from covo_rl.export.policy_files import load_policy_state
    from covo_rl.models import load_family
    from covo_rl.policy.trainable import make_trainable
    from covo_rl.resolve import resolve_model

    folder = policy_folder(path)
    kind = kind_of(folder)
    run = run_of(folder)
    options = run_options(run)
    if kind == "checkpoint":
        options = json.loads((folder / "state.json").read_text(encoding="utf-8"))["config"]
    name = base_model or options.get("model") or base_of(folder)
    family = load_family(resolve_model(name), dtype=dtype or options.get("dtype") or "auto")
    if kind == "adapter":
        modes = make_trainable(family, AdapterConfig(adapter=str(folder)))
    elif kind == "checkpoint":
        known = {f.name for f in fields(AdapterConfig)} - {"load_in_4bit"}
        modes = make_trainable(family, AdapterConfig(**{k: v for k, v in options.items() if k in known}))
        load_trained(modes, folder / "weights.safetensors")
    else:
        modes = make_trainable(
            family, AdapterConfig(lora=False, train_parts=options.get("train_parts") or list(family.parts))
        )
        load_policy_state(modes, folder)
    return Opened(modes, folder, run, name)


def load_trained(modes: Trainable, file: Path) -> None:
    """Put the trained parameters of a checkpoint into the policy, whatever wrapped the model when it was saved.

    Raises:
        ExportError: trained parameters are missing, unexpected, or have another shape.
    """
    from safetensors.torch import load_file

    from covo_rl.export.weights import read_into

    wanted = {name for name, p in modes.family.model.named_parameters() if p.requires_grad}
    tensors = {}
    for name, tensor in load_file(file).items():
        parts = name.split(".")
        endings = (".".join(parts[i:]) for i in range(len(parts)))
        tensors[next((ending for ending in endings if ending in wanted), name)] = tensor
    if tensors.keys() != wanted:
        raise ExportError(
            f"{file} does not fit its own configuration: missing {sorted(wanted - tensors.keys())[:3]}, "
            f"unexpected {sorted(tensors.keys() - wanted)[:3]}"
        )
    try:
        read_into(modes.family.model, tensors)
    except RuntimeError as error:
        raise ExportError(f"{file}: {error}") from error
