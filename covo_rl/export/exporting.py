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
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from covo_rl.export.card import render
from covo_rl.export.errors import ExportError
from covo_rl.export.judge import NOOP, Expected, Target, Verification, is_idle
from covo_rl.export.policy_files import base_reference, rank, save_policy, set_dtype
from covo_rl.export.verify import expect, synthetic_prompts, verify
from covo_rl.export.weights import carried_over, copy_companions, is_sharded, merged_entries, write_shards
from covo_rl.train.ranks import Ranks

if TYPE_CHECKING:
    from covo_rl.audio import ClipStore
    from covo_rl.config import Options
    from covo_rl.models.base import AudioFamily
    from covo_rl.policy.trainable import Trainable
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


def export_adapter(modes: Trainable, folder: str | Path, **options: Any) -> Verification:
    """Write a verified PEFT adapter to `folder`; options as in `export_policy`."""
    return export_policy(modes, folder, "adapter", **options)


def export_merged(modes: Trainable, folder: str | Path, **options: Any) -> Verification:
    """Write the whole model, adapter merged in, under published key names; options as in `export_policy`.

    Shards are streamed: beside the model in memory there is one shard of merged tensors. Processor, generation
    config, chat template, and what lies beside the base's weights are included.
    """
    return export_policy(modes, folder, "merged", **options)


def export_policy(
    modes: Trainable,
    folder: str | Path,
    kind: str,
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
    """Write an `adapter` or `merged` weights to `folder`, verified.

    `prompts` (with their `clips`) are what the logits are compared on; default: two synthetic ones. `base_model` is
    the reference that the export records (default: where the base was loaded from). `dtype` is the precision of what
    is written (default: as in memory). `replace` takes the place of an existing export.

    Raises:
        ExportError: the folder exists, the disk is full, the policy has no adapter or is sharded over ranks, or the
            check failed; nothing is left at `folder`.
    """
    written = torch_dtype(dtype)
    if kind == "adapter" and modes.peft_model is None:
        raise ExportError("a full-parameter policy has no adapter: export it with --merged")
    if kind == "merged" and is_sharded(modes.family.model):
        raise ExportError("the parameters are sharded over ranks: save a checkpoint and run covo-rl export on it")
    if prompts is None or clips is None:
        from covo_rl.audio import ClipStore

        clips = ClipStore()
        prompts = synthetic_prompts(modes.family, clips)
    loaded_as = _base_dtype(modes) if written is None or kind == "adapter" else str(written).removeprefix("torch.")
    with staging(Path(folder), replace) as stage:
        expected = expect(modes, prompts, clips)
        if is_idle(expected) and not allow_noop:  # known without writing anything
            raise ExportError(NOOP)
        if kind == "adapter":
            save_policy(modes, stage, base=base_model, dtype=written)
        else:
            write_merged(modes, stage, written, max_shard_bytes)
        result = _verified(modes, Target(kind, kind, stage, loaded_as), expected, base_model, allow_noop)
        result.write(stage)
        _describe(modes, stage, result, run_folder)
    return result


def export_run_adapter(
    modes: Trainable,
    family: AudioFamily,
    run_folder: str | Path,
    prompts: Sequence[Prompt],
    clips: ClipStore,
    *,
    options: Options | None = None,
    allow_noop: bool = False,
    folder: str | Path | None = None,
) -> Path:
    """The policy of a run, to `folder` (default RUN/adapter, or RUN/model in full mode), verified.

    Every rank calls it, rank 0 exports. With parameters sharded over ranks the policy is gathered first, and verified
    from its files. The random state of the run is left as it was.

    Raises:
        ExportError: on every rank: the check failed, or training changed nothing and `allow_noop` is off; nothing is
            left under the final name.
    """
    run = Path(run_folder)
    target = Path(folder) if folder else run / ("adapter" if modes.peft_model is not None else "model")
    base = _recorded_base(options)
    export = export_adapter if modes.peft_model is not None else export_merged
    common = {"prompts": prompts, "clips": clips, "run_folder": run, "base_model": base, "allow_noop": allow_noop,
              "replace": True}  # fmt: skip
    gathered = save_policy(modes, run / "gathered_policy", base=base) if is_sharded(family.model) else None
    failure = None
    if rank() == 0:
        try:
            with torch.random.fork_rng(devices=[]):
                export(modes if gathered is None else _reopened(gathered, modes), target, **common)
        except (ExportError, OSError) as error:
            failure = str(error)
            shutil.rmtree(target, ignore_errors=True)  # an earlier run's export is not this policy
        finally:
            if gathered is not None:
                shutil.rmtree(gathered)
    failure = Ranks.current().from_main(failure)
    if failure:
        raise ExportError(failure)
    return target


def _reopened(folder: Path, modes: Trainable) -> Trainable:
    """The gathered policy in one piece, on the base it was trained on."""
    from covo_rl.export.source import open_policy

    return open_policy(folder, base_model=base_reference(modes)).modes


def _recorded_base(options: Options | None) -> str | None:
    """The hub name that the user gave; a folder is recorded as where it was found."""
    name = options.model.model if options is not None else None
    return name if name and not name.startswith("builtin:") and not Path(name).is_dir() else None


def _base_dtype(modes: Trainable) -> str:
    return str(modes.family.embed_tokens.weight.dtype).removeprefix("torch.")


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


def write_merged(modes: Trainable, folder: Path, dtype: torch.dtype | None, max_shard_bytes: int | None = None) -> None:
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


def _verified(
    modes: Trainable, target: Target, expected: Expected, base_model: str | None, allow_noop: bool
) -> Verification:
    """The verdict on what lies in the target's folder; raises ExportError unless it is a good one."""
    base = base_reference(modes)
    if not base:
        raise ExportError("the base model was made in memory: save it to a folder and load it from there")
    result = verify(modes, [target], expected, base=base, base_model=base_model, allow_noop=allow_noop)[target.name]
    if not result.ok:
        problems = "\n  - ".join(result.problems)
        raise ExportError(f"the {target.kind} export failed its check and was removed:\n  - {problems}")
    return result


def _describe(modes: Trainable, stage: Path, result: Verification, run_folder: str | Path | None) -> None:
    """export.json and the model card."""
    cls = type(modes.family.model)
    own = cls.__module__.startswith("covo_rl")
    record = {
        "kind": result.kind,
        "base_model": result.base_model,
        "model_type": modes.family.model_type,
        "model_class": cls.__name__,
        "model_module": cls.__module__.rsplit(".", 1)[0] if own else "transformers",
    }
    (stage / "export.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    card = render(**record, verification=asdict(result), run_folder=run_folder)
    (stage / "README.md").write_text(card, encoding="utf-8")
