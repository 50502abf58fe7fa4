"""What a run takes where no configuration is named: the demo's for a shipped model, for another that of a real one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from covo_rl.config import flag_value, taught_prompt
from covo_rl.models.builtin import is_random
from covo_rl.resolve import BUILTIN, find

#: said where rows are named and no model
NO_MODEL = "no model is named, so this trains the demo's tiny model, which knows rendered sounds only"
#: shipped model -> its configuration, where that is not tiny.yaml
_CONFIGS = {"tiny_zero": "tiny_zero", "tiny_spoken": "spoken"}


def default_config(model: str | None) -> Path:
    """The configuration of recipes/configs that suits a model."""
    if is_random(model):
        return find("recipes", "configs/tiny_random.yaml")
    shipped = (model or f"{BUILTIN}tiny").partition(BUILTIN)[2]
    name = _CONFIGS.get(shipped, "tiny") if shipped else "own_model"
    return find("recipes", f"configs/{name}.yaml")


def options_of_model(model: str | None) -> dict[str, str]:
    """What one model adds to that: the prompt options that MODEL/prompt.yaml says, a random one's own run folder.

    Raises:
        ConfigError: prompt.yaml is damaged.
    """
    if model and is_random(model):
        return {"output": f"runs/{model.removeprefix(BUILTIN)}"}
    path = Path(model or "") / "prompt.yaml"
    wording = asdict(taught_prompt(path)) if model and path.is_file() else {}
    words = {name: str(value).lower() if isinstance(value, bool) else value for name, value in wording.items()}
    return {name: value for name, value in words.items() if value is not None}


def with_defaults(words: list[str]) -> list[str]:
    """The words of a command line, after the configuration and the options that suit the model they name; flags win."""
    if flag_value(words, "config") is not None:
        return words
    model = flag_value(words, "model")
    if model is None and flag_value(words, "data") is not None:
        print(f"grpo_mmau: {NO_MODEL}", flush=True)
    own = [word for name, value in options_of_model(model).items() for word in (f"--{name}", value)]
    return ["--config", str(default_config(model)), *own, *words]
