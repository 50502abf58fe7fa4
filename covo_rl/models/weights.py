"""Are the weights of a model those of its files: all of them, of the right shapes, and finite?

Some checkpoints ship a LoRA for use with audio beside their weights (Granite Speech 3.x in the model's folder,
Phi-4-multimodal in `speech-lora`). It is merged on loading: without it the model is not the published one, and unmerged
it would be a second adapter under the one that trains.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError

from covo_rl.data.noise import quiet, quiet_bars
from covo_rl.types import UserError

#: how the files of a LoRA begin that lies beside the weights
ADAPTER_FILES = "adapter_"


class WeightsError(UserError, OSError):
    """A checkpoint or adapter is incomplete or damaged; the message names tensors."""


def load_whole(model_class: Any, path: str, *, adapter_folder: str = "", **options: Any) -> Any:
    """`model_class.from_pretrained(path)`, whose every tensor came from the files, finite; a shipped LoRA merged.

    transformers warns of tensors in the files that the model has no place for. `adapter_folder` is the checkpoint's
    folder where the LoRA would lie.

    Raises:
        WeightsError: files or tensors are missing (they would be random), of another shape, or hold NaN or infinities;
            or a LoRA would have to be merged into weights of 4 bits.
    """
    quiet()  # for programs and notebooks; commands have called it
    quiet_bars()
    adapter = shipped_adapter(path, adapter_folder)
    if adapter and options.get("quantization_config"):
        raise WeightsError(
            f"{path} ships a LoRA ({adapter}), which must be merged before weights are rounded to 4 bits: leave "
            "load_in_4bit out"
        )
    try:
        with tempfile.TemporaryDirectory(prefix="covo-rl-weights-") as scratch:
            model, report = model_class.from_pretrained(
                weights_alone(path, Path(scratch)), output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except (SafetensorError, UnpicklingError, EOFError, OSError, TypeError) as error:  # TypeError: a strange index
        text = str(error).strip().split("\n", 1)[0] or type(error).__name__
        raise WeightsError(f"{path}: its weights cannot be read: {text}. Is the download complete?") from error
    shapes = [f"{name} ({tuple(saved)} in the file, {tuple(ours)} in the model)"
              for name, saved, ours in sorted(report["mismatched_keys"])]  # fmt: skip
    mismatched = {name for name, *_ in report["mismatched_keys"]}
    problems = [
        f"{what}: {_shown(names)}"
        for what, names in (
            ("missing in the checkpoint, they would be random", sorted(set(report["missing_keys"]) - mismatched)),
            ("of another shape than config.json says", shapes),
        )
        if names
    ]
    if problems:
        raise WeightsError(f"{path}: tensors {'; tensors '.join(problems)}. Is the download complete?")
    model.name_or_path = path
    if adapter:
        merge_adapter(model, adapter)
    check_finite(model.named_parameters(), path)
    return model


def shipped_adapter(path: str, subfolder: str = "") -> Path | None:
    """The folder of the LoRA that a checkpoint (folder or hub name) ships in this folder of its own, or None."""
    from transformers.utils.hub import cached_file

    quietly = {f"_raise_exceptions_for_{kind}": False for kind in ("missing_entries", "connection_errors")}
    config = cached_file(path, "adapter_config.json", subfolder=subfolder, **quietly)
    if config is None:
        return None
    if not Path(path).is_dir():  # of a hub name the tensors come to lie beside it
        cached_file(path, "adapter_model.safetensors", subfolder=subfolder)
    return Path(config).parent


def weights_alone(path: str, scratch: Path) -> str:
    """The checkpoint without a LoRA in its own folder: transformers would add it, and then report on nothing else.

    Links to its files in `scratch`, an empty folder; `path` itself where there is no such LoRA.
    """
    if (adapter := shipped_adapter(path)) is None:
        return path
    if not Path(path).is_dir():
        from huggingface_hub import snapshot_download

        adapter = Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"]))
    for entry in adapter.resolve().iterdir():
        if not entry.name.startswith(ADAPTER_FILES):
            os.symlink(entry.resolve(), scratch / entry.name)
    return str(scratch)


def merge_adapter(model: Any, folder: Path) -> None:
    """Add the LoRA in `folder` to the weights of `model`, which is a plain model then.

    Raises:
        WeightsError: tensors of it are missing, of another shape, not finite, or have no place in the model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    names_in_files = getattr(model, "_weight_conversions", None)  # an export asks for them
    report = model.load_adapter(str(folder), adapter_name="shipped")
    model._weight_conversions = names_in_files  # and not for the LoRA's
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := sorted(map(str, getattr(report, what))):
            raise WeightsError(f"{folder}: {what.replace('_', ' ')} of its LoRA: {_shown(names)}")
    for name, layer in [pair for pair in model.named_modules() if isinstance(pair[1], BaseTunerLayer)]:
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise WeightsError(f"{folder}: the LoRA of {name} cannot be merged: {error}") from error
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
    model._hf_peft_config_loaded = False
    if getattr(model.config, "has_lora_adapter", False):  # Granite: a saved copy needs none
        model.config.has_lora_adapter = False


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], where: str) -> None:
    """Raise WeightsError that names the floating-point tensors with NaN or infinities, and how they are held."""
    broken = [f"{name} ({str(value.dtype).removeprefix('torch.')})" for name, value in tensors if not _finite(value)]
    if broken:
        raise WeightsError(
            f"{where}: NaN or infinite numbers in {_shown(broken)}. The file is damaged, its training diverged, or the "
            "dtype is too narrow for its values (float16 ends at 65,504)"
        )


@torch.no_grad()
def _finite(value: torch.Tensor) -> bool:
    if not value.is_floating_point() or value.is_meta:
        return True
    # one sum is quicker than a mask of the tensor's size; it may overflow where no number does
    return bool(torch.isfinite(value.sum(dtype=torch.float32))) or bool(torch.isfinite(value).all())


def _shown(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:5])}{', ...' if names[5:] else ''})"
