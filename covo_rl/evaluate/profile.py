"""`covo-rl data profile`: which training rows teach this policy something?

Every row is answered several times with its audio and several times with silence of the same length. Kept are rows
that are solved sometimes (a group with variance gives a gradient) and that silence does not solve (the audio is
needed). The filtered set has the format of the input.

    profile.jsonl     per row: pass rates with audio and with silence, pass@k, kept or why not
    filtered.json     the kept rows (or .jsonl, .parquet, as the input)
    profile.json      counts and settings
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from covo_rl.data.files import write_atomically
from covo_rl.evaluate.command import Request, answer_all
from covo_rl.evaluate.inputs import Inputs, read_inputs
from covo_rl.evaluate.predictions import read_rows
from covo_rl.evaluate.problems import EvalInputError
from covo_rl.evaluate.records import Record
from covo_rl.evaluate.report import write_json
from covo_rl.evaluate.runner import Ranks, open_folder
from covo_rl.evaluate.scorers import token_set_match
from covo_rl.evaluate.sets import EvalSet
from covo_rl.evaluate.statistics import pass_at_k

TRAINING_SET = EvalSet(
    name="profile",
    title="training rows",
    source="user",
    licence="not given",
    how_to_get="yours",
    fields={},
    breakdown=(),
    scorer=token_set_match,
    scorer_rule="token_set",
    official_drops="rows without a reply",
    reply_keys=(),
)


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


def pass_rate(record: Record) -> float:
    """Share of a row's replies whose extracted answer is right."""
    verdicts = record["verdicts"]["strict"]
    return sum(map(bool, verdicts)) / len(verdicts)


def profile_rows(real: Sequence[Record], silent: Sequence[Record], rule: Rule) -> list[dict[str, Any]]:
    """One row of profile.jsonl per training row. Rows without audio have no silent pass rate."""
    rows = []
    for heard, unheard in zip(real, silent, strict=True):
        n = len(heard["replies"])
        right = sum(map(bool, heard["verdicts"]["strict"]))
        silent_rate = pass_rate(unheard) if heard["seconds"] else None
        rows.append(
            {
                "id": heard["id"],
                "n": n,
                "pass_rate": right / n,
                "pass_at_k": {str(k): pass_at_k(n, right, k) for k in sorted({1, 2, 4, 8, n}) if k <= n},
                "silent_pass_rate": silent_rate,
                "official_pass_rate": sum(map(bool, heard["verdicts"]["official"])) / n,
                "verdict": rule.verdict(right / n, silent_rate),
            }
        )
    return rows


def write_filtered(data: Path, ids_in_order: Sequence[str], keep: set[str], folder: Path) -> Path:
    """The input's own rows, untouched, whose id is kept; same format. Row i of the file is ids_in_order[i].

    Raises:
        EvalInputError: the file has fewer rows than were profiled.
    """
    places = [i for i, name in enumerate(ids_in_order) if name in keep]
    if data.suffix == ".parquet":
        import pyarrow.parquet

        path = folder / "filtered.parquet"
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(data).take(places), path)
        return path
    rows = read_rows(data)
    if len(rows) < len(ids_in_order):
        raise EvalInputError([f"{data}: {len(ids_in_order)} rows were profiled, the file has {len(rows)}"])
    kept = [rows[i] for i in places]
    path = folder / ("filtered.jsonl" if data.suffix == ".jsonl" else "filtered.json")
    if path.suffix == ".json":
        write_json(path, kept)
    else:
        write_atomically(path, lambda file: file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in kept))
    return path


def run_profile(
    data: str | Path,
    audio_dir: str | Path | None,
    output: str | Path,
    *,
    model: str = "builtin:tiny",
    adapter: str | None = None,
    rule: Rule = Rule(),
    answerer: Any = None,
    clips: Any = None,
    allow_outside: bool = False,
    **options: Any,
) -> dict[str, Any] | None:
    """Profile a training set under a policy and write the filtered set; resumable. Returns the content of profile.json
    on rank 0, None on others.

    `options` are those of `covo-rl eval` (see command.Request): num_generations (default 8), temperature, limit,
    batch_size, max_completion_length, seed, dtype, instruction, choice_style, overwrite ... `answerer` replaces the
    model in tests.

    Raises:
        EvalInputError: unreadable rows, duplicate ids, missing clips, a folder in use by another profile.
        TypeError: an option that covo-rl eval does not have.
    """
    inputs = read_inputs(TRAINING_SET, data, audio_dir, limit=options.get("limit"), allow_outside=allow_outside)
    base = Request(
        None, Path(data), None, model, adapter, None, Path(output), greedy=False, num_generations=8, rewards="none"
    )
    request = replace(base, **options)
    ranks = Ranks()
    if answerer is None:
        from covo_rl.evaluate.policies import load_answerer, process_ranks

        ranks = process_ranks()
    settings = {**inputs.meta, "model": model, "adapter": adapter, "options": _plain(options)}
    if ranks.rank == 0:
        open_folder(Path(output), settings, overwrite=request.overwrite)
    ranks.wait()
    if answerer is None:
        answerer = load_answerer(
            model, adapter, dtype=str(request.dtype), prompt_config=request.prompt_config(),
            rollout_config=request.rollout_config(), device=request.device, trust_remote_code=request.trust_remote_code,
        )  # fmt: skip
        clips = answerer.clips
    by_audio = answer_all(request, inputs, answerer, clips, ranks, conditions=("real", "silent"))
    return _finish(inputs, by_audio, rule, settings, Path(output)) if ranks.rank == 0 else None


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: v if isinstance(v, (int, float, bool, type(None))) else str(v)
        for k, v in options.items()
        if k != "overwrite"
    }


def _finish(
    inputs: Inputs, by_audio: Mapping[str, Sequence[Record]], rule: Rule, settings: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    rows = profile_rows(by_audio["real"], by_audio["silent"], rule)
    write_atomically(
        folder / "profile.jsonl", lambda file: file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    )
    keep = {row["id"] for row in rows if row["verdict"] == "kept"}
    filtered = write_filtered(inputs.data, [e.id for e in inputs.examples], keep, folder)
    rates = [row["pass_rate"] for row in rows]
    silent = [row["silent_pass_rate"] for row in rows if row["silent_pass_rate"] is not None]
    result = {
        **settings,
        "rule": asdict(rule),
        "n": len(rows),
        "verdicts": dict(Counter(row["verdict"] for row in rows)),
        "mean_pass_rate": sum(rates) / len(rates),
        "mean_silent_pass_rate": sum(silent) / len(silent) if silent else None,
        "filtered": filtered.name,
        "kept": len(keep),
    }
    write_json(folder / "profile.json", result)
    return result
