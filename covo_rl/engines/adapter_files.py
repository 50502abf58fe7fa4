"""The policy's adapter as a folder that an engine of other memory reads: published key names, a new name a version.

    files = AdapterFiles(trainable, dtype=torch.bfloat16)
    path = files.write(12)           .../covo-rl-adapters-x7/policy-12: adapter_model.safetensors, adapter_config.json
    files.release(11)

vLLM knows prompt blocks by an adapter's name and path, so one that keeps both is served stale. Unlike an export nothing
is verified here: the probe (probe.py) asks the engine itself.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from covo_rl.data.files import fill_folder
from covo_rl.engines.base import EngineError
from covo_rl.policy.entries import entry_of
from covo_rl.policy.published_adapter import STEM, adapter_config, names_in_memory, whole_state
from covo_rl.policy.sharding import every_rank, whole_shape
from covo_rl.policy.trainable import Trainable

MEMORY = Path("/dev/shm")
FOLDER_PREFIX = "covo-rl-adapters-"
LOCK = "lock"
COPIES = 3  # the adapter in use, the next one, and one that is being written


def adapter_name(version: int) -> str:
    """What an engine calls the adapter of a version of the policy."""
    return f"policy-{version}"


class AdapterFiles:
    """Writes the adapter of each version into a folder of its own, below `folder` (default: in memory).

    Making one and `write` are collectives: all ranks call them. Rank 0 writes, for engines that see its folder; with
    `each_machine` one rank of every machine does, for engines in the training processes. LoRA is trained in float32:
    `dtype` is what the engine computes in, `rounding` the largest change that this made to a number of the last write,
    `seconds` how long that took.
    """

    def __init__(
        self, trainable: Trainable, folder: str | Path | None = None, *, dtype: torch.dtype | None = None,
        each_machine: bool = False,
    ) -> None:  # fmt: skip
        if trainable.peft_model is None:
            raise EngineError("a policy without an adapter has no adapter files: its weights are sent whole")
        self.trainable, self.dtype = trainable, dtype
        self.rounding = self.seconds = 0.0
        self._names = names_in_memory(trainable)
        self._written: dict[int, int] = {}  # version -> state of the weights that it was written with
        self._lock: IO[str] | None = None
        main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        self._writes = main or (each_machine and os.environ.get("LOCAL_RANK") == "0")
        self.folder = Path(_agreed(partial(self._new_folder, folder) if main else None))
        _agreed(self._hold_folder if self._writes else None)

    def write(self, version: int) -> Path:
        """The folder of this version's adapter, whole.

        Raises:
            EngineError: on every rank: it could not be written, or it was, with other weights.
        """
        start, model = time.perf_counter(), self.trainable.family.model
        path = self.folder / adapter_name(version)
        weights = sum(p._version for p in model.parameters() if p.requires_grad)
        if self._written.get(version, weights) != weights:
            raise EngineError(f"version {version} was written with other weights: an engine that has loaded those "
                              "would go on with them")  # fmt: skip
        state = whole_state(model, self._names.values(), keep=self._writes)
        _agreed(partial(fill_folder, path, partial(self._fill, state)) if self._writes else None)
        self._written[version], self.seconds = weights, time.perf_counter() - start
        return path

    def release(self, version: int) -> None:
        """Remove a version that no engine will load again."""
        if self._written.pop(version, None) is not None and self._writes:
            shutil.rmtree(self.folder / adapter_name(version))

    def close(self) -> None:
        """Remove everything."""
        if self._lock is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._lock.close()
            self._lock = None

    def _fill(self, state: Mapping[str, torch.Tensor], folder: Path) -> None:
        entries = [entry_of(key, state[name], self.dtype) for key, name in self._names.items()]
        tensors = {entry.name: entry.tensor() for entry in entries}
        changes = [(tensors[key].float() - state[name].detach().cpu().float()).abs().max()
                   for key, name in self._names.items() if tensors[key].dtype != state[name].dtype]  # fmt: skip
        self.rounding = float(max(changes, default=0.0))
        save_file(tensors, folder / f"{STEM}.safetensors", metadata={"format": "pt"})
        adapter_config(self.trainable).save_pretrained(str(folder))

    def _new_folder(self, parent: str | Path | None) -> str:
        state = self.trainable.family.model.state_dict(keep_vars=True)
        size = COPIES * sum(4 * math.prod(whole_shape(state[name])) for name in self._names.values())
        if parent is None:
            room = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > size
            parent = MEMORY if room else tempfile.gettempdir()
            _remove_abandoned(Path(parent))
        Path(parent).mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(parent).free) < size:
            raise EngineError(f"{parent} has {free / 1e6:,.0f} MB free, {COPIES} adapters need {size / 1e6:,.0f} MB: "
                              "give another vllm_adapter_dir")  # fmt: skip
        folder = tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=Path(parent).resolve())
        os.chmod(folder, 0o755)  # mkdtemp gives 700, and servers may run as another user
        return folder

    def _hold_folder(self) -> None:
        """Lock it while this process lives, so that what SIGKILL leaves is told from what is in use."""
        self.folder.mkdir(parents=True, exist_ok=True)  # on machines other than rank 0's
        begun = self.folder / f"{LOCK}.partial"
        self._lock = open(begun, "w", encoding="utf-8")  # noqa: SIM115 (held until close)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.replace(begun, self.folder / LOCK)


def _remove_abandoned(parent: Path) -> None:
    """Adapters in memory of processes that were killed; a lock that another process holds says that it lives."""
    for lock in parent.glob(f"{FOLDER_PREFIX}*/{LOCK}"):
        with suppress(OSError), open(lock, "r+", encoding="utf-8") as file:  # in use, or another user's
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent)


def _agreed(action: Callable[[], Any] | None) -> Any:
    """What `action` returns on the first rank that has one.

    Raises:
        EngineError: on every rank, where it failed on one.
    """
    value = problem = None
    try:
        value = action() if action else None
    except (OSError, SafetensorError, EngineError) as error:
        problem = str(error)
    every = every_rank((value, problem))
    if problems := [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(every) if problem]:
        raise EngineError(f"the adapter cannot be handed to the engine: {'; '.join(problems)}")
    return next((value for value, _ in every if value is not None), None)
