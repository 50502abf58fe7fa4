"""A PEFT LoRA adapter from a folder: read and checked by itself, then put on the model, every tensor at its place.

PEFT alone loads what fits and leaves out the rest; here a tensor without a place, or a place without a tensor, is an
error. LoRA with all that PEFT saves beside it: DoRA, trained copies, token deltas, biases, embeddings.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from covo_rl.models.weights import check_finite
from covo_rl.policy.patterns import PatternError
from covo_rl.resolve import BUILTIN, meant

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    from covo_rl.models.base import AudioFamily

PREFIX = "base_model.model."
FILES = ("adapter_model.safetensors", "adapter_model.bin")
#: LoRA options that change more than weights: our passes over prompt and completions do not do what they ask for
OTHER_FORWARD = ("alora_invocation_tokens", "layer_replication", "arrow_config")
#: initialisations that write into the base model, also when the adapter is loaded
REWRITES_BASE = ("pissa", "olora", "corda", "loftq")
SHOWN = 3
MISMATCH = re.compile(r"size mismatch for (\S+): .*?torch\.Size\((\[.*?\])\).*?torch\.Size\((\[.*?\])\)")


class AdapterError(PatternError):
    """A folder that is no LoRA adapter of this model; the message names file, tensors, shapes and what to do."""


@dataclass(frozen=True)
class SavedAdapter:
    """What a folder holds. `tensors`: name in the file -> tensor on the CPU; `notes`: what the user should know."""

    folder: Path
    config: LoraConfig
    tensors: Mapping[str, torch.Tensor]
    notes: tuple[str, ...]


def kind_of(name: str) -> str:
    """How an adapter holds the parameter of a PEFT model; empty for one of the base."""
    if ".lora_" in name:
        return "LoRA"
    if ".trainable_tokens_" in name:
        return "token deltas"
    return "trained copy" if ".modules_to_save." in name else ""


def largest_rank(config: LoraConfig) -> int:
    """Of all its layers: what a server must make room for."""
    return max([config.r, *(config.rank_pattern or {}).values()])


def read_adapter(folder: str | Path, *, model: str | None = None) -> SavedAdapter:
    """Read a PEFT folder, before or after the base model is loaded; `model` is the base that it will be put on.

    Raises:
        FileNotFoundError: no adapter folder.
        AdapterError: not LoRA, damaged, without weights, or with empty tensors.
        WeightsError: NaN or infinities.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        content = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
        inside = [str(path.parent) for path in sorted(folder.glob("*/adapter_config.json"))]
        hint = f"; did you mean {' or '.join(inside[:SHOWN])}?" if inside else meant(folder)
        if not inside and ((folder / "checkpoints").is_dir() or (folder / "state.json").is_file()):
            hint = f"; covo-rl export {folder} --adapter DIR makes one of a run or checkpoint"
        raise FileNotFoundError(f"{folder}: a PEFT adapter folder has an adapter_config.json; found {content}{hint}")
    config, unknown = _read_config(folder / "adapter_config.json")
    tensors, notes = _read_tensors(folder), []
    if unknown:
        fields_text = ", ".join(f"{name}={value!r}" for name, value in list(unknown.items())[:8])
        notes.append(f"adapter {folder}: this PEFT does not know, and ignores, {fields_text} of adapter_config.json")
    base = config.base_model_name_or_path
    if base and model and Path(base).name.removeprefix(BUILTIN) != Path(model).name:
        notes.append(f"adapter {folder}: it was trained on {base}, and is put on {model}")
    start = str(config.init_lora_weights)
    if start == "lora_ga" or "_niter_" in start:
        notes.append(
            f"adapter {folder}: its init_lora_weights, {start}, changed the base in a way that loading cannot repeat "
            "exactly: have PEFT save it with path_initial_model_for_weight_conversion"
        )
    if _is_idle(config, tensors):
        notes.append(f"adapter {folder}: every LoRA product is zero, so the model answers as it does without it")
    return SavedAdapter(folder, config, tensors, tuple(notes))


def _read_config(path: Path) -> tuple[LoraConfig, dict[str, Any]]:
    """The configuration, and the fields with a value that this version of PEFT does not know."""
    from peft import LoraConfig

    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{path}: expected an object of options, found {type(content).__name__}")
    if (kind := content.get("peft_type")) != "LORA":
        raise AdapterError(
            f"{path}: peft_type is {kind!r}; only LoRA can be scored, trained and exported here (also as DoRA or "
            "rsLoRA, with trained copies, token deltas and biases). Merge it into its base with PEFT "
            "(merge_and_unload) and give the result as the model"
        )
    if other := [name for name in OTHER_FORWARD if content.get(name)]:
        raise AdapterError(f"{path}: {other[0]} asks for a forward pass that is not plain LoRA; it cannot be used here")
    names = {field.name for field in fields(LoraConfig)}
    unknown = {name: value for name, value in content.items() if name not in names}
    with _by_peft(f"{path}: "):
        config = LoraConfig(**{name: value for name, value in content.items() if name in names})
    return config, {name: value for name, value in unknown.items() if value and name != "peft_version"}


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from peft.utils import load_peft_weights
    from safetensors import SafetensorError

    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        content = sorted(p.name for p in folder.iterdir())[:8]
        raise AdapterError(f"{folder}: the adapter has no weights, {' or '.join(FILES)}; found {content}")
    try:
        tensors = load_peft_weights(str(folder), device="cpu")
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, ValueError, OSError) as error:
        first = str(error).strip().split("\n", 1)[0]
        raise AdapterError(f"{file} is damaged ({file.stat().st_size:,} bytes): {first}; copy it again") from error
    if not tensors:
        raise AdapterError(f"{file} holds no tensor: the adapter was saved without its weights")
    if empty := [f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items() if not tensor.numel()]:
        raise AdapterError(
            f"{file}: {len(empty)} of {len(tensors)} tensors are empty, {empty[0]} for example, as ZeRO-3 leaves them "
            "where parameters were not gathered. Save it again from accelerator.get_state_dict(model), or export a "
            "checkpoint with covo-rl export"
        )
    check_finite(tensors.items(), str(file))
    return tensors


