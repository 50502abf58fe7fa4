"""Eval set x model -> records -> Evaluation: behind `covo-rl eval`, the recipe's table and `data profile` alike.

    rows -> batches of similar length, rows of one clip together -> replies -> verdicts -> records -> summary

Batches are planned over all rows before anything runs and a row's noise depends on the seed and the row alone, so the
result does not depend on where an evaluation was interrupted or on how many ranks share it.

The same questions are asked with other sound too: silenced, swapped with another row's, or none at all. What the audio
contributes is the accuracy with it minus the accuracy without it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from covo_rl.audio import content_key
from covo_rl.config import PromptConfig, RewardConfig, RolloutConfig
from covo_rl.evaluate.inputs import repeated_ids
from covo_rl.evaluate.lengths import audio_seconds, length_problems
from covo_rl.evaluate.records import Record, judge_groups
from covo_rl.evaluate.sets import EvalSet, PromptStyle
from covo_rl.evaluate.summary import summarize
from covo_rl.train.ranks import Ranks
from covo_rl.types import Clip, Example, Group, Prompt, visible

if TYPE_CHECKING:
    from covo_rl.audio import ClipStore
    from covo_rl.engines.base import RolloutEngine
    from covo_rl.policy.trainable import Trainable

#: Rows that a program hands over: in MMAU's columns, graded by its rule.
IN_PROCESS = EvalSet("in-process", "rows of a program")
#: audio condition -> what a report calls it
CONDITIONS = {
    "real": "real audio",
    "silent": "silence of the same length",
    "swapped": "another row's audio",
    "none": "no audio (text only)",
}


class Answerer(Protocol):
    """Whatever answers questions: a policy with its sampler, or a fake in a test."""

    def answer(self, examples: Sequence[Example], *, greedy: bool, num_generations: int, seed: int) -> list[Group]:
        """One Group per example, in order, each with `num_generations` rollouts.

        Every batch is given the same seed: the noise of a row must come from the seed and the row (as the sampler of
        engines.own has it), not from its place in the batch.
        """
        ...


@dataclass
class PolicyAnswerer:
    """A policy, its prompts (in the set's published wording where `style` is given) and what samples for it: the policy
    itself, or an `engine` that runs it. `saved` is the adapter on the policy. Each clip is encoded once while the
    feature store holds it."""

    policy: Any
    clips: ClipStore
    prompt_config: PromptConfig
    rollout_config: RolloutConfig
    style: PromptStyle | None = None
    engine: RolloutEngine | None = None
    saved: Trainable | None = None

    @property
    def max_clip_seconds(self) -> float | None:
        return self.policy.family.max_clip_seconds

    def prompt(self, example: Example) -> Prompt:
        from covo_rl.prompt import build_prompt

        config, row = self.prompt_config, example
        if self.style is not None:
            config, row = replace(config, instruction="", written_question=True), self.style.apply(example)
        return replace(build_prompt(row, self.policy.family, self.clips, config), example=example)

    def length_problems(self, examples: Sequence[Example]) -> list[str]:
        return length_problems(
            examples, self.policy.family, self.clips, self.prompt, self.rollout_config.max_completion_length
        )

    def answer(self, examples: Sequence[Example], *, greedy: bool, num_generations: int, seed: int) -> list[Group]:
        from covo_rl.engines.base import EngineError
        from covo_rl.engines.own import OwnEngine

        engine = self.engine or OwnEngine(self.policy)
        prompts = [self.prompt(example) for example in examples]
        pending = engine.submit(prompts, self.rollout_config, seed=seed, generations=num_generations, greedy=greedy)
        groups = engine.collect(pending)
        if failed := engine.failed:  # a figure over the rows that came would be of another set
            raise EngineError(f"{len(failed)} rows were not answered; row {visible(failed[0].row)}: {failed[0].reason}")
        return groups


@dataclass(frozen=True)
class Evaluation:
    """Records of all rows, in the order of the data."""

    records: tuple[Record, ...]
    audio: str = "real"
    greedy: bool = True

    def summary(self) -> dict[str, Any]:
        """Accuracy (strict), ci95, reward means, n, breakdown, thinking length, shares cut and unreadable."""
        return {"audio": self.audio, "greedy": self.greedy, **summarize(self.records)}


def evaluate(
    policy_or_sampler: Any, examples: Sequence[Example], *, prompt_config: PromptConfig,
    rollout_config: RolloutConfig, reward_config: RewardConfig | None, clips: ClipStore | None,
    audio: str = "real", greedy: bool = True, num_generations: int = 1, seed: int = 0, batch_size: int = 64,
    progress: Callable[[int, int, float], object] | None = None, ranks: Ranks | None = None,
    engine: RolloutEngine | None = None, eval_set: EvalSet = IN_PROCESS, style: PromptStyle | None = None,
) -> Evaluation:  # fmt: skip
    """Evaluate in this process, as the trainer does before and after.

    `policy_or_sampler` is a Policy, which `engine` may sample for, or an object with `answer` (see Answerer). `audio`
    is real, silent, swapped or none; the reported reward of a row is the mean over its samples. `progress(done, total,
    accuracy)` is called after every batch, with the rows of this rank. `eval_set` says how replies are graded, `style`
    the wording of a policy's questions. Returns an Evaluation whose records are in the order of `examples`.

    Several `ranks` deal the batches among them and all get all records. Where ranks sample together (a policy in
    shards, an engine of several GPUs) every one runs as many batches, some of them for nothing.

    Raises:
        ValueError: duplicate ids, an unknown audio condition, a greedy run with several samples.
        EngineError: on every rank, where the engine failed on one.
    """
    from covo_rl.engines.base import EngineError

    check_repeats(examples, greedy=greedy, num_generations=num_generations)
    answerer: Answerer = policy_or_sampler
    if not hasattr(policy_or_sampler, "answer"):
        assert clips is not None, "a policy needs the ClipStore that its feature store reads from"
        config = replace(rollout_config, num_generations=num_generations)
        answerer = PolicyAnswerer(policy_or_sampler, clips, prompt_config, config, style, engine)
    ranks = ranks or Ranks()
    seconds = [audio_seconds(e.clips, clips) for e in examples]
    rows = with_audio(examples, audio, clips)
    records: dict[int, Record] = {}
    batches = plan_batches(examples, seconds, batch_size)
    mine = batches[ranks.rank :: ranks.world]
    together = engine is not None or getattr(policy_or_sampler, "sharded", False)

    def answer_mine() -> None:
        for batch in mine:
            answers = answer_batch(
                answerer, [rows[i] for i in batch], [seconds[i] for i in batch], eval_set=eval_set,
                reward_config=reward_config, greedy=greedy, num_generations=num_generations, seed=seed,
            )  # fmt: skip
            records.update(zip(batch, answers, strict=True))
            if progress is not None:
                right = sum(bool(record["strict_correct"]) for record in records.values())
                progress(len(records), sum(map(len, mine)), right / len(records))
        if together and 0 < len(batches) % ranks.world <= ranks.rank:
            answerer.answer([rows[batches[0][0]]], greedy=greedy, num_generations=num_generations, seed=seed)

    ranks.together(answer_mine, EngineError)
    records = dict(ranks.joined(list(records.items())))
    return Evaluation(tuple(records[i] for i in range(len(rows))), audio=audio, greedy=greedy)


def check_repeats(examples: Sequence[Example], *, greedy: bool, num_generations: int) -> None:
    """Raise ValueError for duplicate ids (all named) and for several greedy samples, which would be equal."""
    if twice := sorted(repeated_ids([e.id for e in examples])):
        raise ValueError(f"{len(twice)} ids occur more than once: {', '.join(twice[:20])}")
    if greedy and num_generations != 1:
        raise ValueError(f"greedy decoding gives {num_generations} equal replies; use num_generations=1, or sample")


def plan_batches(
    examples: Sequence[Example], seconds: Sequence[float], batch_size: int, *, bucket: bool = True
) -> list[list[int]]:
    """Row indices per batch: rows of one clip side by side, similar total lengths together, the longest first.

    `seconds[i]` is the length of row i's audio. The longest batch comes first, so that a batch size that does not
    fit the memory fails at once and the time left is over- rather than underestimated.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: at least one row at a time")
    order = list(range(len(examples)))
    if bucket:
        length = [s * 6.25 + len(e.question + "".join(e.choices)) / 4 for e, s in zip(examples, seconds, strict=True)]
        clip = [" ".join(c.path or str(id(c)) for c in e.clips) or f"row {i}" for i, e in enumerate(examples)]
        longest: dict[str, float] = {}
        for name, value in zip(clip, length, strict=True):
            longest[name] = max(value, longest.get(name, 0.0))
        order.sort(key=lambda i: (-longest[clip[i]], clip[i], -length[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def answer_batch(
    answerer: Answerer, examples: Sequence[Example], seconds: Sequence[float], *, eval_set: EvalSet,
    reward_config: RewardConfig | None, greedy: bool, num_generations: int, seed: int,
) -> list[Record]:  # fmt: skip
    """Answer and judge one batch; one record per example, in order. What examines streams judges them itself."""
    if (examine := getattr(answerer, "examine", None)) is not None:
        return examine(examples, seconds)
    groups = answerer.answer(examples, greedy=greedy, num_generations=num_generations, seed=seed)
    if [group.prompt.example.id for group in groups] != [example.id for example in examples]:
        raise ValueError("the sampler returned other rows than it was given, or in another order")
    return judge_groups(groups, seconds, eval_set, reward_config)


# -- the same questions with other sound ----------------------------------------------------------------------------


def with_audio(examples: Sequence[Example], audio: str, clips: ClipStore | None) -> list[Example]:
    """The rows under one audio condition; ids, questions and answers are unchanged.

    Swapped rows hear another sound, not the same one under another name. `clips`: needed for silence alone.

    Raises:
        ValueError: an unknown condition, or nothing to swap with (named).
    """
    if audio not in CONDITIONS:
        raise ValueError(f"audio={audio!r}: choose one of {', '.join(CONDITIONS)}")
    if audio == "real":
        return list(examples)
    if audio == "none":
        return [replace(example, clips=()) for example in examples]
    if audio == "swapped":
        sounding = [example for example in examples if example.clips]
        key = clips.key if clips is not None else content_key
        items = [(" ".join(str(key(clip)) for clip in example.clips), example.answer or "") for example in sounding]
        partners = iter(derangement(items, seed=0) if sounding else ())
        return [replace(e, clips=sounding[next(partners)].clips) if e.clips else e for e in examples]
    assert clips is not None, "silence needs the ClipStore that knows how long each clip is"

    def silence(waveform: np.ndarray, rate: int) -> Clip:
        return Clip(array=np.zeros(len(waveform), dtype=np.float32), sampling_rate=rate)

    return [replace(e, clips=tuple(silence(*clips.waveform(clips.key(c))) for c in e.clips)) for e in examples]


def derangement(items: Sequence[tuple[str, str]], seed: int) -> list[int]:
    """For each (clip, answer) the index of a partner: a permutation in which few keep their clip (none, where that is
    found possible) and then few have a partner with the same answer. Deterministic in `seed`.

    Raises ValueError when all items have the same clip, so that nothing can be swapped.
    """
    if len({clip for clip, _ in items}) < 2:
        raise ValueError(f"swapped audio needs at least two different clips; the {len(items)} rows share one")
    tries = [_attempt(items, f"swap:{seed}:{attempt}") for attempt in range(1 + 400 // len(items))]
    return min(tries, key=lambda partner: sum(_cost(items[i], items[j]) for i, j in enumerate(partner)))


def _cost(item: tuple[str, str], other: tuple[str, str]) -> int:
    return 3 * (item[0] == other[0]) + (item[1] == other[1])


def _attempt(items: Sequence[tuple[str, str]], seed: str) -> list[int]:
    places = range(len(items))
    order = list(places)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda i: items[i][1])
    # Sorted by answer and shifted by the largest block, equal answers cannot meet where that is possible.
    shift = max(Counter(answer for _, answer in items).values()) % len(items) or 1
    partner = [0] * len(items)
    for place, i in enumerate(order):
        partner[i] = order[(place + shift) % len(items)]
    # Exchange two partners wherever a row still has its own clip or answer and that lowers the total cost.
    for i in places:
        mine = items[i]
        for k in places if _cost(mine, items[partner[i]]) else ():
            now = _cost(mine, items[partner[i]]) + _cost(items[k], items[partner[k]])
            if _cost(mine, items[partner[k]]) + _cost(items[k], items[partner[i]]) < now:
                partner[i], partner[k] = partner[k], partner[i]
                break
    return partner
