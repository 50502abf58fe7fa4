"""A whole pre-training: rows and model checked, updates, checkpoints, and a folder that loads as a model."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from transformers import set_seed

from covo_rl import models
from covo_rl.config import ConfigError
from covo_rl.data.files import append_lines, json_line, whole_lines, write_atomically, write_json
from covo_rl.data.noise import quiet
from covo_rl.data.read import DataError
from covo_rl.data.terminal import say
from covo_rl.export.exporting import torch_dtype
from covo_rl.export.merged import write_merged
from covo_rl.models.base import AudioFamily
from covo_rl.models.builtin import resolve_model
from covo_rl.policy.products import HALF
from covo_rl.policy.sharding import reshard, whole
from covo_rl.policy.trainable import training_dtype
from covo_rl.prompt import position_limit
from covo_rl.records.console import ProgressDisplay
from covo_rl.records.lock import FolderLock
from covo_rl.supervised.pretrain.config import PretrainConfig
from covo_rl.supervised.pretrain.distill import Distiller
from covo_rl.supervised.pretrain.distill_options import distill_options
from covo_rl.supervised.pretrain.document import Vocabulary
from covo_rl.supervised.pretrain.packing import PackedBatch
from covo_rl.supervised.pretrain.stages import planned_tasks
from covo_rl.supervised.pretrain.state import PretrainCheckpoints
from covo_rl.supervised.pretrain.stream import PackedStream
from covo_rl.supervised.pretrain.tasks import BuildOptions
from covo_rl.supervised.pretrain.trainer import PretrainTrainer
from covo_rl.train.guard import StoppedBySignal, StopSignals
from covo_rl.train.launch import allow_tf32, computes_in_16_bits, join
from covo_rl.train.ranks import Ranks
from covo_rl.types import UserError

OPTIONS, METRICS, RESULT = "pretrain.yaml", "metrics.jsonl", "result.json"
#: what tells that a folder holds a model, or a run
OWN = (OPTIONS, "config.json", "*.safetensors", "*.safetensors.index.json", METRICS, RESULT, "checkpoints", "abandoned")
TAKEN = (*OWN, "config.yaml", "run.json", "cold_start.yaml")
#: seed of held-out rows beside that of the run's
EVAL_SEED = 1


class FrozenChangedError(UserError, RuntimeError):
    """Weights that were to stay as they are have changed."""


def run_pretraining(config: PretrainConfig) -> Path:
    """Train in `config.output`, or go on there with `resume`; returns that folder, which then is a model's.

    Raises:
        ConfigError: the folder is taken or in use; tasks without rows; a resume with other options, or of nothing.
        DataError: every problem of every row.
        DivergedError: a loss that is not finite.
        StoppedBySignal: after a checkpoint.
    """
    quiet()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise ConfigError(["pre-training never ran under DeepSpeed: launch with recipes/accelerate/fsdp2.yaml"])
    accelerator = join_in(config.autocast)
    with own_folder(config):
        set_seed(config.seed)
        return _pretrain(config, accelerator)


def join_in(autocast: str) -> Accelerator:
    """The accelerator; products in bfloat16 where `autocast` says so, or where the launcher does."""
    wanted = autocast == "bf16" or (autocast == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported())
    if autocast == "no":
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    elif wanted and os.environ.get("ACCELERATE_MIXED_PRECISION", "no") == "no":
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    return join()


@contextmanager
def own_folder(config: PretrainConfig) -> Iterator[None]:
    """`config.output` as this training's alone; a dry run leaves it alone and says what a start would meet."""
    ranks, lock = Ranks.current(), FolderLock(config.output)
    problem = ranks.from_main((output_problem(config) or lock.refusal()) if ranks.main else None)
    if config.dry_run:
        _say(f"a start would be refused: {problem}" if problem else f"to {config.output}")
        yield
        return
    if problem := problem or ranks.from_main(lock.hold() if ranks.main else None):
        raise ConfigError([problem])
    try:
        yield
    finally:
        lock.release()


def output_problem(config: PretrainConfig) -> str | None:
    """Why the training may not write to its folder, or None."""
    folder = Path(config.output)
    own = (folder / OPTIONS).is_file()
    if config.resume:
        return None if own else f"resume: {folder} holds no pre-training ({OPTIONS})"
    there = [path.name for name in TAKEN for path in sorted(folder.glob(name))]
    if not there or (config.overwrite and own):
        return None
    whose = "an earlier pre-training" if own else "something else"
    advice = ", --resume, or --overwrite" if own else ""
    return f"{folder} holds {whose} ({', '.join(there[:5])}): choose another --output{advice}"


