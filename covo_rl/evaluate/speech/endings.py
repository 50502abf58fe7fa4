"""Stories whose written ending a model finds more or less likely: log-probs of the ending as the reply to the prompt.

    row -> prompt (heard or read) -> log-probs of the ids of both endings, at temperature 1

In the model's chat format, as everything that `--model` is asked. Endings in speech need codes of the model's own
tokenizer, which no checkpoint holds: their log-probs come from a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from covo_rl.evaluate.lengths import length_problems
from covo_rl.evaluate.records import Record
from covo_rl.evaluate.speech.inputs import SpeechInputs
from covo_rl.evaluate.speech.rows import GivenReply, SpeechItem
from covo_rl.evaluate.speech.sets import KINDS
from covo_rl.evaluate.through_duplex import without_use
from covo_rl.models.text import text_ids
from covo_rl.types import Example, Group, Rollout

if TYPE_CHECKING:
    from covo_rl.audio import ClipStore
    from covo_rl.evaluate.answer import PolicyAnswerer
    from covo_rl.evaluate.runner import Request

#: options of replies, of which there are none
_OF_REPLIES = ("greedy", "num_generations", "temperature", "top_p", "max_completion_length", "speech_mode", "voice")


def is_likelihood(inputs: SpeechInputs) -> bool:
    """Whether the rows ask how likely something is, and not for a reply."""
    return all(KINDS[row.kind].likelihood for row in inputs.rows)


def has_written_endings(row: SpeechItem) -> bool:
    """Whether a row's endings are texts, whose ids every model has."""
    return row.kind == "tsc" and not any(turn.clips for turn in row.rounds[1:])


def ending_problems(request: Request, inputs: SpeechInputs) -> list[str]:
    """Options that log-probs have no use for."""
    return without_use(request, _OF_REPLIES, f"--set {inputs.speech_set.name} is scored by log-probs")


@dataclass
class EndingScorer:
    """Scores both endings of each row, the right one first."""

    answerer: PolicyAnswerer
    rows: Mapping[str, SpeechItem]

    @property
    def clips(self) -> ClipStore:
        return self.answerer.clips

    @property
    def max_clip_seconds(self) -> float | None:
        return self.answerer.max_clip_seconds

    def length_problems(self, examples: Sequence[Example]) -> list[str]:
        """Rows that do not fit the model with their longest ending."""
        family, clips, prompt = self.answerer.policy.family, self.clips, self.answerer.prompt
        return [
            problem for example in examples
            for problem in length_problems([example], family, clips, prompt, max(map(len, self._endings(example))))
        ]  # fmt: skip

    def examine(self, examples: Sequence[Example], seconds: Sequence[float]) -> list[Record]:
        """One record per row, in order: `logps` of the ids of the right ending, and of the wrong one."""
        import torch

        policy = self.answerer.policy
        groups = [
            Group(self.answerer.prompt(example), tuple(Rollout(ids, (), "", "stop") for ids in self._endings(example)))
            for example in examples
        ]
        with torch.no_grad():
            scores = policy.logps(groups, policy.features([group.prompt for group in groups]))
        logps = [row_C[mask_C].tolist() for row_C, mask_C in zip(scores.logps_NC, scores.mask_NC, strict=True)]
        return [
            {"id": example.id, "missing": False, "logps": logps[2 * place : 2 * place + 2], "seconds": round(length, 3)}
            for place, (example, length) in enumerate(zip(examples, seconds, strict=True))
        ]

    def _endings(self, example: Example) -> list[tuple[int, ...]]:
        tokenizer = self.answerer.policy.family.tokenizer
        return [tuple(text_ids(tokenizer, turn.text or "")) for turn in self.rows[example.id].rounds[1:]]


def ending_replies(records: Iterable[Record]) -> dict[str, GivenReply]:
    """Row's name -> the log-probs of its endings."""
    return {record["id"]: GivenReply(logps=tuple(map(tuple, record["logps"]))) for record in records}
