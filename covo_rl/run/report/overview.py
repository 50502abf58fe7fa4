"""What a report says of a run as a whole: options, environment, learning curves, advice, evaluations; runs compared."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from covo_rl.data.files import read_record, whole_lines
from covo_rl.records.lock import FolderLock
from covo_rl.resolve import folders
from covo_rl.run.report.values import Notes, finite, json_ready, mapping, readable

#: (key of `details` in result.json, when, audio)
EVALUATIONS = (("before", "before", "real"), ("after", "after", "real"), ("silent", "after", "silent"),
               ("swapped", "after", "swapped"))  # fmt: skip
#: options of where and how a run is written, in which two runs differ anyway
_PLACES = ("output", "overwrite", "resume")
#: options of what R is
_OF_R = ("rewards", "reward_gate", "overlong_buffer")


def run_overview(folder: Path, notes: Notes) -> dict[str, Any]:
    """The entry of a run in `runs`, but for its notes; a file that is missing or damaged is named in `notes`."""
    config, environment, result, before = (
        _record(folder / name, notes) for name in ("config.yaml", "environment.json", "result.json", "before.json")
    )
    try:
        metrics, damage = whole_lines(folder / "metrics.jsonl")
    except OSError as error:
        metrics, damage = [], [f"the metrics are left out: {error}"]
    for line in damage:
        notes.add(line)
    for name, content in (("config.yaml", config), ("environment.json", environment), ("metrics.jsonl", metrics)):
        if not content and not (folder / name).is_file():
            notes.add(f"{name} is missing")
    details = mapping(result.get("details")) or {"before": before}
    evaluations = list(_evaluations(details))
    if not result:
        notes.add(f"the run has no result yet: {_state(folder)}; {len(metrics)} steps are logged")
    elif not evaluations and not isinstance(result.get("after"), Mapping):  # figures of when it speaks
        notes.add("the run was not evaluated")
    for aside in sorted(folder.glob("abandoned/[0-9]*")):
        count = len(list(aside.glob("rollouts/step_*.jsonl")))
        notes.add(f"abandoned/{aside.name} holds {count} steps that a resume went back behind; they are not shown")
    return {
        "name": readable(folder.resolve().name),
        "path": readable(os.path.abspath(folder)),
        "config": json_ready(config),
        "environment": json_ready(environment),
        "result": json_ready({name: value for name, value in result.items() if name != "details"}),
        "metrics": [json_ready(row) for row in metrics],
        "advice": _advice(metrics, config),
        "evaluations": evaluations,
    }


def _state(folder: Path) -> str:
    if owner := FolderLock(folder).holder():
        return f"it is under way ({owner})"
    is_left = (folder / "lock.json").is_file()  # by a process that was killed
    return "it was stopped" if is_left else "it was stopped, or is still under way"


def _record(path: Path, notes: Notes) -> dict[str, Any]:
    """A JSON or YAML mapping; empty where there is none, and with a note where it is damaged."""
    try:
        return read_record(path)
    except (ValueError, OSError) as error:
        notes.add(str(error))
        return {}


def _advice(metrics: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    from covo_rl.records.monitor import advice

    pieces = advice(metrics, config)
    return [
        {"step": piece.step, "rule": piece.rule, "text": readable(piece.text), "link": piece.link,
         "help": sections(Path(piece.link.partition("#")[0]).name).get(piece.rule)} for piece in pieces
    ]  # fmt: skip


@lru_cache(maxsize=2)
def sections(page: str) -> dict[str, str]:
    """Rule -> what our page of docs/ says of it, for a report lies beside no docs; none where the page is not here."""
    for place, folder in folders("docs"):
        if place != "working directory" and (folder / page).is_file():
            text = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", (folder / page).read_text("utf-8"))  # links lead nowhere
            _, *parts = re.split(r"^##+ (.+)\n", text, flags=re.M)
            return {title.strip("`"): body.strip() for title, body in zip(parts[::2], parts[1::2], strict=True)}
    return {}


def _evaluations(details: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for key, when, audio in EVALUATIONS:
        for mode in ("greedy", "sampled"):
            if summary := mapping(mapping(details.get(key)).get(mode)):
                name = ", ".join((when, mode, *([] if audio == "real" else [f"{audio} audio"])))
                rewards = {n.removeprefix("reward_"): v for n, v in summary.items() if n.startswith("reward_")}
                yield {
                    "name": name, "when": when, "audio": audio, "mode": mode, **_share(summary, summary.get("n")),
                    "breakdown": list(_breakdown(mapping(summary.get("breakdown")))),
                    "rewards": {readable(n): finite(v) for n, v in rewards.items()},
                }  # fmt: skip


def _breakdown(columns: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for column, values in columns.items():
        for value, block in mapping(values).items():
            block = mapping(block)
            share = _share(mapping(block.get("strict")), block.get("n"))
            yield {"column": readable(column), "value": readable(value), **share}


def _share(block: Mapping[str, Any], n: Any) -> dict[str, Any]:
    """Accuracy and its Wilson interval as they were written when they were measured."""
    interval = block.get("ci95")
    ends = [finite(end) for end in interval] if isinstance(interval, list) else []
    number = finite(n)
    return {
        "n": 0 if number is None else int(number),
        "accuracy": finite(block.get("accuracy")),
        "ci95": ends if len(ends) == 2 and None not in ends else None,
    }


def comparison(runs: Sequence[Mapping[str, Any]], notes: Notes) -> dict[str, Any] | None:
    """Options that differ, and the evaluations of all runs side by side; None of a single run.

    result.json holds no verdicts by row, so nothing is paired: each accuracy has its own interval.
    """
    if len(runs) < 2:
        return None
    settings = [_settings(run) for run in runs]
    names = [name for name in dict.fromkeys(name for values in settings for name in values) if name not in _PLACES]
    table = [{"option": name, "values": [values.get(name) for values in settings]} for name in names]
    by_name = [{block["name"]: block for block in run["evaluations"]} for run in runs]
    evaluations = []
    for name in dict.fromkeys(name for blocks in by_name for name in blocks):
        shares = [blocks.get(name, {}) for blocks in by_name]
        columns = {key: [share.get(key) for share in shares] for key in ("n", "accuracy", "ci95")}
        evaluations.append({"name": name, **columns})
    rows = {str(values.get("sha256 of eval_data") or values.get("sha256 of data")) for values in settings}
    if len(rows) > 1 or len({tuple(filter(None, row["n"])) for row in evaluations}) > 1:
        notes.add("the runs were evaluated on different rows, or on different numbers of them: compare with care")
    if len({json.dumps([values.get(name) for name in _OF_R]) for values in settings}) > 1:
        notes.add("the runs have different rewards: compare accuracy and components, not R")
    differing = [row for row in table if any(value != row["values"][0] for value in row["values"])]
    return {"config": differing, "evaluations": evaluations}


def _settings(run: Mapping[str, Any]) -> dict[str, Any]:
    """Options, and of the environment what decides on the figures."""
    environment, packages = run["environment"], mapping(run["environment"].get("packages"))
    hashes = mapping(environment.get("sha256"))
    return {
        **run["config"],
        **{name: environment.get(name) for name in ("covo_rl", "commit", "python", "platform")},
        **{f"version of {name}": version for name, version in packages.items()},
        **{f"sha256 of {name}": digest for name, digest in hashes.items()},
    }
