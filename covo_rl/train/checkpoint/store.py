"""The checkpoints of one run: save, find, verify, load, thin out.

A folder is written under a temporary name and renamed; its manifest, written last, tells whether it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from covo_rl.data.files import write_atomically
from covo_rl.policy.sharding import TensorPiece
from covo_rl.train.checkpoint.manifest import (
    MANIFEST,
    NAME,
    CheckpointError,
    damage,
    explained,
    file_entries,
    flush,
    moment_name,
    moment_of,
    read_manifest,
    write_manifest,
)
from covo_rl.train.checkpoint.tensors import read_tensors, saved_tensors, write_tensors
from covo_rl.train.ranks import Ranks


def write_values(path: Path, values: Mapping[str, Any]) -> None:
    """JSON on disk, flushed. Numbers come back bit for bit, NaN as NaN (data.files.write_json makes it null)."""
    with explained("write", path):
        write_atomically(path, lambda file: json.dump(values, file))


def read_values(path: Path) -> dict[str, Any]:
    with explained("read", path):
        return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class TrainState:
    """A run between two optimiser updates.

    `step` counts finished steps, `update` the optimiser updates of the step under way (0: between steps).
    `shared` is JSON-ready and the same on every rank. `tensors` maps a file stem to tensors: whole ones of rank 0 and,
    where parameters are sharded, each rank's pieces. `rank` and `rank_tensors` belong to this rank. `score`, higher is
    better, decides `keep_best`.
    """

    step: int
    shared: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Any]]  # Tensor, or TensorPiece to save and TensorPieces as read
    rank: Mapping[str, Any] = field(default_factory=dict)
    rank_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    update: int = 0
    score: float | None = None

    @property
    def name(self) -> str:
        return moment_name(self.step, self.update)

    @property
    def pieces(self) -> bool:
        """Whether this rank has pieces to write."""
        return any(isinstance(value, TensorPiece) for tensors in self.tensors.values() for value in tensors.values())


class CheckpointStore:
    """Checkpoints under `folder`. Keeps the `keep_last` newest, and with `keep_best` the one with the best score."""

    def __init__(self, folder: str | Path, keep_last: int = 2, keep_best: bool = False) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last {keep_last}: at least one checkpoint must be kept")
        self.folder, self.keep_last, self.keep_best = Path(folder), keep_last, keep_best

    def all(self) -> list[Path]:
        """Checkpoint folders, oldest first, complete or not."""
        folders = [path for path in self.folder.glob("step_*") if NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(folders, key=moment_of)

    def latest_valid(self) -> tuple[Path | None, list[str]]:
        """The newest complete checkpoint, and what was wrong with newer ones."""
        passed_over = []
        for path in reversed(self.all()):
            problems = damage(path)
            if not problems:
                return path, passed_over
            passed_over.append(f"{path.name}: {'; '.join(problems)}")
        return None, passed_over

    def meant(self, source: str) -> tuple[Path | None, list[str]]:
        """The checkpoint that `--resume SOURCE` means, `auto` the newest complete one (None: there is none), and what
        was wrong with newer ones.

        Raises:
            CheckpointError: no such folder, not a complete checkpoint, or `auto` finds damaged ones only.
        """
        if source == "auto":
            path, passed_over = self.latest_valid()
            if path is None and passed_over:
                raise CheckpointError(
                    f"no checkpoint under {self.folder} is complete: {'; '.join(passed_over)}. Put a copy of one back, "
                    f"or start over with another --output (or move {self.folder} away)"
                )
            return path, passed_over
        there = ", ".join(map(str, self.all())) or "no checkpoints"
        if not (path := Path(source)).is_dir():
            raise CheckpointError(f"--resume {source}: no such folder; there are {there}")
        if (path / "checkpoints").is_dir():
            raise CheckpointError(f"--resume {source} is a run's folder (no {MANIFEST}): name one of its checkpoints")
        self.check(path)
        return path, []

    def check(self, path: Path) -> None:
        """Raise CheckpointError unless it is complete."""
        if problems := damage(path):
            others = ", ".join(p.name for p in self.all() if p != path) or "there is no other"
            raise CheckpointError(f"{path} is not a complete checkpoint: {'; '.join(problems)} (beside it: {others})")

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
                delete(left_behind)
            with explained("create", partial):
                partial.mkdir(parents=True)

        def complete() -> None:
            about = {"step": state.step, "update": state.update, "score": state.score, "world": ranks.world,
                     "tensors": sorted(state.tensors)}  # fmt: skip
            with explained("write", partial):
                write_manifest(partial, about, {name: entry for part in entries for name, entry in part.items()})
                if target.is_dir():
                    self.remove(target)
                os.replace(partial, target)
                flush(self.folder)

        try:
            ranks.together(begin if ranks.main else lambda: None, CheckpointError)
            sharded = any(ranks.gathered(state.pieces))
            written = ranks.together(lambda: _write_rank(partial, state, ranks, sharded), CheckpointError)
            entries = ranks.gathered(written)
            ranks.together(complete if ranks.main else lambda: None, CheckpointError)
        except CheckpointError as error:
            if ranks.main:
                shutil.rmtree(partial, ignore_errors=True)
            names = [path.name for path in self.all()]
            older = f"{names[-1]} is still there" if names else "There is no earlier checkpoint"
            raise CheckpointError(f"checkpoint {state.name} was not saved: {error}. {older}") from error
        ranks.together(self._thin_out if ranks.main else lambda: None, CheckpointError)
        return target

    def load(self, path: str | Path, ranks: Ranks | None = None) -> TrainState:
        """`read` of a checkpoint, once it is checked.

        Raises:
            CheckpointError: incomplete or damaged, or saved in mid-batch by another number of ranks.
        """
        ranks, path = ranks or Ranks.current(), Path(path)
        ranks.together(lambda: self.check(path) if ranks.main else None, CheckpointError)
        return self.read(path, ranks)

    def read(self, path: Path, ranks: Ranks) -> TrainState:
        """A checkpoint for this rank that is known to be complete, as `meant` says: checking reads all of it again.

        With another number of ranks than it was saved with, `rank` is empty where there is nothing to give back.

        Raises:
            CheckpointError: saved in mid-batch by another number of ranks, or it cannot be read.
        """
        about = self.about(path, ranks.world)
        return ranks.together(lambda: _read(path, about, ranks.rank), CheckpointError)

    def about(self, path: Path, world: int) -> dict[str, Any]:
        """The manifest of a checkpoint that `world` ranks can take up; CheckpointError where they cannot."""
        about = read_manifest(path)
        if about["update"] and about["world"] != world:
            raise CheckpointError(
                f"{path.name} was saved in the middle of a generated batch by {about['world']} ranks, and only as many "
                f"can go on with it, not {world}. Name a checkpoint without a dot: "
                f"{', '.join(p.name for p in self.all() if '.' not in p.name) or 'there is none'}"
            )
        return about

    def remove(self, *paths: Path) -> None:
        """Rename, then delete: a half-deleted folder must not look like a checkpoint."""
        for path in paths:
            trash = path.with_name(f".trash-{path.name}")
            delete(trash)
            os.replace(path, trash)
            delete(trash)

    def _thin_out(self) -> None:
        """Those whose manifest is damaged do not count as kept."""
        every, scores = self.all(), {}
        for path in every:
            try:
                scores[path] = read_manifest(path)["score"]
            except CheckpointError:
                continue
        keep = set(list(scores)[-self.keep_last :])
        if self.keep_best:
            scored = [(score, moment_of(path), path) for path, score in scores.items() if score is not None]
            keep |= {path for _, _, path in sorted(scored)[-1:]}
        with explained("thin out", self.folder):
            self.remove(*(set(every) - keep))


def _write_rank(folder: Path, state: TrainState, ranks: Ranks, sharded: bool) -> dict[str, Any]:
    """This rank's files, and what the manifest says of them: rank 0 alone would take long to read those of all."""
    name = f"rank_{ranks.rank:05d}"
    tensors, values = {name: state.rank_tensors}, {name: state.rank}
    if ranks.main:
        values["state"] = state.shared
    if ranks.main or sharded:
        tensors |= {f"{stem}.{ranks.rank:05d}" if sharded else stem: part for stem, part in state.tensors.items()}
    for stem, content in values.items():
        write_values(folder / f"{stem}.json", content)
    for stem, content in tensors.items():
        write_tensors(folder / f"{stem}.safetensors", content)
    with explained("read", folder):
        return file_entries([*(folder / f"{s}.json" for s in values), *(folder / f"{s}.safetensors" for s in tensors)])


def _read(path: Path, about: Mapping[str, Any], rank: int) -> TrainState:
    stem = path / f"rank_{rank:05d}"
    mine = rank < about["world"]
    return TrainState(
        step=about["step"],
        update=about["update"],
        score=about["score"],
        shared={**read_values(path / "state.json"), "world": about["world"]},
        tensors={stem: saved_tensors(path, stem, about["files"]) for stem in about["tensors"]},
        rank=read_values(stem.with_suffix(".json")) if mine else {},
        rank_tensors=read_tensors(stem.with_suffix(".safetensors")) if mine else {},
    )


def delete(path: Path) -> None:
    """A folder with all in it, or a link without what it points to."""
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)
