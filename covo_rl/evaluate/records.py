"""One evaluated row as a JSON-ready record, and the append-only file that survives a kill.

A record holds the raw replies, the extracted answers and every verdict on them; reports are computed from
records alone, so a restarted evaluation gives the same report as an undisturbed one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from covo_rl.data.files import write_atomically
from covo_rl.evaluate.scorers import Scorer, strict_match
from covo_rl.types import Example, Group, Prompt, RewardTable, Rollout

Record = dict[str, Any]
VERDICTS = ("official", "official_extracted", "strict", "strict_raw")


def rollout_from_text(text: str) -> Rollout:
    """A reply that came from a file: no ids, no log-probs, taken as finished."""
    from covo_rl import prompt

    parsed = prompt.parse(text)
    return Rollout((), (), text, "stop", parsed.think, parsed.answer, parsed.problems)


def group_from_text(example: Example, replies: Sequence[str]) -> Group:
    """Replies from a file as a Group, so that the same scoring code serves."""
    return Group(Prompt(example, (), "", ()), tuple(rollout_from_text(reply) for reply in replies))


def judge_reply(rollout: Rollout, example: Example, scorer: Scorer) -> dict[str, bool | None]:
    """All verdicts on one reply; an extracted answer that is missing counts as an empty reply, hence wrong."""
    answer = example.answer or ""
    return {
        "official": scorer(rollout.text, example.choices, answer),
        "official_extracted": scorer(rollout.answer or "", example.choices, answer),
        "strict": strict_match(rollout.answer, example.choices, answer, example.question),
        "strict_raw": strict_match(rollout.text, example.choices, answer, example.question),
    }


def _rewards(table: RewardTable | None, position: int) -> dict[str, list[float | None]]:
    if table is None:
        return {}
    columns = {name: table.rewards_PGR[position, :, r] for r, name in enumerate(table.names)}
    columns["total"] = table.rewards_PG[position]
    return {name: [None if value != value else float(value) for value in values] for name, values in columns.items()}


def make_record(
    group: Group, scorer: Scorer | None, *, breakdown: Mapping[str, Any], table: RewardTable | None = None,
    position: int = 0, seconds: float | None = None,
) -> Record:  # fmt: skip
    """The record of one row. `table[position]` are its rewards; `seconds` is the length of its audio.

    Without an answer key (`example.answer` is None, or no scorer) every verdict is None.
    """
    example, rollouts = group.prompt.example, group.rollouts
    graded = scorer is not None and example.answer is not None
    nothing: dict[str, bool | None] = dict.fromkeys(VERDICTS)
    verdicts = [judge_reply(r, example, scorer) if graded and scorer else nothing for r in rollouts]
    first = verdicts[0] if verdicts else nothing
    record: Record = {
        "id": example.id,
        "official_correct": first["official"],
        "official_extracted_correct": first["official_extracted"],
        "strict_correct": first["strict"] if verdicts else (False if graded else None),
        "strict_raw_correct": first["strict_raw"] if verdicts else (False if graded else None),
        "missing": not rollouts,
        "model_output": rollouts[0].text if rollouts else None,
        "answer_prediction": rollouts[0].answer if rollouts else None,
        "answer": example.answer,
        "replies": [r.text for r in rollouts],
        "answers": [r.answer for r in rollouts],
        "problems": [list(r.problems) for r in rollouts],
        "stop_reasons": [r.stop_reason for r in rollouts],
        "completion_tokens": [len(r.completion_ids) for r in rollouts],
        "thinking_words": [len(r.think.split()) if r.think is not None else None for r in rollouts],
        "verdicts": {name: [verdict[name] for verdict in verdicts] for name in VERDICTS},
        "rewards": _rewards(table, position) if rollouts else {},
        "seconds": None if seconds is None else round(seconds, 3),
        "breakdown": dict(breakdown),
    }
    return record


class RecordLog:
    """rows.jsonl: one line a record, flushed to disk after every batch. ASCII, so that any character of a reply (a
    lone surrogate, a line separator) leaves the lines intact.

    A batch is written whole and its lines carry its number and size. After a kill the half-written end is cut
    off, an unfinished batch included: it will be repeated with the same seed, and finished rows will not.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, records: Iterable[Record], *, batch: int) -> None:
        """Write one batch and wait until it is on the disk."""
        rows = list(records)
        lines = [json.dumps({**row, "batch": [batch, len(rows)]}) + "\n" for row in rows]
        with open(self.path, "ab") as file:
            file.write("".join(lines).encode("ascii"))
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[Record]:
        """All complete lines, nothing repaired. Raises ValueError naming a broken line that is not the last."""
        if not self.path.is_file():
            return []
        lines = self.path.read_bytes().split(b"\n")
        records = []
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            try:
                records.append(json.loads(line))
            except ValueError as error:
                if number == len(lines):
                    break
                raise ValueError(
                    f"{self.path}, line {number}: not JSON ({error}); delete the line to repeat its row"
                ) from None
        return records

    def repair(self) -> list[Record]:
        """Cut off a half-written end and unfinished batches; return what is finished."""
        records = self.read()
        sizes: dict[int, int] = {}
        for record in records:
            sizes[record["batch"][0]] = sizes.get(record["batch"][0], 0) + 1
        finished = [r for r in records if sizes[r["batch"][0]] == r["batch"][1]]
        ends_whole = not self.path.is_file() or self.path.read_bytes()[-1:] in (b"\n", b"")
        if len(finished) < len(records) or not ends_whole:
            self.replace(finished)
        return finished

    def replace(self, records: Iterable[Record]) -> None:
        """Write the whole file anew under a temporary name and rename it: never half a file."""
        write_atomically(self.path, lambda file: file.writelines(json.dumps(r) + "\n" for r in records))
