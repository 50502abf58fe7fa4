"""What hangs on a run and trains nothing: the recording, the progress bar, an evaluation every few steps, whatever a
user or a tracker wants to see.

To add one, write a subclass of `Observer`, and its line into `observers`. What an observer raises ends the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from covo_rl.config import ConfigError
from covo_rl.data.files import plain, read_record
from covo_rl.evaluate import evaluate
from covo_rl.records import console
from covo_rl.records.monitor import Advice, Monitor
from covo_rl.records.samples import step_samples
from covo_rl.records.sounds import KeptSounds
from covo_rl.records.steps import StepRecord
from covo_rl.records.trackers import Trackers, is_logged, table_rows

if TYPE_CHECKING:
    from covo_rl.run.session import Session


class Observer:
    """Sees a run go by; every method may be left out.

    `begin`, `measure` and `end` are called on every rank, `start`, `record` and `close` on the main process alone.
    """

    def __init__(self, session: Session) -> None:
        self.session = session

    def start(self) -> str | None:
        """All checks are passed and the folder is ours; what keeps the run from beginning, or None."""

    def begin(self, step: int) -> None:
        """Training starts, or goes on after `step` steps."""

    def measure(self, metrics: dict[str, Any]) -> None:
        """A step is done and not yet recorded: evaluate (all ranks take part), and add figures to its `metrics`."""

    def record(self, record: StepRecord) -> None:
        """The step as it is recorded."""

    def end(self) -> None:
        """No further step comes: training is finished, was stopped, or failed."""

    def close(self, result: Mapping[str, Any] | None) -> None:
        """The run is over; `result` is the content of result.json, None where it did not come so far."""


class Evaluator(Observer):
    """With `eval_every`, the held-out accuracy of a step and the figures of each `eval_set`, among its metrics."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        every, best = session.options.eval.eval_every, session.options.train.keep_best
        if every and not session.held_out and (best or not session.eval_sets):
            what = "keep_best, which an eval_set has no part in" if session.eval_sets else f"eval_every {every}"
            raise ConfigError([f"{what}: no row is held out; give eval_data, or raise eval_fraction"])

    def measure(self, metrics: dict[str, Any]) -> None:
        session, start, title = self.session, time.perf_counter(), f"step {metrics['step']}"
        every = session.options.eval.eval_every
        if not every or metrics["step"] % every:
            return
        if session.held_out:
            metrics["eval_accuracy"] = session.evaluate(modes=["greedy"], title=title)["greedy"]["accuracy"]
        whole = [term for term in session.terms if term.reads_whole]
        reward = replace(session.options.reward, rewards=whole) if whole else None
        engine = session.current_engine() if session.eval_sets else None
        for one in session.eval_sets:
            metrics |= one.figures(session.policy, session.clips, session.options, reward, session.ranks, engine, title)
        metrics["seconds"]["eval"] = time.perf_counter() - start


