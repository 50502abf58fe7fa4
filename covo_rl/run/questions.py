"""The rows of a run: which files, which rows train, which are held out, and what is wrong with them. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from covo_rl.config import DataConfig, Options
from covo_rl.data import load_examples, overlap, row_problems
from covo_rl.data.fit import hold_out
from covo_rl.synth import builtin_questions
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
    config = options.data
    builtin = builtin_questions() if config.data is None else {}
    data, eval_data = config.data or builtin["train"], config.eval_data or builtin.get("test")
    files = {name: Path(path) for name, path in (("data", data), ("eval_data", eval_data)) if path is not None}
    folder = config.audio_dir if config.data is not None else None
    eval_folder = config.eval_audio_dir or config.audio_dir if config.eval_data is not None else None

    def load(name: str, audio_dir: str | None) -> list[Example]:
        return load_examples(files[name], audio_dir or files[name].parent, allow_outside=config.allow_outside_audio)

    rows = load("data", folder)
    if not options.eval.evaluate:
        return Rows(rows[: config.limit], [], {"data": files["data"]})
    if "eval_data" in files:
        return Rows(rows[: config.limit], load("eval_data", eval_folder)[: config.eval_limit], files)
    train, held_out = hold_out(rows, config.eval_fraction)
    note = f"no eval_data: {len(held_out)} of {len(rows)} rows are held out, all rows of a clip together"
    return Rows(train[: config.limit], held_out[: config.eval_limit], files, (note,))


def question_problems(rows: Rows, config: DataConfig, longest: float | None) -> list[str]:
    """Broken and over-long clips, duplicate ids, and what training and held-out rows share; empty when all is well."""
    limit = longest if config.long_audio == "error" else None
    problems = [
        f"{name} row {problem.row_id}: {problem.what}"
        for name, part in (("data", rows.train), ("eval_data", rows.held_out))
        for problem in row_problems(part, max_clip_seconds=limit)
    ]
    if rows.held_out and not config.allow_overlap:
        problems += [str(item) for item in overlap(rows.train, rows.held_out) if item.serious]
    return problems
