"""What keeps a long run alive: stop signals, steps that are not finite, memory that ran out."""

from __future__ import annotations

import math
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from covo_rl.config import RolloutConfig
from covo_rl.data.files import write_json
from covo_rl.records.console import console
from covo_rl.types import UserError

#: BSD's EX_TEMPFAIL: stopped by a signal, saved, start again with --resume auto
EXIT_STOPPED = 75
#: seconds that a run which has to stop waits for rollouts under way: after a signal launchers kill it soon
SIGNAL_PATIENCE = 15.0
HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
STOP_SIGNALS = tuple(filter(None, (signal.SIGTERM, signal.SIGINT, HANGUP)))


class TrainingStopped(UserError, RuntimeError):
    """The run cannot go on; the message says why and what to do."""


class StoppedBySignal(SystemExit):
    """The run saved a checkpoint and ends with exit code 75; `--resume auto` continues it."""

    def __init__(self, name: str, saved: Path | None) -> None:
        super().__init__(EXIT_STOPPED)
        self.signal, self.saved = name, saved
        self.message = f"stopped by {name} after saving {saved}; continue with --resume auto"


class StopSignals:
    """Within `with StopSignals() as stop`, SIGTERM, SIGHUP and Ctrl-C set `stop.received`; the process goes on.

    The loop looks at it between optimiser updates. A second Ctrl-C interrupts at once. Under nohup SIGHUP stays
    ignored. Outside the main thread, where Python allows no signal handlers, nothing is installed.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if number == HANGUP and signal.getsignal(number) is signal.SIG_IGN:
                    continue
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == HANGUP:
            drop_closed_output()
        self.received = signal.Signals(number).name


def drop_closed_output() -> None:
    """Where nobody reads stdout or stderr, as after the terminal closed, print into nothing: no print fails."""
    for fd in (1, 2):
        watch = select.poll()
        watch.register(fd, 0)
        if watch.poll(0):  # hung up or closed: nothing else is reported
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, fd)
            os.close(nothing)


class StepGuard:
    """Counts optimiser updates whose loss or gradient is not finite, dumps them, stops the run after a few in a row.

    Args:
        folder: dumps go to `folder`/step_N/rank_R.json, at most `max_dumps` of them.
        limit: this many in a row raise TrainingStopped.
    """

    def __init__(self, folder: str | Path, *, limit: int = 3, rank: int = 0, max_dumps: int = 10) -> None:
        self.folder, self.rank = Path(folder), rank
        self.limit, self.max_dumps = limit, max_dumps
        self.skipped = self.in_a_row = 0

    def passed(self) -> None:
        """An update was applied."""
        self.in_a_row = 0

    def failed(self, step: int, values: Mapping[str, float], details: Callable[[], Mapping[str, Any]]) -> None:
        """An update was skipped because one of `values` is not finite; `details` is called for the dump.

        Raises:
            TrainingStopped: the `limit`-th in a row.
        """
        self.skipped += 1
        self.in_a_row += 1
        bad = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
        folder = self.folder / f"step_{step:06d}"
        path = folder / f"rank_{self.rank:05d}.json"
        existing = [p for p in self.folder.iterdir() if p.is_dir()] if self.folder.is_dir() else []
        dump = {"step": step, "not_finite": bad, "values": dict(values), **details()}
        if folder in existing or len(existing) < self.max_dumps:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_json(path, dump)
            except OSError as error:  # a full disk costs the dump, not the run
                console.print(f"step {step}: {error}; what was not finite is not in {path}", markup=False)
        if self.in_a_row >= self.limit:
            raise TrainingStopped(
                f"step {step}: {self.in_a_row} optimiser updates in a row were not finite "
                f"({', '.join(f'{name} = {value}' for name, value in bad.items())}). See {path}. Usual causes: a "
                "learning_rate that is too high, max_grad_norm 0, or rollouts and scoring that disagree (look at "
                "ratio/max). Lower the learning rate and continue from an earlier checkpoint with --resume PATH "
                "--allow_changed_config."
            )

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


def not_finite_parameters(model: torch.nn.Module) -> dict[str, list[str]]:
    """Names of parameters whose values or gradients hold NaN or infinities, for a dump."""
    values = {"parameters": [(name, p.detach()) for name, p in model.named_parameters()],
              "gradients": [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]}  # fmt: skip
    return {kind: [name for name, value in pairs if not torch.isfinite(value).all()] for kind, pairs in values.items()}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that device or host memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = str(error)
    signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # CUDA, host, cuBLAS and cuDNN
    return isinstance(error, RuntimeError) and any(sign in words for sign in signs)


@contextmanager
def memory_explained(advice: str) -> Iterator[None]:
    """Out of memory inside becomes TrainingStopped with this advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingStopped(advice) from error


def sampling_advice(prompts: int, rollout: RolloutConfig) -> str:
    """What to change where sampling ran out of memory: keys and values of all rows in work are held at once."""
    return (
        f"out of memory while sampling {prompts} prompts x {rollout.num_generations} rollouts of up to "
        f"{rollout.max_completion_length} tokens, {rollout.decode_rows} at a time. Lower decode_rows, which changes "
        "nothing else, max_completion_length or prompts_per_step (and raise max_steps), use more ranks, which share "
        "the prompts, or dtype bfloat16; `covo-rl doctor` estimates what fits. micro_batch_prompts makes no difference "
        "here."
    )


def out_of_memory_advice(micro_batch_prompts: int, rollouts: int, *, can_retry: bool, no_retry: bool = False) -> str:
    """What to change where a scoring or training pass ran out of memory.

    `can_retry`: --oom_retry would help and is off. `no_retry`: it is on, but ranks share out the parameters.
    """
    advice = [
        f"micro_batch_prompts (now {micro_batch_prompts}) to {micro_batch_prompts // 2}: same gradient"
        if micro_batch_prompts > 1
        else f"micro_batch_rollouts (now {rollouts}) to {rollouts // 2}: same gradient"
        if rollouts > 1
        else "max_completion_length: a micro-batch is one rollout already",
        "--gradient_checkpointing, also with --recompute layer",
        "a LoRA adapter instead of --full",
    ]
    retry = " --oom_retry halves the micro-batch by itself." if can_retry else ""
    retry += " --oom_retry has no effect under FSDP and ZeRO: ranks would wait for each other." if no_retry else ""
    return "out of memory. Lower " + ", or use ".join(advice) + "; `covo-rl doctor` estimates what fits." + retry
