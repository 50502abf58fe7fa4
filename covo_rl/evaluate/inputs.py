"""Everything an evaluation reads, checked together before anything runs: rows, key, clips, predictions."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from covo_rl.data.files import file_sha256
from covo_rl.evaluate import problems as checks
from covo_rl.evaluate.predictions import read_predictions
from covo_rl.evaluate.problems import EvalInputError
from covo_rl.evaluate.rows import read_examples
from covo_rl.evaluate.sets import EvalSet, key_sha256, version_of
from covo_rl.types import Example


@dataclass(frozen=True)
class Inputs:
    """Rows of an evaluation set, and replies where they come from a file. `warnings` go into the report."""

    eval_set: EvalSet
    data: Path
    audio_dir: Path | None
    examples: tuple[Example, ...]
    predictions: dict[str, list[str]] | None = None
    warnings: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)


def read_inputs(
    eval_set: EvalSet, data: str | Path | None, audio_dir: str | Path | None, *,
    predictions: str | Path | None = None, limit: int | None = None, allow_outside: bool = False,
) -> Inputs:  # fmt: skip
    """Read and check. Without `data` the set is prepared where it can be (builtin).

    Raises:
        EvalInputError: all problems at once: unreadable files, duplicate ids, a broken key, missing clips,
            predictions for unknown ids.
    """
    path, folder = _where(eval_set, data, audio_dir)
    found = read_examples(eval_set, path, folder, hear=predictions is None, allow_outside=allow_outside)
    sha256 = file_sha256(path)
    errors, warnings = checks.key_problems(found, has_answers=eval_set.has_answers)
    version = version_of(eval_set, sha256, found)
    rows = found[:limit]
    if eval_set.rows is not None and len(found) != eval_set.rows:
        warnings.append(f"{path} has {len(found)} rows, {eval_set.title} has {eval_set.rows}")
    replies = None
    if predictions is None:
        errors += checks.clip_problems(rows)
    else:
        try:
            replies = read_predictions(predictions, eval_set.all_reply_keys())
        except EvalInputError as error:
            errors += error.problems
    if replies is not None:
        unknown, _ = checks.prediction_problems(found, replies)
        _, missing = checks.prediction_problems(rows, replies)
        errors, warnings = errors + unknown, warnings + missing
    if errors:
        raise EvalInputError(errors)
    meta = {"data": str(path), "data_sha256": sha256, "answer_key_sha256": key_sha256(found), "version": version,
            "limit": limit, "problems": warnings}  # fmt: skip
    if predictions is not None:
        meta |= {"predictions": str(predictions), "predictions_sha256": file_sha256(predictions)}
    return Inputs(eval_set, path, folder, tuple(rows), replies, tuple(warnings), meta)


def _where(eval_set: EvalSet, data: str | Path | None, audio_dir: str | Path | None) -> tuple[Path, Path | None]:
    if data is None:
        if eval_set.prepare is None:
            raise EvalInputError([f"--set {eval_set.name} needs --data FILE. {eval_set.how_to_get}"])
        return eval_set.prepare()
    path = Path(data)
    if not path.is_file():
        raise EvalInputError([f"--data {path}: no such file (looked in {Path.cwd()}). {eval_set.how_to_get}"])
    return path, Path(audio_dir) if audio_dir is not None else path.parent
