"""When a checkpoint is whole: its manifest, written last, has size and sha256 of every file and carries its own digest.

Any changed byte is noticed, of the manifest too; so what it says need not be doubted field by field.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from covo_rl.data.files import file_sha256, write_atomically
from covo_rl.types import UserError

FORMAT = 3  # 2: the manifest had no digest; rates and betas came back from the checkpoint
NAME = re.compile(r"step_\d{6,}(\.\d{3,})?")
MANIFEST = "complete.json"


class CheckpointError(UserError, RuntimeError):
    """A checkpoint could not be written or read; the message says which and what to do."""


@contextmanager
def explained(what: str, path: Path) -> Iterator[None]:
    """Turn a failed write or read into a CheckpointError that names the file and the free space."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        folder = next(p for p in [path, *path.parents, Path(".")] if p.is_dir())
        free = f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free"
        raise CheckpointError(f"cannot {what} {path}: {error} ({free})") from error


def flush(path: Path) -> None:
    """fsync a file or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sealed(about: Mapping[str, Any]) -> str:
    """The text of a manifest; its last entry is the sha256 of what it would be without that."""
    text = json.dumps(about)
    return f'{text[:-1]}, "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"}}'


def file_entries(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """What a manifest says of files: size and sha256 by name."""
    return {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in paths}


def write_manifest(
    folder: Path, about: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """List `files`, by default every one of `folder`, with size and sha256, and flush the folder."""
    files = file_entries(folder.iterdir()) if files is None else files
    text = sealed({"format": FORMAT, **about, "files": dict(sorted(files.items()))})
    with explained("write", folder / MANIFEST):
        write_atomically(folder / MANIFEST, lambda file: file.write(text))
        flush(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, byte for byte as it was written.

    Raises:
        CheckpointError: there is none, it has changed, or it has another format.
    """
    path = folder / MANIFEST
    with explained("read", path):
        if not path.is_file():
            raise CheckpointError(f"no {MANIFEST}: writing it was interrupted")
        text = path.read_bytes().decode()
        content = json.loads(text)
        about = {k: v for k, v in content.items() if k != "sha256"} if isinstance(content, dict) else {}
        older = about.get("format") in range(1, FORMAT) and "sha256" not in content
        if not older and sealed(about) != text:
            raise CheckpointError(f"{MANIFEST} has changed: it is not what its own sha256 says")
    if about.get("format") != FORMAT:
        raise CheckpointError(f"it has checkpoint format {about.get('format')}, this version reads {FORMAT}")
    return about


def damage(folder: Path) -> list[str]:
    """Why `folder` is not a complete checkpoint; empty when every file is there and unchanged."""
    try:
        about = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    problems, name = [], moment_name(about["step"], about["update"])
    if NAME.fullmatch(folder.name) and folder.name != name:
        problems.append(f"it was saved as {name} and has been renamed")
    for name, expected in about["files"].items():
        path = folder / name
        try:
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size != expected["bytes"]:
                problems.append(f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}")
            elif file_sha256(path) != expected["sha256"]:
                problems.append(f"{name} has changed: its sha256 differs")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error}")
    return problems


def moment_name(step: int, update: int = 0) -> str:
    """`step_000012`, or `step_000012.003` after three optimiser updates of the next step."""
    return f"step_{step:06d}" + (f".{update:03d}" if update else "")


def moment_of(path: Path) -> list[int]:
    """[step] or [step, update] of anything that is named after one: these sort by time."""
    return [int(digits) for digits in re.findall(r"\d+", path.name)]
