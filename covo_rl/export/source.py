"""From a run, a checkpoint or an adapter folder back to the policy in memory."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covo_rl.export.errors import ExportError

if TYPE_CHECKING:
    from covo_rl.policy.modes import Modes

STEP = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class Opened:
    """A policy read from `folder`, the run it belongs to (if known) and the base model's recorded name."""

    modes: Modes
    folder: Path
    run_folder: Path | None
    base_model: str


def kind_of(folder: Path) -> str | None:
    """`adapter` for a PEFT folder, `full` for weights, None for neither."""
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    return "full" if any(folder.glob("model*.safetensors")) and (folder / "config.json").is_file() else None


def policy_folder(path: str | Path) -> Path:
    """The folder that holds the policy: of a run its adapter/ or model/, else its last checkpoint; of a checkpoint
    its policy/; or the folder itself.

    Raises:
        ExportError: there is none; the message lists what was looked for and what exists.
    """
    path = Path(path)
    if not path.is_dir():
        raise ExportError(f"{path}: no such folder; give a run folder, a checkpoint or an adapter folder")
    steps = sorted(path.glob("checkpoints/step_*"), key=lambda p: int(m[1]) if (m := STEP.fullmatch(p.name)) else -1)
    candidates = [path, path / "adapter", path / "model", path / "policy", *(s / "policy" for s in reversed(steps))]
    for folder in candidates:
        if kind_of(folder):
            return folder
    raise ExportError(
        f"{path}: no policy in {', '.join(c.name if c != path else 'the folder itself' for c in candidates[:4])} or "
        f"checkpoints/step_*/policy; the folder holds {sorted(p.name for p in path.iterdir())[:10]}"
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
    from covo_rl import builtin

    names = []
    for file, key in (("export.json", "base_model"), ("adapter_config.json", "base_model_name_or_path")):
        if (folder / file).is_file():
            names.append(json.loads((folder / file).read_text(encoding="utf-8")).get(key))
    names.append(run_options(run_of(folder)).get("model"))
    name = next(filter(None, names), None)
    if name is None:
        raise ExportError(f"{folder}: no base model is recorded; give --base-model")
    return builtin.resolve_model(name)


def open_policy(path: str | Path, *, base_model: str | None = None, dtype: str | None = None) -> Opened:
    """Load the base and put the saved policy on it, on the CPU.

    `base_model` overrides what the run or the adapter records. `dtype` is the base's precision (default: the run's).

    Raises:
        ExportError: no policy, or no known base model.
    """
    from covo_rl import builtin
    from covo_rl.config import AdapterConfig
    from covo_rl.export.policy_files import load_policy_state
    from covo_rl.models import load
    from covo_rl.policy.modes import build

    folder = policy_folder(path)
    kind = kind_of(folder)
    run = run_of(folder)
    options = run_options(run)
    name = base_model or options.get("model") or base_of(folder)
    family = load(builtin.resolve_model(name), dtype=dtype or options.get("dtype") or "auto")
    if kind == "adapter":
        modes = build(family, AdapterConfig(adapter=str(folder)))
    else:
        parts = options.get("train_parts") or list(family.parts)
        modes = build(family, AdapterConfig(lora=False, train_parts=parts))
        load_policy_state(modes, folder)
    return Opened(modes, folder, run, name)
