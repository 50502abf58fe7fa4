"""Checkpoints of pre-training: GRPO's folders, with the place in the stream in them. A resume is exact.

RUN/checkpoints/step_000500/    weights, optimiser, random states, and in state.json options and the stream's state
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from covo_rl.data.files import plain
from covo_rl.models.weights import WeightsError
from covo_rl.policy.sharding import reshard
from covo_rl.records.console import console
from covo_rl.resolve import ConfigError
from covo_rl.supervised.pretrain.config import MAY_CHANGE, PretrainConfig
from covo_rl.supervised.pretrain.trainer import PretrainTrainer
from covo_rl.train.checkpoint import CheckpointError, CheckpointStore, TrainState, state
from covo_rl.train.checkpoint.manifest import flush
from covo_rl.train.checkpoint.timeline import finish_moving, move_aside
from covo_rl.train.guard import StoppedBySignal, StopSignals
from covo_rl.train.ranks import Ranks
from covo_rl.train.schedule import place_schedule


class PretrainCheckpoints:
    """Of one folder. Every method is a collective.

    A periodic save that fails (a full disk) is reported, and training goes on with the last good checkpoint; a save
    that the run ends with raises.
    """

    def __init__(self, config: PretrainConfig, stop: StopSignals) -> None:
        self.config, self.stop, self.ranks = config, stop, Ranks.current()
        self.folder = Path(config.output)
        self.metrics = self.folder / "metrics.jsonl"
        self.store = CheckpointStore(self.folder / "checkpoints", config.keep_last)
        self.saved_step = -1

    def after_update(self, trainer: PretrainTrainer) -> None:
        """After an update and its line of metrics.

        Raises:
            StoppedBySignal: a rank was asked to stop; all is saved.
        """
        if signal := next(filter(None, self.ranks.gathered(self.stop.received)), None):
            raise StoppedBySignal(signal, self.save(trainer))
        every = self.config.checkpoint_every
        if not every or trainer.step % every:
            return
        try:
            self.save(trainer)
        except CheckpointError as error:
            if self.ranks.main:
                console.print(f"step {trainer.step}: {error}; training goes on", style="bold red", markup=False)

    def save(self, trainer: PretrainTrainer) -> Path:
        """Everything that `resume` needs, on disk; nothing where this step is there already."""
        main = self.ranks.main  # alone writes, and so holds, copies of what is not sharded
        reshard(trainer.policy)
        optimizer_tensors, optimizer = state.optimizer_state(trainer.optimizer, trainer.policy, keep=main)
        random, rank_tensors = state.random_state()
        logged = main and self.metrics.is_file()
        if logged:
            flush(self.metrics)
        shared = {
            "config": plain(self.config.fixed),
            "rows_an_update": trainer.rows_an_update,
            "frozen": self._frozen(trainer),
            "stream": trainer.stream.state_dict(),
            "distiller": None if trainer.distiller is None else trainer.distiller.state_dict(),
            "optimizer": optimizer,
            "metrics_bytes": self.metrics.stat().st_size if logged else 0,
        }
        tensors = {"weights": state.weights(trainer.policy, keep=main), "optimizer": optimizer_tensors}
        path = self.store.save(TrainState(trainer.step, shared, tensors, {"random": random}, rank_tensors), self.ranks)
        self.saved_step = trainer.step
        return path

    def resume(self, trainer: PretrainTrainer) -> list[str]:
        """Take up at the newest complete checkpoint; lines for the log.

        Raises:
            ConfigError: there is none, or it is of other options, rows or another model, which are named.
            CheckpointError: all are damaged, or do not fit the model.
        """
        self._on_main(lambda: finish_moving(self.folder))
        path, passed_over = self.ranks.from_main(self._on_main(lambda: self.store.meant("auto")))
        if path is None:
            raise ConfigError([f"resume: there is no checkpoint under {self.store.folder}; leave it out to begin"])
        saved = self.store.read(path, self.ranks)
        if problems := self._differences(saved.shared, trainer):
            raise ConfigError([f"{path.name}: {problem}" for problem in problems])
        self._restore(trainer, saved)
        notes = [f"passed over {what}" for what in passed_over]
        if saved.shared["world"] != self.ranks.world:
            notes.append(f"saved by {saved.shared['world']} ranks, now {self.ranks.world}: rows, weights and optimiser "
                         "go on exactly; sums over ranks round differently")  # fmt: skip
        trains_on = saved.step < self.config.steps
        moved = self._on_main(
            lambda: move_aside(self.folder, [saved.step], saved.shared["metrics_bytes"], trains_on=trains_on)
        )
        return [f"resumed from {path} (step {saved.step})", *notes, *(moved or [])]

    def _restore(self, trainer: PretrainTrainer, saved: TrainState) -> None:
        shared, tensors = saved.shared, saved.tensors
        trainer.stream.load_state_dict(shared["stream"])
        if trainer.distiller is not None:
            trainer.distiller.load_state_dict(shared["distiller"])

        def load() -> None:
            state.load_weights(trainer.policy, tensors["weights"])
            state.load_optimizer_state(trainer.optimizer, trainer.policy, tensors["optimizer"], shared["optimizer"])

        self.ranks.together(load, WeightsError)  # of a sharded tensor each rank sees its own part
        place_schedule(trainer.schedule, saved.step)
        trainer.step = self.saved_step = saved.step
        if saved.rank:
            state.load_random_state(saved.rank["random"], saved.rank_tensors)

    def _differences(self, saved: Mapping[str, Any], trainer: PretrainTrainer) -> list[str]:
        """What a resumed run may not change and has changed."""
        before, now = saved["config"], plain(self.config.fixed)
        names = [name for name in sorted({*before, *now} - MAY_CHANGE) if before.get(name) != now.get(name)]
        problems = [f"{name} {before.get(name)!r} there, {now.get(name)!r} now" for name in names]
        rows, wanted = trainer.rows_an_update, saved["rows_an_update"]
        if rows != wanted:
            problems.append(f"{wanted} rows an update there, {rows} now (batch_size x gradient_accumulation_steps x "
                            f"{self.ranks.world} ranks)")  # fmt: skip
        frozen = self._frozen(trainer)
        if None not in (frozen, saved["frozen"]) and frozen != saved["frozen"]:
            problems.append("the frozen weights of the model are others than there")
        return problems

    def _frozen(self, trainer: PretrainTrainer) -> dict[str, str] | None:
        """Digests of what does not train, where every rank holds all of it."""
        return None if trainer.policy.sharded else trainer.frozen

    def _on_main(self, action: Any) -> Any:
        """`action` of the main rank alone; what it returned there, and on every rank the CheckpointError it raised."""
        return self.ranks.together(action if self.ranks.main else lambda: None, CheckpointError)
