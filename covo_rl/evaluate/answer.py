"""Eval set x model -> records -> Evaluation: behind `covo-rl eval`, the recipe's table and `data profile` alike.

    rows -> batches of similar length, rows of one clip together -> replies -> verdicts -> records -> summary

Batches are planned over all rows before anything runs and a row's noise depends on the seed and the row alone, so the
result does not depend on where an evaluation was interrupted or on how many ranks share it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from covo_rl.config import AdapterConfig, PromptConfig, RewardConfig, RolloutConfig
from covo_rl.evaluate.inputs import repeated_ids
from covo_rl.evaluate.records import Record, judge_groups
from covo_rl.evaluate.sets import EvalSet, PromptStyle
from covo_rl.evaluate.summary import summarize
from covo_rl.evaluate.variants import with_audio
from covo_rl.train.ranks import Ranks
from covo_rl.types import Clip, Example, Group, Prompt

if TYPE_CHECKING:
    from covo_rl.audio import ClipStore

#: Rows that a program hands over: in MMAU's columns, graded by its rule.
IN_PROCESS = EvalSet("in-process", "rows of a program")


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
    """A policy, its prompts and its sampler. Each clip is encoded once while the feature store holds it."""

    policy: Any
    clips: ClipStore
    prompt_config: PromptConfig
    rollout_config: RolloutConfig
    style: PromptStyle | None = None

    @property
    def max_clip_seconds(self) -> float | None:
        return self.policy.family.max_clip_seconds

    def _prompt(self, example: Example) -> Prompt:
        """The prompt of one row, in the set's published wording where `style` is given."""
        from covo_rl.prompt import build_prompt

        family = self.policy.family
        if self.style is None:
            return build_prompt(example, family, self.clips, self.prompt_config)
        plain = replace(self.prompt_config, instruction="")
        return replace(build_prompt(self.style.apply(example), family, self.clips, plain), example=example)

    def answer(self, examples: Sequence[Example], *, greedy: bool, num_generations: int, seed: int) -> list[Group]:
        import torch

        from covo_rl.engines import own

        prompts = [self._prompt(example) for example in examples]
        with torch.no_grad():
            features = self.policy.features(prompts)
            return own.sample(
                self.policy, prompts, features, self.rollout_config,
                seed=seed, greedy=greedy, num_generations=num_generations,
            )  # fmt: skip


def load_answerer(
    model: str, adapter: str | None, *, dtype: str, prompt_config: PromptConfig, rollout_config: RolloutConfig,
    style: PromptStyle | None = None, device: str | None = None, trust_remote_code: bool = False,
) -> PolicyAnswerer:  # fmt: skip
    """Load a checkpoint folder, hub name or `builtin:tiny`, with a PEFT adapter on it if given, ready to answer."""
    import torch
    from accelerate import PartialState

    from covo_rl.audio import ClipStore
    from covo_rl.models import load_family
    from covo_rl.policy import Policy
    from covo_rl.policy.trainable import make_trainable
    from covo_rl.resolve import resolve_model

    family = load_family(resolve_model(model), dtype=dtype, trust_remote_code=trust_remote_code)
    peft_model: Any = make_trainable(family, AdapterConfig(lora=True, adapter=adapter)).peft_model if adapter else None
    backbone: Any = family.model
    backbone.to(torch.device(device) if device else PartialState().device)
    backbone.requires_grad_(False)  # nothing trains, so that the features of a clip are kept
    clips = ClipStore()
    policy = Policy(family, peft_model=peft_model, clips=clips)
    policy.eval()
    return PolicyAnswerer(policy, clips, prompt_config, rollout_config, style)


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
) -> Evaluation:  # fmt: skip
    """Evaluate in this process, as the trainer does before and after.

    `policy_or_sampler` is a Policy, or an object with `answer` (see Answerer). `audio` is real, silent, swapped or
    none; the reported reward of a row is the mean over its samples. `progress(done, total, accuracy)` is called
    after every batch. Returns an Evaluation whose records are in the order of `examples`.

    Several `ranks` deal the batches among them and all get all records; not for sharded parameters, whose ranks must
    run the same number of forwards.

    Raises:
        ValueError: duplicate ids, an unknown audio condition, a greedy run with several samples.
    """
    check_settings(examples, greedy=greedy, num_generations=num_generations)
    answerer: Answerer = policy_or_sampler
    if not hasattr(policy_or_sampler, "answer"):
        assert clips is not None, "a policy needs the ClipStore that its feature store reads from"
        config = replace(rollout_config, num_generations=num_generations)
        answerer = PolicyAnswerer(policy_or_sampler, clips, prompt_config, config)
    ranks = ranks or Ranks()
    seconds = [audio_seconds(e.clips, clips) for e in examples]
    rows = with_audio(examples, audio, clips)
    records: dict[int, Record] = {}
    for batch in plan_batches(examples, seconds, batch_size)[ranks.rank :: ranks.world]:
        answers = answer_batch(
            answerer, [rows[i] for i in batch], [seconds[i] for i in batch], eval_set=IN_PROCESS,
            reward_config=reward_config, greedy=greedy, num_generations=num_generations, seed=seed,
        )  # fmt: skip
        records.update(zip(batch, answers, strict=True))
        if progress is not None:
            right = sum(bool(record["strict_correct"]) for record in records.values())
            progress(len(records), len(rows), right / len(records))
    records = dict(ranks.joined(list(records.items())))
    return Evaluation(tuple(records[i] for i in range(len(rows))), audio=audio, greedy=greedy)


def check_settings(examples: Sequence[Example], *, greedy: bool, num_generations: int) -> None:
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


def answer_batch(
    answerer: Answerer, examples: Sequence[Example], seconds: Sequence[float], *, eval_set: EvalSet,
    reward_config: RewardConfig | None, greedy: bool, num_generations: int, seed: int,
) -> list[Record]:  # fmt: skip
    """Answer and judge one batch; one record per example, in order."""
    groups = answerer.answer(examples, greedy=greedy, num_generations=num_generations, seed=seed)
    if [group.prompt.example.id for group in groups] != [example.id for example in examples]:
        raise ValueError("the sampler returned other rows than it was given, or in another order")
    return judge_groups(groups, seconds, eval_set, reward_config)
