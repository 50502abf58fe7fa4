"""Dialogues of several rounds put to a model, which sees what was asked and what it replied itself in those before.

    round 0 of all rows -> replies -> round 1, with round 0 and its reply before it -> ...

The record of a row is that of its first round, with those of the others under `later`. A reply with codes stands in the
history as it was sampled, text and codes; a reply of text as the model's chat template writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from covo_rl.config import PromptConfig
from covo_rl.evaluate.answer import PolicyAnswerer
from covo_rl.evaluate.lengths import length_problems
from covo_rl.evaluate.records import Record, judge_groups
from covo_rl.evaluate.sets import EvalSet
from covo_rl.evaluate.speech.hearing import sound_id
from covo_rl.evaluate.speech.inputs import SpeechInputs
from covo_rl.evaluate.speech.rows import SpeechItem, round_count
from covo_rl.prompt import messages
from covo_rl.speech import SAY_ALOUD
from covo_rl.types import Example, Group

if TYPE_CHECKING:
    from covo_rl.audio import ClipStore
    from covo_rl.evaluate.runner import Request

_LANGUAGES = {"en": "English", "zh": "Chinese"}


def question_of(row: SpeechItem, place: int = 0) -> str:
    """What is written beside the clips of a round: nothing where they ask."""
    text = row.rounds[place].text
    if row.kind == "asr":
        return "Write down what is said."
    if row.kind == "tts":
        return f"{SAY_ALOUD}\n{row.reference}"
    if row.kind == "translation":
        return f"Translate what is said into {_LANGUAGES[row.language]}."
    if row.choices:
        options = "\n".join(f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(row.choices))
        ending = "letter" if row.kind == "air_foundation" else "text"
        return f"{text}\n{options}\nAnswer with the {ending} of one option and nothing else."
    written = row.kind.startswith(("air_", "mmau_pro_")) or not row.rounds[place].clips
    return text or "" if written else ""


def has_rounds(inputs: SpeechInputs) -> bool:
    """Whether some row is a dialogue of several."""
    return any(round_count(row) > 1 for row in inputs.rows)


def round_records(record: Record) -> list[Record]:
    """Those of a row's rounds, in order."""
    return [record, *record.get("later", ())]


@dataclass
class RoundsAnswerer:
    """Asks `answerer`, a policy or a cascade, all rounds of a row. Only a row's first sample goes on."""

    answerer: Any
    rows: Mapping[str, SpeechItem]
    eval_set: EvalSet
    request: Request

    @property
    def clips(self) -> ClipStore:
        return self.answerer.clips

    @property
    def max_clip_seconds(self) -> float | None:
        return getattr(self.answerer, "max_clip_seconds", None)

    def length_problems(self, examples: Sequence[Example]) -> list[str]:
        """Rows whose rounds, with the longest replies that there may be, do not fit the model."""
        if not isinstance(one := self.answerer, PolicyAnswerer):
            return []
        return [
            problem for example in examples
            for problem in length_problems([example], one.policy.family, one.clips, one.prompt,
                                           round_count(self.rows[example.id]) * self.request.max_completion_length)
        ]  # fmt: skip

    def examine(self, examples: Sequence[Example], seconds: Sequence[float]) -> list[Record]:
        """One record per row, in order; an example holds the clips of all its rounds."""
        history: dict[str, tuple[Mapping[str, Any], ...]] = {example.id: () for example in examples}
        records: dict[str, list[Record]] = {example.id: [] for example in examples}
        lengths = {example.id: length for example, length in zip(examples, seconds, strict=True)}
        for place in range(max(round_count(self.rows[example.id]) for example in examples)):
            waiting = [example for example in examples if round_count(self.rows[example.id]) > place]
            rounds = [self._round(example, place, history[example.id]) for example in waiting]
            groups = self.answerer.answer(
                rounds, greedy=self.request.greedy, num_generations=1 if place else self.request.num_generations,
                seed=self.request.seed,
            )  # fmt: skip
            judged = judge_groups(groups, [lengths[example.id] for example in waiting], self.eval_set, None)
            for example, one, group, record in zip(waiting, rounds, groups, judged, strict=True):
                history[example.id] += (_question(one), self._reply(group))
                records[example.id].append(record)
        return [first | ({"later": later} if later else {}) for first, *later in records.values()]

    def _round(self, example: Example, place: int, history: tuple[Mapping[str, Any], ...]) -> Example:
        """The question of a round, whose clips come after those of its history."""
        row = self.rows[example.id]
        end = sum(len(turn.clips) for turn in row.rounds[: place + 1]) if round_count(row) > 1 else len(example.clips)
        return Example(sound_id(row, place), example.clips[:end], question_of(row, place), columns=example.columns,
                       history=history)  # fmt: skip

    def _reply(self, group: Group) -> Mapping[str, Any]:
        reply = group.rollouts[0]
        said: dict[str, Any] = {"role": "assistant", "content": [{"type": "text", "text": reply.text}]}
        if reply.codes:  # which no text can write; the template ends the turn itself
            ids = reply.completion_ids
            said["ids"] = ids[:-1] if ids[-1] in self.answerer.policy.family.eos_token_ids else ids
        return said


def _question(asked: Example) -> Mapping[str, Any]:
    return messages(asked, PromptConfig(instruction="", written_question=True))[-1]
