"""Helpers of the tests of timelines: what lies in a run folder, and deaths at a chosen moment."""

import os
import shutil
import sys
from pathlib import Path

from covo_rl.train.checkpoint import CheckpointStore, timeline

sys.path.insert(0, str(Path(__file__).parents[1]))
from deaths import killed_at


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def contents(folder):
    """Every file below, by relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(checkpoint):
    return (checkpoint / "weights.safetensors").read_bytes()


def step(folder, number):
    return folder / "checkpoints" / f"step_{number:06d}"


def set_keep_last(monkeypatch, number):
    original = CheckpointStore.__init__
    monkeypatch.setattr(CheckpointStore, "__init__", lambda self, folder, *more: original(self, folder, number))


def copy_of(folder, target):
    shutil.copytree(folder, target, dirs_exist_ok=True)
    return target


def dies_at(number, monkeypatch, action):
    """Run `action`, dying before the `number`-th change that the move makes on disk; whether it got so far."""
    places = [(timeline, "write_values"), (os, "replace"), (os, "truncate")]
    return killed_at(number, monkeypatch, places, action)[0]


def damage_all(run):
    for path in (run / "checkpoints").iterdir():
        file = path / "optimizer.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
