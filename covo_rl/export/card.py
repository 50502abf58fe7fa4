"""The model card: what was trained, from what, with which figures, and under which terms."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from covo_rl.config import number_map
from covo_rl.export.errors import ExportError

TEMPLATE = "model_card.md.jinja"
#: option -> how the card calls it
SHOWN = {
    "data": "data", "prompts_per_step": "prompts per step", "num_generations": "rollouts per prompt",
    "max_steps": "steps", "learning_rate": "learning rate", "loss_type": "loss", "beta": "KL coefficient",
    "temperature": "temperature", "lora_r": "LoRA rank", "lora_alpha": "LoRA alpha", "use_rslora": "rsLoRA",
    "use_dora": "DoRA", "modules_to_save": "trained in full", "train_parts": "trained parts", "judge": "judge",
    "seed": "seed",
}  # fmt: skip
LORA_ONLY = {"lora_r", "lora_alpha", "use_rslora", "use_dora", "modules_to_save"}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    import yaml

    return yaml.safe_load(text) or {}


def _number(value: Any) -> str:
    return "-" if value is None else (f"{value:.4g}" if isinstance(value, float) else str(value))


def _evaluation(result: Mapping[str, Any]) -> list[dict[str, str]]:
    before, after = result.get("before") or {}, result.get("after") or {}
    names = [name for name in before if name in after and name != "n"]
    return [{"name": n.replace("_", " "), "before": _number(before[n]), "after": _number(after[n])} for n in names]


def _audio_checks(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, words in (("after_silent_audio", "silence"), ("after_swapped_audio", "another row's audio")):
        figures = result.get(key) or {}
        if figures.get("accuracy_sampled") is not None:
            lines.append(f"With {words} in place of the clip, sampled accuracy is {figures['accuracy_sampled']:.4g}.")
    return lines


def _training(config: Mapping[str, Any], environment: Mapping[str, Any], result: Mapping[str, Any]) -> list[dict]:
    rows = []
    for name, words in SHOWN.items():
        value = config.get(name)
        if value in (None, [], "", False) or (name in LORA_ONLY and not config.get("lora", True)):
            continue
        if name == "train_parts" and config.get("lora", True):
            continue
        rows.append({"name": words, "value": ", ".join(map(str, value)) if isinstance(value, list) else value})
    if result.get("trainable_parameters"):
        rows.append({"name": "trainable parameters", "value": f"{result['trainable_parameters']:,}"})
    if result.get("train_seconds"):
        rows.append({"name": "training time", "value": f"{result['train_seconds']} s"})
    if environment.get("commit"):
        rows.append({"name": "commit", "value": environment["commit"]})
    packages = environment.get("packages") or {}
    if packages:
        rows.append({"name": "versions", "value": ", ".join(f"{n} {v}" for n, v in packages.items() if v)})
    return rows


def render(
    *,
    kind: str,
    base_model: str,
    model_type: str,
    model_class: str,
    model_module: str,
    verification: Mapping[str, Any],
    run_folder: str | Path | None = None,
) -> str:
    """README.md of an export. `kind` is adapter or merged; figures come from the run folder where there is one."""
    import jinja2

    from covo_rl import __version__

    run = Path(run_folder) if run_folder else None
    config = _read(run / "config.yaml") if run else {}
    environment = _read(run / "environment.json") if run else {}
    result = _read(run / "result.json") if run else {}
    weights = number_map(config.get("rewards"), what="rewards", default=1.0)
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip  # markdown, not HTML
    name = str(base_model).rstrip("/").rsplit("/", 1)[-1]
    return env.get_template(TEMPLATE).render(
        kind=kind,
        title=f"{name} {'reasoning adapter' if kind == 'adapter' else 'with reasoning'}",
        base_model=base_model,
        academic_only=model_type == "covo_audio" and not str(config.get("model", "")).startswith("builtin:"),
        model_class=model_class,
        model_module=model_module,
        import_line="import covo_rl.models.covo_audio  # registers the model" if model_type == "covo_audio" else "",
        covo_rl_version=environment.get("covo_rl") or __version__,
        instruction=config.get("instruction"),
        evaluation=_evaluation(result),
        held_out=(result.get("after") or {}).get("n"),
        audio_checks=_audio_checks(result),
        training=_training(config, environment, result),
        rewards=" + ".join(f"{'' if w == 1 else f'{w:g} '}R_{n}" for n, w in weights.items()),
        hashes=environment.get("sha256") or {},
        verification=verification,
    )


def update_card(folder: str | Path, run_folder: str | Path) -> Path:
    """Write the card of an export again, now that the run folder holds result.json; returns its path.

    Raises:
        ExportError: `folder` is no export of ours.
    """
    folder = Path(folder)
    record = _read(folder / "export.json")
    verification = _read(folder / "verification.json")
    if not record or not verification:
        raise ExportError(f"{folder}: export.json and verification.json are missing; covo-rl export writes them")
    path = folder / "README.md"
    path.write_text(render(**record, verification=verification, run_folder=run_folder), encoding="utf-8")
    return path
