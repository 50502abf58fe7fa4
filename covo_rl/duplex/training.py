"""GRPO of when to stop: GRPO's trainer, whose rollouts are stopping chunks and whose groups cost one forward each.

    streams -> one forward over each trunk -> hazards -> G stops, their rewards -> estimator -> the next policy

What trains, clipping, schedule, faults, ranks, checkpoints and metrics are those of every other run
(covo_rl/train/loop.py): only where rollouts come from, and their gradient, are of this module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from covo_rl.algo.advantage import by_sum
from covo_rl.audio import ClipStore
from covo_rl.duplex.config import DuplexOptions
from covo_rl.duplex.content import ReplyReader
from covo_rl.duplex.ids import DuplexIds
from covo_rl.duplex.questions import TimingQuestion
from covo_rl.duplex.records import stop_table, timing_step_metrics
from covo_rl.duplex.rollout import StopRewards, sample_stops, score_stops, shuffled_stops, stop_generator
from covo_rl.duplex.timing import TimingOptions, gold_loss, timing_loss
from covo_rl.duplex.trunk import Trunk, stop_logits
from covo_rl.policy import Policy
from covo_rl.policy.rows import evaluation_mode
from covo_rl.records.steps import Clock
from covo_rl.rewards.duplex_lint import reads_reply
from covo_rl.train.checkpoint.saver import Saver
from covo_rl.train.guard import TrainingStopped, not_finite_parameters
from covo_rl.train.learner import Learner
from covo_rl.train.loop import Trainer
from covo_rl.train.schedule import advance_schedule
from covo_rl.types import Example, Group, Prompt, RewardTable

if TYPE_CHECKING:
    from covo_rl.models.base import AudioFamily


def trunk_logits(policy: Policy, trunks: Sequence[Trunk], features: Sequence[Tensor], ids: DuplexIds) -> list[Tensor]:
    """z (K,) of each; call it as `wrapped(trunk_logits, ...)`, under the hooks of DDP and FSDP."""
    return stop_logits(policy.family, trunks, features, ids)


@torch.no_grad()
def question_logits(
    family: AudioFamily, questions: Sequence[TimingQuestion], ids: DuplexIds, batch_size: int = 32
) -> list[Tensor]:
    """z (K,) of every question, without gradient or dropout; those of about the same length go through together."""
    results: dict[int, Tensor] = {}
    with evaluation_mode(family.model):
        for part in length_batches(questions, batch_size):
            z = stop_logits(family, *_inputs([questions[i] for i in part]), ids)
            results |= dict(zip(part, z, strict=True))
    return [results[i] for i in range(len(questions))]


def length_batches(questions: Sequence[TimingQuestion], size: int) -> list[list[int]]:
    """Places of the questions by length, `size` at a time."""
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].trunk.ids))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _inputs(questions: Sequence[TimingQuestion]) -> tuple[list[Trunk], list[Tensor]]:
    return [question.trunk for question in questions], [question.features_UD for question in questions]


class TimingLearner(Learner):
    """One forward and one backward per stream and update, however many rollouts it has.

    `idle` is what a rank without streams passes through the model; `reader` decodes what is said after drawn stops, if
    a reward reads it.
    """

    def __init__(
        self, timing: TimingOptions, ids: DuplexIds, idle: TimingQuestion, reader: ReplyReader | None, *args: Any
    ) -> None:
        super().__init__(*args)
        self.timing, self.ids, self.idle, self.reader = timing, ids, idle, reader
        self.references: dict[str, Tensor] = {}

    def update_stops(
        self, questions: Sequence[TimingQuestion], rewards: Sequence[StopRewards], step: int
    ) -> tuple[list[Tensor], list[np.ndarray], list[StopRewards], dict[str, float]]:
        """One update with this rank's streams: their z (K,) before it, stops (G,) drawn from them, `rewards` with those
        of what is said there, and metrics."""
        self.policy.train()
        count = sum(self.ranks.gathered(len(questions)))
        micro = length_batches(questions, self.size.prompts)
        passes = max(self.ranks.gathered(len(micro)))
        z: dict[int, Tensor] = {}
        stops: dict[int, np.ndarray] = {}
        scored: dict[int, StopRewards] = {}
        sums: list[dict[str, float]] = []
        for index in range(passes):
            last = index == passes - 1
            self.accelerator.sync_gradients = last
            part = micro[index] if index < len(micro) else []
            # a rank that has no work left still takes part: DDP wants a pass from every rank
            asked, known = [questions[i] for i in part] or [self.idle], [rewards[i] for i in part]
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                rows = self.wrapped(trunk_logits, *_inputs(asked), self.ids)
                drawn = [self._stops(question, row, step) for question, row in zip(asked, rows, strict=True)]
                earned = self.reader.read(asked, known, drawn) if self.reader and part else known
                nothing = [StopRewards(np.zeros(len(rows[0]) + 1), {}, {})]
                loss, figures = self._stop_loss(asked, rows, known or nothing, earned or nothing, drawn)
                # DDP averages over ranks, accelerate over its accumulation steps; the loss is a mean over all streams
                share = len(part) / count * self.ranks.world * self.accelerator.gradient_accumulation_steps
                self.accelerator.backward(loss * share)
            z |= {i: row.detach() for i, row in zip(part, rows, strict=False)}
            stops |= dict(zip(part, drawn, strict=False))
            scored |= dict(zip(part, earned, strict=True))
            sums.append({name: value * len(part) / count for name, value in figures.items()})
        joined = self.ranks.joined(sums)
        metrics: dict[str, float] = {name: sum(values[name] for values in joined) for name in joined[0]}
        metrics["grad_norm"] = self.apply_gradient(metrics, step, lambda: self._details(questions, z))
        advance_schedule(self.schedule)
        order = range(len(questions))
        return [z[i] for i in order], [stops[i] for i in order], [scored[i] for i in order], metrics

    def _stops(self, question: TimingQuestion, z_K: Tensor, step: int) -> np.ndarray:
        rng = stop_generator(self.options.train.seed, question.stream.id, step)
        return sample_stops(z_K, self.timing.generations, rng)

    def _stop_loss(
        self, questions: Sequence[TimingQuestion], z: Sequence[Tensor], rewards: Sequence[StopRewards],
        earned: Sequence[StopRewards], stops: Sequence[np.ndarray],
    ) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
        references = self._references(questions) if self.timing.beta else None
        totals, more = [each.total_S for each in rewards], [each.total_S for each in earned]
        loss, figures = timing_loss(z, totals, stops, self.timing, references, more)
        return loss, {"loss": float(loss.detach()), **figures}

    @torch.no_grad()
    def _references(self, questions: Sequence[TimingQuestion]) -> list[Tensor]:
        """z (K,) under the policy before training, computed once for every stream."""
        new = [question for question in questions if question.stream.id not in self.references]
        if new:
            with self.policy.as_reference() as family, self.policy.evaluating():
                rows = stop_logits(family, *_inputs(new), self.ids)
            self.references |= {question.stream.id: row for question, row in zip(new, rows, strict=True)}
        return [self.references[question.stream.id] for question in questions]

    def _details(self, questions: Sequence[TimingQuestion], z: Mapping[int, Tensor]) -> dict[str, Any]:
        rows = [
            {"id": questions[i].stream.id, "logits": [str(value) for value in row.tolist()]} for i, row in z.items()
        ]
        return {"rows": rows, "not_finite_in": not_finite_parameters(self.policy)}


class GoldLearner(TimingLearner):
    """Supervised updates on the same streams, to compare with: `gold`, by stream, is the stop that is prescribed."""

    def __init__(self, gold: Mapping[str, int], *args: Any) -> None:
        super().__init__(*args)
        self.gold = gold

    def _stop_loss(
        self, questions: Sequence[TimingQuestion], z: Sequence[Tensor], rewards: Sequence[StopRewards],
        earned: Sequence[StopRewards], stops: Sequence[np.ndarray],
    ) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
        loss = gold_loss(z, [self.gold[question.stream.id] for question in questions])
        return loss, {"loss": float(loss.detach())}


@dataclass
class TimingBatch:
    """What a step did, over all ranks: P streams, their z (K,) before the update, stops (P, G) drawn from them, what
    stops of each stream earn, and in `table` those that were drawn."""

    questions: list[TimingQuestion]
    z: list[Tensor]
    stops_PG: np.ndarray
    rewards: list[StopRewards]
    table: RewardTable
    advantages_PG: np.ndarray


class TimingTrainer(Trainer):
    """GRPO over streams: a group's rollouts are the chunks in which it stops.

    `rewards`, by stream, are what each of its stops earns; `shuffle` deals these at random, a control. `gold`, by
    stream, are stops that supervised updates learn instead, another one.
    """

    options: DuplexOptions
    learner: TimingLearner

    def __init__(
        self, options: DuplexOptions, timing: TimingOptions, policy: Policy, questions: Sequence[TimingQuestion],
        ids: DuplexIds, *, accelerator: Accelerator | None = None, shuffle: bool = False,
        gold: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        self.timing, self.ids, self.gold = timing, ids, gold
        self.questions = {question.stream.id: question for question in questions}
        self.examples = {name: question_example(question) for name, question in self.questions.items()}
        super().__init__(options, policy, ClipStore(), list(self.examples.values()), accelerator)
        terms = [term for term in self.terms if not reads_reply(term)]
        scored = score_stops([q.stream for q in questions], terms, timeout=options.reward.reward_timeout)
        if shuffle:
            rngs = [stop_generator(options.train.seed, question.stream.id) for question in questions]
            scored = [shuffled_stops(each, rng) for each, rng in zip(scored, rngs, strict=True)]
        self.rewards = dict(zip(self.questions, scored, strict=True))

    def new_learner(self, idle_group: Group) -> TimingLearner:
        idle = next(iter(self.questions.values()))
        reader = ReplyReader.of(self.options, self.policy.family, self.ids, self.terms)
        common = (self.timing, self.ids, idle, reader, self.options, self.policy, self.accelerator, idle_group)
        return TimingLearner(*common) if self.gold is None else GoldLearner(self.gold, *common)

    def prompt_of(self, example_id: str) -> Prompt:
        """A stream has no wording: its path of ids is its trunk's."""
        return Prompt(self.examples[example_id], (), "", self.questions[example_id].trunk.ids)

    def train_step(self, saver: Saver | None = None) -> tuple[dict[str, Any], Any]:
        """One update with `prompts_per_step` streams; the rollouts are those of the policy before it."""
        clock = Clock()
        rows = self.rows.share(self.sampler.take(self.options.train.prompts_per_step))
        questions = [self.questions[row.id] for row in rows]
        with clock("update"):
            known = [self.rewards[row.id] for row in rows]
            z, stops, rewards, losses = self.learner.update_stops(questions, known, self.step)
        with clock("score"):
            names = [row.id for row in rows]
            batch = self._batch([*zip(names, [z_K.cpu() for z_K in z], stops, rewards, strict=True)])
        self.step += 1
        return self.timing_metrics(batch, losses, clock), batch

    def _batch(self, own: Sequence[tuple[str, Tensor, np.ndarray, StopRewards]]) -> TimingBatch:
        """Of all ranks, from this one's part.

        Raises:
            TrainingStopped: a reward fails too often.
        """
        names, z, stops, rewards = map(list, zip(*self.ranks.joined(own), strict=True))
        stops_PG = np.stack(stops)
        totals, parts = [scored.total_S for scored in rewards], [scored.parts for scored in rewards]
        table = stop_table(totals, stops_PG, parts, [scored.failures for scored in rewards])
        if problem := self.reward_failures.add([table]):
            raise TrainingStopped(f"step {self.step}: {problem}")
        advantages_PG, _ = by_sum(table.rewards_PG, self.options.loss.scale_rewards)
        return TimingBatch([self.questions[name] for name in names], z, stops_PG, rewards, table, advantages_PG)

    def timing_metrics(self, batch: TimingBatch, losses: dict[str, float], clock: Clock) -> dict[str, Any]:
        """The step over all ranks, keyed as in metrics.jsonl."""
        norm, loss = losses.pop("grad_norm"), losses.pop("loss")
        return timing_step_metrics(
            [question.stream for question in batch.questions], batch.z, batch.stops_PG, batch.table, losses=losses,
            step=self.step, epoch=self.sampler.epoch, loss=loss, grad_norm=norm,
            learning_rate=self.schedule.get_last_lr()[0], skipped_steps=self.guard.skipped, skipped_rows=0,
            seconds={"step": clock.total(), **clock.seconds},
        )  # fmt: skip


def question_example(question: TimingQuestion) -> Example:
    """The row that checkpoints know a stream by: all that it asks."""
    asks = "when does the model begin to speak?" if question.stream.listening else "when does it stop?"
    # where a stream lies is none of its content: a run goes on after its folder was moved; of the answer all else tells
    stream = {name: value for name, value in vars(question.stream).items() if name not in ("folder", "answer")}
    return Example(question.stream.id, (), asks, columns={"stream": stream})
