"""Merged weights under their published names, written shard by shard.

Only one shard of merged tensors exists beside the model at any time. A LoRA layer is merged in float32 and rounded
once to the wanted precision; the model in memory is left bit for bit as it was.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from covo_rl.export import ExportError
from covo_rl.export.names import ADAPTER, TWICE, Parts, base_folder, published_state, whole_around
from covo_rl.models.base import AudioFamily
from covo_rl.models.weights import ADAPTER_FILES

MAX_SHARD_BYTES = 4 << 30
#: A shard is at most this share of the model, so that model + shard stay under 1.3 x the model.
SHARD_SHARE = 0.125
MIN_SHARD_BYTES = 64 << 20  # below this, pieces are only a nuisance
#: the LoRA that a checkpoint ships, and the second copy of its weights in Mistral's own format
NOT_CARRIED = (ADAPTER_FILES, "consolidated")
#: of a base that is kept back: its card, a template that would hide the exported one (transformers prefers the older
#: chat_template.json), and what supervised stages leave beside a checkpoint
KEPT_BACK = (".*", "README.md", "chat_template.json", "stage-*", "training_log.json", f"{ADAPTER_FILES}*")
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.index.json", "*.pth", "*.gguf")

# -- tensors -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One tensor to write: its published name, shape and precision, and how to make it (in any precision)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def tensor(self) -> torch.Tensor:
        """The tensor as it is written, on the CPU."""
        return self.make().to("cpu", self.dtype).contiguous()


def entry_of(name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None, make: Callable | None = None) -> Entry:
    """The entry of a tensor in memory, or of what `make` makes in its place; `dtype` only casts floating point."""
    precision = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return Entry(name, tuple(tensor.shape), precision, make or tensor.detach)


def published_entries(
    model: PreTrainedModel, state: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None,
    merge: Callable[[str], Callable[[], torch.Tensor] | None] = lambda name: None,
) -> list[Entry]:  # fmt: skip
    """Every tensor of the plain model under its published name, from `state`, or as `merge(name)` makes it."""
    parts, entries = Parts(model), []
    for key, origin in published_state(model).items():
        tensor = state[origin.name]
        entry = entry_of(key, tensor, dtype, merge(origin.name))
        if origin.part is not None:
            entry = Entry(key, origin.part, entry.dtype, partial(parts.get, key, origin.name, entry.make))
        entries.append(entry)
    return entries


def merged_entries(model: PreTrainedModel, dtype: torch.dtype | None = None) -> list[Entry]:
    """Every tensor of the plain model with the adapter merged in, under its published name.

    `dtype`: precision of floating-point tensors; None keeps that of the weights in memory.
    """

    def merge(name: str) -> Callable[[], torch.Tensor] | None:
        layer, leaf = adapter_on(model, name)
        return None if layer is None else partial(merged_parameter, layer, leaf)

    return published_entries(model, model.state_dict(), dtype, merge)


def adapter_on(model: nn.Module, name: str) -> tuple[Any, str]:
    """The PEFT layer that adapts a parameter, None where there is none, and the parameter's last name.

    Several may be wrapped around one module of stacked experts, one for each of its parameters.
    """
    path, _, leaf = name.rpartition(".base_layer.")
    while path:
        layer = model.get_submodule(path)
        if getattr(layer, "parameter_name", leaf) == leaf:
            return layer, leaf
        path = path.removesuffix(".base_layer") if path.endswith(".base_layer") else ""
    return None, leaf


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
        return getattr(base, leaf).data
    finally:
        layer.merged_adapters.clear()  # instead of subtracting again: the originals come back exactly
        for name, parameter in base.named_parameters(recurse=False):
            parameter.data = originals[name]


def stored_tensors(folder: Path, pattern: str = "*.safetensors") -> dict[str, Callable[[], torch.Tensor]]:
    """Name -> reader of every tensor in the files of a folder; only the headers are read now."""

    def read(file: Path, name: str) -> torch.Tensor:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)

    readers = {}
    for file in sorted(folder.glob(pattern)):
        with safe_open(file, framework="pt") as opened:
            readers |= {name: partial(read, file, name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    return readers


def base_tensors(base: Path) -> dict[str, Callable[[], torch.Tensor]]:
    """Name -> reader of a checkpoint's tensors; not of a LoRA beside them (merged on loading) or of Mistral's copy."""
    files = [path.name for path in base.glob("*.safetensors") if not path.name.startswith(NOT_CARRIED)]
    return {name: read for file in sorted(files) for name, read in stored_tensors(base, file).items()}


def carried_over(base: Path, entries: list[Entry]) -> list[Entry]:
    """Tensors of the base checkpoint that the model class does not hold: carried along, so that none gets lost.

    Raises:
        ExportError: a tensor would be there twice, under two names.
    """
    stored = base_tensors(base)
    names = {entry.name for entry in entries}
    others = {name: read for name, read in stored.items() if TWICE.sub(r"\1.", name) not in names}
    own = names - stored.keys()
    if twice := next((name for name in others if own & {name[i + 1 :] for i in _dots(name)}), None):
        raise ExportError(
            f"{base} holds {twice}, which the export would call otherwise and hold twice; export the adapter instead, "
            "or merge with another release of transformers"
        )
    return [entry_of(name, read(), make=read) for name, read in others.items()]


def _dots(name: str) -> list[int]:
    return [i for i, letter in enumerate(name) if letter == "."]


# -- files -------------------------------------------------------------------------------------------------------


def shards(entries: list[Entry], max_bytes: int | None = None) -> list[list[Entry]]:
    """Consecutive entries in groups of at most `max_bytes` (a larger tensor is alone in its group)."""
    if max_bytes is None:
        total = sum(entry.nbytes for entry in entries)
        max_bytes = max(MIN_SHARD_BYTES, min(MAX_SHARD_BYTES, int(SHARD_SHARE * total)))
    groups: list[list[Entry]] = []
    size = 0
    for entry in entries:
        size += entry.nbytes
        if not groups or size > max_bytes:
            groups.append([])
            size = entry.nbytes
        groups[-1].append(entry)
    return groups


def write_shards(entries: list[Entry], folder: Path, max_bytes: int | None = None, *, stem: str = "model") -> None:
    """Write safetensors shards and their index, as transformers names them.

    Raises:
        ExportError: the disk has no room.
    """
    total, free = sum(entry.nbytes for entry in entries), shutil.disk_usage(folder).free
    if total > free:
        raise ExportError(f"{folder}: the weights need {total / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
    groups, weight_map = shards(entries, max_bytes), {}
    for number, group in enumerate(groups, 1):
        part = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
        name = f"{stem}{part}.safetensors"
        save_file({entry.name: entry.tensor() for entry in group}, folder / name, metadata={"format": "pt"})
        weight_map |= {entry.name: name for entry in group}
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_config(model: PreTrainedModel, folder: Path, dtype: torch.dtype | None) -> None:
    """config.json, with `dtype` (None: as it is) in the config and its sub-configs.

    Of a model that is a part of its checkpoint (an Omni's thinker) it is the whole one's, with its own inside, as vLLM
    and the class of the whole want it.
    """
    config: Any = copy.deepcopy(model.config)
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {})):
        if dtype is not None and part is not None:
            part.dtype = dtype
    # `fully_shard` puts an FSDP class of its own in front of the model's
    config.architectures = [next(c.__name__ for c in type(model).__mro__ if not c.__name__.startswith("FSDP"))]
    config.save_pretrained(str(folder))
    path = folder / "config.json"
    whole = whole_around(model, json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def write_merged(
    family: AudioFamily, folder: Path, dtype: torch.dtype | None = None, max_shard_bytes: int | None = None, *,
    state: Mapping[str, torch.Tensor] | None = None,
) -> None:  # fmt: skip
    """Weights, config, generation config, processor with chat template, and the base's companions, unverified.

    `state` are the whole weights of a model without adapter that is held in shards.
    """
    model = family.model
    entries = merged_entries(model, dtype) if state is None else published_entries(model, state, dtype)
    base = base_folder(model)  # a model made in memory has none
    if base is not None:
        entries += carried_over(base, entries)
    write_shards(entries, folder, max_shard_bytes)
    write_config(model, folder, dtype)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(str(folder))
    save_processor(family, folder)
    for source in sorted(base.iterdir()) if base is not None else ():  # vocoder, licence, ...: what was not written
        target = folder / source.name
        weights = source.is_file() and any(source.match(pattern) for pattern in WEIGHT_FILES)
        own = weights or source.name == family.adapter_folder or any(source.match(name) for name in KEPT_BACK)
        if not (own or target.exists()):
            shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)


def save_processor(family: AudioFamily, folder: Path) -> None:
    """The processor with the chat template that training used, which may be the family's own."""
    processor = family.processor
    before = getattr(processor, "chat_template", None)
    try:
        processor.chat_template = family.chat_template or before or getattr(family.tokenizer, "chat_template", None)
        processor.save_pretrained(str(folder))
    finally:
        processor.chat_template = before
