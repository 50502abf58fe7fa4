"""A whole run of learning when to speak: options -> streams, model, rewards, all checked -> before -> GRPO -> after.

Folder, checkpoints, records, monitor and report are those of every other run (session.py): what differs is where
questions come from, and what is measured on those held out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from covo_rl.audio import ClipStore
from covo_rl.duplex.config import NEW, DuplexOptions
from covo_rl.duplex.content import ReplyReader
from covo_rl.duplex.features import TEST_COUNTS, FeatureStream, draw_streams
from covo_rl.duplex.figures import is_early, success_at_early, threshold_line, timing_figures
from covo_rl.duplex.probe import GATE, probe_auc, probe_places
from covo_rl.duplex.questions import FeatureWorld
from covo_rl.duplex.recorded import take_recorded
from covo_rl.duplex.records import TimingSounds, timing_rows
from covo_rl.duplex.rollout import greedy_stop
from covo_rl.duplex.sonify import write_sound
from covo_rl.duplex.training import TimingTrainer, question_example, question_logits
from covo_rl.duplex.trunk import decision_states
from covo_rl.duplex.waves import feature_world
from covo_rl.models.builtin import resolve_model
from covo_rl.policy.loading import trainable_policy
from covo_rl.policy.trainable import render_report, training_dtype
from covo_rl.prompt import build_prompt
from covo_rl.records import console
from covo_rl.records.folder import Run
from covo_rl.rewards import components
from covo_rl.run.observers import Adviser, Bar, Observer, Recorder, Tracking
from covo_rl.run.session import Session
from covo_rl.run.start import take_up
from covo_rl.run.timing_start import taught_model, timing_reward_problems
from covo_rl.train.checkpoint.identity import run_contents
from covo_rl.train.launch import join
from covo_rl.train.ranks import Ranks
from covo_rl.types import Example, Prompt

#: what a line of the table before and after shows
SHOWN = (
    "early_long_pause", "long_pause_success", "single_turn_success", "delay_p50", "barge_in_success",
    "back_channel_ignored", "floor_held",
)  # fmt: skip
PROBED = {"pause": 100, "single": 60}
FIRST_STEPS, KEPT_STEPS = 3, 50


class TimingSession(Session):
    """A run whose rows are streams. The model, `options.model.model`, is one that speaks and has a duplex section."""

    options: DuplexOptions

    def __init__(self, options: DuplexOptions, accelerator: Accelerator | None = None) -> None:
        self.options, self.accelerator = options, accelerator or join()
        self.ranks = Ranks(self.accelerator.process_index, self.accelerator.num_processes)
        self.run = Run(options.train.output, active=self.ranks.main)
        self.start = take_up(self.run, options, self.ranks)
        self.terms = components(options.reward.rewards)
        self._refuse(timing_reward_problems(options, self.terms) if self.ranks.main else [])
        set_seed(options.train.seed % 2**32)
        self.clips, self.files, self.in_memory = ClipStore(), {}, {}
        self.decoder, self.engine, self.positions = None, None, 0
        path, train = resolve_model(options.model.model), options.train
        options.model.dtype, notes = training_dtype(options.model.dtype, path, full=not options.adapter.lora)
        self.policy, self.trainable = trainable_policy(
            options.model, options.adapter, clips=self.clips, device=self.accelerator.device,
            learning_rate=train.learning_rate, gradient_checkpointing=train.gradient_checkpointing,
            recompute=train.recompute, keep_reference=bool(options.loss.beta),
        )  # fmt: skip
        self.family = self.policy.family
        self._take_streams()
        self.reader = ReplyReader.of(options, self.family, self.world.ids, self.terms)
        self.examples, self.held_out = [question_example(question) for question in self.questions], []
        self.contents = run_contents(options, self.examples, self.policy, self.clips.key) if self.ranks.main else None
        self._refuse(self.start.changes(options, self.contents))
        self.train_seconds, self.record_seconds, self.accepted = 0.0, 0.0, False
        self.trainer, self.notes, self.sounds = None, notes, TimingSounds(self.run.folder)
        self.start_figures: dict[str, Any] = {}  # of the test, before training
        kinds = (TimingEvaluator, Recorder, Bar, Adviser, TimingTracking)
        self.observers: list[Observer] = [kind(self) for kind in kinds]

    def _take_streams(self) -> None:
        """The questions of RL and of the test, drawn or from folders."""
        if recorded := self.options.recorded("rl_data", "test_data"):
            overlap, chunks = self.options.data.allow_overlap, self.options.reply_chunks(self.terms)
            self.world, taken = take_recorded(self.family, recorded, allow_overlap=overlap, answer_chunks=chunks)
            self.questions, self.test = (self.world.questions(taken[name]) for name in ("rl_data", "test_data"))
            return
        duplex = self.options.duplex
        self.world = feature_world(self.family, duplex)
        drawn = draw_streams("rl", duplex.rl_streams, self.options.train.seed, cue=self.cue)
        self.questions = self.world.questions(drawn)
        self.test = self.world.questions(held_out_streams(self.options, self.cue))

    @property
    def cue(self) -> str | None:
        """That of every stream, where the control wants one."""
        return "none" if self.options.duplex.control == "no_cue" else None

    def show(self) -> None:
        """Print what trains, and on what."""
        duplex, train = self.options.duplex, self.options.train
        rows = [
            ("model", self.options.model.model), ("streams", f"{len(self.questions)}, tested on {len(self.test)}"),
            ("step", f"{train.prompts_per_step} streams, one forward each, {train.max_steps} steps"),
            ("estimator", f"{duplex.timing_estimator}, control {duplex.control}"), ("seed", train.seed),
            ("R_total", " + ".join(f"{term.weight:g} R_{term.name}" for term in self.terms)),
            ("run folder", train.output),
        ]  # fmt: skip
        self._print(console.summary_table("run", rows), render_report(self.trainable.report), *self.notes)

    def _claimed(self, prompts: list[Prompt]) -> list[str]:
        return super()._claimed([])  # what checks an export is no wording of this run

    def new_trainer(self) -> TimingTrainer:
        control = self.options.duplex.control
        drawn = [question.stream for question in self.questions if isinstance(question.stream, FeatureStream)]
        gold = {stream.id: stream.gold_stop for stream in drawn} if control == "gold" else None
        return TimingTrainer(
            self.options, self.options.timing, self.policy, self.questions, self.world.ids,
            accelerator=self.accelerator, shuffle=control == "shuffled", gold=gold,
        )  # fmt: skip

    def rollout_rows(self, batch: Any) -> list[dict[str, Any]]:
        """Of the steps that are kept, for there are hundreds of rollouts a step; with the sound of one stream. They are
        of all ranks, and the main one keeps them."""
        steps, step = self.options.train.max_steps, self.trainer.step if self.trainer else 0
        if not self.ranks.main or not (step <= FIRST_STEPS or step == steps or step % max(1, steps // KEPT_STEPS) == 0):
            return []
        streams = [question.stream for question in batch.questions]
        sounds = {}
        with self.run.going_on(f"the sound of step {step} is not kept for the report"):
            sounds = {streams[0].id: self.sounds.keep(streams[0], greedy_stop(batch.z[0]))}
        rewards = batch.rewards
        return timing_rows(
            streams, batch.z, [scored.total_S for scored in rewards], batch.stops_PG, batch.advantages_PG,
            [scored.parts for scored in rewards], failures=[scored.failures for scored in rewards], sounds=sounds,
            replies=[scored.replies for scored in rewards] if self.reader else (),
        )  # fmt: skip

    def test_logits(self) -> list[torch.Tensor]:
        """z (K,) of the policy as it is, on the test's streams."""
        return question_logits(self.family, self.test, self.world.ids)

    def figures(self, z: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Those of the test's streams; with rewards that read replies also what the greedy ones earn."""
        figures = timing_figures([question.stream for question in self.test], z)
        return figures | (self.reader.figures(self.test, z) if self.reader else {})

    @property
    def shown(self) -> tuple[str, ...]:
        """The figures of a line."""
        return (*SHOWN, *(term.name for term in (self.reader.terms if self.reader else ())))

    def write_sounds(self, before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> None:
        """One long pause as it sounds before training and after: of the first drawn stream that was answered early and
        then was not, else of the first. How answers to recorded ones sound nobody knows. By the main process."""
        stops = [
            (q.stream, greedy_stop(first), greedy_stop(last))
            for q, first, last in zip(self.test, before, after, strict=True)
            if isinstance(q.stream, FeatureStream) and q.stream.kind == "pause"
        ]  # fmt: skip
        changed = [each for each in stops if is_early(each[0], each[1]) and not is_early(each[0], each[2])]
        for stream, first, last in (changed or stops)[:1] if self.ranks.main else ():
            write_sound(self.run.folder / "sounds" / "before", stream, first, split="test")
            write_sound(self.run.folder / "sounds" / "after", stream, last, split="test")

    def warn_of_probe(self, auc: float) -> None:
        """RL teaches no perception: say so where there is little to work with."""
        self._print(f"probe AUC {auc:.2f}, below {GATE}: 0.3 s into a silence the decoder's states hardly tell a pause "
                    "from the turn's end. RL may only learn how long to wait; teach perception first")  # fmt: skip

    def write_result(self, result: Mapping[str, Any]) -> Path:
        """result.json, and on the screen the figures before and after."""
        self.run.catch_up()
        path = self.run.write_json("result.json", result)
        self._let_go(result)
        rows = [(name, f"{_shown(result['before'][name])} -> {_shown(result['after'][name])}") for name in self.shown]
        rows += [("probe AUC", f"{result['probe_auc']:.3f}"), ("result", path)]
        self._print(console.summary_table("before -> after", rows))
        return path

    @torch.no_grad()
    def probe(self) -> float:
        """AUC of the turn's end at the decoder's hidden states, 0.3 s into silences of streams of their own; recorded
        ones are those of the test."""
        states, over, streams = [], [], []
        questions = self.test
        if isinstance(self.world, FeatureWorld):
            questions = self.world.questions(draw_streams("rl", PROBED, self.options.train.seed + 1, cue=self.cue))
        with self.policy.evaluating():
            for question in questions:
                if not (places := probe_places(question.stream)):
                    continue
                hidden_KD = decision_states(self.family, [question.trunk], [question.features_UD])[0]
                states += [hidden_KD[k].float().cpu().numpy() for k, _ in places]
                over += [is_over for _, is_over in places]
                streams += [question.stream.id] * len(places)
        return probe_auc(np.array(states), np.array(over), streams)

    def _prompts(self, count: int) -> list[Prompt]:
        """Written questions, by which an export is checked."""
        rows = [Example(f"check-{i}", (), text) for i, text in enumerate(("one two", "three")[:count])]
        return [build_prompt(row, self.family, self.clips, self.options.prompt) for row in rows]


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


class TimingEvaluator(Observer):
    """With `eval_every`, the figures of a step, among its metrics."""

    session: TimingSession

    def measure(self, metrics: dict[str, Any]) -> None:
        every = self.session.options.eval.eval_every
        if every and metrics["step"] % every == 0:
            figures = self.session.figures(self.session.test_logits())
            metrics |= {f"eval_{name}": figures[name] for name in self.session.shown if figures[name] is not None}


class TimingTracking(Tracking):
    """With `report_to`, the run at experiment trackers, with the figures before and after."""

    session: TimingSession

    def begin(self, step: int) -> None:
        if not step:
            self.trackers.log_evaluation("", {"greedy": self.session.start_figures}, 0)

    def close(self, result: Mapping[str, Any] | None) -> None:
        super().close(result and {"details": {"after": {"greedy": result["after"]}}})


def held_out_streams(options: DuplexOptions, cue: str | None) -> list[FeatureStream]:
    """The same for every seed of a run, by kind in the shares of TEST_COUNTS."""
    share = options.duplex.test_streams / sum(TEST_COUNTS.values())
    return draw_streams("test", {kind: max(1, round(n * share)) for kind, n in TEST_COUNTS.items()}, 0, cue=cue)


def run_timing(options: DuplexOptions) -> Path:
    """The whole of it: the supervised stage for a new model, then RL of timing; returns result.json.

    `seconds` there are those of this process, `stages` those of each part.
    """
    began, accelerator = time.perf_counter(), join()
    taught_model(options, accelerator)
    taught = time.perf_counter() - began
    session = TimingSession(options, accelerator)
    try:
        session.show()
        session.accept()
        streams, start = [question.stream for question in session.test], session.test_logits()
        session.start_figures = before = session.figures(start)
        line, auc = threshold_line(streams, start), session.probe()
        if auc < GATE:
            session.warn_of_probe(auc)
        trainer = session.train()
        exported, end = session.export(), session.test_logits()
        after = session.figures(end)
        session.write_sounds(start, end)
        at_equal = success_at_early([{"b": 0, **before}, *line], after["early_long_pause"])
        result = {
            "seed": options.train.seed, "steps": trainer.step, "before": before, "after": after,
            "threshold": line, "threshold_single_at_equal_early": at_equal, "probe_auc": auc,
            "estimator": options.duplex.timing_estimator, "control": options.duplex.control,
            "trainable_parameters": session.trainable.trainable_parameters,
            "model": str(exported.relative_to(session.run.folder)),
            "stages": {"sft": round(taught, 1), "rl": round(session.train_seconds, 1)},
            "seconds": round(time.perf_counter() - began, 1),
        }  # fmt: skip
        return session.write_result(result)
    finally:
        session.close()


def dry_timing(options: DuplexOptions) -> None:
    """Check options, rewards and model as `run_timing` would, and start nothing."""
    accelerator, new = join(), options.model.model == NEW
    taught_model(options, accelerator)
    if not new:  # else there is no model yet
        TimingSession(options, accelerator).show()
    console.console.print("dry run: options, model and rewards are fine; nothing was started")
