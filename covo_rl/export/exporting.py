"""Write an export to a temporary folder, verify it in a fresh process, and only then give it its name."""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from covo_rl.export.card import render
from covo_rl.export.errors import ExportError
from covo_rl.export.judge import NOOP, Target, Verification, is_idle
from covo_rl.export.policy_files import base_reference, rank, save_policy, set_dtype
from covo_rl.export.verify import expect, synthetic_prompts, verify
from covo_rl.export.weights import carried_over, copy_companions, is_sharded, merged_entries, write_shards

if TYPE_CHECKING:
    from covo_rl.audio import ClipStore
    from covo_rl.config import Options
    from covo_rl.models.base import AudioFamily
    from covo_rl.policy.modes import Modes
    from covo_rl.types import Prompt

DTYPES = ("float32", "bfloat16", "float16")


def torch_dtype(name: str | None) -> torch.dtype | None:
    """`bfloat16` -> torch.bfloat16; None and `auto` mean: as it is.

    Raises:
        ExportError: another name.
    """
    if name in (None, "auto"):
        return None
    if name not in DTYPES:
        raise ExportError(f"dtype {name!r}: there are auto, {', '.join(DTYPES)}")
    return getattr(torch, name)


def export_adapter(
    modes: Modes,
    folder: str | Path,
    *,
    prompts: Sequence[Prompt] | None = None,
    clips: ClipStore | None = None,
    run_folder: str | Path | None = None,
    base_model: str | None = None,
    dtype: str | None = None,
    allow_noop: bool = False,
    replace: bool = False,
) -> Verification:
    """Write a verified PEFT adapter to `folder`.

    `prompts` (with their `clips`) are what the logits are compared on; default: two synthetic ones. `base_model` is
    the reference that adapter_config.json records (default: where the base was loaded from). `replace` takes the
    place of an existing export.

    Raises:
        ExportError: the policy is no adapter, the folder exists, or the check failed; nothing is left at `folder`.
    """
    if modes.peft_model is None:
        raise ExportError("a full-parameter policy has no adapter: export it with --merged")
    with staging(Path(folder), replace) as stage:
        save_policy(modes, stage, base=base_model, dtype=torch_dtype(dtype))
        return _finish(modes, stage, "adapter", _base_dtype(modes), prompts, clips, run_folder, base_model, allow_noop)


def export_merged(
    modes: Modes,
    folder: str | Path,
    *,
    prompts: Sequence[Prompt] | None = None,
    clips: ClipStore | None = None,
    run_folder: str | Path | None = None,
    base_model: str | None = None,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    allow_noop: bool = False,
    replace: bool = False,
) -> Verification:
    """Write the whole model, adapter merged in, under published key names, verified, to `folder`.

    Shards are streamed: beside the model in memory there is one shard of merged tensors. Processor, generation
    config, chat template, and what lies beside the base's weights are included. Arguments as in `export_adapter`.

    Raises:
        ExportError: the folder exists, the disk is full, or the check failed; nothing is left at `folder`.
    """
    if is_sharded(modes.family.model):
        raise ExportError("the parameters are sharded over ranks: save a checkpoint and run covo-rl export on it")
    with staging(Path(folder), replace) as stage:
        kind = torch_dtype(dtype)
        write_merged(modes, stage, kind, max_shard_bytes)
        name = _base_dtype(modes) if kind is None else str(kind).removeprefix("torch.")
        return _finish(modes, stage, "merged", name, prompts, clips, run_folder, base_model, allow_noop)


def export_run_adapter(
    modes: Modes,
    family: AudioFamily,
    run_folder: str | Path,
    prompts: Sequence[Prompt],
    clips: ClipStore,
    *,
    options: Options | None = None,
    allow_noop: bool = True,
) -> Path:
    """The export at the end of a run: RUN/adapter (LoRA) or RUN/model (full). Every rank calls it, rank 0 exports.

    An untrained policy is no failure here: verification.json and the card say that it is one. With parameters
    sharded over ranks the policy is gathered first, and verified from its files.

    Raises:
        ExportError: the check failed; nothing is left under the final name.
    """
    run = Path(run_folder)
    folder = run / ("adapter" if modes.peft_model is not None else "model")
    base = _recorded_base(options)
    if is_sharded(family.model):
        gathered = save_policy(modes, run / "gathered_policy", base=base)
        if rank() == 0:
            from covo_rl.export.source import open_policy

            try:
                modes = open_policy(gathered, base_model=base_reference(modes)).modes
                _export(modes, folder, prompts, clips, run, base, allow_noop)
            finally:
                shutil.rmtree(gathered)
        return folder
    if rank() == 0:
        _export(modes, folder, prompts, clips, run, base, allow_noop)
    return folder


