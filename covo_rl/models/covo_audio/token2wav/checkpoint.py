"""The files of a decoder's folder: config.json, model.safetensors or model.pt, global_mean_var.npy.

Read as what strangers wrote: nothing is unpickled but tensors, and every tensor must have its place and its shape.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from covo_rl.models.weights import WeightsError, check_finite

#: what torch's newer weight norm calls the published `weight_g` and `weight_v`
PARAMETRISED = {".parametrizations.weight.original0": ".weight_g", ".parametrizations.weight.original1": ".weight_v"}
#: tensors that follow from formulas: a file may lack them
BUFFERS = (".inv_freq", ".filter")
WEIGHT_FILES = ("model.safetensors", "model.pt")
STATISTICS = "global_mean_var.npy"


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors by published name, of model.safetensors or else model.pt, out of the wrapper "model" and "module.".

    Raises:
        WeightsError: neither file exists, it cannot be read, or holds something else.
    """
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if path is None:
        raise WeightsError(f"{folder} holds neither {' nor '.join(WEIGHT_FILES)}: is it the folder of a decoder?")
    try:
        data: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(
            path, map_location="cpu", weights_only=True)  # fmt: skip
    except (SafetensorError, pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
        raise WeightsError(f"{path} cannot be read: {reason:.200}. Is the download complete?") from error
    if isinstance(data, Mapping) and isinstance(data.get("model"), Mapping):
        data = data["model"]
    if not isinstance(data, Mapping):
        raise WeightsError(f"{path} holds {type(data).__name__}; tensors by name are expected")
    tensors: dict[str, torch.Tensor] = {}
    for name, value in data.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise WeightsError(f"{path}: {name!r:.80} is {type(value).__name__}; only tensors by name are expected")
        ours = name.removeprefix("module.")
        for ending, published in PARAMETRISED.items():
            if ours.endswith(ending):
                ours = ours.removesuffix(ending) + published
        if ours in tensors:
            raise WeightsError(f"{path} holds {ours} twice, under two names")
        tensors[ours] = value
    return tensors


def fill(model: nn.Module, tensors: dict[str, torch.Tensor], where: str, dtype: torch.dtype) -> None:
    """Give `model` exactly these tensors, in `dtype`.

    Raises:
        WeightsError: names or shapes are not the model's, or the numbers not finite, or a formula's tensor (see
            BUFFERS) has other values.
    """
    ours = model.state_dict()
    tensors = {**{name: value for name, value in ours.items() if name.endswith(BUFFERS)}, **tensors}
    shapes = [
        f"{name} {tuple(tensors[name].shape)}, here {tuple(value.shape)}"
        for name, value in ours.items() if name in tensors and tensors[name].shape != value.shape
    ]  # fmt: skip
    other = [
        name for name, value in ours.items() if name.endswith(BUFFERS) and tensors[name].shape == value.shape
        and not torch.allclose(tensors[name].float(), value.float(), rtol=1e-2, atol=1e-6)
    ]  # fmt: skip
    for what, names in (
        ("missing", sorted(ours.keys() - tensors.keys())),
        ("unknown", sorted(tensors.keys() - ours.keys())),
        ("of another shape than config.json says", shapes),
        ("with other values than the formula's", other),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise WeightsError(f"{where}: tensors {what}: {', '.join(names[:5])}{more}")
    check_finite(tensors.items(), where)
    model.load_state_dict({name: value.to(dtype) for name, value in tensors.items()}, assign=True)


def read_statistics(path: Path, latent: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance (E,) float32 of the latents: the halves of the squeezed array.

    Raises:
        WeightsError: the file is missing or no array of 2 E numbers, or a variance is not above 0.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.size != 2 * latent:
        shape = getattr(array, "shape", type(array).__name__)
        raise WeightsError(f"{path} is {shape} {getattr(array, 'dtype', '')}; expected {2 * latent} floating-point "
                           f"numbers: {latent} means, then {latent} variances")  # fmt: skip
    mean, variance = torch.from_numpy(np.array(array, dtype=np.float32).reshape(2, latent))
    if not (mean.isfinite().all() and variance.isfinite().all() and (variance > 0).all()):
        raise WeightsError(f"{path}: means must be finite, and variances (its second half) finite and above 0")
    return mean, variance


def write_folder(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], statistics: np.ndarray
) -> None:
    """The three files, with the published names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    np.save(folder / STATISTICS, statistics)
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, folder / WEIGHT_FILES[0])
