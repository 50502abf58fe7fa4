"""Write an export to a temporary folder, verify it in a fresh process, and only then give it its name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from dataclasses import replace as replaced
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError

from covo_rl.audio import ClipStore
from covo_rl.config import PromptConfig
from covo_rl.export import ExportError, verify
from covo_rl.export.adapter import open_policy, policy_kind, save_policy
from covo_rl.export.card import update_card
from covo_rl.export.merged import write_merged
from covo_rl.export.questions import stock_class
from covo_rl.models.processor import AudioProcessor
from covo_rl.models.weights import shipped_adapter
from covo_rl.policy.published_adapter import base_reference
from covo_rl.policy.sharding import is_sharded, torch_linear
from covo_rl.policy.trainable import Trainable
from covo_rl.records.folder import export_files
from covo_rl.train.checkpoint import CheckpointStore
from covo_rl.train.ranks import Ranks
from covo_rl.types import Prompt, UserError

#: a failed check, a full disk, a checking process that hangs
NOT_WRITTEN = (UserError, OSError, SafetensorError, subprocess.TimeoutExpired)


def torch_dtype(name: str | None) -> torch.dtype | None:
    """`bfloat16` -> torch.bfloat16; None and `auto` mean: as it is.

    Raises:
        ExportError: another name.
    """
    if name in (None, "auto"):
        return None
    if name not in verify.FLAT_TOLERANCE:
        raise ExportError(f"dtype {name!r}: there are auto, {', '.join(verify.FLAT_TOLERANCE)}")
    return getattr(torch, name)


def export_policy(
    modes: Trainable,
    folder: str | Path,
    *,
    kind: str,
    prompts: Sequence[Prompt] | None = None,
    clips: ClipStore | None = None,
    run_folder: str | Path | None = None,
    base_model: str | None = None,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    allow_noop: bool = False,
    replace: bool = False,
    wording: PromptConfig | None = None,
    load_in_4bit: bool = False,
) -> verify.Verification:
    """Write a PEFT `adapter`, or the whole model with the adapter `merged` in, to `folder`, verified.

    Merged shards are streamed: beside the model in memory there is one shard of merged tensors. `prompts` (with their
    `clips`) are what the logits are compared on; default: two synthetic ones. `base_model` is the reference that the
    export records (default: where the base was loaded from). `dtype` is the precision of what is written (default: as
    in memory). `replace` takes the place of an existing export.

    An adapter on a 4-bit base is checked on that base, held the same way, because that is the policy that was trained;
    how it does on the base unquantised is measured beside it. `load_in_4bit` says that an adapter which is in memory
    on an unquantised base was trained on a 4-bit one.

    Raises:
        ExportError: the folder exists, the disk is full, the policy has no adapter, is sharded over ranks or, to be
            merged, is held in 4 bits, or the check failed; nothing is left at `folder`.
    """
    precision, base, held = torch_dtype(dtype), base_reference(modes), quantisation_in(modes)
    if kind == "adapter" and modes.peft_model is None:
        raise ExportError("a full-parameter policy has no adapter: export it with --merged")
    if kind == "merged" and held:
        raise ExportError("4-bit weights cannot take up an update: open the policy on its unquantised base and merge "
                          "there, as covo-rl export --merged does")  # fmt: skip
    if kind == "merged" and is_sharded(modes.family.model):
        raise ExportError("the parameters are sharded over ranks: save a checkpoint and run covo-rl export on it")
    if not prompts or clips is None:
        clips = ClipStore()
        prompts = verify.synthetic_prompts(modes.family, clips)
    in_memory = modes.family.embed_tokens.weight.dtype
    loaded_as = in_memory if precision is None or kind == "adapter" else precision
    if base and Path(base).exists() and Path(base).resolve() == Path(folder).resolve():
        raise ExportError(f"{folder} is the base model of this policy, which it needs: give another folder")
    with staging(Path(folder), replace) as stage:
        expected = verify.ask_policy(modes, prompts, clips)
        if verify.is_idle(expected) and not allow_noop:  # known without writing anything
            raise ExportError(verify.NOOP)
        if not base:
            raise ExportError("the base model was made in memory: save it to a folder and load it from there")
        if kind == "adapter":
            save_policy(modes, stage, base=base_model, dtype=precision)
        else:
            write_merged(modes.family, stage, precision, max_shard_bytes)
        start, reference = time.perf_counter(), base_model or base
        target = verify.Target(kind, kind, stage, str(loaded_as).removeprefix("torch."), held)
        published = replaced(target, name="unquantised", quantization_config=None)
        targets = [target, published] if held else [target]
        logits, notes = verify.run_fresh(modes.family, base, targets, prompts, clips)
        result = verify.compare_logits(target, expected, logits, notes, base_model=reference, allow_noop=allow_noop)
        if held:
            result.unquantised = verify.compare_unquantised(target, published, expected.trained, logits)
        result.seconds = round(time.perf_counter() - start, 2)
        if not result.ok:
            problems = "\n  - ".join(result.problems)
            raise ExportError(f"the {kind} export failed its check and was removed:\n  - {problems}")
        _describe(modes, stage, result, run_folder, wording, load_in_4bit)
    return result


def quantisation_in(modes: Trainable) -> dict[str, Any] | None:
    """The bitsandbytes options that the base in memory is held in 4 bits with, ready for JSON; None where it is not."""
    model = modes.family.model
    return model.config.quantization_config.to_dict() if getattr(model, "is_loaded_in_4bit", False) else None


export_adapter = partial(export_policy, kind="adapter")
export_merged = partial(export_policy, kind="merged")


def export_run_adapter(
    modes: Trainable,
    run_folder: str | Path,
    prompts: Sequence[Prompt],
    clips: ClipStore,
    *,
    base_model: str | None = None,
    folder: str | Path | None = None,
    wording: PromptConfig | None = None,
) -> Path:
    """The policy of a run, to `folder` (default RUN/adapter, or RUN/model in full mode), verified.

    Every rank calls it, rank 0 exports. With parameters sharded over ranks the policy is gathered first, and verified
    from its files. The random state of the run is left as it was.

    Raises:
        ExportError: on every rank: the check failed, or training changed nothing; nothing is left under the final
            name. At the end of a run it says which checkpoint holds what was trained.
    """
    run, kind = Path(run_folder), "merged" if modes.peft_model is None else "adapter"
    target = Path(folder) if folder else run / ("model" if modes.peft_model is None else "adapter")
    gathered, failure, ranks = None, None, Ranks.current()
    try:
        if is_sharded(modes.family.model):
            gathered = save_policy(modes, run / "gathered_policy", base=base_model)
    except NOT_WRITTEN as error:  # on rank 0, which alone writes
        failure = str(error)
    if ranks.main and not failure:
        try:
            with torch.random.fork_rng(devices=[]), torch_linear():
                if gathered is not None:  # in one piece, on the base it was trained on
                    modes = open_policy(gathered, base_model=base_reference(modes)).modes
                export_policy(modes, target, kind=kind, prompts=prompts, clips=clips, run_folder=run,
                              base_model=base_model, replace=True, wording=wording)  # fmt: skip
        except NOT_WRITTEN as error:
            failure = str(error)
            if policy_kind(target):  # an earlier run's export is not this policy
                shutil.rmtree(target, ignore_errors=True)
        finally:
            shutil.rmtree(run / "gathered_policy", ignore_errors=True)
    if failure and folder is None:
        failure += f"\n{remainder(run, kind, noop=verify.NOOP in failure)}"
    failure = ranks.from_main(failure)
    if failure:
        raise ExportError(failure)
    return target


def remainder(run: Path, kind: str, *, noop: bool = False) -> str:
    """What is left of a run that could not be exported, and what to do with it."""
    steps = CheckpointStore(run / "checkpoints").all()
    if not steps:
        return (f"no checkpoint lies in {run / 'checkpoints'}, so what was trained ends with this process: run again "
                "with --checkpoint-every N")  # fmt: skip
    export = f"covo-rl export {steps[-1]} --{kind} DIR{' --allow-noop' if noop else ''}"
    return (f"the run's work is not lost, {steps[-1]} holds it: `{export}` tries again, and --resume {steps[-1]} with "
            "a larger --max-steps and --allow_changed_config trains on")  # fmt: skip


def check_target(folder: Path, replace: bool) -> None:
    """Whether an export may be written to `folder`.

    Raises:
        ExportError: it exists and is not to be replaced, or is not an export and must not be.
    """
    if not folder.exists():
        return
    if not replace:
        raise ExportError(f"{folder} exists: give another folder, or --replace it")
    ours = policy_kind(folder) or (folder / "export.json").is_file()
    if not folder.is_dir() or (any(folder.iterdir()) and not ours):
        raise ExportError(f"{folder} holds no adapter and no weights, so it is not replaced: give another folder")


@contextmanager
def staging(folder: Path, replace: bool) -> Iterator[Path]:
    """A hidden folder beside `folder` that takes its name when the block ends well, and vanishes when it does not.

    Of a folder that it replaces, what no export wrote is carried over.

    Raises:
        ExportError: `folder` may not be written (`check_target`).
    """
    check_target(folder, replace)
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield stage
        os.chmod(stage, 0o755)  # mkdtemp gives 700
        if folder.exists():
            for path in {*folder.iterdir()} - {*export_files(folder)} - {folder / name for name in os.listdir(stage)}:
                shutil.copytree(path, stage / path.name) if path.is_dir() else shutil.copy2(path, stage)
            os.replace(folder, old := Path(tempfile.mkdtemp(prefix=stage.name, dir=folder.parent)))
            os.replace(stage, folder)
            shutil.rmtree(old)
        else:
            os.replace(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _describe(
    modes: Trainable, stage: Path, result: verify.Verification, run_folder: str | Path | None,
    wording: PromptConfig | None, load_in_4bit: bool,
) -> None:  # fmt: skip
    """prompt.yaml, the chat template, verification.json, the model card, and export.json, which lists the files."""
    module, name, has_code = stock_class(modes.family)
    package = module.rpartition(".")[0] if module.startswith("covo_rl") else module
    if wording is not None:
        text = yaml.safe_dump(asdict(wording), sort_keys=False, allow_unicode=True)
        (stage / "prompt.yaml").write_text(text, encoding="utf-8")
    if result.kind == "adapter" and (template := modes.family.chat_template):  # the base's processor has another
        (stage / "chat_template.jinja").write_text(template, encoding="utf-8")
    files = sorted({*os.listdir(stage), "README.md", "export.json", "verification.json"})
    held, family = quantisation_in(modes), modes.family
    shipped = shipped_adapter(base_reference(modes), family.adapter_folder)
    record = {"kind": result.kind, "base_model": result.base_model, "model_type": modes.family.model_type,
              "model_class": name, "model_module": package, "trust_remote_code": has_code,
              "load_in_4bit": load_in_4bit or held is not None,
              "quantization_config": held, "files": files,
              "stock_processor": not isinstance(family.processor, AudioProcessor),
              "shipped_adapter": (family.adapter_folder or ".") if shipped else "",
              "stock_logits_divisor": family.stock_logits_divisor}  # fmt: skip
    for file, content in (("verification.json", asdict(result)), ("export.json", record)):
        (stage / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    update_card(stage, run_folder)
