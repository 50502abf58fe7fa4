"""One evaluated row as a JSON-ready record, and the append-only file that survives a kill.

A record holds the raw replies, the extracted answers and every verdict on them; reports are computed from
records alone, so a restarted evaluation gives the same report as an undisturbed one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from covo_rl.config import RewardConfig
from covo_rl.data.files import append_lines, json_lines, plain, write_atomically
from covo_rl.evaluate.sets import EvalSet, strict_match
from covo_rl.rewards.rules.criteria import words
from covo_rl.types import Example, Group, Prompt, Rollout

Record = dict[str, Any]
VERDICTS = ("official", "official_extracted", "strict", "strict_raw")


@dataclass(frozen=True)
class TurnRollout(Rollout):
    """What a duplex session said in its first turn, and how it took that turn (turn_figures.py reads it)."""

    turn: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SpokenRollout(Rollout):
    """A reply with its sound: the path of a wav file, from the folder of the evaluation."""

    audio: str = ""


def group_from_text(example: Example, replies: Sequence[str]) -> Group:
    """Replies from a file as a Group: no ids, no log-probs, taken as finished; so that the same scoring serves."""
    from covo_rl import prompt

    parts = [(text, prompt.parse(text)) for text in replies]
    rollouts = [Rollout((), (), text, "stop", parsed.think, parsed.answer, parsed.problems) for text, parsed in parts]
    return Group(Prompt(example, (), "", ()), tuple(rollouts))


def judge_groups(
    groups: Sequence[Group], seconds: Sequence[float | None], eval_set: EvalSet, reward_config: RewardConfig | None
) -> list[Record]:
    """One record per group, in order; all groups have the same number of replies, which may be none.

    `seconds` is the length of each row's audio. Without an answer key every verdict is None, without a reward_config
    there are no rewards. Where `accuracy(part='text')` is one, the answer is the whole reply, as it is there.
    """
    rewards_of: list[dict[str, list[float | None]]] = [{} for _ in groups]  # of each reply; None: cannot be graded
    if reward_config is not None and groups and groups[0].rollouts:
        from covo_rl.rewards.scoring import components, score, whole_sums

        terms = components(reward_config.rewards)
        if any(term.reward.source.name == "accuracy" and term.reads_whole for term in terms):
            groups = [replace(g, rollouts=tuple(replace(r, answer=r.text.strip()) for r in g.rollouts)) for g in groups]
        table = score(groups, replace(reward_config, rewards=terms))
        totals_PG = whole_sums(table)
        for place, row in enumerate(rewards_of):
            row |= plain({name: table.rewards_PGR[place, :, r] for r, name in enumerate(table.names)})
            row["total"] = plain(totals_PG[place])
    return [_record(*row, eval_set) for row in zip(groups, seconds, rewards_of, strict=True)]


def _record(group: Group, seconds: float | None, rewards: dict[str, list[float | None]], eval_set: EvalSet) -> Record:
    """An extracted answer that is missing counts as an empty reply, hence wrong."""
    example, rollouts = group.prompt.example, group.rollouts
    question, choices, answer = example.question, example.choices, example.answer or ""
    raw, extracted = [r.text for r in rollouts], [r.answer for r in rollouts]
    verdicts: dict[str, list[bool | None]] = {name: [None] * len(rollouts) for name in VERDICTS}
    scorer = eval_set.grader if example.answer is not None else None
    if scorer is not None:
        verdicts = {
            "official": [scorer(text, choices, answer) for text in raw],
            "official_extracted": [scorer(text or "", choices, answer) for text in extracted],
            "strict": [strict_match(text, choices, answer, question) for text in extracted],
            "strict_raw": [strict_match(text, choices, answer, question) for text in raw],
        }
    unanswered = {name: False if scorer and name.startswith("strict") else None for name in VERDICTS}
    return {
        "id": example.id,
        **{f"{name}_correct": values[0] if values else unanswered[name] for name, values in verdicts.items()},
        "missing": not rollouts,
        "model_output": raw[0] if rollouts else None,
        "answer_prediction": extracted[0] if rollouts else None,
        "answer": example.answer,
        "replies": raw,
        "answers": extracted,
        "problems": [list(r.problems) for r in rollouts],
        "stop_reasons": [r.stop_reason for r in rollouts],
        "completion_tokens": [len(r.completion_ids) for r in rollouts],
        **({"completion_codes": [list(r.codes) for r in rollouts]} if any(r.codes for r in rollouts) else {}),
        **({"reply_audio": sounds} if (sounds := [r.audio for r in rollouts if isinstance(r, SpokenRollout)]) else {}),
        **({"turns": turns} if (turns := [dict(r.turn) for r in rollouts if isinstance(r, TurnRollout)]) else {}),
        "thinking_words": [None if r.think is None else len(words(r.think, None)) for r in rollouts],
        "verdicts": verdicts,
        "rewards": rewards,
        "seconds": None if seconds is None else round(seconds, 3),
        "breakdown": eval_set.breakdown_of(example),
    }


@dataclass(frozen=True)
class RecordLog:
    """rows.jsonl: one line a record, flushed to disk after every batch. ASCII, so that any character of a reply (a
    lone surrogate, a line separator) leaves the lines intact.

    A batch is written whole and its lines carry its number and size. After a kill the half-written end is cut
    off, an unfinished batch included: it will be repeated with the same seed, and finished rows will not.
    """

    path: Path

    def append(self, records: Sequence[Record], *, batch: int) -> None:
        """Write one batch and wait until it is on the disk."""
        append_lines(self.path, [json.dumps({**row, "batch": [batch, len(records)]}) + "\n" for row in records])

    def _ends_whole(self) -> bool:
        return self.path.read_bytes()[-1:] in (b"\n", b"")

    def read(self) -> list[Record]:
        """All complete lines, nothing repaired. Raises ValueError naming a broken line that is not the last."""
        lines = list(json_lines(self.path)) if self.path.is_file() else []
        if lines and lines[-1][1] is None and not self._ends_whole():
            lines.pop()
        for number, row, problem in lines:
            if row is None:
                raise ValueError(f"{self.path}, line {number}: {problem}; delete the line to repeat its row")
        return [row for _, row, _ in lines if row is not None]

    def repair(self) -> list[Record]:
        """Cut off a half-written end and unfinished batches; return what is finished."""
        records = self.read()
        sizes = Counter(record["batch"][0] for record in records)
        finished = [r for r in records if sizes[r["batch"][0]] == r["batch"][1]]
        if len(finished) < len(records) or (self.path.is_file() and not self._ends_whole()):
            self.replace(finished)
        return finished

    def replace(self, records: Iterable[Record]) -> None:
        """Write the whole file anew under a temporary name and rename it: never half a file."""
        write_atomically(self.path, lambda file: file.writelines(json.dumps(r) + "\n" for r in records))
