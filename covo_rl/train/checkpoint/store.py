"""The checkpoints of one run: save, find, verify, load, thin out."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from covo_rl.train.checkpoint import files
from covo_rl.train.checkpoint.files import MANIFEST, CheckpointError
from covo_rl.train.ranks import Ranks

FORMAT = 1
NAME = re.compile(r"step_(\d{6,})(?:\.(\d{3,}))?")


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
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.keep_best = keep_best

    def all(self) -> list[Path]:
        """Checkpoint folders, oldest first, complete or not."""
        if not self.folder.is_dir():
            return []
        matches = ((NAME.fullmatch(path.name), path) for path in self.folder.iterdir() if path.is_dir())
        return [path for _, path in sorted((_order(match), path) for match, path in matches if match)]

    def latest_valid(self) -> tuple[Path | None, list[str]]:
        """The newest complete checkpoint, and what was wrong with newer ones."""
        passed_over = []
        for path in reversed(self.all()):
            found = files.damage(path)
            if not found:
                return path, passed_over
            passed_over.append(f"{path.name}: {'; '.join(found)}")
        return None, passed_over

    def save(self, state: TrainState, ranks: Ranks | None = None) -> Path:
        """Write `state`; a collective over all ranks. A complete checkpoint of the same moment is left as it is.

        Raises:
            CheckpointError: on every rank, when any of them could not write (a full disk); older ones are untouched.
        """
        ranks = ranks or Ranks.current()
        target, partial = self.folder / state.name, self.folder / f".partial-{state.name}"
        if ranks.from_main(ranks.main and target.is_dir() and not files.damage(target)):
            return target
        try:
            if ranks.main:
                self._clear()
            ranks.together(lambda: _make(partial) if ranks.main else None, CheckpointError)
            ranks.together(lambda: _write_rank(partial, state, ranks), CheckpointError)
            ranks.together(
                lambda: self._complete(partial, target, state, ranks) if ranks.main else None, CheckpointError
            )
        except CheckpointError as error:
            if ranks.main:
                shutil.rmtree(partial, ignore_errors=True)
            kept = self.all()
            raise CheckpointError(
                f"checkpoint {state.name} was not saved: {error}. "
                + (f"{kept[-1].name} is still there" if kept else "There is no earlier checkpoint")
            ) from error
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
        if found := ranks.from_main(files.damage(path) if ranks.main else None):
            raise CheckpointError(f"{path} is not a complete checkpoint: {'; '.join(found)}")
        about = files.read_json(path / MANIFEST)
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
            shared={**files.read_json(path / "state.json"), "world": about["world"]},
            tensors={name: files.read_tensors(path / f"{name}.safetensors") for name in about["tensors"]},
            rank=files.read_json(stem.with_suffix(".json")) if mine else {},
            rank_tensors=files.read_tensors(stem.with_suffix(".safetensors")) if mine else {},
        )

    def remove_all(self) -> None:
        """Delete every checkpoint, for a run that starts over."""
        for path in self.all():
            self._remove(path)

    def _complete(self, partial: Path, target: Path, state: TrainState, ranks: Ranks) -> None:
        for name, tensors in state.tensors.items():
            files.write_tensors(partial / f"{name}.safetensors", tensors)
        files.write_json(partial / "state.json", state.shared)
        about = {"format": FORMAT, "step": state.step, "update": state.update, "score": state.score,
                 "world": ranks.world, "tensors": sorted(state.tensors)}  # fmt: skip
        with files.explained("write", partial):
            files.write_manifest(partial, about)
            if target.is_dir():
                self._remove(target)
            os.replace(partial, target)
            files.flush(self.folder)

    def _clear(self) -> None:
        """Remove what an interrupted save or clean-up left behind."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name.startswith((".partial-", ".trash-")):
                    shutil.rmtree(path, ignore_errors=True)

    def _remove(self, path: Path) -> None:
        """Rename, then delete: a half-deleted folder must not look like a checkpoint."""
        trash = path.with_name(f".trash-{path.name}")
        shutil.rmtree(trash, ignore_errors=True)
        os.replace(path, trash)
        shutil.rmtree(trash, ignore_errors=True)

    def _thin_out(self) -> None:
        every = self.all()
        kept = set(every[-self.keep_last :])
        if self.keep_best:
            scores = {path: _score(path) for path in every}
            scored = [path for path in every if scores[path] is not None]
            if scored:
                kept.add(max(scored, key=lambda path: (scores[path], path.name)))
        for path in every:
            if path not in kept:
                self._remove(path)


def _order(match: re.Match[str]) -> tuple[int, int]:
    return int(match[1]), int(match[2] or 0)


def _make(partial: Path) -> None:
    with files.explained("create", partial):
        partial.mkdir(parents=True)


def _write_rank(partial: Path, state: TrainState, ranks: Ranks) -> None:
    stem = partial / f"rank_{ranks.rank:05d}"
    files.write_json(stem.with_suffix(".json"), state.rank)
    files.write_tensors(stem.with_suffix(".safetensors"), state.rank_tensors)


def _score(path: Path) -> float | None:
    try:
        return files.read_json(path / MANIFEST)["score"]
    except CheckpointError:
        return None  # incomplete, so never the best one
