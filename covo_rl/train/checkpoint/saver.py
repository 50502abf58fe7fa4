"""Ties a trainer and its run folder to the checkpoints: when to save, and how to take up again.

A save happens between two optimiser updates: every n steps, every n minutes, when a signal asks for it, at the end.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from covo_rl.config import ConfigError, Options
from covo_rl.data.files import plain
from covo_rl.records.console import console
from covo_rl.train.batch import Batch
from covo_rl.train.checkpoint import state
from covo_rl.train.checkpoint.store import CheckpointError, CheckpointStore, TrainState, flush, read_values
from covo_rl.train.guard import StoppedBySignal, StopSignals
from covo_rl.train.ranks import Ranks
from covo_rl.train.sampler import PromptSampler
from covo_rl.types import Example, Prompt

#: options that change nothing about the training itself; data files are compared by content, not by path
FREE = frozenset(
    """
    output resume checkpoint_every checkpoint_minutes keep_last keep_best export_checkpoints allow_changed_config
    allow_overlap allow_outside_audio dry_run log_rollouts oom_retry check_rewards reward_timeout evaluate eval_every
    eval_num_generations eval_batch_size data audio_dir eval_data eval_audio_dir eval_limit feature_memory_mb overwrite
    """.split()  # noqa: SIM905 - a list of 25 quoted words is harder to read
)
#: options that change only how the same gradient is computed: a resume is right, but not bit for bit
ROUNDING = frozenset(
    {"micro_batch_prompts", "micro_batch_rollouts", "gradient_checkpointing", "shared_decode", "attn_implementation"}
)


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


class Saver:
    """Checkpoints of one run. Every method is a collective: all ranks call it at the same point.

    A periodic save that fails (a full disk) is reported and counted, and training goes on with the last good
    checkpoint; a save that the run ends with raises. `on_saved` is called on every rank with the folder of each
    periodic checkpoint.
    """

    def __init__(
        self,
        options: Options,
        run_folder: str | Path,
        stop: StopSignals | None = None,
        on_saved: Callable[[Path], object] | None = None,
    ) -> None:
        train = options.train
        self.config: Mapping[str, Any] = plain(options.flat())
        self.run_folder = Path(run_folder)
        self.metrics = self.run_folder / "metrics.jsonl"
        self.store = CheckpointStore(self.run_folder / "checkpoints", train.keep_last, train.keep_best)
        self.every_steps, self.every_seconds = train.checkpoint_every, train.checkpoint_minutes * 60
        self.stop = stop or StopSignals()
        self.on_saved = on_saved
        self.ranks = Ranks.current()
        self.failures = 0
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

    def _save_if(self, due: bool, trainer: Resumable, score: float | None = None) -> None:
        overdue = bool(self.every_seconds) and time.monotonic() - self._saved_at >= self.every_seconds
        wishes = self.ranks.gathered((self.stop.received, overdue))
        if signal := next((name for name, _ in wishes if name), None):
            raise StoppedBySignal(signal, self._save(trainer, score))
        if not due and not any(late for _, late in wishes):
            return
        try:
            saved = self._save(trainer, score)
        except CheckpointError as error:
            self.failures += 1
            self._saved_at = time.monotonic()
            if self.ranks.main:
                console.print(f"[bold red]step {trainer.step}: {error}; training goes on[/]")
        else:
            if self.on_saved:
                self.on_saved(saved)

    # -- out -----------------------------------------------------------------------------------------------------

    def _save(self, trainer: Resumable, score: float | None) -> Path:
        """Everything that `_restore` needs, as copies, on disk."""
        optimizer_tensors, optimizer = state.optimizer_state(trainer.optimizer, trainer.policy)
        random, rank_tensors = state.random_state()
        rank: dict[str, Any] = {"random": random, "batch": None}
        if trainer.batch is not None and trainer.update_index:
            rank["batch"], batch_tensors = state.pack_batch(trainer.batch)
            rank_tensors |= batch_tensors
        logged = self.ranks.main and self.metrics.is_file()
        if logged:
            flush(self.metrics)
        shared = {
            **self._identity(trainer),
            "trainer": trainer.state_dict(),
            "schedule": trainer.schedule.state_dict(),
            "optimizer": optimizer,
            "metrics_bytes": self.metrics.stat().st_size if logged else 0,
        }
        tensors = {"weights": state.weights(trainer.policy), "optimizer": optimizer_tensors}
        saved = TrainState(trainer.step, shared, tensors, rank, rank_tensors, trainer.update_index, score)
        path = self.store.save(saved, self.ranks)
        self._saved_at = time.monotonic()
        return path

    def _identity(self, trainer: Resumable) -> dict[str, Any]:
        """What a resume must have in common with the checkpoint."""
        return {"config": self.config, "data": data_fingerprint(trainer.sampler.examples)}

    # -- back ----------------------------------------------------------------------------------------------------

    def resume(self, trainer: Resumable, source: str | None, *, allow_changed: bool = False) -> list[str]:
        """Take up at `auto` (the newest complete checkpoint, or the start if there is none) or at a folder.

        Cuts metrics.jsonl and rollouts/ back to the checkpoint. Without `source`, starts a new run.

        Returns:
            lines for the log: what was resumed, and where it cannot be exact.

        Raises:
            ConfigError: configuration or data differ and `allow_changed` is off, or a new run would write over one.
            CheckpointError: the checkpoint is damaged or does not fit the model.
        """
        if source is None:
            unfinished = self.ranks.from_main(self._unfinished() if self.ranks.main else None)
            if unfinished:
                raise ConfigError([f"{self.run_folder} holds an unfinished run ({unfinished}): continue it with "
                                   "--resume auto, or choose another --output"])  # fmt: skip
            if self.ranks.main:
                self.store.remove(*self.store.all())
            self._cut_logs(0, 0)
            return []
        notes: list[str] = []
        if source == "auto":
            path, passed_over = self.ranks.from_main(self.store.latest_valid() if self.ranks.main else None)
            notes += [f"passed over {what}" for what in passed_over]
            if path is None:
                self._cut_logs(0, 0)
                return [*notes, f"no checkpoint under {self.store.folder}: starting from the first step"]
        elif not (path := Path(source)).is_dir():
            raise CheckpointError(f"--resume {source}: no such folder; there are "
                                  f"{', '.join(str(p) for p in self.store.all()) or 'no checkpoints'}")  # fmt: skip
        saved = self.store.load(path, self.ranks)
        notes += self._changes(saved.shared, trainer, allow_changed)
        self._restore(trainer, saved)
        self._cut_logs(saved.step, saved.shared["metrics_bytes"])
        where = f", update {saved.update}" if saved.update else ""
        return [f"resumed from {path} (step {saved.step}{where})", *notes]

    def _restore(self, trainer: Resumable, saved: TrainState) -> None:
        """Put a loaded state into a trainer that was built from the same options."""
        tensors, shared = saved.tensors, saved.shared
        state.load_weights(trainer.policy, tensors["weights"])
        state.load_optimizer_state(trainer.optimizer, trainer.policy, tensors["optimizer"], shared["optimizer"])
        trainer.schedule.load_state_dict(dict(shared["schedule"]))
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

    def _changes(self, shared: Mapping[str, Any], trainer: Resumable, allow_changed: bool) -> list[str]:
        """Lines for the log about what differs from the checkpoint; raises ConfigError unless that is allowed."""
        serious, rounding = differences(shared, self._identity(trainer))
        if serious and not allow_changed:
            raise ConfigError([*serious, "the run differs from its checkpoint: undo that, choose another --output, "
                                         "or pass --allow_changed_config"])  # fmt: skip
        notes = [f"changed: {line}" for line in serious]
        notes += [f"changed, same gradient up to rounding: {line}" for line in rounding]
        if shared["world"] != self.ranks.world:
            notes.append(
                f"saved by {shared['world']} ranks, now {self.ranks.world}: data order, weights and optimiser go on "
                "exactly; sums over ranks round differently and dropout draws other numbers"
            )
        return notes

    def _cut_logs(self, step: int, metrics_bytes: int) -> None:
        """Nothing after the checkpoint may stay in the logs, or it would appear twice."""
        if not self.ranks.main:
            return
        if self.metrics.is_file():
            size = self.metrics.stat().st_size
            if size < metrics_bytes:
                raise CheckpointError(
                    f"{self.metrics} has {size} bytes, but had {metrics_bytes} when the checkpoint was saved: it was "
                    "edited or replaced; put it back or choose another --output"
                )
            os.truncate(self.metrics, metrics_bytes)
        for path in (self.run_folder / "rollouts").glob("step_*.jsonl"):
            number = path.stem.removeprefix("step_")
            if number.isdigit() and int(number) > step:
                path.unlink()


def data_fingerprint(examples: Sequence[Example]) -> dict[str, Any]:
    """Number of rows and a sha256 over ids, questions, choices, answers and clip names, in order."""
    digest = hashlib.sha256()
    for row in examples:
        names = [clip.name.rsplit("/", 1)[-1] for clip in row.clips]
        digest.update(repr((row.id, row.question, row.choices, row.answer, names)).encode())
    return {"rows": len(examples), "sha256": digest.hexdigest()}


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """`config` and `data` of a checkpoint against the run's: (changes that alter the training, only its rounding).

    One readable line each.
    """
    serious, rounding = [], []
    for name in sorted({*saved["config"], *now["config"]} - FREE):
        before, after = saved["config"].get(name), now["config"].get(name)
        if before != after:
            (rounding if name in ROUNDING else serious).append(f"{name}: {before!r} in the checkpoint, {after!r} now")
    before, after = saved["data"], now["data"]
    if before["rows"] != after["rows"]:
        serious.append(f"training data: {before['rows']} rows in the checkpoint, {after['rows']} now")
    elif before != after:
        serious.append("training data: as many rows as in the checkpoint, but their content or order has changed")
    return serious, rounding
