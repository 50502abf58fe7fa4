"""One evaluation in its folder: resumable, shared between ranks, the same result however often it was interrupted.

run.json       what is evaluated on what; a folder never mixes two settings
rows.jsonl     one record a row, flushed after every batch (rows.rank1.jsonl ... while several ranks work)
report.json, report.md, plots, submission.json
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from covo_rl.evaluate.engine import (
    Answerer,
    audio_seconds,
    check_settings,
    evaluate_batch,
    plan_batches,
    score_groups,
)
from covo_rl.evaluate.inputs import Inputs
from covo_rl.evaluate.problems import EvalInputError
from covo_rl.evaluate.records import Record, RecordLog, group_from_text, make_record
from covo_rl.evaluate.variants import with_audio

#: called once before and then after every batch with (rows done, rows in all, right so far, graded so far).
Progress = Callable[[int, int, float, int], object]


@dataclass(frozen=True)
class Ranks:
    """Which of several processes this is, and how they wait for one another."""

    rank: int = 0
    world: int = 1
    wait: Callable[[], object] = lambda: None


def open_folder(folder: Path, settings: dict[str, Any], *, overwrite: bool = False) -> None:
    """Claim the folder for these settings, or accept it when it already holds them.

    Raises:
        EvalInputError: it holds another evaluation (the differing settings are named), or rows that nobody claims.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.json"
    wanted = json.loads(json.dumps(settings))
    if path.is_file() and not overwrite:
        there = json.loads(path.read_text(encoding="utf-8"))
        differing = [
            f"{key}: {there.get(key)!r} there, {wanted.get(key)!r} now"
            for key in sorted({*there, *wanted})
            if there.get(key) != wanted.get(key)
        ]
        if differing:
            advice = "choose another --output, or --overwrite"
            raise EvalInputError([f"{folder} holds another evaluation ({advice}):", *differing])
        return
    old = sorted(folder.glob("rows*.jsonl"))
    if old and not overwrite:
        names = ", ".join(file.name for file in old)
        raise EvalInputError([f"{folder} holds {names} of unknown origin (no run.json); choose another --output"])
    for file in old:
        file.unlink()
    from covo_rl.evaluate.report import write_json

    write_json(path, wanted)


def _log_name(audio: str, rank: int) -> str:
    middle = "" if audio == "real" else f".{audio}"
    return f"rows{middle}.rank{rank}.jsonl" if rank else f"rows{middle}.jsonl"


def _logs(folder: Path, audio: str) -> list[RecordLog]:
    middle = "" if audio == "real" else f".{audio}"
    others = sorted(folder.glob(f"rows{middle}.rank*.jsonl"))
    return [RecordLog(folder / _log_name(audio, 0)), *map(RecordLog, others)]


def run_model(
    inputs: Inputs, answerer: Answerer, folder: Path, *, clips: Any, reward_config: Any, audio: str, greedy: bool,
    num_generations: int, seed: int, batch_size: int, ranks: Ranks = Ranks(), progress: Progress | None = None,
    bucket: bool = True,
) -> list[Record] | None:  # fmt: skip
    """Evaluate what is not finished yet; the records of all rows in data order on rank 0, None on others.

    Batches are dealt to the ranks in turn; each rank writes its own file, rank 0 joins them at the end.
    """
    examples = inputs.examples
    check_settings(examples, greedy=greedy, num_generations=num_generations)
    if ranks.rank == 0:
        for log in _logs(folder, audio):
            log.repair()
    ranks.wait()
    done = {record["id"]: record for log in _logs(folder, audio) for record in log.read()}
    ranks.wait()
    seconds = [audio_seconds(e.clips, clips) for e in examples]
    batches = plan_batches(examples, seconds, batch_size, bucket=bucket)
    mine = list(range(ranks.rank, len(batches), ranks.world))
    todo = [b for b in mine if not all(examples[i].id in done for i in batches[b])]
    log = RecordLog(folder / _log_name(audio, ranks.rank))
    right, graded = _standing(done.values())
    finished, total = len(done), len(done) + sum(len(batches[b]) for b in todo)
    rows = with_audio(examples, audio, clips, seed=0) if todo else []
    if progress is not None:
        progress(finished, total, right, graded)
    for b in todo:
        part = [rows[i] for i in batches[b]]
        records = evaluate_batch(
            answerer, part, [seconds[i] for i in batches[b]], scorer=inputs.eval_set.grader,
            reward_config=reward_config, breakdown=inputs.eval_set.breakdown_of, greedy=greedy,
            num_generations=num_generations, seed=seed,
        )  # fmt: skip
        log.append(records, batch=b)
        more_right, more_graded = _standing(records)
        right, graded, finished = right + more_right, graded + more_graded, finished + len(records)
        if progress is not None:
            progress(finished, total, right, graded)
    ranks.wait()
    return _join(folder, audio, examples) if ranks.rank == 0 else None


def _standing(records: Any) -> tuple[int, int]:
    verdicts = [record["strict_correct"] for record in records if record["strict_correct"] is not None]
    return sum(verdicts), len(verdicts)


def _join(folder: Path, audio: str, examples: Sequence[Any]) -> list[Record]:
    """All ranks' records in data order, as one rows.jsonl; each row must be there."""
    logs = _logs(folder, audio)
    found = {record["id"]: record for log in logs for record in log.read()}
    missing = [e.id for e in examples if e.id not in found]
    if missing:
        raise RuntimeError(f"{len(missing)} rows were not evaluated: {', '.join(missing[:20])}; run the command again")
    records = [found[e.id] for e in examples]
    logs[0].replace(records)
    for log in logs[1:]:
        log.path.unlink()
    return records


def run_predictions(inputs: Inputs, folder: Path, *, reward_config: Any) -> list[Record]:
    """Judge replies from a file; rows without one are recorded as missing."""
    replies = inputs.predictions or {}
    groups = [group_from_text(example, replies.get(example.id, ())) for example in inputs.examples]
    present = [group for group in groups if group.rollouts]
    tables = {}
    for n in {len(group.rollouts) for group in present}:  # a reward table needs groups of one size
        same = [group for group in present if len(group.rollouts) == n]
        table = score_groups(same, reward_config)
        tables.update({group.prompt.example.id: (table, p) for p, group in enumerate(same)})
    records = []
    for group in groups:
        example = group.prompt.example
        table, position = tables.get(example.id, (None, 0))
        records.append(
            make_record(
                group,
                inputs.eval_set.grader,
                breakdown=inputs.eval_set.breakdown_of(example),
                table=table,
                position=position,
                seconds=_header_seconds(example),
            )
        )
    RecordLog(folder / "rows.jsonl").replace(records)
    return records


def _header_seconds(example: Any) -> float | None:
    """Audio length where the files are there; scoring a predictions file does not need them."""
    if not example.clips or any(clip.path is None or not Path(clip.path).is_file() for clip in example.clips):
        return None
    try:
        return audio_seconds(example.clips, None)
    except (OSError, RuntimeError):  # soundfile's LibsndfileError is a RuntimeError
        return None
