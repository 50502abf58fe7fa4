"""May a run start, or go on, in its folder? Asked before a model is loaded, which changes nothing; then it owns it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from covo_rl.config import Options
from covo_rl.data.files import plain
from covo_rl.records.folder import Run, environment
from covo_rl.rewards.judging import template_hashes
from covo_rl.train.checkpoint import CheckpointError, CheckpointStore
from covo_rl.train.checkpoint.saver import data_fingerprint, differences
from covo_rl.train.checkpoint.store import damage, read_values
from covo_rl.types import Example


class RunFinished(SystemExit):
    """`--resume` of a run that has nothing left to do: exit code 0, and its folder as it was."""

    def __init__(self) -> None:
        super().__init__(0)


@dataclass(frozen=True)
class Start:
    """What `look_at` saw: what stands in the way, what is worth saying, whether nothing is left to do, and the
    fingerprint of the training rows in the checkpoint that is taken up (None: no checkpoint, or any rows will do)."""

    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    finished: bool = False
    data: Mapping[str, Any] | None = None

    def changed_data(self, rows: Sequence[Example]) -> list[str]:
        """What is wrong where other rows train than those of the checkpoint."""
        if self.data is None:
            return []
        return _serious({"config": {}, "data": self.data}, {"config": {}, "data": data_fingerprint(rows)})


def continues(run: Run, options: Options) -> bool:
    """Whether --resume goes on with the run in this folder, and not from a checkpoint that lies elsewhere."""
    source = options.train.resume
    return source == "auto" or bool(source and Path(source).resolve().is_relative_to(run.folder.resolve()))


def look_at(run: Run, options: Options) -> Start:
    """The folder of `run` before a start with `options`; reads, and changes nothing."""
    train, store = options.train, CheckpointStore(run.folder / "checkpoints")
    if train.resume not in (None, "auto") and not Path(train.resume).is_dir():
        there = ", ".join(map(str, store.all())) or "no checkpoints"
        return Start((f"--resume {train.resume}: no such folder; there are {there}",))
    if occupied := run.lock.refusal() or run.refusal(overwrite=train.overwrite or continues(run, options)):
        return Start(notes=(f"a start would be refused: {occupied}",)) if train.dry_run else Start((occupied,))
    if not train.resume:
        return Start()
    try:
        path = store.latest_valid()[0] if train.resume == "auto" else Path(train.resume)
        if path is None:
            return Start()
        if train.resume != "auto" and (faults := damage(path)):
            return Start((f"{path} is not a complete checkpoint: {'; '.join(faults)}",))
        saved = read_values(path / "state.json")
    except CheckpointError as error:
        return Start((str(error),))
    if train.allow_changed_config:
        problems = []
    else:
        problems = _serious(saved, {"config": plain(options.flat()), "data": saved["data"]})
    if not problems and saved["trainer"]["step"] >= train.max_steps and (run.folder / "result.json").is_file():
        note = (f"{run.folder} holds this run, finished: nothing to do. `covo-rl eval` evaluates it on other rows, a "
                "larger --max-steps with --allow_changed_config trains on")  # fmt: skip
        return Start(notes=(note,), finished=True)
    return Start(tuple(problems), data=None if train.allow_changed_config else saved["data"])


def _serious(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What `now` changes about the training, and what to do about it; both hold `config` and `data`."""
    serious, _ = differences(saved, now)
    advice = "the run differs from its checkpoint: undo that, choose another --output, or pass --allow_changed_config"
    return [*serious, advice] if serious else []


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
        (run.folder / "result.json").unlink(missing_ok=True)  # of a finished run that trains on
        run.write_json("environment.json", record)
        run.write_config(options.flat())
    except OSError as error:
        run.lock.release()
        return f"{run.folder} cannot be written: {error}"
    return None
