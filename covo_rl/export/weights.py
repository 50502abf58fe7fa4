"""Weights under their published names, merged and written shard by shard.

Only one shard of merged tensors exists beside the model at any time. A LoRA layer is merged in float32 and rounded
once to the wanted precision; the model in memory is left bit for bit as it was.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from covo_rl.export.errors import ExportError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

ADAPTER = "default"
MAX_SHARD_BYTES = 4 << 30
#: A shard is at most this share of the model, so that model + shard stay under 1.3 x the model.
SHARD_SHARE = 0.125
MIN_SHARD_BYTES = 64 << 20  # below this, pieces are only a nuisance
#: transformers 5.17 undoes the renaming of Qwen2-Audio's decoder twice; the published name has one `model`.
TWICE = re.compile(r"^(language_model\.model)\.model\.")
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.index.json", "*.pth", "*.gguf")


@dataclass(frozen=True)
class Entry:
    """One tensor to write: its published name, size, and how to make it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a DTensor (a collective: every rank must call it); others are returned as they are."""
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather is not None else tensor


def is_sharded(model: nn.Module) -> bool:
    """True where parameters live in pieces on several ranks (FSDP2's DTensor, ZeRO-3's partitions)."""
    return any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in model.parameters())


def plain_class(model: nn.Module) -> type:
    """The model's class as it was before `fully_shard` put an FSDP class of its own in front."""
    return next(cls for cls in type(model).__mro__ if not cls.__name__.startswith("FSDP"))


def published_names(model: PreTrainedModel, names: list[str]) -> dict[str, str]:
    """Parameter name in memory -> name in the published checkpoint, by transformers' own conversion table.

    Raises:
        ExportError: the conversion does more than rename.
    """
    from transformers.core_model_loading import revert_weight_conversion

    markers = {name: torch.empty(0) for name in names}
    reverted = revert_weight_conversion(model, dict(markers))
    by_id = {id(tensor): name for name, tensor in reverted.items()}
    lost = [name for name, tensor in markers.items() if id(tensor) not in by_id]
    if lost:
        raise ExportError(
            f"transformers converts {len(lost)} tensors of {type(model).__name__} by more than a renaming "
            f"({lost[0]!r} for example); export the adapter instead and merge it with PEFT"
        )
    return {name: TWICE.sub(r"\1.", by_id[id(tensor)]) for name, tensor in markers.items()}


def base_name(name: str) -> str | None:
    """Name that a tensor of a PEFT-injected model has in the plain model; None for adapter-only tensors.

    A trained copy (modules_to_save) takes the place of its original.
    """
    if ".base_layer." in name:
        return name.replace(".base_layer.", ".")
    if ".modules_to_save." in name:
        path, rest = name.split(".modules_to_save.", 1)
        adapter, _, leaf = rest.partition(".")
        return f"{path}.{leaf}" if adapter == ADAPTER else None
    if ".original_module." in name or ".lora_" in name:
        return None
    return name


def merged_entries(model: PreTrainedModel, dtype: torch.dtype | None = None) -> list[Entry]:
    """Every tensor of the plain model with the adapter merged in, under its published name.

    `dtype`: precision of floating-point tensors; None keeps that of the weights in memory.
    """
    state = model.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    names = {name: plain for name in state if (plain := base_name(name)) is not None and plain not in tied}
    published = published_names(model, list(names.values()))
    if len(set(published.values())) != len(names):
        raise ExportError(f"two tensors of {type(model).__name__} have the same published name")
    entries = []
    for name, plain in names.items():
        tensor = state[name]
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        entries.append(Entry(published[plain], tuple(tensor.shape), kind, _maker(model, name, tensor, kind)))
    return entries


