"""What hangs on a run and trains nothing: the recording, the progress bar, an evaluation every few steps, whatever a
user or a tracker wants to see.

To add one, write a subclass of `Observer`, and its line into `observers`. What an observer raises ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from covo_rl.records import console
from covo_rl.records.sounds import KeptSounds
from covo_rl.records.steps import StepRecord

if TYPE_CHECKING:
    from covo_rl.run.session import Session


class Observer:
    """Sees a run go by; every method may be left out.

    `begin`, `measure` and `end` are called on every rank, `record` and `close` on the main process alone.
    """

    def __init__(self, session: Session) -> None:
        self.session = session

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
    """With `eval_every`, the held-out accuracy of a step, among its metrics."""

    def measure(self, metrics: dict[str, Any]) -> None:
        every = self.session.options.eval.eval_every
        if every and metrics["step"] % every == 0 and self.session.held_out:
            metrics["eval_accuracy"] = self.session.evaluate(modes=["greedy"])["greedy"]["accuracy"]


class Recorder(Observer):
    """A step into the run folder, with its sounds that have no file."""

    def begin(self, step: int) -> None:
        self.sounds = KeptSounds(self.session.run.folder, self.session.examples)
        self.without = 0

    def record(self, record: StepRecord) -> None:
        run = self.session.run
        run.log_metrics(record.metrics)
        if self.session.options.train.log_rollouts:
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
    """How far training is, and the figures of the last step."""

    def begin(self, step: int) -> None:
        total, main = self.session.options.train.max_steps, self.session.ranks.main
        self.display = console.ProgressDisplay("GRPO", total, done=step, active=main, steps=5).__enter__()

    def record(self, record: StepRecord) -> None:
        self.display.update(record.step, console.step_line(record.metrics))

    def end(self) -> None:
        self.display.__exit__()


class Callback(Observer):
    """A function of the user's, called with every StepRecord."""

    def __init__(self, session: Session, function: Callable[[StepRecord], object]) -> None:
        super().__init__(session)
        self.function = function

    def record(self, record: StepRecord) -> None:
        self.function(record)


def observers(session: Session, callbacks: Sequence[Callable[[StepRecord], object]]) -> list[Observer]:
    """All of a run, in the order in which they are called."""
    kinds = (Evaluator, Recorder, Bar)
    return [*(kind(session) for kind in kinds), *(Callback(session, function) for function in callbacks)]