class Listener(Observer):
    """With `listen_every`, greedy accuracy on a few held-out rows, with their clips and with silence instead."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.options = session.options.eval
        rows = [row for row in session.held_out if row.clips]
        count = min(self.options.listen_rows, len(rows))
        self.rows = [rows[i * len(rows) // count] for i in range(count)]  # of all kinds, where rows lie by kind
        if self.options.listen_every and not rows:
            raise ConfigError([f"listen_every {self.options.listen_every}: no held-out row has a clip to be silenced; "
                               "give eval_data with audio, or leave it out"])  # fmt: skip

    def measure(self, metrics: dict[str, Any]) -> None:
        if not self.options.listen_every or metrics["step"] % self.options.listen_every:
            return
        session, start = self.session, time.perf_counter()
        for audio in ("real", "silent"):
            title = f"step {metrics['step']}, listening, {audio}"
            with console.ProgressDisplay(title, len(self.rows), active=session.ranks.main) as display:
                evaluation = evaluate(
                    session.policy, self.rows, prompt_config=session.options.prompt, reward_config=None,
                    rollout_config=session.options.rollout, clips=session.clips, audio=audio,
                    seed=session.options.train.seed, batch_size=self.options.eval_batch_size, ranks=session.ranks,
                    progress=display.rated, engine=session.current_engine(),
                )  # fmt: skip
            metrics[f"listen_{audio}"] = evaluation.summary()["accuracy"]
        metrics["listen_rows"] = len(self.rows)
        metrics["seconds"]["listen"] = time.perf_counter() - start


class Recorder(Observer):
    """A step into the run folder, with its sounds that have no file."""

    def begin(self, step: int) -> None:
        self.sounds = KeptSounds(self.session.run.folder, self.session.examples)
        self.without = 0

    def record(self, record: StepRecord) -> None:
        run = self.session.run
        run.log_metrics(record.metrics)
        if self.session.options.train.log_rollouts and record.rollouts:
            run.log_rollouts(record.step, record.rollouts)
            with run.going_on(f"sounds of step {record.step} are not kept for the report"):
                self.without += self.sounds.keep(record.rollouts)

    def end(self) -> None:
        if self.without:
            console.console.print(
                f"{self.without} sounds of rows in memory were not kept in {self.session.run.folder / 'clips'}: there "
                "was no more room, and the report cannot play them"
            )


class Bar(Observer):
    """How far training is, the figures of each step, and three rollouts of the first and the last."""

    def begin(self, step: int) -> None:
        session = self.session
        total, main = session.options.train.max_steps, session.ranks.main
        self.sampled = (step + 1, total)
        if main and step < total:
            console.console.print(console.legend(term.name for term in session.terms))
        self.display = console.ProgressDisplay("GRPO", total, done=step, active=main, steps=5).__enter__()

    def record(self, record: StepRecord) -> None:
        self.display.update(record.step, console.step_figures(record.metrics))
        if record.step in self.sampled:
            run, logged = self.session.run, self.session.options.train.log_rollouts
            for text in step_samples(record, run.rollouts_path(record.step) if logged else None):
                console.console.print(text)

    def end(self) -> None:
        self.display.__exit__()


class Adviser(Observer):
    """What the monitor has to say: when it appears, and all of it at the end."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.monitor = Monitor(session.options.flat())
        self.advice: list[Advice] = []

    def begin(self, step: int) -> None:
        if step and self.session.ranks.main:  # what was said before is not said again
            self.advice = [piece for metrics in self.session.run.metrics() for piece in self.monitor.see(metrics)]

    def record(self, record: StepRecord) -> None:
        news = self.monitor.see(plain(record.metrics))
        self.advice += news
        for piece in news:
            console.console.print(str(piece), style="yellow")

    def close(self, result: Mapping[str, Any] | None) -> None:
        if self.advice:
            rows = [(f"step {piece.step}", f"{piece.rule}, {piece.link}") for piece in self.advice]
            console.console.print(console.summary_table("advice of this run", rows))


class Tracking(Observer):
    """With `report_to`, the run at experiment trackers."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.trackers = Trackers(session.options.tracker, session.run.folder)
        self.rows = {row.id: row for row in session.examples}
        self.step = 0

    def start(self) -> str | None:
        options, saved = self.session.options, self.session.start.saved
        self.step = saved["trainer"]["step"] if saved else 0
        return self.trackers.start(options.flat(), resume=options.train.resume is not None, step=self.step)

    def begin(self, step: int) -> None:
        if self.trackers.active and not step:
            self.trackers.log_evaluation("", read_record(self.session.run.folder / "before.json"), 0)

    def record(self, record: StepRecord) -> None:
        self.step = record.step
        self.trackers.log_step(record)
        if self.trackers.active and is_logged(record.step, self.session.options.train.max_steps):
            self.trackers.log_table(table_rows(record, self._waveforms), record.step)

    def _waveforms(self, row: str) -> list[tuple[np.ndarray, int]]:
        clips = self.session.clips
        return [clips.waveform(clips.key(clip)) for clip in self.rows[row].clips]

    def close(self, result: Mapping[str, Any] | None) -> None:
        evaluations = (result or {}).get("details", {})
        for name in ("after", "silent", "swapped"):
            self.trackers.log_evaluation("" if name == "after" else name, evaluations.get(name, {}), self.step)
        self.trackers.finish()


class Callback(Observer):
    """A function of the user's, called with every StepRecord."""

    def __init__(self, session: Session, function: Callable[[StepRecord], object]) -> None:
        super().__init__(session)
        self.function = function

    def record(self, record: StepRecord) -> None:
        self.function(record)


def observers(session: Session, callbacks: Sequence[Callable[[StepRecord], object]]) -> list[Observer]:
    """All of a run, in the order in which they are called."""
    kinds = (Evaluator, Listener, Recorder, Bar, Adviser, Tracking)
    return [*(kind(session) for kind in kinds), *(Callback(session, function) for function in callbacks)]