def _pretrain(config: PretrainConfig, accelerator: Accelerator) -> Path:
    ranks = Ranks.current()
    tasks = planned_tasks(config)
    held_out = planned_tasks(config, "eval_tasks") if config.eval_tasks else {}
    family = load_model(config)
    vocabulary = Vocabulary.of(family)
    _say(f"reading the rows of {', '.join(tasks)}")
    shared: dict[str, Any] = {
        "length": config.length, "pad_id": family.pad_token_id, "extractor": family.processor.feature_extractor,
        "options": BuildOptions(config.sentence_share, config.content, config.query, config.text_loss),  # pyright: ignore
        "tokenizer": config.tokenizer, "batch_size": config.batch_size, "ranks": (ranks.rank, ranks.world),
    }  # fmt: skip
    stream = PackedStream(tasks, vocabulary, seed=config.seed, workers=config.workers, **shared)
    held = PackedStream(held_out, vocabulary, seed=config.seed + EVAL_SEED, **shared) if held_out else None
    for line in (*stream.unnamed_speakers(), *stream.padded_replies()):
        _say(line)
    if config.check_recordings:
        own = [problem for rows in (stream, held) if rows for problem in rows.heard_problems(ranks.rank, ranks.world)]
        if problems := ranks.joined(own):
            raise DataError("the recordings of the tasks", problems)
    family.model.to(accelerator.device)
    distiller = None
    if config.distill is not None:
        distiller = Distiller(distill_options(config.distill, []), family, accelerator, seed=config.seed)
    trainer = PretrainTrainer(config, family, stream, accelerator, distiller)
    allow_tf32(accelerator.device, computes_in_16_bits(accelerator, family.model), family.model)
    for part, count in trainer.trained.items():
        _say(f"trains: {part}, {count / 1e6:.2f} M parameters")
    _say(
        f"frozen: {', '.join(trainer.frozen) or 'nothing'}; {trainer.rows_an_update} rows of {config.length} an update"
    )
    if config.dry_run:
        row = next(stream.rows())
        _say(f"the first row: {len(row.documents)} documents, {row.tokens} of {row.length} ids")
        _say("dry run: options, rows and model are fine; nothing was trained or written")
        return Path(config.output)
    return _train(config, trainer, _held_out_batches(config, held, ranks))


def load_model(config: PretrainConfig) -> AudioFamily:
    """The model to start from, in a dtype that trains.

    Raises:
        ConfigError: it lies in the output folder, or has fewer positions than a row.
        ModelError, OSError: it does not load.
    """
    path = resolve_model(str(config.model))
    if Path(path).resolve() == Path(config.output).resolve():
        raise ConfigError([f"output {config.output} is the model that the training starts from: choose another"])
    dtype, notes = training_dtype(config.dtype, path, full=True)
    for note in notes:
        _say(note)
    family = models.load_family(path, dtype=dtype)
    limit = position_limit(family.model.config)
    if limit is not None and config.length > limit:
        raise ConfigError([f"length {config.length}: the model has {limit} positions"])
    if any(parameter.dtype in HALF for parameter in family.model.parameters()):
        _say(f"dtype {config.dtype}: updates below 1/256 of a weight are lost; auto or float32 keeps them")
    return family


def _held_out_batches(config: PretrainConfig, held: PackedStream | None, ranks: Ranks) -> list[PackedBatch]:
    """The same `eval_rows` rows (rounded up to whole batches of all ranks) at every measurement."""
    if held is None:
        return []
    return [held.next_batch() for _ in range(math.ceil(config.eval_rows / (config.batch_size * ranks.world)))]


# -- the updates -------------------------------------------------------------------------------------------------------


def _train(config: PretrainConfig, trainer: PretrainTrainer, held_out: list[PackedBatch]) -> Path:
    """All updates that are left, with a checkpoint at the end, and the model."""
    folder, ranks = Path(config.output), trainer.ranks
    with StopSignals() as stop:
        checkpoints = PretrainCheckpoints(config, stop)
        if config.resume:
            for note in checkpoints.resume(trainer):
                _say(note)
        elif ranks.main:
            _clear(folder)
        if ranks.main:
            text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
            write_atomically(folder / OPTIONS, lambda file: file.write(text))
        try:
            with ProgressDisplay("pretrain", config.steps, done=trainer.step, active=ranks.main) as display:
                while trainer.step < config.steps:
                    line = _one_update(config, trainer, held_out)
                    if ranks.main:
                        append_lines(folder / METRICS, [json_line(line)])
                    display.update(trainer.step, f"loss {line['loss']:.3f}" if line["taught"] else "no label")
                    checkpoints.after_update(trainer)
        except StoppedBySignal as stopped:
            _say(f"stopped by {stopped.signal} after saving {stopped.saved}; continue with --resume")
            raise
        finally:
            trainer.stream.close()
        if checkpoints.saved_step != trainer.step:
            checkpoints.save(trainer)
    return _finish(config, trainer, held_out)


