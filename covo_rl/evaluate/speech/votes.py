"""Judges asked as official scripts ask them: several votes of one question, each read by the set's own rule.

A reply that the rule cannot read is asked for again; after that it is missing, and so is its row: never a middle score,
and never the mean of fewer votes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from covo_rl.data.files import file_sha256
from covo_rl.rewards.replies import AnswerError, JudgeError
from covo_rl.speech.listeners import finished_results
from covo_rl.types import Clip, shown

ASKED_AGAIN = 3  # times, where a reply cannot be read
#: how URO-Bench's scripts ask: three votes
OFFICIAL_SAMPLING = {"temperature": 0.5, "top_p": 0.95, "max_tokens": 2048}
OFFICIAL_VOTES = 3


@dataclass(frozen=True)
class JudgeQuestion:
    """A row's filled prompt, and the clips that a judge who hears is sent: the reply last. `read`: the rule of this one
    question's replies, where it is not the set's."""

    id: str
    prompt: str
    clips: Sequence[Clip] = ()
    read: Callable[[str], Any] | None = None


@dataclass
class Verdicts:
    """One question's: `values` as the rule read them, a vote each; empty where one is missing, with why."""

    values: tuple[Any, ...] = ()
    replies: tuple[str, ...] = ()
    missing: str = ""
    #: "unreadable" or "failed", where it is missing
    kind: str = ""
    #: the last reply that could not be read, of which official rules make something
    unread: str = ""

    @property
    def texts(self) -> list[str] | None:
        """What the judge said, as an official script is given it; None where it failed."""
        if not self.missing:
            return list(self.replies)
        return [*self.replies, self.unread] if self.kind == "unreadable" else None


class FileJudge:
    """Finished replies by the id of a question: {"id", "text"} a line, text a list of votes where there are several.

    Raises:
        RewardError: as `finished_results`.
    """

    hears = True

    def __init__(self, path: Path) -> None:
        self.lines: dict[str, list[str]] = finished_results(path, _read_replies)
        self.name, self.version = f"file:{path}", file_sha256(path)

    def reply(self, name: str, number: int) -> str | JudgeError:
        """The vote of this number about a question."""
        votes = self.lines.get(name, [])
        if number < len(votes):
            return votes[number]
        why = f"{len(votes)} votes for {name}, not {number + 1}" if votes else f"no line for {name}"
        return JudgeError(f"{self.name} has {why}")


def _read_replies(line: Mapping[str, Any]) -> list[str]:
    texts: list[Any] = line["text"] if isinstance(line.get("text"), list) else [line.get("text")]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"text is {line.get('text')!r:.80}, not a string or a list of strings")
    return texts


@dataclass
class JudgeCounts:
    """What became of all questions: in a report, beside the numbers that rest on them."""

    asked: int = 0
    asked_again: int = 0
    missing: Counter[str] = field(default_factory=Counter)


def ask_votes(
    judge: Any, questions: Sequence[JudgeQuestion], read: Callable[[str], Any], *, votes: int = 1,
    sampling: Mapping[str, Any] | None = None, counts: JudgeCounts | None = None,
) -> list[Verdicts]:  # fmt: skip
    """Verdicts on each question, in order. `read` is the set's rule: a reply -> a value; None, or ValueError, where it
    cannot be read. `sampling` (OFFICIAL_SAMPLING, say) needs a judge with `vote` (rewards/replies.py)."""
    results = [Verdicts() for _ in questions]
    counts = counts or JudgeCounts()
    counts.asked += len(questions)
    for number in range(votes):
        voter = judge.vote(number, **(sampling or {})) if hasattr(judge, "vote") else judge
        waiting = [i for i, result in enumerate(results) if not result.missing]
        for attempt in range(1 + ASKED_AGAIN):
            counts.asked_again += len(waiting) if attempt else 0
            waiting = _ask(voter, questions, results, waiting, read, number)
            if not waiting or not hasattr(voter, "forget"):  # a file would say the same again
                break
    for result in results:
        if result.missing:
            result.values = ()
            counts.missing[result.kind] += 1
    return results


def _ask(
    voter: Any, questions: Sequence[JudgeQuestion], results: list[Verdicts], waiting: list[int],
    read: Callable[[str], Any], number: int,
) -> list[int]:  # fmt: skip
    """One round; those whose replies cannot be read, which are missing unless they are asked again."""
    unread = []
    asked = [questions[i] for i in waiting]
    for i, question, reply in zip(waiting, asked, _replies(voter, asked, number), strict=True):
        result = results[i]
        if not isinstance(reply, str):
            why = str(reply) if isinstance(reply, AnswerError) else f"the judge gave {shown(reply)}, not text"
            result.kind, result.missing, result.unread = "failed", why, ""
            continue
        try:
            value = (question.read or read)(reply)
        except ValueError:
            value = None
        if value is None:
            result.kind, result.missing = "unreadable", f"the judge's reply cannot be read: {reply[:120]!r}"
            result.unread = reply
            unread.append(i)
            if hasattr(voter, "forget"):
                voter.forget(question.prompt, question.clips)
        else:
            result.kind = result.missing = result.unread = ""
            result.values, result.replies = (*result.values, value), (*result.replies, reply)
    return unread


def _replies(voter: Any, asked: Sequence[JudgeQuestion], number: int) -> Sequence[Any]:
    if isinstance(voter, FileJudge):
        return [voter.reply(question.id, number) for question in asked]
    prompts = [question.prompt for question in asked]
    if getattr(voter, "hears", False):
        return voter.ask(prompts, [question.clips for question in asked])
    return voter.ask(prompts)
