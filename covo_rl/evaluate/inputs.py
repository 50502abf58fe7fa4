"""Everything an evaluation reads, checked together before anything runs: rows, key, clips, predictions.

Training reads a key helpfully (letters and indices become option texts); an official scorer compares what the file
says. So ids, questions, options and answers come from the file as they stand, and only the clips through covo_rl.data.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covo_rl.data.check import facts_by_row
from covo_rl.data.delimited import SUFFIXES
from covo_rl.data.files import file_sha256, json_values
from covo_rl.data.memory import IN_MEMORY
from covo_rl.evaluate.sets import EvalInputError, EvalSet, key_sha256, version_of
from covo_rl.resolve import column_map, meant
from covo_rl.types import Clip, Example, visible

if TYPE_CHECKING:
    from covo_rl.data.memory import Source

#: So many row names are listed for one problem.
SHOWN = 20
#: Share of rows whose answer may be missing from the options before the file is refused as broken.
MAX_BAD_KEYS = 0.05
#: Names tried after a set's own; `choice_a ... choice_d` is written as one string.
USUAL = {
    "id": ("id",),
    "audio": ("audio_id", "audio_path", "audio"),
    "question": ("question",),
    "choices": ("choices", "choice_a choice_b choice_c choice_d"),
    "answer": ("answer", "answer_gt"),
}


@dataclass(frozen=True)
class Inputs:
    """Rows of an evaluation set, and replies where they come from a file. `meta` goes into the report."""

    eval_set: EvalSet
    data: Path
    examples: tuple[Example, ...]
    predictions: dict[str, list[str]] | None = None
    meta: dict[str, Any] = field(default_factory=dict)


def read_inputs(
    eval_set: EvalSet, data: Source | None, audio_dir: str | Path | None, *,
    predictions: str | Path | None = None, limit: int | None = None, allow_outside: bool = False,
    columns: str | Mapping[str, str] | None = None,
) -> Inputs:  # fmt: skip
    """Read and check. Without `data` the set is prepared where it can be (builtin); a folder, a set of the hub and rows
    in memory are read as for training, by the fields that they have.

    Raises:
        EvalInputError: all problems at once: unreadable files, duplicate ids, a broken key, missing clips,
            predictions for unknown ids.
    """
    if data is None and eval_set.prepare is not None:
        data, audio_dir = eval_set.prepare()
    if data is None:
        raise EvalInputError([f"--set {eval_set.name} needs --data FILE. {eval_set.how_to_get}"])
    names = column_map(columns, "--columns")
    path = Path(data if isinstance(data, str | os.PathLike) else IN_MEMORY)
    is_file = not (str(path) == IN_MEMORY or path.is_dir() or str(path).startswith("hf:"))
    if not is_file:
        if eval_set.submission:
            raise EvalInputError([f"{eval_set.name} is submitted in the form of its own file: give that as data"])
        all_rows = _load(data, audio_dir, names, allow_outside=allow_outside, strict=False)
    else:
        if not path.is_file():
            where = f"no such file (looked in {Path.cwd()}){meant(path)}"
            raise EvalInputError([f"--data {path}: {where}. {eval_set.how_to_get}"])
        folder = Path(audio_dir) if audio_dir is not None else path.parent
        all_rows = _read_examples(eval_set, path, folder, names, hear=predictions is None, allow_outside=allow_outside)
    rows = all_rows[:limit]
    errors, warnings = _key_problems(all_rows, has_answers=eval_set.has_answers)
    if eval_set.rows is not None and len(all_rows) != eval_set.rows:
        warnings.append(f"{path} has {len(all_rows)} rows, {eval_set.title} has {eval_set.rows}")
    replies = None
    if predictions is None:
        errors += clip_problems(rows)
    else:
        try:
            replies = _read_predictions(predictions, eval_set.all_reply_keys())
        except EvalInputError as error:
            errors += error.problems
        ids = {e.id for e in all_rows}
        if unknown := [name for name in replies or () if name not in ids]:
            errors.append(f"predictions for unknown ids in {count_rows(unknown)}; not in the data")
        if replies is not None and (missing := [e.id for e in rows if e.id not in replies]):
            warnings.append(f"no prediction for {count_rows(missing)}; counted as wrong")
    if errors:
        raise EvalInputError(errors)
    sha256 = file_sha256(path) if is_file else _rows_sha256(all_rows)
    meta = {"data": str(path), "data_sha256": sha256, "answer_key_sha256": key_sha256(all_rows),
            "version": version_of(eval_set, sha256, all_rows), "limit": limit, "problems": warnings}  # fmt: skip
    meta |= {"columns": names} if names else {}
    if predictions is not None:
        meta |= {"predictions": str(predictions), "predictions_sha256": file_sha256(predictions)}
    return Inputs(eval_set, path, tuple(rows), replies, meta)


def count_rows(ids: Sequence[str]) -> str:
    """`3 rows: a, b, c`, cut after SHOWN names."""
    more = f", ... ({len(ids) - SHOWN} more)" if len(ids) > SHOWN else ""
    return f"{len(ids)} row{'s' * (len(ids) != 1)}: {', '.join(map(visible, ids[:SHOWN]))}{more}"


def repeated_ids(ids: Sequence[str]) -> list[str]:
    return [name for name, count in Counter(ids).items() if count > 1]


# -- files -----------------------------------------------------------------------------------------------------------


def read_json_rows(path: str | Path) -> list[Any]:
    """The rows of a JSON list, a JSON object with one list in it, or JSON lines.

    Raises:
        EvalInputError: the file does not exist or is half-written: every unreadable line is named.
    """
    path = Path(path)
    if not path.is_file():
        raise EvalInputError([f"{path}: no such file (looked in {Path.cwd()}){meant(path)}"])
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text)
    except UnicodeDecodeError as error:
        raise EvalInputError([f"{path}: not UTF-8 at byte {error.start}; was the file cut or is it binary?"]) from None
    except ValueError as error:
        if text.lstrip()[:1] == "[":
            starts = text.count('"id"')
            what = f"{error}; {starts} rows begin before the end of the file"
            raise EvalInputError([f"{path}: not valid JSON, half-written? {what}"]) from None
        lines = list(json_values(text.split("\n")))
        if broken := [(number, line) for number, line, _, problem in lines if problem]:
            raise EvalInputError([
                f"{path}, line {number}: not JSON, half-written? It begins {line[:60]!r}"
                for number, line in broken[:SHOWN]
            ]) from None  # fmt: skip
        return [value for _, _, value, _ in lines]
    lists = [value for value in content.values() if isinstance(value, list)] if isinstance(content, dict) else []
    if isinstance(content, list):
        return content
    return lists[0] if len(lists) == 1 and "id" not in content else [content]


def _read_predictions(path: str | Path, keys: Sequence[str]) -> dict[str, list[str]]:
    """id -> replies (usually one). Rows whose reply is absent, null or not text give no entry: they count as missing.

    A list of samples under `replies` (written by this tool) wins over the single reply beside it.

    Raises:
        EvalInputError: unreadable file, rows without id, no reply key anywhere, duplicate ids; all at once, rows named.
    """
    rows, problems = read_json_rows(path), []
    if not rows:
        problems.append(f"{path}: no predictions in it")
    if nameless := [str(n) for n, row in enumerate(rows, 1) if not isinstance(row, dict) or "id" not in row]:
        problems.append(f"{path}: no id in {count_rows(nameless)} (counted from 1)")
    rows = [row for row in rows if isinstance(row, dict) and "id" in row]
    silent = [str(row["id"]) for row in rows if not any(key in row for key in (*keys, "replies"))]
    if silent and len(silent) == len(rows):
        problems.append(f"{path}: none of the keys {', '.join(keys)} in {count_rows(silent)}")
    if twice := repeated_ids([str(row["id"]) for row in rows]):
        problems.append(f"{path}: duplicate ids in {count_rows(twice)}")
    if problems:
        raise EvalInputError(problems)
    replies = {}
    for row in rows:
        texts = row.get("replies")
        if not isinstance(texts, list) or len(texts) < 2:
            single = next((row[key] for key in keys if row.get(key) is not None), None)
            texts = single if isinstance(single, list) else [single]
        if all(isinstance(text, str) for text in texts):
            replies[str(row["id"])] = texts
    return replies


def _read_examples(
    eval_set: EvalSet, path: Path, folder: Path, columns: Mapping[str, str], *, hear: bool, allow_outside: bool
) -> list[Example]:
    """The rows in the order of the file. `hear`: clips are needed, so that their paths are resolved strictly.

    A set that names no fields (training data), tables other than JSON and rows with mapped columns are read by
    covo_rl.data alone.

    Raises:
        EvalInputError: everything that cannot be read, rows named.
    """
    if columns or not eval_set.fields or path.suffix.lower() in (".parquet", *SUFFIXES):
        return _load(path, folder, columns, allow_outside=allow_outside, strict=not eval_set.fields)
    names = {noun: list(dict.fromkeys((eval_set.fields.get(noun, usual[0]), *usual))) for noun, usual in USUAL.items()}
    outcomes = [_read_row(row, number, names) for number, row in enumerate(read_json_rows(path), start=1)]
    if problems := [problem for problem in outcomes if isinstance(problem, str)]:
        raise EvalInputError([f"{path}: {problem}" for problem in problems[:50]])
    examples = [example for example in outcomes if isinstance(example, Example)]
    if hear and not eval_set.own:
        sounds = [example.clips for example in _load(path, folder, {}, allow_outside=allow_outside, strict=False)]
        return [replace(example, clips=clips) for example, clips in zip(examples, sounds, strict=True)]
    for example in examples if hear and not allow_outside else ():
        for name in [clip.path or "" for clip in example.clips]:
            if not (folder / name).resolve().is_relative_to(folder.resolve()):
                raise EvalInputError([visible(f"row {example.id}: {name} leaves {folder}")])
    return [replace(e, clips=tuple(Clip(path=str(folder / (c.path or ""))) for c in e.clips)) for e in examples]


def _rows_sha256(rows: Sequence[Example]) -> str:
    from covo_rl.train.checkpoint.identity import rows_sha256  # torch, which scoring a file does without

    return rows_sha256(rows)


def _load(
    source: Source, folder: str | Path | None, columns: Mapping[str, str], *, allow_outside: bool, strict: bool
) -> list[Example]:
    from covo_rl import data

    try:
        return data.load_examples(source, folder, columns=columns, allow_outside=allow_outside, strict=strict)
    except data.DataError as error:
        raise EvalInputError([str(error)]) from error


def _read_row(row: Any, number: int, names: Mapping[str, Sequence[str]]) -> Example | str:
    """The row word for word, clips by the names that it gives them, or what it lacks. `names`: noun -> its names."""
    if not isinstance(row, Mapping):
        return f"row {number} is {type(row).__name__}, not an object"
    values = {noun: next((row[name] for name in names[noun] if name in row), None) for noun in names}
    values["choices"] = choices = _choices(row, names["choices"])
    absent = [f"{noun} ({' or '.join(names[noun])})" for noun in ("id", "question", "choices") if values[noun] is None]
    if choices is None or absent:
        return f"row {number if values['id'] is None else visible(values['id'])} has no {' and no '.join(absent)}"
    answer, audio = values["answer"], values["audio"]
    if answer is not None:
        answer = None if answer == "" and "" not in choices else str(answer)
    clips = [Clip(path=i) for i in (audio if isinstance(audio, list) else [audio]) if isinstance(i, str) and i]
    used = {part for alternatives in names.values() for name in alternatives for part in name.split()}
    columns = {name: value for name, value in row.items() if name not in used}
    return Example(str(values["id"]), tuple(clips), str(values["question"]), tuple(choices), answer, columns)


def _choices(row: Mapping[str, Any], names: Sequence[str]) -> list[str] | None:
    """Options as texts; trailing absent ones of `choice_a ...` are left out. None where there is no list."""
    for name in names:
        if len(parts := name.split()) > 1 and parts[0] in row:
            values = [row.get(part) for part in parts]
            while values and values[-1] is None:
                values.pop()
            return ["" if value is None else str(value) for value in values]
        if isinstance(row.get(name), list):
            return [str(value) for value in row[name]]
    return None


# -- problems --------------------------------------------------------------------------------------------------------


def _key_problems(examples: Sequence[Example], *, has_answers: bool) -> tuple[list[str], list[str]]:
    """(what makes an evaluation meaningless, what is only worth knowing) about an answer key."""
    errors, warnings = [], []
    if not examples:
        errors.append("the data file has no rows")
    if twice := repeated_ids([e.id for e in examples]):
        errors.append(f"duplicate ids in {count_rows(twice)}")
    if not has_answers:
        return errors, warnings
    if without := [e.id for e in examples if e.answer is None]:
        errors.append(f"no answer in {count_rows(without)}; sets without a key are scored by their hosts (mmau-test)")
    bad = [e.id for e in examples if e.answer is not None and e.choices and e.answer not in e.choices]
    if bad:
        text = f"the answer is not among the choices in {count_rows(bad)}"
        if (len(bad) > MAX_BAD_KEYS * len(examples) and len(bad) > 1) or len(bad) == len(examples):
            errors.append(f"{text}; over {MAX_BAD_KEYS:.0%} of the rows: is this an edition with a broken key?")
        else:
            warnings.append(f"{text}; the official rule is applied as it stands")
    if equal := [e.id for e in examples if len(set(e.choices)) < len(e.choices)]:
        warnings.append(f"duplicate options in {count_rows(equal)}; every copy of the answer is accepted")
    return errors, warnings


def clip_problems(examples: Sequence[Example]) -> list[str]:
    """One line for all rows whose audio files do not exist, one for those whose clips cannot be read whole."""
    missing, broken = {}, {}
    for example, clips in zip(examples, facts_by_row(examples), strict=True):
        for facts in clips:
            if facts.clip.path is not None and not os.path.isfile(facts.clip.path):
                missing[example.id] = facts.clip.path
            elif facts.error is not None:
                broken[example.id] = facts.error
    return [
        f"{what} in {count_rows(list(rows))} (first: {next(iter(rows.values()))}); check --audio-dir"
        for what, rows in (("audio files are missing", missing), ("audio files cannot be read", broken))
        if rows
    ]