def _one_update(config: PretrainConfig, trainer: PretrainTrainer, held_out: list[PackedBatch]) -> dict[str, Any]:
    """An update, measured on held-out rows where that is due, and what the stream says so far."""
    begun = time.perf_counter()
    batches = trainer.ranks.together(trainer.next_batches, UserError)
    waited = time.perf_counter() - begun
    line = trainer.update(batches)
    seconds = time.perf_counter() - begun
    line |= {"seconds": seconds, "data_seconds": waited, "tokens_per_second": line["tokens"] / seconds}
    drawn = trainer.stream.report()["tasks"]
    line |= {f"drawn/{name}": task["tokens"] for name, task in drawn.items()}
    skipped = {name: {why: found["rows"] for why, found in task["skipped"].items()}
               for name, task in drawn.items() if task["skipped"]}  # fmt: skip
    line |= {"rows_skipped": sum(count for reasons in skipped.values() for count in reasons.values())}
    line |= {"skipped": skipped} if skipped else {}
    every = config.eval_every
    if held_out and ((every and trainer.step % every == 0) or trainer.step == config.steps):
        line |= trainer.measure(held_out)
    return line


def _clear(folder: Path) -> None:
    """Take away what an earlier pre-training left, its model first: `output_problem` allowed it."""
    for name in ("config.json", *(name for name in OWN if name != "config.json")):
        for path in folder.glob(name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


# -- the end -----------------------------------------------------------------------------------------------------------


def _finish(config: PretrainConfig, trainer: PretrainTrainer, held_out: list[PackedBatch]) -> Path:
    """The model in the folder, and what came of it. Raises FrozenChangedError before anything is written."""
    folder, ranks = Path(config.output), trainer.ranks
    if changed := trainer.changed_parts():
        raise FrozenChangedError(f"{', '.join(changed)} did not train and changed all the same: the model is not saved;"
                                 f" its checkpoint is in {folder / 'checkpoints'}")  # fmt: skip
    _say(f"frozen and unchanged, bit for bit: {', '.join(trainer.frozen) or 'nothing was frozen'}")
    weights = _whole_weights(trainer)
    if ranks.main:
        save_model(trainer.family, folder, config.save_dtype, weights)
        lines = whole_lines(folder / METRICS)[0]
        taught = [line for line in lines if line["taught"]] or lines
        write_json(folder / RESULT, {
            "steps": trainer.step, "stage": config.stage, "seconds": sum(line["seconds"] for line in lines),
            "first": _losses(taught[0]), "last": {**_losses(taught[-1]), **_losses(lines[-1])},
            "updates_without_a_label": sum(not line["taught"] for line in lines), "trained": trainer.trained,
            "frozen": trainer.frozen, "stream": trainer.stream.report(),
        })  # fmt: skip
    ranks.wait()
    _say(f"model: {folder}")
    return folder


def _losses(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name.removeprefix("eval_").startswith("loss")}


def _whole_weights(trainer: PretrainTrainer) -> dict[str, torch.Tensor] | None:
    """The weights by name, gathered on the main rank, where they are in shards; a collective."""
    if not trainer.policy.sharded:
        return None
    reshard(trainer.policy)
    gathered = {}
    for name, tensor in trainer.family.model.state_dict().items():
        full = whole(tensor)
        if trainer.ranks.main:
            gathered[name] = full.cpu()
    return gathered


def save_model(family: AudioFamily, folder: Path, save_dtype: str, weights: dict[str, torch.Tensor] | None) -> None:
    """A folder that loads: written beside it, then moved in file by file, `config.json` last."""
    partial = folder / ".partial-model"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dtype = torch_dtype(save_dtype) or next(family.model.parameters()).dtype
    write_merged(family, partial, dtype, state=weights)
    for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    partial.rmdir()


def _say(line: str) -> None:
    if Ranks.current().main:
        say(line)
