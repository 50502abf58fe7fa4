"""The checkpoints of one run: save, find, verify, load, thin out.

A folder is written under a temporary name and renamed; its manifest, written last, tells whether it is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from covo_rl.data.files import file_sha256, write_atomically
from covo_rl.train.ranks import Ranks
from covo_rl.types import UserError

FORMAT = 2
NAME = re.compile(r"step_\d{6,}(\.\d{3,})?")
MANIFEST = "complete.json"


class CheckpointError(UserError, RuntimeError):
    """A checkpoint could not be written or read; the message says which and what to do."""


@contextmanager
def explained(what: str, path: Path) -> Iterator[None]:
    """Turn a failed write or read into a CheckpointError that names the file and the free space."""
    try:
        yield
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
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


def write_values(path: Path, values: Mapping[str, Any]) -> None:
    """JSON on disk, flushed. Numbers come back bit for bit, NaN as NaN (data.files.write_json makes it null)."""
    with explained("write", path):
        write_atomically(path, lambda file: json.dump(values, file))


def read_values(path: Path) -> dict[str, Any]:
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
    entries = {p.name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in sorted(folder.iterdir())}
    write_values(folder / MANIFEST, {**about, "files": entries})
    flush(folder)


def damage(folder: Path) -> list[str]:
    """Why `folder` is not a complete checkpoint; empty when every file is there and unchanged."""
    if not (folder / MANIFEST).is_file():
        return [f"no {MANIFEST}: writing it was interrupted"]
    try:
        entries = read_values(folder / MANIFEST)["files"]
    except (CheckpointError, KeyError) as error:
        return [f"{MANIFEST} cannot be read: {error}"]
    problems = []
    for name, expected in entries.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != expected["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}")
        elif file_sha256(path) != expected["sha256"]:
            problems.append(f"{name} has changed: its sha256 differs")
    return problems


@dataclass(frozen=True)
class TrainState:
    """A run between two optimiser updates.

    `step` counts finished steps, `update` the optimiser updates of the step under way (0: between steps).
    `shared` is JSON-ready and the same on every rank; `tensors` maps a file stem to tensors (only rank 0's are
    written). `rank` and `rank_tensors` belong to this rank. `score`, higher is better, decides `keep_best`.
    """

    step: int
    shared: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]]
    rank: Mapping[str, Any] = field(default_factory=dict)
    rank_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    update: int = 0
    score: float | None = None

    @property
    def name(self) -> str:
        return f"step_{self.step:06d}" + (f".{self.update:03d}" if self.update else "")


class CheckpointStore:
    """Checkpoints under `folder`. Keeps the `keep_last` newest, and with `keep_best` the one with the best score."""

    def __init__(self, folder: str | Path, keep_last: int = 2, keep_best: bool = False) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last {keep_last}: at least one checkpoint must be kept")
        self.folder, self.keep_last, self.keep_best = Path(folder), keep_last, keep_best

    def all(self) -> list[Path]:
        """Checkpoint folders, oldest first, complete or not."""
        folders = [path for path in self.folder.glob("step_*") if NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(folders, key=lambda path: [int(digits) for digits in re.findall(r"\d+", path.name)])

    def latest_valid(self) -> tuple[Path | None, list[str]]:
        """The newest complete checkpoint, and what was wrong with newer ones."""
        passed_over = []
        for path in reversed(self.all()):
            problems = damage(path)
            if not problems:
                return path, passed_over
            passed_over.append(f"{path.name}: {'; '.join(problems)}")
        return None, passed_over

    def save(self, state: TrainState, ranks: Ranks | None = None) -> Path:
        """Write `state`; a collective over all ranks. A complete checkpoint of the same moment is left as it is.

        Raises:
            CheckpointError: on every rank, when any of them could not write (a full disk); older ones are untouched.
        """
        ranks = ranks or Ranks.current()
        target, partial = self.folder / state.name, self.folder / f".partial-{state.name}"
        if ranks.from_main(ranks.main and target.is_dir() and not damage(target)):
            return target

        def begin() -> None:
            for left_behind in [*self.folder.glob(".partial-*"), *self.folder.glob(".trash-*")]:
                shutil.rmtree(left_behind, ignore_errors=True)
            with explained("create", partial):
                partial.mkdir(parents=True)

        def write_rank() -> None:
            stem = partial / f"rank_{ranks.rank:05d}"
            write_values(stem.with_suffix(".json"), state.rank)
            write_tensors(stem.with_suffix(".safetensors"), state.rank_tensors)

        def complete() -> None:
            for name, tensors in state.tensors.items():
                write_tensors(partial / f"{name}.safetensors", tensors)
            write_values(partial / "state.json", state.shared)
            about = {"format": FORMAT, "step": state.step, "update": state.update, "score": state.score,
                     "world": ranks.world, "tensors": sorted(state.tensors)}  # fmt: skip
            with explained("write", partial):
                write_manifest(partial, about)
                if target.is_dir():
                    self.remove(target)
                os.replace(partial, target)
                flush(self.folder)

        try:
            for stage, everybody in ((begin, False), (write_rank, True), (complete, False)):
                ranks.together(stage if everybody or ranks.main else lambda: None, CheckpointError)
        except CheckpointError as error:
            if ranks.main:
                shutil.rmtree(partial, ignore_errors=True)
            names = [path.name for path in self.all()]
            older = f"{names[-1]} is still there" if names else "There is no earlier checkpoint"
            raise CheckpointError(f"checkpoint {state.name} was not saved: {error}. {older}") from error
        if ranks.main:
            self._thin_out()
        return target

    def load(self, path: str | Path, ranks: Ranks | None = None) -> TrainState:
        """Read a complete checkpoint for this rank.

        With another number of ranks than it was saved with, `rank` is empty where there is nothing to give back.

        Raises:
            CheckpointError: incomplete or damaged, or saved in mid-batch by another number of ranks.
        """
        ranks, path = ranks or Ranks.current(), Path(path)
        if problems := ranks.from_main(damage(path) if ranks.main else None):
            raise CheckpointError(f"{path} is not a complete checkpoint: {'; '.join(problems)}")
        about = read_values(path / MANIFEST)
        if about["format"] != FORMAT:
            raise CheckpointError(f"{path} has checkpoint format {about['format']}, this version reads {FORMAT}")
        if about["update"] and about["world"] != ranks.world:
            raise CheckpointError(
                f"{path.name} was saved in the middle of a generated batch by {about['world']} ranks, and only as many "
                f"can go on with it, not {ranks.world}. Name a checkpoint without a dot: "
                f"{', '.join(p.name for p in self.all() if '.' not in p.name) or 'there is none'}"
            )
        stem = path / f"rank_{ranks.rank:05d}"
        mine = ranks.rank < about["world"]
        return TrainState(
            step=about["step"],
            update=about["update"],
            score=about["score"],
            shared={**read_values(path / "state.json"), "world": about["world"]},
            tensors={name: read_tensors(path / f"{name}.safetensors") for name in about["tensors"]},
            rank=read_values(stem.with_suffix(".json")) if mine else {},
            rank_tensors=read_tensors(stem.with_suffix(".safetensors")) if mine else {},
        )

    def remove(self, *paths: Path) -> None:
        """Rename, then delete: a half-deleted folder must not look like a checkpoint."""
        for path in paths:
            trash = path.with_name(f".trash-{path.name}")
            shutil.rmtree(trash, ignore_errors=True)
            os.replace(path, trash)
            shutil.rmtree(trash, ignore_errors=True)

    def _thin_out(self) -> None:
        every = self.all()
        keep = set(every[-self.keep_last :])
        if self.keep_best:
            scored = [(score, path.name, path) for path in every if (score := _score(path)) is not None]
            keep |= {path for _, _, path in sorted(scored)[-1:]}
        self.remove(*(set(every) - keep))


def _score(path: Path) -> float | None:
    try:
        return read_values(path / MANIFEST)["score"]
    except CheckpointError:
        return None  # incomplete, so never the best one
