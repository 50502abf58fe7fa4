"""All weights of a policy without adapter, shard by shard, as files that an engine of other memory loads.

    files = WeightFiles(trainable, dtype=torch.bfloat16)
    for path in files.shards():              one file at a time: the one before it is gone
        load(path)

Published names, so an engine loads them as it loads a checkpoint. It must drop its prompt blocks and encoder outputs
itself, or be told to: vLLM 0.31 does not (docs/rollouts.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from covo_rl.engines.base import EngineError
from covo_rl.engines.memory_folder import MemoryFolder, agreed
from covo_rl.policy.entries import published_entries, published_weights, shards
from covo_rl.policy.trainable import Trainable

SHARD_BYTES = 1 << 30


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
