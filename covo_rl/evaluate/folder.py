"""The folder of an evaluation or a profile: one owner, one setting, nothing written over unasked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from covo_rl.data.files import plain, read_record, write_json
from covo_rl.evaluate.sets import EvalInputError
from covo_rl.records.lock import FolderLock
from covo_rl.train.ranks import Ranks

#: what an evaluation or a profile writes beside run.json
WRITTEN = (
    "rows*.jsonl", "scores.jsonl", "report.json", "report.md", "submission.json", "accuracy.png", "audio_length.png",
    "listening.png", "audio/*.wav", "profile.json", "profile.jsonl", "filtered.json", "filtered.jsonl",
    "filtered.parquet",
)  # fmt: skip


def joined_ranks() -> Ranks:
    """This process among those that accelerate or torchrun started, if they did."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from covo_rl.train.launch import process_state

        process_state()
    return Ranks.current()


@contextmanager
def owned(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Within this, nobody else evaluates into the folder.

    Raises:
        EvalInputError: on every rank: somebody does.
    """
    lock = FolderLock(folder)
    if why := ranks.from_main(lock.hold() if ranks.main else None):
        raise EvalInputError([why])
    try:
        yield
    finally:
        lock.release()


def check_folder(folder: Path, settings: Mapping[str, Any], ranks: Ranks, *, overwrite: bool = False) -> None:
    """Whether an evaluation with these settings may go on, or start, in the folder; changes nothing.

    Raises:
        EvalInputError: on every rank: it holds another evaluation (the differing settings are named), or rows or a
            report that nobody claims.
    """
    if problems := ranks.from_main(_folder_problems(folder, plain(settings)) if ranks.main and not overwrite else None):
        raise EvalInputError(problems)


def _folder_problems(folder: Path, settings: Mapping[str, Any]) -> list[str]:
    path = folder / "run.json"
    if not path.is_file():
        names = ", ".join(file.name for pattern in WRITTEN for file in sorted(folder.glob(pattern)))
        origin = f"{folder} holds {names} of unknown origin (no run.json); choose another --output, or --overwrite"
        return [origin] if names else []
    try:
        there = read_record(path)
    except ValueError as error:
        return [f"{error}; choose another --output, or --overwrite"]
    both = {key: (there.get(key), settings.get(key)) for key in sorted({*there, *settings})}
    for name in ("model", "adapter"):  # the same weights by another path, as from another working directory
        old, new = both.get(f"{name}_sha256", (None, None))
        if old and old == new:
            del both[name]
    differing = [f"{key}: {old!r} there, {new!r} now" for key, (old, new) in both.items() if old != new]
    advice = f"{folder} holds another evaluation (choose another --output, or --overwrite):"
    return [advice, *differing] if differing else []


def claim_folder(folder: Path, settings: Mapping[str, Any], ranks: Ranks, *, overwrite: bool = False) -> None:
    """Write run.json, where it is not there; with `overwrite` delete what an evaluation wrote before, and no more.

    Raises:
        EvalInputError: on every rank: the folder cannot be written.
    """

    def claim() -> str | None:
        try:
            if overwrite or not (folder / "run.json").is_file():
                for file in [file for pattern in WRITTEN for file in folder.glob(pattern)]:
                    file.unlink()
                write_json(folder / "run.json", settings)
        except OSError as error:
            return f"{folder} cannot be written: {error}"
        return None

    if problem := ranks.from_main(claim() if ranks.main else None):
        raise EvalInputError([problem])
