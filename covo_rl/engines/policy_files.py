"""The policy as files that an engine of other memory reads, under published names: an adapter, or all weights.

    files = AdapterFiles(trainable, dtype=torch.bfloat16)
    path = files.write(12)           .../covo-rl-engine-x7/policy-12: adapter_model.safetensors, adapter_config.json
    files.release(11)
    for path in WeightFiles(trainable, dtype=torch.bfloat16).shards():      one file at a time
        load(path)

vLLM knows prompt blocks by an adapter's name and path, so one that keeps both is served stale. After whole weights an
engine must drop prompt blocks and encoder outputs, which vLLM 0.31 does not do unasked (docs/rollouts.md). Unlike an
export nothing is verified here: the probe (probe.py) asks the engine itself.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from covo_rl.data.files import fill_folder
from covo_rl.engines.base import EngineError
from covo_rl.engines.memory_folder import MemoryFolder, agreed
from covo_rl.policy.entries import entry_of, published_entries, published_weights, shards
from covo_rl.policy.published_adapter import STEM, adapter_config, names_in_memory, whole_state
from covo_rl.policy.sharding import whole_shape
from covo_rl.policy.trainable import Trainable

SHARD_BYTES = 1 << 30
COPIES = 3  # the adapter in use, the next one, and one that is being written


def adapter_name(version: int) -> str:
    """What an engine calls the adapter of a version of the policy."""
    return f"policy-{version}"


class AdapterFiles:
    """Writes the adapter of each version into a folder of its own, below `folder` (default: in memory).

    Making one and `write` are collectives: all ranks call them. Rank 0 writes, for engines that see its folder; with
    `each_machine` one rank of every machine does, for engines in the training processes. LoRA is trained in float32:
    `dtype` is what the engine computes in, `rounding` the largest change that this made to a number of the last write.
    """

    def __init__(
        self, trainable: Trainable, folder: str | Path | None = None, *, dtype: torch.dtype | None = None,
        each_machine: bool = False,
    ) -> None:  # fmt: skip
        if trainable.peft_model is None:
            raise EngineError("a policy without an adapter has no adapter files: its weights are sent whole")
        self.trainable, self.dtype = trainable, dtype
        self.rounding = 0.0
        self._names, state = names_in_memory(trainable), trainable.family.model.state_dict(keep_vars=True)
        self._written: set[int] = set()
        size = sum(4 * math.prod(whole_shape(state[name])) for name in self._names.values())
        self.folder = MemoryFolder(folder, COPIES * size, each_machine=each_machine)

    def write(self, version: int) -> Path:
        """The folder of this version's adapter, whole.

        Raises:
            EngineError: on every rank: it could not be written, or it was, with other weights.
        """
        path = self.folder.path / adapter_name(version)
        state = whole_state(self.trainable.family.model, self._names.values(), keep=self.folder.writes)
        agreed(partial(self._put, state, path) if self.folder.writes else None)
        self._written.add(version)
        return path

    def release(self, version: int) -> None:
        """Remove a version that no engine will load again."""
        if version in self._written and self.folder.writes:
            shutil.rmtree(self.folder.path / adapter_name(version))
        self._written.discard(version)

    def close(self) -> None:
        """Remove everything."""
        self.folder.close()

    def _put(self, state: Mapping[str, torch.Tensor], path: Path) -> None:
        entries = [entry_of(key, state[name], self.dtype) for key, name in self._names.items()]
        tensors = {entry.name: entry.tensor() for entry in entries}
        if not path.is_dir():
            changes = [(tensors[key].float() - state[name].detach().cpu().float()).abs().max()
                       for key, name in self._names.items() if tensors[key].dtype != state[name].dtype]  # fmt: skip
            self.rounding = float(max(changes, default=0.0))
            fill_folder(path, partial(self._fill, tensors))
            return
        there = load_file(path / f"{STEM}.safetensors")  # asked for again, as after a restart
        if any(not torch.equal(there[key], tensor) for key, tensor in tensors.items()):
            raise EngineError(f"{path.name} was written with other weights: an engine that has loaded those would go "
                              "on with them")  # fmt: skip

    def _fill(self, tensors: dict[str, torch.Tensor], folder: Path) -> None:
        save_file(tensors, folder / f"{STEM}.safetensors", metadata={"format": "pt"})
        adapter_config(self.trainable).save_pretrained(str(folder))


class WeightFiles:
    """Written below `folder` (default: in memory) by rank 0. Making one and taking all `shards` are collectives.

    `dtype` is what the engine computes in: weights in float32 are rounded to it.
    """

    def __init__(
        self, trainable: Trainable, folder: str | Path | None = None, *, dtype: torch.dtype | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:  # fmt: skip
        if trainable.peft_model is not None:
            raise EngineError("an adapter is sent as one: merged into 16-bit weights, small updates would vanish")
        self.model, self.dtype = trainable.family.model, dtype
        entries = published_entries(self.model, self.model.state_dict(keep_vars=True), dtype)
        self._sizes = [len(group) for group in shards(entries, shard_bytes)]
        self.folder = MemoryFolder(folder, 2 * max(shard_bytes, *(entry.nbytes for entry in entries)))

    def shards(self) -> Iterator[Path]:
        """Files of the weights as they are now; each is removed when the next one is asked for.

        Raises:
            EngineError: on every rank: one could not be written.
        """
        weights = published_weights(self.model, self.dtype)
        for number, size in enumerate(self._sizes):
            path, tensors = self.folder.path / f"weights-{number:05d}.safetensors", {}
            for _ in range(size):
                name, tensor = next(weights)
                if self.folder.writes:
                    tensors[name] = tensor.cpu().contiguous()
            agreed(partial(save_file, tensors, path) if self.folder.writes else None)
            path.chmod(0o644) if self.folder.writes else None
            yield path
            if self.folder.writes:
                path.unlink()

    def close(self) -> None:
        """Remove everything."""
        self.folder.close()
