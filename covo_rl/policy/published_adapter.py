"""A trained adapter as others read it: published key names, both namings of its modules, whole tensors.

LoRA keys are in checkpoint naming, so that a plain PEFT on the published model, and servers that know only published
names, find every module. Trained copies (modules_to_save) keep the name in memory, which is where PEFT looks for them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from covo_rl.policy.lora import adapted_modules
from covo_rl.policy.published import ADAPTER, published_names, published_state, renamed
from covo_rl.policy.saved_adapter import PREFIX, kind_of
from covo_rl.policy.sharding import is_sharded, whole
from covo_rl.policy.trainable import Trainable

if TYPE_CHECKING:
    from peft import LoraConfig

STEM = "adapter_model"


def base_reference(modes: Trainable) -> str:
    """Where the base model was loaded from: a folder as absolute path, or a hub name."""
    name = modes.family.model.name_or_path or ""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def names_in_memory(modes: Trainable) -> dict[str, str]:
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
        known = published.get(f"{path}.weight", "").removesuffix(".weight")
        # PEFT maps the published path of the module back to the one in memory, but adds no prefix that it lacks
        if lora and not path.endswith(f".{known}"):
            keys[name] = known + lora + leaf
    return {PREFIX + key: name for name, key in (keys | {name: name for name in modes.replaced}).items()}


def whole_state(model: torch.nn.Module, names: Iterable[str], *, keep: bool = True) -> dict[str, torch.Tensor]:
    """The model's tensors by name; of a model sharded by FSDP2 or ZeRO-3 those of `names` gathered, on the CPU.

    A collective then: every rank must call it, and those with `keep` False are left with empty tensors.
    """
    state = model.state_dict(keep_vars=True)
    for name in dict.fromkeys(names) if is_sharded(model) else ():
        full = whole(state[name])
        state[name] = full.cpu() if keep else torch.empty(0)
    return state


def adapter_config(modes: Trainable, base: str | None = None) -> LoraConfig:
    """adapter_config.json of the policy's adapter, on `base` (default: where the base was loaded from)."""
    peft_model: Any = modes.peft_model
    config = copy.deepcopy(peft_model.peft_config[ADAPTER])
    config.inference_mode = True
    config.base_model_name_or_path = base_reference(modes) if base is None else base
    config.target_modules = _both_namings(modes.family.model) or config.target_modules
    return config


def _both_namings(model: Any) -> list[str]:
    """Names of the adapted modules, in memory and as published where they differ.

    Other versions of transformers hold the same model under other names: PEFT then still finds its modules. No regular
    expression: for mixtures of experts PEFT 0.21 reads one as last names, which the audio encoder has too.
    """
    adapted = adapted_modules(model)
    published = published_names(model, [f"{name}.weight" for name in adapted]).values()
    return sorted({*adapted, *(name.removesuffix(".weight") for name in published)})
