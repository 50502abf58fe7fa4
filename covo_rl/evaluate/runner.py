"""One evaluation in its folder: resumable, shared between ranks, the same result however often it was interrupted.

run.json       what is evaluated on what; a folder never mixes two settings
rows.jsonl     one record a row, flushed after every batch (rows.rank1.jsonl ... while several ranks work)
report.json, report.md, plots, submission.json
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from covo_rl.config import RewardConfig
from covo_rl.data.files import plain, write_json
from covo_rl.evaluate.answer import answer_batch, audio_seconds, check_settings, load_answerer, plan_batches
from covo_rl.evaluate.inputs import Inputs, count_rows
from covo_rl.evaluate.records import Record, RecordLog, group_from_text, judge_groups
from covo_rl.evaluate.request import Request
from covo_rl.evaluate.sets import EvalInputError, PromptStyle
from covo_rl.evaluate.variants import with_audio
from covo_rl.records.console import ProgressDisplay, percent
from covo_rl.train.ranks import Ranks
from covo_rl.types import Example, Group


def open_folder(folder: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Claim the folder for these settings, or accept it when it already holds them.

    Raises:
        EvalInputError: it holds another evaluation (the differing settings are named), or rows that nobody claims.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.json"
    settings = plain(settings)
    if path.is_file() and not overwrite:
        there = json.loads(path.read_text(encoding="utf-8"))
        differing = [
            f"{key}: {there.get(key)!r} there, {settings.get(key)!r} now"
            for key in sorted({*there, *settings})
            if there.get(key) != settings.get(key)
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
    write_json(path, settings)


def answer_rows(
    request: Request, inputs: Inputs, settings: Mapping[str, Any], conditions: Iterable[str],
    style: PromptStyle | None = None,
) -> dict[str, list[Record]] | None:  # fmt: skip
    """Claim the folder, load the model and answer the rows under every audio condition, each resumable.

    Returns the records by condition on rank 0, None on others.

    Raises:
        EvalInputError: the folder holds something else, the model cannot be loaded, clips are longer than it takes.
    """
    ranks = _launched_ranks()
    assert request.model is not None and request.output is not None
    if ranks.main:
        open_folder(request.output, settings, overwrite=request.overwrite)
    ranks.wait()
    try:
        answerer = load_answerer(
            request.model, request.adapter, dtype=str(request.dtype), prompt_config=request.prompt_config(),
            rollout_config=request.rollout_config(), style=style, device=request.device,
            trust_remote_code=request.trust_remote_code,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise EvalInputError([f"--model {request.model}, --adapter {request.adapter}: {error}"]) from error
    longest: float | None = getattr(answerer, "max_clip_seconds", None)
    lengths = [(e.id, audio_seconds((clip,), answerer.clips)) for e in inputs.examples for clip in e.clips if longest]
    if longest and (over := list(dict.fromkeys(name for name, seconds in lengths if seconds > longest))):
        raise EvalInputError([f"audio longer than the {longest:g} s this model takes in {count_rows(over)}"])
    by_audio = {audio: run_model(inputs, answerer, request, audio=audio, ranks=ranks) or [] for audio in conditions}
    return by_audio if ranks.main else None


def _launched_ranks() -> Ranks:
    """This process among those that accelerate or torchrun started; a single one otherwise."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from covo_rl.train.launch import process_state

        process_state()
    return Ranks.current()


def run_model(inputs: Inputs, answerer: Any, request: Request, *, audio: str, ranks: Ranks) -> list[Record] | None:
    """Evaluate what is not finished yet; the records of all rows in data order on rank 0, None on others.

    `answerer` is an Answerer with a ClipStore `clips`. Batches are dealt to the ranks in turn; each rank writes its own
    file, rank 0 joins them at the end.
    """
    examples, folder = inputs.examples, request.output
    assert folder is not None
    check_settings(examples, greedy=request.greedy, num_generations=request.num_generations)
    name = "rows" if audio == "real" else f"rows.{audio}"
    log = RecordLog(folder / (f"{name}.rank{ranks.rank}.jsonl" if ranks.rank else f"{name}.jsonl"))

    def logs() -> list[RecordLog]:
        return [RecordLog(folder / f"{name}.jsonl"), *map(RecordLog, sorted(folder.glob(f"{name}.rank*.jsonl")))]

    if ranks.main:
        for each in logs():
            each.repair()
    ranks.wait()
    done = {record["id"]: record for each in logs() for record in each.read()}
    ranks.wait()
    seconds = [audio_seconds(e.clips, answerer.clips) for e in examples]
    batches = list(enumerate(plan_batches(examples, seconds, request.batch_size)))[ranks.rank :: ranks.world]
    todo = [(b, batch) for b, batch in batches if not all(examples[i].id in done for i in batch)]
    rows = with_audio(examples, audio, answerer.clips) if todo else []
    title, total = f"{inputs.eval_set.name}, {audio}", len(done) + sum(len(batch) for _, batch in todo)
    with ProgressDisplay(title, total, done=len(done), active=ranks.main, stderr=True) as display:
        display.update(len(done), _standing(done.values()))
        for b, batch in todo:
            records = answer_batch(
                answerer, [rows[i] for i in batch], [seconds[i] for i in batch], eval_set=inputs.eval_set,
                reward_config=request.reward_config(), greedy=request.greedy,
                num_generations=request.num_generations, seed=request.seed,
            )  # fmt: skip
            log.append(records, batch=b)
            done |= {record["id"]: record for record in records}
            display.update(len(done), _standing(done.values()))
    ranks.wait()
    return _join(logs(), examples) if ranks.main else None


def _standing(records: Iterable[Record]) -> str:
    verdicts = [record["strict_correct"] for record in records if record["strict_correct"] is not None]
    return f"{percent(sum(verdicts) / len(verdicts))} % right" if verdicts else "not graded"


def _join(logs: Sequence[RecordLog], examples: Iterable[Example]) -> list[Record]:
    """All ranks' records in data order, as one rows.jsonl; each row must be there."""
    by_id = {record["id"]: record for log in logs for record in log.read()}
    if missing := [e.id for e in examples if e.id not in by_id]:
        raise RuntimeError(f"{len(missing)} rows were not evaluated: {', '.join(missing[:20])}; run the command again")
    records = [by_id[e.id] for e in examples]
    logs[0].replace(records)
    for log in logs[1:]:
        log.path.unlink()
    return records


def run_predictions(inputs: Inputs, folder: Path, *, reward_config: RewardConfig | None) -> list[Record]:
    """Judge replies from a file; rows without one are recorded as missing."""
    replies = inputs.predictions or {}
    by_size: dict[int, list[Group]] = {}  # a reward table needs groups of one size
    for example in inputs.examples:
        group = group_from_text(example, replies.get(example.id, ()))
        by_size.setdefault(len(group.rollouts), []).append(group)
    by_id = {}
    for groups in by_size.values():
        seconds = [_header_seconds(group.prompt.example) for group in groups]
        records = judge_groups(groups, seconds, inputs.eval_set, reward_config)
        by_id.update({record["id"]: record for record in records})
    records = [by_id[example.id] for example in inputs.examples]
    RecordLog(folder / "rows.jsonl").replace(records)
    return records


def _header_seconds(example: Example) -> float | None:
    """Audio length where the files are there; scoring a predictions file does not need them."""
    if not example.clips or any(clip.path is None or not Path(clip.path).is_file() for clip in example.clips):
        return None
    try:
        return audio_seconds(example.clips, None)
    except (OSError, RuntimeError):  # soundfile's LibsndfileError is a RuntimeError
        return None
