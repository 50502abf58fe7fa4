"""A whole run, from options to result.json: check everything, evaluate, train, evaluate, export.

options -> data + model + rewards, all checked -> before -> GRPO -> after -> adapter -> result.json
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from covo_rl import data
from covo_rl.audio import ClipStore
from covo_rl.config import ConfigError, Options
from covo_rl.data.fit import fit_clips
from covo_rl.engines.health import SelfCheckError
from covo_rl.engines.health import self_check as check_policy
from covo_rl.evaluate import evaluate
from covo_rl.export import ExportError
from covo_rl.export.card import update_card
from covo_rl.export.exporting import export_run_adapter
from covo_rl.export.source import hub_name
from covo_rl.models import load_family
from covo_rl.policy import Policy
from covo_rl.policy.patterns import PatternError
from covo_rl.policy.quantised import quantization_kwargs
from covo_rl.policy.trainable import make_trainable as build_modes
from covo_rl.policy.trainable import render_report
from covo_rl.prompt import PromptError, build_prompt
from covo_rl.records import console
from covo_rl.records.folder import Run, environment
from covo_rl.resolve import resolve_model
from covo_rl.resolve import reward_files as reward_files_of
from covo_rl.rewards import RewardError, components, lint
from covo_rl.rewards.judge import JudgeError
from covo_rl.rewards.judging import template_hashes
from covo_rl.run import doctor, outcome, questions
from covo_rl.train.batch import Batch, rollout_rows
from covo_rl.train.checkpoint import CheckpointError
from covo_rl.train.checkpoint.saver import Saver
from covo_rl.train.guard import StoppedBySignal, StopSignals, TrainingStopped
from covo_rl.train.launch import join
from covo_rl.train.learner import gathered
from covo_rl.train.loop import Trainer

#: what a user can mend: shown as one message, without a traceback
USER_ERRORS = (
    ConfigError, data.DataError, PatternError, PromptError, RewardError, JudgeError, SelfCheckError, CheckpointError,
    ExportError, TrainingStopped, OSError,
)  # fmt: skip


def seed_everything(seed: int) -> None:
    """Python, numpy and torch. Rollouts have generators of their own, seeded by step and prompt."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Session:
    """Everything a run needs, loaded and checked. Building it starts no training."""

    def __init__(self, options: Options, accelerator: Accelerator | None = None) -> None:
        self.options = options
        self.accelerator = accelerator or join()
        self.main = self.accelerator.is_main_process
        seed_everything(options.train.seed)
        with self.accelerator.main_process_first():  # the first process renders the built-in set
            self.rows = questions.read_questions(options)
        model = options.model
        self.family = load_family(
            resolve_model(model.model),
            dtype=model.dtype,
            attn_implementation=model.attn_implementation,
            trust_remote_code=model.trust_remote_code,
            **(quantization_kwargs() if options.adapter.load_in_4bit else {}),
        )
        self.clips = ClipStore()
        self._check_data()
        self.modes = build_modes(self.family, options.adapter, learning_rate=options.train.learning_rate)
        self.family.model.to(self.accelerator.device)
        self.policy = Policy(
            self.family,
            peft_model=self.modes.peft_model,
            clips=self.clips,
            feature_memory_mb=options.train.feature_memory_mb,
            gradient_checkpointing=options.train.gradient_checkpointing,
            keep_reference=bool(options.loss.beta),
        )
        self.run = Run(options.train.output, active=self.main)
        self.train_seconds = 0.0

    # -- set-up --------------------------------------------------------------------------------------------------

    def _check_data(self) -> None:
        """Every clip is decoded for this, so the first process checks for all; then clips are fitted.

        Raises:
            ConfigError: broken and over-long clips and overlap, all together, before anything trains.
        """
        longest = self.family.max_clip_seconds
        found = [questions.question_problems(self.rows, self.options.data, longest) if self.main else []]
        problems = broadcast_object_list(found)[0]
        if problems:
            raise ConfigError([*problems[:50], *([f"... and {len(problems) - 50} more"] if problems[50:] else [])])
        mode = self.options.data.long_audio
        self.examples, notes = fit_clips(self.rows.train, longest, mode)
        self.held_out, more = fit_clips(self.rows.held_out, longest, mode)
        for note in (*self.rows.notes, *notes, *more):
            self._print(note)

    def show_budget(self) -> None:
        """End of a dry run: the estimate of memory, and that nothing is started."""
        clips = [self.clips.waveform(self.clips.key(row.clips[0])) for row in self.examples[:64] if row.clips]
        longest = max((len(waveform) / rate for waveform, rate in clips), default=0.0)
        self._print(doctor.render_plan(doctor.plan_options(self.options, seconds=longest)))
        self._print("dry run: data, configuration, model and rewards are fine; nothing was started")

    def show(self) -> None:
        """Print the configuration summary, what trains, the reward check and the self-check; record them."""
        options = self.options
        self.run.write_config(options.flat())
        rewards = {term.name: term.weight for term in components(options.reward.rewards)}
        reward_files = {f"reward:{name}": path for name, path in reward_files_of(rewards).items()}
        record = environment({**self.rows.files, **reward_files})
        if options.reward.judge:
            record["judge_templates"] = template_hashes()
        self.run.write_json("environment.json", record)
        if self.main:
            console.console.print(console.summary_table("run", self._summary(rewards)))
            console.console.print(render_report(self.modes.report))
            for note in self.modes.notes:
                self._print(note)
        if options.reward.check_rewards:
            findings = lint(options.reward.rewards, self.examples[:8])
            if findings:
                raise ConfigError([str(finding) for finding in findings])
        prompts = [build_prompt(row, self.family, self.clips, options.prompt) for row in self.examples[:4]]
        self.self_check = check_policy(self.policy, prompts, options.rollout)
        if self.main:
            console.console.print(console.summary_table("self-check", list(asdict(self.self_check).items())))

    def _summary(self, rewards: dict[str, float]) -> list[tuple[str, Any]]:
        train, rollout = self.options.train, self.options.rollout
        terms = " + ".join(f"{'' if w == 1 else f'{w:g} '}R_{name}" for name, w in rewards.items())
        return [
            ("model", f"{self.options.model.model} ({self.family.model_type})"),
            ("device", f"{self.accelerator.device}, {self.accelerator.num_processes} process(es)"),
            ("data", f"{len(self.examples)} rows from {self.rows.files['data']}"),
            ("held out", f"{len(self.held_out)} rows from {self.rows.files.get('eval_data', self.rows.files['data'])}"),
            ("step", f"{train.prompts_per_step} prompts x {rollout.num_generations} rollouts, {train.max_steps} steps"),
            ("R_total", terms + (f", gated by {self.options.reward.reward_gate}"
                                 if self.options.reward.reward_gate != "none" else "")),
            ("judge", self.options.reward.judge or "none: deterministic checkers"),
            ("loss", f"{self.options.loss.loss_type}, beta {self.options.loss.beta:g}, lr {train.learning_rate:g}"),
            ("seed", train.seed),
            ("run folder", train.output),
        ]  # fmt: skip

    # -- phases --------------------------------------------------------------------------------------------------

    def evaluate(self, *, audio: str = "real", modes: Sequence[str] = ("greedy", "sampled")) -> dict[str, Any]:
        """Summaries on the held-out rows, one per mode; `audio` may be real, silent or swapped."""
        summaries = {}
        for mode in modes:
            result = evaluate(
                self.policy,
                self.held_out,
                prompt_config=self.options.prompt,
                rollout_config=self.options.rollout,
                reward_config=self.options.reward,
                clips=self.clips,
                audio=audio,
                greedy=mode == "greedy",
                num_generations=1 if mode == "greedy" else self.options.eval.eval_num_generations,
                seed=self.options.train.seed,
                batch_size=self.options.eval.eval_batch_size,
                **self._ranks(),
            )
            summaries[mode] = result.summary()
        return summaries

    def _ranks(self) -> dict[str, Any]:
        """Ranks share the rows, unless the parameters are sharded: then all must run the same forwards."""
        several = self.accelerator.num_processes > 1 and not self.policy.sharded
        here = {"rank": self.accelerator.process_index, "world": self.accelerator.num_processes}
        return {**here, "gather": gather_object} if several else {}

    def before(self) -> dict[str, Any]:
        """`evaluate` of the untrained policy; a resumed run reads what it found the first time."""
        path = self.run.folder / "before.json"
        if self.options.train.resume and path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        summaries = self.evaluate()
        self.run.write_json("before.json", summaries)
        return summaries

    def train(self) -> Trainer:
        """Run GRPO, from a checkpoint if asked for, and record every step.

        Raises:
            StoppedBySignal: SIGTERM or Ctrl-C came and a checkpoint was saved; a SystemExit with code 75.
        """
        trainer = Trainer(self.options, self.policy, self.clips, self.examples, self.accelerator)
        start = time.perf_counter()
        train = self.options.train
        with StopSignals() as stop:
            on_saved = self._export_step if train.export_checkpoints else None
            saver = Saver(self.options, self.run.folder, stop, on_saved)
            for line in saver.resume(trainer, train.resume, allow_changed=train.allow_changed_config):
                self._print(line)
            with console.StepProgress(train.max_steps, done=trainer.step, active=self.main) as progress:

                def on_step(metrics: dict[str, Any], batch: Batch) -> float | None:
                    score = self._score(metrics)
                    self.run.log_metrics(metrics)
                    if train.log_rollouts:
                        rows = gathered(self.accelerator, rollout_rows(batch))
                        self.run.log_rollouts(metrics["step"], rows)
                    progress.update(metrics)
                    return score

                try:
                    trainer.run(on_step, saver)
                except StoppedBySignal as stopped:
                    self._print(stopped.message)
                    raise
        self.train_seconds = time.perf_counter() - start
        return trainer

    def _score(self, metrics: dict[str, Any]) -> float | None:
        """With `eval_every`, the held-out accuracy of this step, also put into its metrics."""
        every = self.options.eval.eval_every
        if not every or metrics["step"] % every or not self.held_out:
            return None
        metrics["eval_accuracy"] = self.evaluate(modes=["greedy"])["greedy"]["accuracy"]
        return metrics["eval_accuracy"]

    def _print(self, line: str) -> None:
        if self.main:
            console.console.print(line, markup=False)

    def export(self, folder: Path | None = None) -> Path:
        """Write RUN/adapter (LoRA) or RUN/model (full), or `folder`, verified by logits in a fresh process.

        Raises:
            ExportError: on every rank, where the check failed or training changed nothing; nothing is left.
        """
        prompts = [build_prompt(row, self.family, self.clips, self.options.prompt) for row in self.examples[:2]]
        exported = export_run_adapter(
            self.modes, self.run.folder, prompts, self.clips,
            base_model=hub_name(self.options.model.model), folder=folder,
        )  # fmt: skip
        if self.main:  # the wording it was trained with, for evaluation
            text = yaml.safe_dump(asdict(self.options.prompt), sort_keys=False, allow_unicode=True)
            (exported / "prompt.yaml").write_text(text, encoding="utf-8")
        return exported

    def _export_step(self, checkpoint: Path) -> None:
        """RUN/exports/step_N of a checkpoint just saved; an export that fails is reported, and training goes on."""
        try:
            self.export(self.run.folder / "exports" / checkpoint.name)
        except ExportError as error:
            self._print(f"{checkpoint.name} was not exported, training goes on: {error}")

    def finish_unevaluated(self, exported: Path, steps: int) -> Path:
        """result.json of a run that was not evaluated: before and after are null."""
        return self.run.write_json("result.json", {**self._result(exported, steps), **outcome.UNEVALUATED})

    def finish(self, before: dict, after: dict, silent: dict, swapped: dict, exported: Path, steps: int) -> Path:
        """Write result.json and curves.png; print the table."""
        figures = outcome.evaluated(before, after, silent, swapped)
        path = self.run.write_json("result.json", {**self._result(exported, steps), **figures})
        if self.main:
            update_card(exported, self.run.folder)
            outcome.show(self.run, figures["details"], self.train_seconds, exported, path)
        return path

    def _result(self, exported: Path, steps: int) -> dict[str, Any]:
        return {
            "seed": self.options.train.seed,
            "steps": steps,
            "train_seconds": round(self.train_seconds, 1),
            "trainable_parameters": self.modes.trainable_parameters,
            "adapter": str(exported.relative_to(self.run.folder)),
            "self_check": asdict(self.self_check),
        }
