"""Tensors of a checkpoint <-> safetensors: whole in one file, or in the pieces of each rank in a file of its own.

weights.safetensors                                       whole tensors, written by rank 0
weights.00000.safetensors, weights.00001.safetensors      sharded: the header's `pieces` says where each lies
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from covo_rl.policy.sharding import TensorPiece, TensorPieces
from covo_rl.train.checkpoint.manifest import CheckpointError, explained, flush


def write_tensors(path: Path, tensors: Mapping[str, Tensor | TensorPiece]) -> None:
    """safetensors on disk, flushed; the header says of what the pieces are. Tensors are copied to the CPU."""
    pieces = {name: value for name, value in tensors.items() if isinstance(value, TensorPiece)}
    places = json.dumps({name: [piece.start, piece.shape] for name, piece in sorted(pieces.items())})
    held = {**tensors, **{name: piece.tensor for name, piece in pieces.items()}}
    contents = {name: value.detach().cpu().contiguous() for name, value in held.items()}
    with explained("write", path):
        save_file(contents, path, metadata={"pieces": places} if pieces else None)
        flush(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    with explained("read", path):
        return load_file(path)


def saved_tensors(folder: Path, stem: str, names: Iterable[str]) -> dict[str, Tensor | TensorPieces]:
    """What STEM.safetensors or the STEM.NNNNN.safetensors of all ranks hold, of those `names` that a folder has.

    Files are mapped: what nobody looks at is not read.

    Raises:
        CheckpointError: a file cannot be read, or the pieces of a tensor do not make one.
    """
    pieces: dict[str, list[TensorPiece]] = defaultdict(list)
    for path in sorted(folder / name for name in names if re.fullmatch(rf"{stem}(\.\d+)?\.safetensors", name)):
        with explained("read", path), safe_open(path, framework="pt") as file:
            places = json.loads((file.metadata() or {}).get("pieces", "{}"))
            for name in file.keys():  # noqa: SIM118 (no mapping)
                tensor = file.get_tensor(name)
                start, shape = places.get(name, ([0] * tensor.dim(), tensor.shape))
                pieces[name].append(TensorPiece(tensor, start, shape))
    joined = {name: TensorPieces(parts) for name, parts in pieces.items()}
    if unfit := sorted(name for name, value in joined.items() if not value.complete):
        raise CheckpointError(f"{folder}: the pieces of {', '.join(unfit[:3])} ({len(unfit)}) do not make a tensor: "
                              "some are missing, or files of another checkpoint lie beside them")  # fmt: skip
    return {name: value.pieces[0].tensor if len(value.pieces) == 1 else value for name, value in joined.items()}
