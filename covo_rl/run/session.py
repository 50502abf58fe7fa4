"""A whole run, from options to result.json: check everything, evaluate, train, evaluate, export.

options -> data + model + rewards, all checked -> before -> GRPO -> after -> adapter -> result.json
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from covo_rl.config import Options
from covo_rl.engines.base import EngineLost, RolloutEngine
from covo_rl.evaluate import Evaluation, evaluate
from covo_rl.export import ExportError
from covo_rl.export.adapter import portable_name
from covo_rl.export.exporting import export_run_adapter
from covo_rl.records import console
from covo_rl.records.steps import StepRecord, rollout_rows
from covo_rl.run.observers import observers
from covo_rl.run.result import before_settings, evaluated, noop_explained, show_end, stored_before
from covo_rl.run.setup import Setup
from covo_rl.train.batch import Batch
from covo_rl.train.checkpoint.saver import Saver
from covo_rl.train.guard import StoppedBySignal, StopSignals
from covo_rl.train.loop import Trainer
from covo_rl.types import UserError

#: what a user can mend: shown as one message, without a traceback
USER_ERRORS = (UserError, OSError)


class Session(Setup):
    """A run by its phases. `callbacks` see every step after it is recorded, on the main process only; what one raises
    ends the run. Making a session starts no training; the rest is as in Setup."""

    def __init__(
        self,
        options: Options,
        accelerator: Accelerator | None = None,
        *,
        callbacks: Sequence[Callable[[StepRecord], object]] = (),
        memory: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(options, accelerator, memory)
        self.train_seconds, self.record_seconds = 0.0, 0.0
        self.trainer: Trainer | None = None
        self.observers = observers(self, callbacks)

    def current_engine(self) -> RolloutEngine | None:
        """What evaluations sample with, given the policy as it is; None: the policy itself."""
        if self.engine is not None and self.trainer is not None:
            self.trainer.sync()
        return self.engine

    # -- phases --------------------------------------------------------------------------------------------------

    def evaluate(
        self, *, audio: str = "real", modes: Sequence[str] = ("greedy", "sampled"), title: str = ""
    ) -> dict[str, Any]:
        """Summaries on the held-out rows, one per mode; `audio` may be real, silent or swapped; `title` is shown."""
        title = title or ("after" if self.train_seconds else "before")
        return {mode: self._evaluation(title, audio, mode).summary() for mode in modes}

    def _evaluation(self, title: str, audio: str, mode: str) -> Evaluation:
        options = self.options
        title = ", ".join([title, *([] if audio == "real" else [audio]), mode])
        with console.ProgressDisplay(title, len(self.held_out), active=self.ranks.main) as display:
            return evaluate(
                self.policy, self.held_out, prompt_config=options.prompt, rollout_config=options.rollout,
                reward_config=replace(options.reward, rewards=self.terms), clips=self.clips, audio=audio,
                greedy=mode == "greedy", num_generations=1 if mode == "greedy" else options.eval.eval_num_generations,
                seed=options.train.seed, batch_size=options.eval.eval_batch_size, ranks=self.ranks,
                progress=display.rated, engine=self.current_engine(),
            )  # fmt: skip

    def before(self) -> dict[str, Any]:
        """`evaluate` of the untrained policy; a resumed run reads what it wrote at first, if that is of these rows."""
        self.accept()
        settings = before_settings(self.options, self.held_out, self.clips) if self.ranks.main else None
        resumes = self.options.train.resume is not None
        stored = self.ranks.from_main(stored_before(self.run, settings) if resumes and self.ranks.main else None)
        if stored is None:
            if resumes:
                self._print("before.json is missing, or of other rows or options: evaluating before training again")
            stored = self.evaluate()
            with self.run.going_on("a resume will evaluate before training again"):
                self.run.write_json("before.json", {**stored, "settings": settings})
        return stored

    def new_trainer(self) -> Trainer:
        return Trainer(self.options, self.policy, self.clips, self.examples, self.accelerator, self.engine)

    def train(self) -> Trainer:
        """Run GRPO, from a checkpoint if asked for, and record every step.

        Raises:
            StoppedBySignal: SIGTERM, SIGHUP or Ctrl-C came, or no engine answers any more, and a checkpoint was saved;
                a SystemExit with code 75.
        """
        self.accept()
        self.trainer = trainer = self.new_trainer()
        start, train = time.perf_counter(), self.options.train
        with StopSignals() as stop, ExitStack() as ends:
            on_saved = self._export_step if train.export_checkpoints else None
            saver = Saver(self.options, self.run.folder, stop, on_saved, self.contents)
            self._print(*saver.resume(trainer, train.resume, allow_changed=train.allow_changed_config))
            for observer in self.observers:
                observer.begin(trainer.step)
                ends.callback(observer.end)
            try:
                trainer.run(self._after_step, saver)
            except StoppedBySignal as stopped:
                ends.close()
                self._print(stopped.message)
                raise
        self.train_seconds = time.perf_counter() - start
        return trainer

    def _after_step(self, metrics: dict[str, Any], batch: Batch) -> float | None:
        """Show a step to the observers; its held-out accuracy, where that was measured."""
        metrics["seconds"]["records"] = self.record_seconds  # of the step before, its own are not known yet
        lost: EngineLost | None = None
        for observer in self.observers:
            try:
                observer.measure(metrics)
            except EngineLost as error:  # the step itself is done, and is recorded before the run ends
                lost = error
                break
        start = time.perf_counter()
        rows = self.rollout_rows(batch)
        if self.ranks.main:
            for observer in self.observers:
                observer.record(StepRecord(metrics["step"], metrics, rows))
        self.record_seconds = time.perf_counter() - start
        if lost is not None:
            raise lost
        return metrics.get("eval_accuracy")

    def rollout_rows(self, batch: Batch) -> Sequence[Mapping[str, Any]]:
        """Of the step, over all ranks."""
        first = sum(self.ranks.gathered(len(batch.groups))[: self.ranks.rank])
        rows = rollout_rows(
            batch.groups, batch.table, batch.advantages, first_group=first, decoder=self.decoder, version=batch.version
        )
        return self.ranks.joined(rows)

    def export(self, folder: Path | None = None) -> Path:
        """Write RUN/adapter (LoRA) or RUN/model (full), or `folder`, verified by logits in a fresh process.

        Raises:
            ExportError: on every rank, where the check failed or training changed nothing; nothing is left.
        """
        doing = console.working("export: written, loaded in a fresh process, logits compared", active=self.ranks.main)
        with doing, noop_explained(self.run, self.options, self.ranks):
            return export_run_adapter(
                self.trainable, self.run.folder, self._prompts(2), self.clips,
                base_model=portable_name(self.options.model.model), folder=folder, wording=self.options.prompt,
            )  # fmt: skip

    def _export_step(self, checkpoint: Path) -> None:
        """RUN/exports/step_N of a checkpoint just saved; an export that fails is reported, and training goes on."""
        try:
            self.export(self.run.folder / "exports" / checkpoint.name)
        except ExportError as error:
            self._print(f"{checkpoint.name} was not exported, training goes on: {error}")

    def finish(self, exported: Path, steps: int, evaluations: dict[str, dict[str, Any]] | None = None) -> Path:
        """Write result.json, and with `evaluations` (before, after, silent, swapped) the curves and the table."""
        result = {
            "seed": self.options.train.seed,
            "steps": steps,
            "train_seconds": round(self.train_seconds, 1),
            "trainable_parameters": self.trainable.trainable_parameters,
            "adapter": str(exported.relative_to(self.run.folder)),
            "self_check": self.self_check,
            **(evaluated(evaluations) if evaluations else {"before": None, "after": None}),
        }
        self.run.catch_up()
        path = self.run.write_json("result.json", result)
        self._let_go(result)  # first: what observers say stands above the table
        if self.ranks.main:
            show_end(self.run, self.options, exported, evaluations, self.train_seconds, self.held_out or self.examples)
        self.close()
        return path