def _is_idle(config: LoraConfig, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether there is nothing but LoRA pairs, one matrix or the alpha of each being zero."""
    from peft.utils.other import get_pattern_key

    alphas = config.alpha_pattern or {}
    pairs: dict[str, bool] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*\.lora_(?:embedding_)?)[AB](\.weight)?", name)
        if match is None:
            return False
        module = match[1].removeprefix(PREFIX).rpartition(".")[0]
        alpha = alphas.get(get_pattern_key(list(alphas), module), config.lora_alpha)
        pairs[match[1]] = pairs.get(match[1], False) or not alpha or not tensor.any()
    return all(pairs.values())


def put_on(family: AudioFamily, adapter: SavedAdapter) -> tuple[PeftModel, tuple[str, ...]]:
    """Put the adapter on the family's model, in place, to be trained on.

    Returns the PEFT model, and the names in `family.model` of the base's own parameters that it replaced.

    Raises:
        AdapterError: tensors without a place, places without a tensor, or other shapes.
    """
    from peft.utils import set_peft_model_state_dict

    from covo_rl.policy.lora import inject

    name = family.model.name_or_path or "in memory"
    prefix = f"the adapter {adapter.folder} does not fit {family.model_type} ({name}): "
    adapter.config.inference_mode = False
    adapter.config.base_model_name_or_path = family.model.name_or_path  # another base is noted by read_adapter
    with _by_peft(prefix):
        if isinstance(pattern := adapter.config.target_modules, str):  # of a mixture of experts PEFT reads last names
            hits = [name for name, _ in family.model.named_modules() if re.fullmatch(pattern, name)]
            adapter.config.target_modules = hits or pattern
        model: Any = inject(family.model, adapter.config)
        versions = {name: p._version for name, p in family.model.named_parameters()}
        result = set_peft_model_state_dict(model, dict(adapter.tensors))
        if result.unexpected_keys:
            tensors = _at_places(family.model, adapter.tensors, result.unexpected_keys)
            result = set_peft_model_state_dict(model, tensors)
    places = {name for name, p in model.named_parameters() if p.requires_grad}
    misfits = [
        *_some("no place in the model for", result.unexpected_keys),
        *_some("the file lacks", [key for key in result.missing_keys if key in places]),
    ]
    if misfits:
        raise AdapterError(prefix + "; ".join(misfits) + ". Is it an adapter of another model?")
    replaced = [n for n, p in family.model.named_parameters() if not kind_of(n) and p._version != versions[n]]
    if str(adapter.config.init_lora_weights).split("_")[0] in REWRITES_BASE:
        replaced += [n for n, _ in family.model.named_parameters() if n.endswith(".base_layer.weight")]
    return model, tuple(dict.fromkeys(replaced))


def _at_places(
    model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], misfits: Iterable[str]
) -> dict[str, torch.Tensor]:
    """The tensors, those without a place under the names of the model in memory where they have published ones.

    PEFT 0.21 maps less than transformers does: it adds no prefix that published names lack (Qwen2-Audio's encoder).
    """
    from covo_rl.policy.lora import adapted_modules
    from covo_rl.policy.published import published_names

    paths = adapted_modules(model)
    published = published_names(model, [f"{path}.weight" for path in paths])
    places = {published[f"{path}.weight"].removesuffix(".weight"): path for path in paths}
    moved = {}
    for key in misfits:
        path, lora, leaf = key.removeprefix(PREFIX).partition(".lora_")
        if key in tensors and path in places:
            moved[key] = f"{PREFIX}{places[path]}{lora}{leaf}"
    return {moved.get(key, key): tensor for key, tensor in tensors.items()}


def _some(problem: str, names: list[str]) -> list[str]:
    """One line for all tensors with the same problem, the first few by name."""
    if not names:
        return []
    more = f" (and {len(names) - SHOWN} more)" if len(names) > SHOWN else ""
    return [f"{problem} {', '.join(names[:SHOWN])}{more}"]


@contextmanager
def _by_peft(prefix: str) -> Iterator[None]:
    """What PEFT cannot do with a configuration or its tensors, as one AdapterError."""
    try:
        yield
    except KeyError as error:
        raise AdapterError(f"{prefix}the file lacks {error.args[0]}") from error
    except (RuntimeError, ValueError, TypeError, AttributeError, ZeroDivisionError, ImportError, re.error) as error:
        hits = MISMATCH.findall(str(error))
        shapes = [f"{name} is {here} in the file, {there} in the model" for name, here, there in hits]
        more = f"; and {len(shapes) - SHOWN} more. Is it an adapter of another model?" if len(shapes) > SHOWN else ""
        text = "; ".join(shapes[:SHOWN]) + more if shapes else str(error).strip()
        raise AdapterError(prefix + text) from error
