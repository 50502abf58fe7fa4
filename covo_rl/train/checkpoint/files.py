"""Writing so that a file is whole or absent, and a manifest that tells which."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from covo_rl.data.files import file_sha256

MANIFEST = "complete.json"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which and what to do."""


@contextmanager
def explained(what: str, path: Path) -> Iterator[None]:
    """Turn a failed write or read into a CheckpointError that names the file and the free space."""
    try:
        yield
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"cannot {what} {path}: {error} ({free_space(path)})") from error


def free_space(path: Path) -> str:
    """How much room is left where `path` is, in words."""
    folder = next((p for p in [path, *path.parents] if p.is_dir()), Path("."))
    status = os.statvfs(folder)
    return f"{status.f_bavail * status.f_frsize / 1e9:.1f} GB free"


def flush(path: Path) -> None:
    """fsync a file or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """JSON on disk, flushed; the folder it is in is renamed as a whole. Numbers come back bit for bit, NaN as NaN."""
    with explained("write", path), open(path, "w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any]:
    with explained("read", path):
        return json.loads(path.read_text(encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """safetensors on disk, flushed. Tensors are copied to the CPU."""
    with explained("write", path):
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
        flush(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    with explained("read", path):
        return load_file(path)


def write_manifest(folder: Path, about: Mapping[str, Any]) -> None:
    """List every file of `folder` with size and sha256, and flush the folder."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in sorted(folder.iterdir())
    }
    write_json(folder / MANIFEST, {**about, "files": files})
    flush(folder)


def damage(folder: Path) -> list[str]:
    """Why `folder` is not a complete checkpoint; empty when every file is there and unchanged."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return [f"no {MANIFEST}: writing it was interrupted"]
    try:
        files = read_json(manifest)["files"]
    except (CheckpointError, KeyError) as error:
        return [f"{MANIFEST} cannot be read: {error}"]
    found = []
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != expected["bytes"]:
            found.append(f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}")
        elif file_sha256(path) != expected["sha256"]:
            found.append(f"{name} has changed: its sha256 differs")
    return found
