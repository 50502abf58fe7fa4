"""Eval set x model -> records -> Evaluation: behind `covo-rl eval`, the recipe's table and `data profile` alike.

    rows -> batches of similar length, rows of one clip together -> replies -> verdicts -> records -> summary

Batches are planned over all rows before anything runs and a row's noise depends on the seed and the row alone, so the
result does not depend on where an evaluation was interrupted or on how many ranks share it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from covo_rl.evaluate.records import Record, make_record
from covo_rl.evaluate.scorers import Scorer, token_set_match
from covo_rl.evaluate.summary import summarize
from covo_rl.evaluate.variants import with_audio
from covo_rl.types import Clip, Example, Group, Prompt

if TYPE_CHECKING:
    from covo_rl.audio import ClipStore
    from covo_rl.config import PromptConfig, RewardConfig, RolloutConfig
    from covo_rl.evaluate.sets import PromptStyle

BREAKDOWN = ("task", "category", "sub-category", "difficulty")


class Answerer(Protocol):
    """Whatever answers questions: a policy with its sampler, or a fake in a test."""

    def answer(self, examples: Sequence[Example], *, greedy: bool, num_generations: int, seed: int) -> list[Group]:
        """One Group per example, in order, each with `num_generations` rollouts.

        Every batch is given the same seed: the noise of a row must come from the seed and the row (as rollout.sample
        has it), not from its place in the batch.
        """
        ...


@dataclass
class PolicyAnswerer:
    """A policy, its prompts and its sampler. Each clip is encoded once while the feature store holds it."""

    policy: Any
    clips: ClipStore
    prompt_config: PromptConfig
    rollout_config: RolloutConfig
    style: PromptStyle | None = None

    @property
    def max_clip_seconds(self) -> float | None:
        return self.policy.family.max_clip_seconds

    def build(self, example: Example) -> Prompt:
        """The prompt of one row, in the set's published wording where `style` is given."""
        from covo_rl import prompt

        if self.style is None:
            return prompt.build_prompt(example, self.policy.family, self.clips, self.prompt_config)
        plain = replace(self.prompt_config, instruction="")
        built = prompt.build_prompt(self.style.apply(example), self.policy.family, self.clips, plain)
        return replace(built, example=example)

    def answer(self, examples: Sequence[Example], *, greedy: bool, num_generations: int, seed: int) -> list[Group]:
        import torch

        from covo_rl.engines import own

        prompts = [self.build(example) for example in examples]
        with torch.no_grad():
            features = self.policy.features(prompts)
            return own.sample(
                self.policy, prompts, features, self.rollout_config,
                seed=seed, greedy=greedy, num_generations=num_generations,
            )  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """Records of all rows, in the order of the data."""

    records: tuple[Record, ...]
    audio: str = "real"
    greedy: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Accuracy (strict), ci95, reward means, n, breakdown, thinking length, shares cut and unreadable."""
        return {"audio": self.audio, "greedy": self.greedy, **summarize(self.records)}


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


def audio_seconds(clips: Sequence[Clip], store: ClipStore | None) -> float:
    """Length of a row's audio in seconds, from the file headers where the clips are files."""
    total = 0.0
    for clip in clips:
        if clip.array is not None and clip.sampling_rate:
            total += len(clip.array) / clip.sampling_rate
        elif clip.path is not None:
            import soundfile

            total += float(soundfile.info(clip.path).duration)
        elif store is not None:
            waveform, rate = store.waveform(store.key(clip))
            total += len(waveform) / rate
    return total


def evaluate_batch(
    answerer: Answerer, examples: Sequence[Example], seconds: Sequence[float], *, scorer: Scorer | None,
    reward_config: RewardConfig | None, breakdown: Callable[[Example], Mapping[str, Any]],
    greedy: bool, num_generations: int, seed: int,
) -> list[Record]:  # fmt: skip
    """Answer and judge one batch; one record per example, in order."""
    groups = answerer.answer(examples, greedy=greedy, num_generations=num_generations, seed=seed)
    if [group.prompt.example.id for group in groups] != [example.id for example in examples]:
        raise ValueError("the sampler returned other rows than it was given, or in another order")
    table = score_groups(groups, reward_config)
    return [
        make_record(group, scorer, breakdown=breakdown(group.prompt.example), table=table, position=p, seconds=s)
        for p, (group, s) in enumerate(zip(groups, seconds, strict=True))
    ]