def _maker(model: nn.Module, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    if ".base_layer." not in name:
        return lambda: whole(tensor.detach()).to("cpu", dtype).contiguous()
    path, leaf = name.rsplit(".base_layer.", 1)
    return lambda: merged_parameter(model.get_submodule(path), leaf).to("cpu", dtype).contiguous()


@torch.no_grad()
def merged_parameter(layer: Any, leaf: str) -> torch.Tensor:
    """`weight` or `bias` of a PEFT layer with its adapter merged in float32; the layer itself is left unchanged.

    Raises:
        ExportError: the base is quantised or sharded, so that there is nothing exact to merge into.
    """
    base = layer.get_base_layer()
    originals = {name: parameter.data for name, parameter in base.named_parameters(recurse=False)}
    for name, data in originals.items():
        if not data.is_floating_point() or hasattr(data, "full_tensor"):
            raise ExportError(
                f"cannot merge into {type(base).__name__}.{name} of dtype {data.dtype}: load the base unquantised "
                "on one device (covo-rl export does) and merge there"
            )
    try:
        for name, parameter in base.named_parameters(recurse=False):
            parameter.data = originals[name].to(torch.float32, copy=True)
        layer.merge(adapter_names=[ADAPTER])
        result = getattr(base, leaf).data
    finally:
        layer.merged_adapters.clear()  # instead of subtracting again: the originals come back exactly
        for name, parameter in base.named_parameters(recurse=False):
            parameter.data = originals[name]
    return result


def shards(entries: list[Entry], max_bytes: int | None = None) -> Iterator[list[Entry]]:
    """Consecutive entries in groups of at most `max_bytes` (a larger tensor is alone in its group)."""
    if max_bytes is None:
        total = sum(entry.nbytes for entry in entries)
        max_bytes = max(MIN_SHARD_BYTES, min(MAX_SHARD_BYTES, int(SHARD_SHARE * total)))
    group: list[Entry] = []
    size = 0
    for entry in entries:
        if group and size + entry.nbytes > max_bytes:
            yield group
            group, size = [], 0
        group.append(entry)
        size += entry.nbytes
    if group:
        yield group


def write_shards(entries: list[Entry], folder: Path, max_bytes: int | None = None) -> list[Path]:
    """Write safetensors shards and their index, as transformers names them; returns the files.

    Raises:
        ExportError: the disk has no room.
    """
    from safetensors.torch import save_file

    total = sum(entry.nbytes for entry in entries)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise ExportError(f"{folder}: the weights need {total / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
    groups = list(shards(entries, max_bytes))
    files, weight_map = [], {}
    for number, group in enumerate(groups, 1):
        name = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file({entry.name: entry.make() for entry in group}, folder / name, metadata={"format": "pt"})
        weight_map |= {entry.name: name for entry in group}
        files.append(folder / name)
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def checkpoint_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file of a checkpoint folder, read from the headers."""
    from safetensors import safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found


def carried_over(base: Path, entries: list[Entry]) -> list[Entry]:
    """Tensors of the base checkpoint that the model class does not hold: carried along, so that none gets lost."""
    from safetensors import safe_open

    known = {entry.name for entry in entries}

    def reader(name: str, file: Path) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(name)

        return read

    extra = []
    for name, file in checkpoint_tensors(base).items():
        if TWICE.sub(r"\1.", name) not in known:
            tensor = reader(name, file)()
            extra.append(Entry(name, tuple(tensor.shape), tensor.dtype, reader(name, file)))
    return extra


def copy_companions(base: Path, folder: Path) -> list[str]:
    """Copy what lies beside the base's weights and was not written already (vocoder, licence, ...)."""
    copied = []
    for source in sorted(base.iterdir()):
        target = folder / source.name
        if source.name.startswith(".") or source.name == "README.md" or target.exists():
            continue
        if source.is_file() and any(source.match(pattern) for pattern in WEIGHT_FILES):
            continue
        shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)
        copied.append(source.name)
    return copied


def read_into(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy full tensors into parameters and buffers of the same names, sharded or not, whatever their precision.

    Raises:
        RuntimeError: shapes differ.
    """
    state = model.state_dict()
    for name, tensor in tensors.items():
        held: Any = state[name]
        if held.shape != tensor.shape:
            raise RuntimeError(f"{name} has shape {tuple(held.shape)} in memory and {tuple(tensor.shape)} in the file")
        if hasattr(held, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            tensor = distribute_tensor(tensor.to(held.device, held.dtype), held.device_mesh, held.placements)
        held.detach().copy_(tensor)
