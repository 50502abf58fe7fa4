"""Ties a trainer and its run folder to the checkpoints: when to save, and how to take up again.

A save happens between two optimiser updates: every n steps, every n minutes, when a signal asks for it, at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from covo_rl.config import ConfigError, Options
from covo_rl.data.files import plain
from covo_rl.models.weights import WeightsError
from covo_rl.policy.sharding import reshard
from covo_rl.records.console import console
from covo_rl.train.batch import Batch
from covo_rl.train.checkpoint import state
from covo_rl.train.checkpoint.identity import (
    check_changes,
    differences,
    run_contents,
)
from covo_rl.train.checkpoint.manifest import CheckpointError, flush
from covo_rl.train.checkpoint.store import CheckpointStore, TrainState, read_values
from covo_rl.train.checkpoint.timeline import START, finish_moving, move_aside
from covo_rl.train.guard import SIGNAL_PATIENCE, StoppedBySignal, StopSignals
from covo_rl.train.ranks import Ranks
from covo_rl.train.sampler import PromptSampler
from covo_rl.train.schedule import place_schedule
from covo_rl.types import Prompt


class Resumable(Protocol):
    """What a trainer must show. `batch` is the generated batch under way, `update_index` its finished updates."""

    step: int
    update_index: int
    batch: Batch | None
    policy: Any  # nn.Module
    optimizer: Any
    schedule: Any
    sampler: PromptSampler

    @property
    def device(self) -> torch.device: ...
    def state_dict(self) -> dict[str, Any]: ...  # JSON-ready counters and positions
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
    def prompt_of(self, example_id: str) -> Prompt: ...  # of a training row
    def settle(self, patience: float | None) -> None: ...  # before a save: wait, at most so many seconds, for rollouts


class Saver:
    """Checkpoints of one run. Every method is a collective: all ranks call it at the same point.

    A periodic save that fails (a full disk) is reported and counted, and training goes on with the last good
    checkpoint; a save that the run ends with raises. `on_saved` is called on every rank with the folder of each
    periodic checkpoint. `contents` are the main rank's `run_contents`, where they are known.
    """

    def __init__(
        self,
        options: Options,
        run_folder: str | Path,
        stop: StopSignals | None = None,
        on_saved: Callable[[Path], object] | None = None,
        contents: Mapping[str, Any] | None = None,
    ) -> None:
        train = options.train
        self.updates_per_step = train.num_iterations * train.steps_per_generation
        self.options = options
        self.config: Mapping[str, Any] = plain(options.flat())
        self.run_folder = Path(run_folder)
        self.metrics = self.run_folder / "metrics.jsonl"
        self.store = CheckpointStore(self.run_folder / "checkpoints", train.keep_last, train.keep_best)
        self.every_steps, self.every_seconds = train.checkpoint_every, train.checkpoint_minutes * 60
        self.stop = stop or StopSignals()
        self.on_saved = on_saved
        self.ranks = Ranks.current()
        self.failures = 0
        self._contents, self._shared = contents, None
        self._saved_at = time.monotonic()

    # -- when ----------------------------------------------------------------------------------------------------

    def after_update(self, trainer: Resumable) -> None:
        """Between optimiser updates of one step: only a signal or the clock saves here."""
        self._save_if(False, trainer)

    def after_step(self, trainer: Resumable, score: float | None = None) -> None:
        """After a step and its log lines."""
        due = self.every_steps and trainer.step % self.every_steps == 0
        self._save_if(bool(due) or score is not None, trainer, score)

    def finish(self, trainer: Resumable) -> Path:
        """After the last step; raises CheckpointError if it cannot be written."""
        return self._save(trainer, None)

    def stopped(self, trainer: Resumable, why: str) -> StoppedBySignal:
        """What to raise where the run cannot go on for now, after a checkpoint."""
        return StoppedBySignal(why, self._save(trainer, None, SIGNAL_PATIENCE))

    def _save_if(self, due: bool, trainer: Resumable, score: float | None = None) -> None:
        overdue = bool(self.every_seconds) and time.monotonic() - self._saved_at >= self.every_seconds
        wishes = self.ranks.gathered((self.stop.received, overdue))
        if signal := next((name for name, _ in wishes if name), None):
            raise StoppedBySignal(signal, self._save(trainer, score, SIGNAL_PATIENCE))
        if not due and not any(late for _, late in wishes):
            return
        try:
            saved = self._save(trainer, score)
        except CheckpointError as error:
            self.failures += 1
            self._saved_at = time.monotonic()
            if self.ranks.main:
                console.print(f"step {trainer.step}: {error}; training goes on", style="bold red")
        else:
            if self.on_saved:
                self.on_saved(saved)

    # -- out -----------------------------------------------------------------------------------------------------

    def _save(self, trainer: Resumable, score: float | None, patience: float | None = None) -> Path:
        """Everything that `_restore` needs, as copies, on disk."""
        trainer.settle(patience)
        main = self.ranks.main  # alone writes, and so holds, copies of what is not sharded
        reshard(trainer.policy)
        optimizer_tensors, optimizer = state.optimizer_state(trainer.optimizer, trainer.policy, keep=main)
        random, rank_tensors = state.random_state()
        rank: dict[str, Any] = {"random": random, "batch": None}
        if trainer.batch is not None and trainer.update_index:
            rank["batch"], batch_tensors = state.pack_batch(trainer.batch)
            rank_tensors |= batch_tensors
        logged = main and self.metrics.is_file()
        if logged:
            flush(self.metrics)
        shared = {
            **self._identity(trainer),
            "trainer": trainer.state_dict(),
            "optimizer": optimizer,
            "metrics_bytes": self.metrics.stat().st_size if logged else 0,
        }
        tensors = {"weights": state.weights(trainer.policy, keep=main), "optimizer": optimizer_tensors}
        saved = TrainState(trainer.step, shared, tensors, rank, rank_tensors, trainer.update_index, score)
        path = self.store.save(saved, self.ranks)
        self._saved_at = time.monotonic()
        return path

    def _identity(self, trainer: Resumable) -> dict[str, Any]:
        """What a resume must have in common with the checkpoint; every clip is read for it, once, by one rank."""
        if self._shared is None:
            if self.ranks.main and self._contents is None:
                self._contents = run_contents(self.options, trainer.sampler.examples, trainer.policy)
            self._shared = self.ranks.from_main(self._contents)
        return {"config": self.config, **self._shared}

    # -- back ----------------------------------------------------------------------------------------------------

    def resume(self, trainer: Resumable, source: str | None, *, allow_changed: bool = False) -> list[str]:
        """Take up at `auto` (the newest complete checkpoint, or the start if there is none) or at a folder.

        What is later moves to RUN/abandoned (see timeline.py), once all else has worked. Without `source`, or from
        a checkpoint of another run folder, that is everything.

        Returns:
            lines for the log: what was resumed, what was moved, and where the resume cannot be exact.

        Raises:
            ConfigError: configuration or data differ and `allow_changed` is off or no help, or a new run would write
                over one.
            CheckpointError: the checkpoint is damaged or does not fit the model, or `auto` finds damaged ones only.
        """
        self._on_main(lambda: finish_moving(self.run_folder))
        if source is None:
            unfinished = self.ranks.from_main(self._unfinished() if self.ranks.main else None)
            if unfinished:
                raise ConfigError([f"{self.run_folder} holds an unfinished run ({unfinished}): continue it with "
                                   "--resume auto, or choose another --output"])  # fmt: skip
            self._identity(trainer)  # as the rows are now, not when the first checkpoint comes
            return self._move_aside()
        path, passed_over = self.ranks.from_main(self._on_main(lambda: self.store.meant(source)))
        if path is None:
            self._identity(trainer)
            return [f"no checkpoint under {self.store.folder}: starting from the first step", *self._move_aside()]
        notes = [f"passed over {what}" for what in passed_over]
        saved = self.store.read(path, self.ranks)
        notes += self._changes(saved, trainer, allow_changed)
        self._restore(trainer, saved)
        if path.resolve().parent == self.store.folder.resolve():
            moment = [saved.step, saved.update] if saved.update else [saved.step]
            trains_on = saved.step < self.config["max_steps"]
            notes += self._move_aside(moment, saved.shared["metrics_bytes"], trains_on)
        else:
            notes += self._move_aside()
        where = f", update {saved.update}" if saved.update else ""
        return [f"resumed from {path} (step {saved.step}{where})", *notes]

    def _restore(self, trainer: Resumable, saved: TrainState) -> None:
        """Put a loaded state into a trainer that was built from the same options."""
        tensors, shared = saved.tensors, saved.shared

        def load() -> None:
            state.load_weights(trainer.policy, tensors["weights"])
            state.load_optimizer_state(trainer.optimizer, trainer.policy, tensors["optimizer"], shared["optimizer"])

        self.ranks.together(load, WeightsError)  # of a sharded tensor each rank sees its own part
        done = saved.step * self.updates_per_step + min(saved.update, self.updates_per_step)
        place_schedule(trainer.schedule, done)
        trainer.load_state_dict(shared["trainer"])
        if saved.rank:
            state.load_random_state(saved.rank["random"], saved.rank_tensors)
            if batch := saved.rank["batch"]:
                trainer.batch = state.unpack_batch(batch, saved.rank_tensors, trainer.prompt_of, trainer.device)

    def _unfinished(self) -> str | None:
        """Name of the newest checkpoint, if it was saved before the last step of its run."""
        path, _ = self.store.latest_valid()
        saved = read_values(path / "state.json") if path else None
        return path.name if path and saved and saved["trainer"]["step"] < saved["config"]["max_steps"] else None

    def _changes(self, saved: TrainState, trainer: Resumable, allow_changed: bool) -> list[str]:
        """Lines for the log about what differs from the checkpoint; raises ConfigError unless that is allowed."""
        serious, rounding = differences(saved.shared, self._identity(trainer))
        check_changes(serious, allowed=allow_changed, mid_batch=bool(saved.update))
        notes = [f"changed: {line}" for line in serious]
        notes += [f"changed, same gradient up to rounding: {line}" for line in rounding]
        if saved.shared["world"] != self.ranks.world:
            notes.append(
                f"saved by {saved.shared['world']} ranks, now {self.ranks.world}: data order, weights and optimiser go "
                "on exactly; sums over ranks round differently and dropout draws other numbers"
            )
        return notes

    def _move_aside(self, moment: Sequence[int] = START, metrics_bytes: int = 0, trains_on: bool = True) -> list[str]:
        """Nothing after the checkpoint may stay, or it would appear twice, or be taken for this run's."""
        return self._on_main(lambda: move_aside(self.run_folder, moment, metrics_bytes, trains_on=trains_on)) or []

    def _on_main(self, action: Callable[[], Any]) -> Any:
        """`action` of the main rank alone; what it returned there, and on every rank the CheckpointError it raised."""
        return self.ranks.together(action if self.ranks.main else lambda: None, CheckpointError)
