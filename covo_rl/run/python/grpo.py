"""A run from Python, with the options of the command line by keyword.

    from covo_rl import GRPO, load

    run = GRPO(model="builtin:tiny", data=rows, rewards=["accuracy", "format", brevity], max_steps=20).train()
    run.result["after"]["accuracy_greedy"], run.adapter, run.report()

Making a GRPO checks the options and loads nothing; `train` checks the rest as the recipe does, which is this, too.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from covo_rl.config import ConfigError, Options
from covo_rl.data.terminal import say
from covo_rl.records.folder import Run
from covo_rl.run.defaults import NO_MODEL
from covo_rl.run.python.keywords import read_keywords
from covo_rl.run.python.outcome import TrainedRun

if TYPE_CHECKING:
    from covo_rl.data.memory import Source
    from covo_rl.records.steps import StepRecord
    from covo_rl.run.session import Session

    Rewards = str | Callable[..., Any] | Sequence[str | Callable[..., Any]] | Mapping[Any, float]
    OnStep = Callable[[StepRecord], object]


class GRPO:
    """GRPO of an audio language model on questions.

    Args:
        model: a folder, a hub name, or builtin:tiny.
        data: a path, rows (mappings), or a `datasets.Dataset`, whose audio we decode; None is the built-in set.
        rewards: names, files (`./mine.py:score`), functions; with weights a mapping {reward: weight}.
        eval_data: held-out questions, as `data`; without them a share of `data` is held out, by clip.
        on_step: called with the record of every step (`step`, `metrics`, `rollouts`), or a list of such functions.
        config: a YAML file of options. Without one a shipped model takes recipes/configs/tiny.yaml, and any other
            recipes/configs/own_model.yaml with the wording of its prompt.yaml.
        options: any option of `covo-rl train --help`, or its name in TRL; they win over `config`.

    Raises:
        ConfigError: everything that is wrong with the options, at once.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        data: Source | None = None,
        rewards: Rewards | None = None,
        eval_data: Source | None = None,
        *,
        on_step: OnStep | Sequence[OnStep] | None = None,
        config: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        named = {"model": model, "data": data, "rewards": rewards, "eval_data": eval_data}
        named = {name: value for name, value in named.items() if value is not None}
        self.callbacks = [on_step] if callable(on_step) else list(on_step or ())
        if others := [function for function in self.callbacks if not callable(function)]:
            raise ConfigError([f"GRPO: on_step {others[0]!r:.80} is no function"])
        self.options, self.memory = read_keywords(config, {**named, **options})
        self._names_output = config is not None or bool({"output", "output_dir", "resume"} & options.keys())
        if "data" in named and model is None and config is None:
            say(f"GRPO: {NO_MODEL}")

    def __repr__(self) -> str:
        data = self.options.data.data or "the built-in set"
        return f"GRPO(model={self.options.model.model!r}, data={data!r}, output={self.options.train.output!r})"

    def train(self) -> TrainedRun:
        """Check, evaluate, train, export, evaluate again, and write the run folder.

        Where the options name no `output`, a used folder is left alone and the next free one taken: runs/tiny,
        runs/tiny-2 ... Another `train` starts anew.

        Raises:
            UserError, OSError: what a user can mend, as the recipe says it; the run folder is given back.
            KeyboardInterrupt: Ctrl-C, or the notebook's stop: a checkpoint was saved, and the message says how to go
                on; a second one ends at once.
        """
        from covo_rl.run.session import Session  # torch
        from covo_rl.run.start import RunFinished
        from covo_rl.train.guard import StoppedBySignal

        options = self._options()
        folder = options.train.output
        try:
            with _as_before():
                complete(Session(options, callbacks=self.callbacks, memory=self.memory))
        except RunFinished:
            pass
        except StoppedBySignal as stopped:
            if stopped.signal != "SIGINT":
                raise
            how = f"go on with GRPO(..., output={folder!r}, resume='auto').train()"
            raise KeyboardInterrupt(f"stopped after saving {stopped.saved}; {how}") from None
        return TrainedRun(folder)

    def _options(self) -> Options:
        """A copy for one run, with a folder of its own."""
        options = Options(**{name: replace(room) for name, room in vars(self.options).items()})
        train = options.train
        if not self._names_output and not train.overwrite and "WORLD_SIZE" not in os.environ:
            names = (train.output if n == 1 else f"{train.output}-{n}" for n in range(1, 10_000))
            train.output = next(name for name in names if not Run(name).contents())
        return options


def complete(session: Session) -> None:
    """The whole of a run: check, evaluate, train, export, evaluate again. A dry run ends after the checks.

    However it ends, the run folder is given back.
    """
    try:
        session.show()
        if session.options.train.dry_run:
            session.show_budget()
            return
        before = session.before() if session.held_out and session.options.eval.evaluate else None
        trainer = session.train()
        exported = session.export()
        evaluations = None
        if before is not None:
            evaluations = {"before": before, "after": session.evaluate()} | {
                audio: session.evaluate(audio=audio, modes=["sampled"]) for audio in ("silent", "swapped")
            }
        session.finish(exported, trainer.step, evaluations)
        session.ranks.wait()  # nobody reads result.json before it is there
    finally:
        session.close()


@contextmanager
def _as_before() -> Iterator[None]:
    """A run seeds the generators of Python, numpy and torch, and fills the device's memory; the program goes on as if
    there had been none."""
    import torch
    from accelerate.utils.memory import clear_device_cache

    state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        clear_device_cache(garbage_collection=True)
