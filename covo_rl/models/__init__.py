"""Audio language models behind one interface.

`load_family` reads the model type of a checkpoint and returns its family. A further family is one module with a
subclass of `TransformersFamily` and one line in `FAMILIES`; a user's own needs no line (models/registry.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covo_rl.models.registry import FAMILIES, ModelError, family_class, family_fingerprint, use_family
from covo_rl.resolve import meant
from covo_rl.types import UserError

if TYPE_CHECKING:
    from covo_rl.models.base import AudioFamily

__all__ = [
    "FAMILIES", "ModelError", "checkpoint_dtype", "damage_named", "family_at", "family_class", "family_fingerprint",
    "load_family", "model_config", "use_family",
]  # fmt: skip

#: the hint where no folder has a name like the one given
SHIPPED = "; builtin:tiny is the shipped model"


def checkpoint_dtype(path: str) -> str | None:
    """What the checkpoint's configuration says of its weights, "bfloat16" for example, without reading them."""
    return _stated_dtype(model_config(path))


def _stated_dtype(config: Mapping[str, Any]) -> str | None:
    return str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.") or None


def family_at(path: str) -> type[AudioFamily]:
    """The family of a local folder or hub name, by the `model_type` of its `config.json`; no weights are read.

    Raises ModelError for a model type without a family, OSError where there is no checkpoint.
    """
    return family_class(model_config(path).get("model_type", ""))


def load_family(path: str, dtype: str = "auto", *, load_in_4bit: bool = False, **options: Any) -> AudioFamily:
    """Load model and processor of the family of `path`.

    `dtype` "auto" keeps the checkpoint's; `load_in_4bit` holds the linear layers of the decoder in NF4, their products
    in `dtype`; `options` are those of `AudioFamily.load`.
    Raises ModelError for a model type without a family or damaged files, OSError where there is no checkpoint,
    QuantisationError where 4 bits cannot be had.
    """
    import torch

    from covo_rl.models.quantised import check_quantisation, keep_one_arithmetic, quantisation_of

    config = model_config(path)
    family = family_class(config["model_type"])
    for where, name in (("config.json says ", _stated_dtype(config) or "float32"), ("", dtype)):
        kind = getattr(torch, name, None)
        if name != "auto" and not (isinstance(kind, torch.dtype) and kind.is_floating_point and kind.itemsize > 1):
            raise ModelError(f"model {path}: {where}dtype {name!r}; there are float32, bfloat16 and float16")
    if load_in_4bit:
        check_quantisation()
        products = (_stated_dtype(config) or "float32") if dtype == "auto" else dtype
        options["quantization_config"] = quantisation_of(family.parts, products, getattr(family, "other_parts", ()))
    with damage_named(path):
        loaded = family.load(path, dtype=dtype, **options)
        keep_one_arithmetic(loaded.model)
        return loaded


@contextmanager
def damage_named(path: str) -> Iterator[None]:
    """Turns what damaged files, and sizes that no model can have, raise in other packages into a ModelError."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except (
        SafetensorError, StrictDataclassError, ValueError, TypeError, ArithmeticError, RuntimeError, ImportError,
    ) as error:  # fmt: skip
        if isinstance(error, UserError):
            raise
        text = " ".join(str(error).split())[:300]
        raise ModelError(
            f"model {path} does not load ({type(error).__name__}: {text})"
            + ("" if isinstance(error, ImportError) else "; is every file of it whole?")
        ) from error


def model_config(path: str) -> dict[str, Any]:
    """What config.json of a model folder or hub name says; nothing else is read.

    Raises:
        OSError: there is none; the message says where it was looked for and what to give.
        ModelError: its model_type has no family.
    """
    from transformers import PreTrainedConfig

    folder = Path(path)
    if folder.exists():
        _check_folder(folder)
    elif folder.is_absolute() or path.startswith((".", "~")) or len(folder.parts) != 2:
        raise FileNotFoundError(f"model {path!r}: no such folder (looked in {Path.cwd()}){meant(folder) or SHIPPED}")
    else:
        _check_hub(path)
    raw, _ = PreTrainedConfig.get_config_dict(path)
    family_class(raw.get("model_type", ""))
    return raw


def _check_folder(folder: Path) -> None:
    if (folder / "config.json").is_file():
        try:
            content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ModelError(f"model {folder}: config.json is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise ModelError(f"model {folder}: config.json is a {type(content).__name__}, not an object of options")
        return
    if not folder.is_dir():
        raise NotADirectoryError(f"model {folder}: give the folder that holds config.json and the weights, not a file")
    adapters = [f for f in (folder, folder / "adapter") if (f / "adapter_config.json").is_file()]
    hint = f"; {adapters[0]} is a PEFT adapter: give it as adapter, and its base as model" if adapters else ""
    if (folder / "model" / "config.json").is_file():
        hint = f"; did you mean {folder / 'model'}?"
    elif not hint and ((folder / "checkpoints").is_dir() or (folder / "state.json").is_file()):
        hint = f"; covo-rl export {folder} --merged DIR makes one of a run or checkpoint"
    content = sorted(p.name for p in folder.iterdir())[:8]
    raise FileNotFoundError(f"model {folder}: a model folder has a config.json; found {content}{hint}")


def _check_hub(name: str) -> None:
    """One request, where transformers repeats it for half a minute before it says that there is no network."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
    except HFValidationError:
        where = f"no such folder (looked in {Path.cwd()}), and no name that the Hugging Face hub could have"
        raise FileNotFoundError(f"model {name!r}: {where}{meant(name) or SHIPPED}") from None
    why = "is switched off (HF_HUB_OFFLINE)"
    if not constants.HF_HUB_OFFLINE:
        try:
            HfApi().model_info(name, timeout=10)
            return
        except Exception as error:  # also those of its HTTP library
            text = str(error).strip().split("\n", 1)[0]
            why = f"does not give it ({type(error).__name__}: {text})"
    raise FileNotFoundError(
        f"model {name!r}: no such folder (looked in {Path.cwd()}), it is not in the "
        f"Hugging Face cache, and the hub {why}. Give a folder with config.json, or where there is a network: "
        f"hf download {name}{meant(name) or SHIPPED}"
    )
