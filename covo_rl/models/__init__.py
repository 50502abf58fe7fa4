"""Audio language models behind one interface.

`load_family` reads the model type of a checkpoint and returns its family. A further family is one module with a
subclass of `AudioFamily` and one line in `FAMILIES`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from covo_rl.models.base import AudioFamily

#: model_type -> "module:class"
FAMILIES = {
    "covo_audio": "covo_rl.models.covo_audio.family:CovoAudio",
    "qwen2_audio": "covo_rl.models.qwen2_audio:Qwen2Audio",
}


def family_class(model_type: str) -> type[AudioFamily]:
    """The family of a `model_type`; raises ValueError that lists what exists."""
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type {model_type!r} has no family; there are {', '.join(FAMILIES)}. To add one, subclass "
            "covo_rl.models.base.AudioFamily and name it in covo_rl.models.FAMILIES"
        )
    module, name = FAMILIES[model_type].split(":")
    return getattr(import_module(module), name)


def family_at(path: str) -> type[AudioFamily]:
    """The family of a local folder or hub name, by the `model_type` of its `config.json`; no weights are read.

    Raises ValueError for a model type without a family, OSError where there is no checkpoint.
    """
    from transformers import PreTrainedConfig

    raw, _ = PreTrainedConfig.get_config_dict(path)
    return family_class(raw.get("model_type", ""))


def load_family(path: str, dtype: str = "auto", **options: Any) -> AudioFamily:
    """Load model and processor of `family_at(path)`.

    `dtype` "auto" keeps the checkpoint's; `options` are those of `AudioFamily.load`.
    """
    return family_at(path).load(path, dtype=dtype, **options)