def score_groups(groups: Sequence[Group], reward_config: RewardConfig | None) -> Any:
    """The reward components of these groups, or None where no rewards were asked for."""
    if reward_config is None or not groups:
        return None
    from covo_rl import rewards

    return rewards.score(groups, reward_config)


def default_breakdown(example: Example) -> dict[str, str]:
    """The columns that MMAU-format rows are reported by, where the row has them."""
    return {name: str(example.columns[name]) for name in BREAKDOWN if example.columns.get(name) not in (None, "")}


def evaluate(
    policy_or_sampler: Any, examples: Sequence[Example], *, prompt_config: PromptConfig,
    rollout_config: RolloutConfig, reward_config: RewardConfig | None, clips: ClipStore | None,
    audio: str = "real", greedy: bool = True, num_generations: int = 1, seed: int = 0, batch_size: int = 64,
    progress: Callable[[int, int, float], object] | None = None, scorer: Scorer = token_set_match,
    swap_seed: int = 0, rank: int = 0, world: int = 1, gather: Callable[[list], list] | None = None,
) -> Evaluation:  # fmt: skip
    """Evaluate in this process, as the trainer does before and after.

    `policy_or_sampler` is a Policy, or an object with `answer` (see Answerer). `audio` is real, silent, swapped or
    none; the reported reward of a row is the mean over its samples. `progress(done, total, accuracy)` is called
    after every batch. Returns an Evaluation whose records are in the order of `examples`.

    With `world` > 1 each rank answers every world-th batch and `gather` (accelerate.utils.gather_object) brings the
    records to all; not for sharded parameters, whose ranks must run the same number of forwards.

    Raises:
        ValueError: duplicate ids, an unknown audio condition, a greedy run with several samples.
    """
    check_settings(examples, greedy=greedy, num_generations=num_generations)
    answerer: Answerer = policy_or_sampler
    if not hasattr(policy_or_sampler, "answer"):
        assert clips is not None, "a policy needs the ClipStore that its feature store reads from"
        config = replace(rollout_config, num_generations=num_generations)
        answerer = PolicyAnswerer(policy_or_sampler, clips, prompt_config, config)
    seconds = [audio_seconds(e.clips, clips) for e in examples]
    # only real audio goes without clips
    rows = list(examples) if audio == "real" else with_audio(examples, audio, clips, seed=swap_seed)  # type: ignore[arg-type]
    found: dict[int, Record] = {}
    for batch in plan_batches(examples, seconds, batch_size)[rank::world]:
        part = [rows[i] for i in batch]
        records = evaluate_batch(
            answerer, part, [seconds[i] for i in batch], scorer=scorer, reward_config=reward_config,
            breakdown=default_breakdown, greedy=greedy, num_generations=num_generations,
            seed=seed,
        )  # fmt: skip
        found.update(zip(batch, records, strict=True))
        if progress is not None:
            right = sum(bool(record["strict_correct"]) for record in found.values())
            progress(len(found), len(rows), right / len(found))
    if gather is not None:
        found = dict(gather(list(found.items())))
    return Evaluation(tuple(found[i] for i in range(len(rows))), audio=audio, greedy=greedy)


def check_settings(examples: Sequence[Example], *, greedy: bool, num_generations: int) -> None:
    """Raise ValueError for duplicate ids (all named) and for several greedy samples, which would be equal."""
    seen: set[str] = set()
    twice = sorted({e.id for e in examples if e.id in seen or seen.add(e.id)})
    if twice:
        raise ValueError(f"{len(twice)} ids occur more than once: {', '.join(twice[:20])}")
    if greedy and num_generations != 1:
        raise ValueError(f"greedy decoding gives {num_generations} equal replies; use num_generations=1, or sample")
