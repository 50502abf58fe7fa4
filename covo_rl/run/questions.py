"""The rows of a run: which files, which rows train, which are held out, and what is wrong with them. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from covo_rl import data
from covo_rl.config import DataConfig, Options
from covo_rl.data.fit import hold_out
from covo_rl.synth import builtin
from covo_rl.types import Example


@dataclass(frozen=True)
class Rows:
    """`files` maps data and eval_data to the question files; `notes` are lines for the user."""

    train: list[Example]
    held_out: list[Example]
    files: Mapping[str, Path]
    notes: tuple[str, ...] = ()


def read_questions(options: Options) -> Rows:
    """Training and held-out rows. Without `data` the built-in set, rendered on first use.

    Without `eval_data` a share of the user's rows is held out, all rows of a clip on the same side.

    Raises:
        DataError: rows that cannot be used, all named.
    """
    given = options.data
    files = _files(given)
    rows = _load(given, *files["data"])
    paths = {name: path for name, (path, _) in files.items()}
    if not options.eval.evaluate:
        return Rows(rows[: given.limit], [], {"data": paths["data"]})
    if "eval_data" in files:
        return Rows(rows[: given.limit], _load(given, *files["eval_data"])[: given.eval_limit], paths)
    train, held_out = hold_out(rows, given.eval_fraction)
    note = f"no eval_data: {len(held_out)} of {len(rows)} rows are held out, all rows of a clip together"
    return Rows(train[: given.limit], held_out[: given.eval_limit], paths, (note,))


def question_problems(rows: Rows, given: DataConfig, longest: float | None) -> list[str]:
    """Broken and over-long clips, duplicate ids, and what training and held-out rows share; empty when all is well."""
    limit = longest if given.long_audio == "error" else None
    found = [
        f"{name} row {problem.row_id}: {problem.what}"
        for name, part in (("data", rows.train), ("eval_data", rows.held_out))
        for problem in data.row_problems(part, max_clip_seconds=limit)
    ]
    if rows.held_out and not given.allow_overlap:
        found += [str(item) for item in data.overlap(rows.train, rows.held_out) if item.serious]
    return found


def _files(given: DataConfig) -> dict[str, tuple[Path, str]]:
    """Name -> (questions, audio folder)."""
    if given.data is None:
        rendered = builtin.questions()
        files = {name: (rendered[split], str(rendered[split].parent))
                 for name, split in (("data", "train"), ("eval_data", "test"))}  # fmt: skip
    else:
        files = {"data": (Path(given.data), given.audio_dir or str(Path(given.data).parent))}
    if given.eval_data is not None:
        folder = given.eval_audio_dir or given.audio_dir or str(Path(given.eval_data).parent)
        files["eval_data"] = (Path(given.eval_data), folder)
    return files


def _load(given: DataConfig, path: Path, audio_dir: str) -> list[Example]:
    return data.load_examples(str(path), audio_dir, allow_outside=given.allow_outside_audio)
