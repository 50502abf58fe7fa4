"""The model card: what was trained, from what, with which figures, and under which terms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from covo_rl import __version__
from covo_rl.config import number_map
from covo_rl.export import ExportError
from covo_rl.export.source import read_record

TEMPLATE = "model_card.md.jinja"
#: option -> how the card calls it
SHOWN = {
    "data": "data", "prompts_per_step": "prompts per step", "num_generations": "rollouts per prompt",
    "max_steps": "steps", "learning_rate": "learning rate", "loss_type": "loss", "beta": "KL coefficient",
    "temperature": "temperature", "lora_r": "LoRA rank", "lora_alpha": "LoRA alpha", "use_rslora": "rsLoRA",
    "use_dora": "DoRA", "modules_to_save": "trained in full", "train_parts": "trained parts", "judge": "judge",
    "seed": "seed",
}  # fmt: skip
LORA_ONLY = ("lora_r", "lora_alpha", "use_rslora", "use_dora", "modules_to_save")
FULL_ONLY = ("train_parts",)
AUDIO_CHECKS = {"after_silent_audio": "silence", "after_swapped_audio": "another row's audio"}


def update_card(folder: str | Path, run_folder: str | Path | None) -> Path:
    """Write README.md of an export, with what its run's folder says by now; returns its path.

    Raises:
        ExportError: `folder` is no export of ours.
    """
    folder = Path(folder)
    record, verification = (read_record(folder / name) for name in ("export.json", "verification.json"))
    if not record or not verification:
        raise ExportError(f"{folder}: export.json and verification.json are missing; covo-rl export writes them")
    config, environment, result = (
        read_record(Path(run_folder) / name) if run_folder else {}
        for name in ("config.yaml", "environment.json", "result.json")
    )
    before, after = result.get("before") or {}, result.get("after") or {}
    heard = {words: (result.get(key) or {}).get("accuracy_sampled") for key, words in AUDIO_CHECKS.items()}
    weights = number_map(config.get("rewards"), what="rewards", default=1.0)
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip  # markdown, not HTML
    card = env.get_template(TEMPLATE).render(
        **record,
        name=record["base_model"].rstrip("/").rsplit("/", 1)[-1],
        academic_only=record["model_type"] == "covo_audio" and not str(config.get("model", "")).startswith("builtin:"),
        covo_rl_version=environment.get("covo_rl") or __version__,
        instruction=config.get("instruction"),
        figures=[name for name in before if name in after and name != "n"],
        before=before,
        after=after,
        audio_checks=[
            f"With {words} in place of the clip, sampled accuracy is {figure:.4g}."
            for words, figure in heard.items()
            if figure is not None
        ],
        training=_training(config, environment, result),
        rewards=" + ".join(f"{'' if w == 1 else f'{w:g} '}R_{n}" for n, w in weights.items()),
        hashes=environment.get("sha256") or {},
        verification=verification,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder / "README.md"


def _training(config: Mapping[str, Any], environment: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """What the card says of the training; rows without a value are left out of it."""
    hidden = FULL_ONLY if config.get("lora", True) else LORA_ONLY
    options = {words: config.get(name) for name, words in SHOWN.items() if name not in hidden}
    parameters, seconds = result.get("trainable_parameters"), result.get("train_seconds")
    packages = environment.get("packages") or {}
    return {
        **{words: ", ".join(map(str, v)) if isinstance(v, list) else v for words, v in options.items()},
        "trainable parameters": parameters and f"{parameters:,}",
        "training time": seconds and f"{seconds} s",
        "commit": environment.get("commit"),
        "versions": ", ".join(f"{name} {version}" for name, version in packages.items() if version),
    }
