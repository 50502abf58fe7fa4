"""`covo-rl data profile`: which training rows teach this policy something?

Every row is answered several times with its audio and several times with silence of the same length. Kept are rows
that are solved sometimes (a group with variance gives a gradient) and that silence does not solve (the audio is
needed). The filtered set has the format of the input.

    profile.jsonl     per row: pass rates with audio and with silence, pass@k, kept or why not
    filtered.json     the kept rows (or .jsonl, .csv, .tsv, .parquet, as the input)
    profile.json      counts and settings
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from covo_rl.data.delimited import SUFFIXES, selected_text
from covo_rl.data.files import plain, write_atomically, write_json
from covo_rl.evaluate.engine import engine_settings
from covo_rl.evaluate.folder import joined_ranks, owned
from covo_rl.evaluate.inputs import Inputs, read_inputs, read_json_rows
from covo_rl.evaluate.records import Record
from covo_rl.evaluate.runner import Request, answer_rows
from covo_rl.evaluate.sets import EvalInputError, EvalSet
from covo_rl.evaluate.summary import pass_at_k
from covo_rl.resolve import meant

TRAINING_SET = EvalSet("profile", "training rows", fields={}, breakdown=())


@dataclass(frozen=True)
class Rule:
    """Keep a row when its pass rate with audio lies strictly between the bounds and silence passes at most so often."""

    min_rate: float = 0.0
    max_rate: float = 1.0
    max_silent_rate: float = 0.5

    def verdict(self, rate: float, silent_rate: float | None) -> str:
        """`kept`, or why not."""
        if rate <= self.min_rate:
            return "never solved" if rate == 0 else "too hard"
        if rate >= self.max_rate:
            return "always solved" if rate == 1 else "too easy"
        if silent_rate is not None and silent_rate > self.max_silent_rate:
            return "solved from silence"
        return "kept"


def run_profile(
    data: str | Path, audio_dir: str | Path | None, output: str | Path, *, model: str = "builtin:tiny",
    adapter: str | None = None, rule: Rule = Rule(), allow_outside: bool = False, **options: Any,
) -> dict[str, Any] | None:  # fmt: skip
    """Profile a training set under a policy and write the filtered set; resumable. Returns the content of profile.json
    on rank 0, None on others.

    `options` are those of `covo-rl eval` (see Request): num_generations (default 8), temperature, limit, batch_size,
    max_completion_length, seed, dtype, instruction, choice_style, overwrite ...

    Raises:
        EvalInputError: unreadable rows, duplicate ids, missing clips, a folder in use by another profile.
        TypeError: an option that covo-rl eval does not have.
    """
    if not Path(data).is_file():
        what = f"{data}: a profile writes rows again as they stand in a file: name one (metadata.csv of a folder)"
        raise EvalInputError([what + meant(data)])
    inputs = read_inputs(
        TRAINING_SET, data, audio_dir, limit=options.get("limit"), allow_outside=allow_outside,
        columns=options.get("columns"),
    )  # fmt: skip
    request = Request(
        data=Path(data), model=model, adapter=adapter, output=Path(output), rewards="none",
        **{"greedy": False, "num_generations": 8, **options},
    )  # fmt: skip
    if problems := request.engine_problems() + request.model_problems():
        raise EvalInputError(problems)
    recorded = plain({name: value for name, value in options.items() if name not in ("overwrite", "engine")})
    settings = {**inputs.meta, "model": model, "adapter": adapter, "options": recorded}
    settings |= engine_settings(request.engine)
    ranks, folder = joined_ranks(), Path(output)
    with owned(folder, ranks):
        by_audio = answer_rows(request, inputs, settings, ("real", "silent"), ranks)
        return _write_profile(by_audio, settings, rule, inputs, folder) if by_audio is not None else None


def _write_profile(
    by_audio: Mapping[str, Sequence[Record]], settings: Mapping[str, Any], rule: Rule, inputs: Inputs, folder: Path
) -> dict[str, Any]:
    """profile.jsonl, the filtered set and profile.json; returns the last."""
    rows = [_profile_row(*pair, rule) for pair in zip(by_audio["real"], by_audio["silent"], strict=True)]
    _write_lines(folder / "profile.jsonl", rows)
    places = [place for place, row in enumerate(rows) if row["verdict"] == "kept"]
    rates = [row["pass_rate"] for row in rows]
    silent = [row["silent_pass_rate"] for row in rows if row["silent_pass_rate"] is not None]
    result = {
        **settings,
        "rule": asdict(rule),
        "n": len(rows),
        "verdicts": dict(Counter(row["verdict"] for row in rows)),
        "mean_pass_rate": sum(rates) / len(rates),
        "mean_silent_pass_rate": sum(silent) / len(silent) if silent else None,
        "filtered": _write_filtered(inputs.data, places, folder, profiled=len(rows)).name,
        "kept": len(places),
    }
    write_json(folder / "profile.json", result)
    return result


def _profile_row(real: Record, silent: Record, rule: Rule) -> dict[str, Any]:
    """One row of profile.jsonl. A row without audio has no silent pass rate."""
    n, right = len(real["replies"]), sum(map(bool, real["verdicts"]["strict"]))
    silent_rate = fmean(map(bool, silent["verdicts"]["strict"])) if real["seconds"] else None
    return {
        "id": real["id"],
        "n": n,
        "pass_rate": right / n,
        "pass_at_k": {str(k): pass_at_k(n, right, k) for k in sorted({1, 2, 4, 8, n}) if k <= n},
        "silent_pass_rate": silent_rate,
        "official_pass_rate": fmean(map(bool, real["verdicts"]["official"])),
        "verdict": rule.verdict(right / n, silent_rate),
    }


def _write_lines(path: Path, rows: Iterable[Any]) -> None:
    write_atomically(path, lambda file: file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write_filtered(data: Path, places: Sequence[int], folder: Path, *, profiled: int) -> Path:
    """The input's own rows at these places, untouched; same format.

    Raises:
        EvalInputError: the file has fewer rows than were profiled.
    """
    path = folder / f"filtered{data.suffix if data.suffix in ('.parquet', '.jsonl', *SUFFIXES) else '.json'}"
    if path.suffix == ".parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.parquet.read_table(data).take(places), path)
        return path
    if path.suffix in SUFFIXES:
        text = selected_text(data, places)
        write_atomically(path, lambda file: file.write(text))
        return path
    rows = read_json_rows(data)
    if len(rows) < profiled:
        raise EvalInputError([f"{data}: {profiled} rows were profiled, the file has {len(rows)}"])
    keep = [rows[place] for place in places]  # untouched, NaN included
    if path.suffix == ".jsonl":
        _write_lines(path, keep)
    else:
        write_atomically(path, lambda file: json.dump(keep, file, indent=2))
    return path
