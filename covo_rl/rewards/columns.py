"""Groups of rollouts -> the columns that reward functions take, one value per completion; and what ours read of them.

Names: `prompts`, `completions` (text), `completion_codes` (audio codes), `completion_ids`, `stop_reason`; of the row
`id`, `question`, `choices`, `answer` (the right one) and every further column; `group_id`, which the rollouts of a
prompt share; of the completion `parsed` (prompt.Parsed), `think` and `predicted_answer`; `clips` (only for functions
that name it). A dataset column with one of these names arrives as `row_<name>`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from covo_rl.prompt import Parsed, parse
from covo_rl.rewards.specs import RewardError
from covo_rl.types import Clip, Example, Group, Prompt, Rollout, shown, visible

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class LazyClip:
    """A clip that a reward may look at; it is decoded only when asked for."""

    clip: Clip

    @property
    def path(self) -> str | None:
        return self.clip.path

    @property
    def duration(self) -> float:
        """Seconds."""
        waveform, rate = self.waveform()
        return len(waveform) / rate

    def waveform(self) -> tuple[np.ndarray, int]:
        """Mono float32 (samples,) and its rate in Hz."""
        from covo_rl.audio import decode

        return decode(self.clip)


class TrainerState(dict):
    """Where training stands, by key and by attribute: `step`, and TRL's name for it, `global_step`."""

    def __init__(self, state: Any = None) -> None:
        values = state if isinstance(state, Mapping) else getattr(state, "__dict__", {})
        super().__init__({name: v for name, v in values.items() if isinstance(v, bool | int | float | str | None)})
        self.setdefault("step", self.get("global_step", 0))
        self.setdefault("global_step", self["step"])

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the trainer state has no {name!r}; it has {', '.join(self)}") from None


def reward_columns(
    groups: Sequence[Group], trainer_state: Any = None, group_ids: Sequence[int] | None = None
) -> dict[str, Any]:
    """Lists of N = P*G values in group-major order, and the trainer's state.

    `group_ids` (P,): groups of the same number are parts of one; by default each is one of its own.

    Raises:
        ValueError: the groups have different numbers of rollouts.
    """
    sizes = {len(group.rollouts) for group in groups}
    if len(sizes) > 1:
        raise ValueError(f"groups of different sizes {sorted(sizes)}: every prompt needs the same number of rollouts")
    pairs = [(group.prompt, rollout) for group in groups for rollout in group.rollouts]
    numbered = zip(group_ids or range(len(groups)), groups, strict=True)
    parse_once = cache(parse)  # rollouts of a prompt often say the same
    parsed = [parse_once(rollout.text, rollout.stop_reason) for _, rollout in pairs]
    examples = [prompt.example for prompt, _ in pairs]
    columns: dict[str, Any] = {
        "prompts": [prompt.text for prompt, _ in pairs],
        "completions": [rollout.text for _, rollout in pairs],
        "completion_ids": [list(rollout.completion_ids) for _, rollout in pairs],
        "completion_codes": [list(rollout.codes) for _, rollout in pairs],
        "stop_reason": [rollout.stop_reason for _, rollout in pairs],
        "id": [example.id for example in examples],
        "group_id": [number for number, group in numbered for _ in group.rollouts],
        "question": [example.question for example in examples],
        "choices": [list(example.choices) for example in examples],
        "answer": [example.answer for example in examples],
        "parsed": parsed,
        "think": [item.think for item in parsed],
        "predicted_answer": [item.answer for item in parsed],
        "clips": [[LazyClip(clip) for clip in example.clips] for example in examples],
        "trainer_state": TrainerState(trainer_state),
    }
    own = {*columns, "log_extra", "log_metric", "log_missing", "judge", "scorer_model", "explain"}
    for name in dict.fromkeys(name for group in groups for name in group.prompt.example.columns):
        columns[f"row_{name}" if name in own else name] = [example.columns.get(name) for example in examples]
    return columns


def example_from_row(row: Mapping[str, Any], index: int = 0) -> Example:
    """A scored or hand-written row (question, choices, answer and further columns) as an Example.

    `clips` are paths, as a run writes them. A column of the data that a run's row had to call `row/NAME` has its name.

    Raises:
        RewardError: its choices are no list; the characters of a text would be options.
    """
    choices = () if row.get("choices") is None else row["choices"]
    if isinstance(choices, str | bytes | Mapping) or not isinstance(choices, Iterable):
        kind = f"{type(choices).__name__} {shown(choices, 80)}"
        raise RewardError(f"row {visible(row.get('id', index))}: choices is {kind}, not a list")
    others = {"id", "question", "choices", "answer", "completion", "completion_codes", "stop_reason", "rewards",
              "reward_total"}  # fmt: skip
    if "advantage" in row:  # a run's rollout
        others |= {"group", "rollout", "clip_keys", "parsed_answer", "problems", "missing", "advantage", "length",
                   "lag", "mean_logp", "token_logps"}  # fmt: skip
    answer: Any = row.get("answer")  # an index or a list of right answers is allowed here
    columns = {name: value for name, value in row.items() if name not in others}
    paths = columns.get("clips")
    clips: tuple[Clip, ...] = ()
    if isinstance(paths, list) and all(isinstance(path, str) for path in paths):
        clips = tuple(map(Clip, columns.pop("clips")))
    columns |= {name.removeprefix("row/"): columns.pop(name) for name in [*columns] if name.startswith("row/")}
    return Example(
        str(row.get("id", index)), clips, str(row.get("question") or ""), tuple(map(str, choices)), answer, columns
    )


def group_from_completions(
    example: Example, completions: Iterable[str], stop_reason: str = "stop", completion_ids: Iterable[int] = (),
    completion_codes: Iterable[int] = (),
) -> Group:  # fmt: skip
    """Completions that come from a file or a test, as rollouts without log-probs; ids and codes if there are any."""
    reason, ids, codes = "length" if stop_reason == "length" else "stop", tuple(completion_ids), tuple(completion_codes)
    rollouts = tuple(Rollout(ids, (), text, reason, codes=codes) for text in completions)
    return Group(Prompt(example, ({"role": "user", "content": example.question},), example.question, ()), rollouts)


def completion_text(completion: Any) -> str:
    """A completion as text: a string, or TRL's list of messages (their contents, joined)."""
    if isinstance(completion, str):
        return completion
    contents = [message["content"] or "" for message in completion]
    parts = [[{"text": content}] if isinstance(content, str) else content for content in contents]
    return "".join(part.get("text", "") for content in parts for part in content)


def completion_rows(
    completions: Sequence[Any], parsed: Sequence[Parsed] | None, *columns: Sequence[Any] | None
) -> list[tuple[Any, ...]]:
    """(parts, value of every column) by completion. `parsed` where the runner has the parts; no column is all None."""
    parts = [parse(completion_text(c)) for c in completions] if parsed is None else parsed
    return list(zip(parts, *([None] * len(parts) if c is None else c for c in columns), strict=True))
