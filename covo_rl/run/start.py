"""May a run start, or go on, in its folder? Asked before a model is loaded, which changes nothing; then it owns it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from covo_rl.config import ConfigError, Options
from covo_rl.data.files import plain
from covo_rl.records.folder import Run, environment
from covo_rl.rewards import Component, RewardError
from covo_rl.rewards.judging import template_hashes
from covo_rl.train.checkpoint import CheckpointError, CheckpointStore
from covo_rl.train.checkpoint.identity import (
    base_fingerprint,
    check_changes,
    data_fingerprint,
    differences,
    reward_fingerprint,
)
from covo_rl.train.checkpoint.manifest import damage
from covo_rl.train.checkpoint.store import read_values
from covo_rl.train.checkpoint.timeline import ASIDE, PLAN
from covo_rl.types import Example


class RunFinished(SystemExit):
    """`--resume` of a run that has nothing left to do: exit code 0, and its folder as it was."""

    def __init__(self) -> None:
        super().__init__(0)


@dataclass(frozen=True)
class Start:
    """What `look_at` saw: what stands in the way, what is worth saying, whether nothing is left to do, and what the
    checkpoint that is taken up says about its run (None without one)."""

    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    finished: bool = False
    saved: Mapping[str, Any] | None = None

    def changes(self, options: Options, rows: Sequence[Example], policy: nn.Module) -> list[str]:
        """What is wrong where other rows or another base model train than in the checkpoint, known once both are
        loaded."""
        if self.saved is None:
            return []
        now = {"config": self.saved["config"], "data": data_fingerprint(rows), "base": base_fingerprint(policy)}
        return _refused(self.saved, now, options)


def continues(run: Run, options: Options) -> bool:
    """Whether --resume goes on with the run in this folder, and not from a checkpoint that lies elsewhere."""
    source = options.train.resume
    return source == "auto" or bool(source and Path(source).resolve().is_relative_to(run.folder.resolve()))


def look_at(run: Run, options: Options, world: int) -> Start:
    """The folder of `run` before a start with `options` on `world` ranks; reads, and changes nothing."""
    train, store = options.train, CheckpointStore(run.folder / "checkpoints")
    if train.resume not in (None, "auto") and not Path(train.resume).is_dir():
        there = ", ".join(map(str, store.all())) or "no checkpoints"
        return Start((f"--resume {train.resume}: no such folder; there are {there}",))
    if occupied := run.lock.refusal() or run.refusal(overwrite=train.overwrite or continues(run, options)):
        return Start(notes=(f"a start would be refused: {occupied}",)) if train.dry_run else Start((occupied,))
    interrupted = any((run.folder / ASIDE).glob(f"*/{PLAN}"))  # the checkpoints are in motion: resuming sorts them out
    if not train.resume or interrupted:
        return Start()
    try:
        path, faults = store.latest_valid() if train.resume == "auto" else (Path(train.resume), [])
        if path is None:
            return Start((f"no checkpoint under {store.folder} is complete: {'; '.join(faults)}",) if faults else ())
        if train.resume != "auto" and (faults := damage(path)):
            return Start((f"{path} is not a complete checkpoint: {'; '.join(faults)}",))
        about = store.about(path, world)
        state, rewards = read_values(path / "state.json"), reward_fingerprint(options.reward.rewards)
    except (CheckpointError, RewardError) as error:
        return Start((f"--resume {train.resume}: {error}",))
    saved = {name: state.get(name) for name in ("config", "data", "rewards", "base")} | {"update": about["update"]}
    now = {"config": plain(options.flat()), "data": saved["data"], "rewards": rewards}
    problems = _refused(saved, now, options)
    here = path.resolve().parent == store.folder.resolve()
    logged = run.metrics_path.stat().st_size if run.metrics_path.is_file() else 0
    if here and logged < state["metrics_bytes"]:
        what = f"{run.metrics_path} has {logged} bytes, but had {state['metrics_bytes']} when {path.name} was saved"
        problems = [*problems, f"{what}: put it back, or choose another --output"]
    if not problems and here and about["step"] >= train.max_steps and (run.folder / "result.json").is_file():
        note = (f"{run.folder} holds this run, finished: nothing to do. `covo-rl eval` evaluates it on other rows, a "
                "larger --max-steps with --allow_changed_config trains on")  # fmt: skip
        return Start(notes=(note,), finished=True)
    return Start(tuple(problems), saved=saved)


def _refused(saved: Mapping[str, Any], now: Mapping[str, Any], options: Options) -> list[str]:
    """What `now` changes that a resume may not change."""
    try:
        allowed, mid_batch = options.train.allow_changed_config, bool(saved["update"])
        check_changes(differences(saved, now)[0], allowed=allowed, mid_batch=mid_batch)
    except ConfigError as error:
        return error.problems
    return []


def own(run: Run, options: Options, files: Mapping[str, Path]) -> str | None:
    """Lock the folder, make room where --overwrite says so, write environment.json with the hashes of `files` and
    config.yaml; returns what went wrong, or None."""
    train, record = options.train, environment(files)
    if options.reward.judge:
        record["judge_templates"] = template_hashes()
    if why := run.lock.hold() or run.refusal(overwrite=train.overwrite or continues(run, options)):
        run.lock.release()
        return why
    try:
        run.sweep()
        if train.overwrite:
            run.clear()
        run.write_json("environment.json", record)
        run.write_config(options.flat())
    except OSError as error:
        run.lock.release()
        return f"{run.folder} cannot be written: {error}"
    return None


def summary_rows(
    options: Options, rewards: Sequence[Component], model_type: str, place: str, rows: Mapping[str, str]
) -> list[tuple[str, Any]]:
    """The lines of the table that a run starts with."""
    train, rollout, reward = options.train, options.rollout, options.reward
    terms = " + ".join(f"{'' if term.weight == 1 else f'{term.weight:g} '}R_{term.name}" for term in rewards)
    gate = "" if reward.reward_gate == "none" else f", gated by {reward.reward_gate}"
    return [
        ("model", f"{options.model.model} ({model_type})"),
        ("device", place),
        *rows.items(),
        ("step", f"{train.prompts_per_step} prompts x {rollout.num_generations} rollouts, {train.max_steps} steps"),
        ("R_total", terms + gate),
        ("judge", reward.judge or "none: deterministic checkers"),
        ("loss", f"{options.loss.loss_type}, beta {options.loss.beta:g}, lr {train.learning_rate:g}"),
        ("seed", train.seed),
        ("run folder", train.output),
    ]
