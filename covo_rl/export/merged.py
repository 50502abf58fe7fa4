"""Merged weights under their published names, written shard by shard.

Only one shard of merged tensors exists beside the model at any time.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from covo_rl.export import ExportError
from covo_rl.models.base import AudioFamily
from covo_rl.models.weights import ADAPTER_FILES
from covo_rl.policy.entries import Entry, entry_of, merged_entries, published_entries, shards
from covo_rl.policy.published import TWICE, base_folder, whole_around

#: the LoRA that a checkpoint ships, and the second copy of its weights in Mistral's own format
NOT_CARRIED = (ADAPTER_FILES, "consolidated")
#: of a base that is kept back: its card, a template that would hide the exported one (transformers prefers the older
#: chat_template.json), and what supervised stages leave beside a checkpoint
KEPT_BACK = (".*", "README.md", "chat_template.json", "stage-*", "training_log.json", f"{ADAPTER_FILES}*",
             "pretrain.yaml", "metrics.jsonl", "result.json", "checkpoints", "abandoned", "lock.json")  # fmt: skip
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.index.json", "*.pth", "*.gguf")

# -- tensors -----------------------------------------------------------------------------------------------------


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
