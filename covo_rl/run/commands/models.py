"""`covo-rl models`: the families and shipped checkpoints; `covo-rl models PATH`: what a folder is, by its files alone.

Weights are never loaded: their names, shapes and precision stand in the heads of the safetensors files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from covo_rl.config import AdapterConfig
from covo_rl.data.files import read_record
from covo_rl.models.builtin import resolve_model
from covo_rl.records.console import console, summary_table
from covo_rl.records.folder import BEGUN
from covo_rl.resolve import BUILTIN, folders
from covo_rl.types import UserError, user_errors, visible

Rows = list[tuple[str, Any]]
#: of each of these a model folder has one
TEXT_FILES = (("tokenizer.json", "tokenizer.model", "vocab.json"), ("tokenizer_config.json",),
              ("processor_config.json", "preprocessor_config.json"))  # fmt: skip


class DamagedModel(UserError, ValueError):
    """Files are missing, or cut short."""


def models_command(
    path: Annotated[str | None, typer.Argument(help="model, adapter or run folder, hub name, builtin:tiny")] = None,
) -> None:
    """List what there is, or say what PATH is: family, parameters, what would train, missing files."""
    with user_errors("covo-rl models", code=1):
        if path is None:
            _list()
            return
        folder = Path(resolve_model(path))
        if (folder / "adapter_config.json").is_file():
            title, rows, problems = "a PEFT adapter", *_adapter(folder)
        elif all((folder / name).is_file() for name in BEGUN):
            title, rows, problems = "a run", *_run(folder)
        else:
            title, rows, problems = "a model", *_model(str(folder))
        console.print(summary_table(f"{visible(path)}: {title}", rows))
        if problems:
            raise DamagedModel("\n  - ".join([f"{path} cannot be used as it is:", *problems]))


def _list() -> None:
    from covo_rl.models import FAMILIES
    from covo_rl.run.doctor import PUBLISHED

    known = {kind: [name for name, (model_type, _) in PUBLISHED.items() if model_type == kind] for kind in FAMILIES}
    console.print(summary_table("families, by model_type of config.json",
                                [(kind, ", ".join(names) or "-") for kind, names in known.items()]))  # fmt: skip
    shipped = {path.parent.name: place for place, folder in reversed(folders("checkpoints"))
               for path in folder.glob("*/config.json")}  # fmt: skip
    rows = [(f"{BUILTIN}{name}", place) for name, place in sorted(shipped.items())]
    console.print(summary_table("shipped checkpoints", rows))
    console.print("covo-rl models PATH says what a folder is; another family is one class: docs/architecture.md")


def _model(folder: str) -> tuple[Rows, list[str]]:
    from covo_rl.models import damage_named, family_class
    from covo_rl.run.doctor import shape_of, sizes_of

    with damage_named(folder):
        config = sizes_of(folder)
        family = family_class(config.model_type)
        shape, full = shape_of(config, AdapterConfig()), shape_of(config, AdapterConfig(lora=False))
    longest = family.max_clip_seconds
    rows: Rows = [
        ("family", f"{config.model_type} ({family.__module__})"),
        ("parameters", f"{shape.total:,}: "
                       + ", ".join(f"{part} {count:,}" for part, count in shape.parameters.items() if count)),
        ("decoder", f"{shape.layers} layers, {shape.width} wide, {shape.vocabulary:,} tokens"),
        ("clips", f"up to {longest:g} s" if longest else "of any length"),
        ("LoRA trains", f"{shape.trainable:,} at rank {AdapterConfig.lora_r}, {shape.trainable / shape.total:.2%}"),
        ("--full trains", f"{full.trainable:,}: {', '.join(AdapterConfig().train_parts)}"),
    ]  # fmt: skip
    if not Path(folder).is_dir():
        return [*rows, ("weights", "not on this disk: not looked at")], []
    weights, problems = _weights(Path(folder))
    wording = (Path(folder) / "prompt.yaml").is_file()
    rows += [*weights, ("wording", "its prompt.yaml" if wording else "none of its own: the options say it")]
    missing = [" or ".join(names) for names in TEXT_FILES if not any((Path(folder) / name).is_file() for name in names)]
    return rows, [*problems, *(f"{names} is missing" for names in missing)]


def _weights(folder: Path) -> tuple[Rows, list[str]]:
    """What lies in the safetensors files of a folder, and what is missing or cut."""
    files, problems = _weight_files(folder), []
    there = [path for path in files if path.is_file()]
    problems += [f"{path.name} is missing" for path in files if not path.is_file()]
    counts: Counter[str] = Counter()
    tensors = 0
    for path in there:
        try:
            for shape, dtype in _heads(path):
                size = 1
                for length in shape:
                    size *= length
                counts[dtype] += size
                tensors += 1
        except DamagedModel as error:
            problems.append(str(error))
    if not files:
        others = len(list(folder.glob("*.bin")))
        return ([("weights", f"{others} .bin files: not looked into")], []) if others else (
            [], ["it has no weights: no *.safetensors"])  # fmt: skip
    held = ", ".join(f"{count:,} in {dtype}" for dtype, count in counts.most_common())
    size = sum(path.stat().st_size for path in there) / 1e6
    return [("weights", f"{tensors} tensors, {held}; {len(there)} of {len(files)} files, {size:,.1f} MB")], problems


def _weight_files(folder: Path) -> list[Path]:
    """The files that the index names, or those that are there."""
    named = read_record(folder / "model.safetensors.index.json").get("weight_map")
    if isinstance(named, Mapping):
        return [folder / str(name) for name in sorted(set(map(str, named.values())))]
    return sorted(folder.glob("*.safetensors"))


def _heads(path: Path) -> Iterator[tuple[list[int], str]]:
    """Shape and dtype of every tensor.

    Raises:
        DamagedModel: the file is cut, or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                part = file.get_slice(name)
                yield part.get_shape(), part.get_dtype()
    except (SafetensorError, OSError) as error:
        raise DamagedModel(f"{path.name} cannot be read ({visible(error)}): is the download complete?") from error


def _adapter(folder: Path) -> tuple[Rows, list[str]]:
    record = read_record(folder / "adapter_config.json")
    weights, problems = _weights(folder)
    base, wording = record.get("base_model_name_or_path"), (folder / "prompt.yaml").is_file()
    targets = record.get("target_modules")
    rows = [
        ("base model", base or "not recorded"),
        ("kind", f"{record.get('peft_type', '?')}, rank {record.get('r', '?')}, alpha {record.get('lora_alpha', '?')}"),
        ("on", ", ".join(sorted(map(str, targets))) if isinstance(targets, list) else targets or "?"),
        *weights,
        ("wording", "its prompt.yaml" if wording else "none of its own: the options say it"),
        ("use", f"covo-rl generate --model {base or 'BASE'} --adapter {folder} --audio CLIP --question TEXT"),
    ]
    return rows, problems


def _run(folder: Path) -> tuple[Rows, list[str]]:
    from covo_rl.records.follow import RunFollower

    run = RunFollower(folder)
    run.read()
    exported = [path for path in (folder / "adapter", folder / "model") if path.is_dir()]
    rows = [
        ("model", run.config.get("model", "?")),
        ("state", f"{run.status}, step {run.step} of {run.total or '?'}"),
        ("exported", ", ".join(map(str, exported)) or f"nothing yet: covo-rl export {folder} --adapter DIR"),
        ("see", f"covo-rl watch {folder}, covo-rl report {folder}"),
    ]
    return rows, run.notes