def _export(
    modes: Modes, folder: Path, prompts: Any, clips: Any, run: Path, base: str | None, allow_noop: bool
) -> None:
    export = export_adapter if modes.peft_model is not None else export_merged
    export(modes, folder, prompts=prompts, clips=clips, run_folder=run, base_model=base, allow_noop=allow_noop,
           replace=True)  # fmt: skip


def _recorded_base(options: Options | None) -> str | None:
    """The hub name that the user gave; a folder is recorded as where it was found."""
    name = options.model.model if options is not None else None
    return name if name and not name.startswith("builtin:") and not Path(name).is_dir() else None


def _base_dtype(modes: Modes) -> str:
    return str(modes.family.embed_tokens.weight.dtype).removeprefix("torch.")  # type: ignore[union-attr]


# -- writing -----------------------------------------------------------------------------------------------------


@contextmanager
def staging(folder: Path, replace: bool) -> Iterator[Path]:
    """A hidden folder beside `folder` that takes its name when the block ends well, and vanishes when it does not.

    Raises:
        ExportError: `folder` exists and is not to be replaced.
    """
    if folder.exists() and not replace:
        raise ExportError(f"{folder} exists: give another folder, or --replace it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield stage
        os.chmod(stage, 0o755)  # mkdtemp gives 700
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def base_folder(name: str) -> Path | None:
    """Where the base checkpoint lies on this disk: the folder itself, or the hub's cache."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json") if name else None
    return Path(cached).parent if isinstance(cached, str) else None


def write_merged(modes: Modes, folder: Path, dtype: torch.dtype | None, max_shard_bytes: int | None = None) -> None:
    """Weights, config, generation config, processor with chat template, and the base's companions, unverified."""
    family = modes.family
    entries = merged_entries(family.model, dtype)
    base = base_folder(family.model.name_or_path or "")
    if base is not None:
        entries += carried_over(base, entries)
    write_shards(entries, folder, max_shard_bytes)
    config = copy.deepcopy(family.model.config)
    if dtype is not None:
        set_dtype(config, dtype)
    config.architectures = [type(family.model).__name__]
    config.save_pretrained(str(folder))
    if family.model.generation_config is not None:
        family.model.generation_config.save_pretrained(str(folder))
    save_processor(family, folder)
    if base is not None:
        copy_companions(base, folder)


def save_processor(family: AudioFamily, folder: Path) -> None:
    """The processor with the chat template that training used, which may be the family's own."""
    processor = family.processor
    own = getattr(sys.modules[type(family).__module__], "CHAT_TEMPLATE", None)
    before = getattr(processor, "chat_template", None)
    template = own or before or getattr(family.tokenizer, "chat_template", None)
    try:
        processor.chat_template = template
        processor.save_pretrained(str(folder))
    finally:
        processor.chat_template = before


def _finish(
    modes: Modes,
    stage: Path,
    kind: str,
    dtype: str,
    prompts: Sequence[Prompt] | None,
    clips: ClipStore | None,
    run_folder: str | Path | None,
    base_model: str | None,
    allow_noop: bool,
) -> Verification:
    """Verify what lies in `stage`; write verification.json, export.json and the card, or raise."""
    if prompts is None or clips is None:
        from covo_rl.audio import ClipStore

        clips = ClipStore()
        prompts = synthetic_prompts(modes.family, clips)
    base = base_reference(modes)
    if not base:
        raise ExportError("the base model was made in memory: save it to a folder and load it from there")
    expected = expect(modes, prompts, clips)
    if is_idle(expected) and not allow_noop:  # known without a fresh process
        raise ExportError(NOOP)
    result = verify(modes, [Target(kind, kind, stage, dtype)], expected, base=base, base_model=base_model,
                    allow_noop=allow_noop)[kind]  # fmt: skip
    if not result.ok:
        raise ExportError(f"the {kind} export failed its check and was removed:\n  - " + "\n  - ".join(result.problems))
    result.write(stage)
    cls = type(modes.family.model)
    own = cls.__module__.startswith("covo_rl")
    record = {
        "kind": kind,
        "base_model": base_model or base,
        "model_type": modes.family.model_type,
        "model_class": cls.__name__,
        "model_module": cls.__module__.rsplit(".", 1)[0] if own else "transformers",
    }
    (stage / "export.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    from dataclasses import asdict

    (stage / "README.md").write_text(
        render(**record, verification=asdict(result), run_folder=run_folder), encoding="utf-8"
    )
    return result
