"""A whole run, from options to result.json: check everything, evaluate, train, evaluate, export.

options -> data + model + rewards, all checked -> before -> GRPO -> after -> adapter -> result.json
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed

from covo_rl.audio import ClipStore
from covo_rl.config import ConfigError, Options
from covo_rl.data import DataError
from covo_rl.engines.base import EngineError
from covo_rl.engines.health import SelfCheckError, self_check
from covo_rl.evaluate import evaluate
from covo_rl.export import ExportError
from covo_rl.export.adapter import hub_name
from covo_rl.export.exporting import export_run_adapter, update_card
from covo_rl.models import load_family
from covo_rl.models.text import special_token_notes
from covo_rl.policy import Policy
from covo_rl.policy.patterns import PatternError
from covo_rl.policy.trainable import make_trainable, quantization_kwargs, render_report
from covo_rl.prompt import PromptError, build_prompt, written_texts
from covo_rl.records import console
from covo_rl.records.folder import Run, environment
from covo_rl.records.steps import rollout_rows
from covo_rl.resolve import resolve_model, reward_files
from covo_rl.rewards import RewardError, components, lint
from covo_rl.rewards.judge import JudgeError
from covo_rl.rewards.judging import template_hashes
from covo_rl.run import doctor, questions
from covo_rl.run.checks import check_before_loading
from covo_rl.run.page import curves
from covo_rl.train.batch import Batch
from covo_rl.train.checkpoint import CheckpointError
from covo_rl.train.checkpoint.saver import Saver
from covo_rl.train.guard import StoppedBySignal, StopSignals, TrainingStopped
from covo_rl.train.launch import join
from covo_rl.train.loop import Trainer
from covo_rl.train.ranks import Ranks
from covo_rl.types import UserError

#: what a user can mend: shown as one message, without a traceback
USER_ERRORS = (
    ConfigError, DataError, PatternError, PromptError, RewardError, JudgeError, SelfCheckError, CheckpointError,
    ExportError, EngineError, TrainingStopped, UserError, OSError,
)  # fmt: skip


class Session:
    """Everything a run needs, loaded and checked. Making one starts no training."""

    def __init__(self, options: Options, accelerator: Accelerator | None = None) -> None:
        self.options = options
        self.accelerator = accelerator or join()
        self.ranks = Ranks(self.accelerator.process_index, self.accelerator.num_processes)
        check_before_loading(options)
        self.terms = components(options.reward.rewards)
        set_seed(options.train.seed % 2**32)  # rollouts have generators of their own, seeded by step and prompt
        with self.accelerator.main_process_first():  # the first process renders the built-in set
            self.rows = questions.read_questions(options)
        if options.reward.check_rewards and (findings := lint(options.reward.rewards, self.rows.train[:8])):
            raise ConfigError([str(finding) for finding in findings])
        model = options.model
        self.family = load_family(
            resolve_model(model.model),
            dtype=model.dtype,
            attn_implementation=model.attn_implementation,
            trust_remote_code=model.trust_remote_code,
            **(quantization_kwargs() if options.adapter.load_in_4bit else {}),
        )
        self.clips = ClipStore()
        self.clips.watch(clip for row in (*self.rows.train, *self.rows.held_out) for clip in row.clips)
        self._check_data()
        self.trainable = make_trainable(self.family, options.adapter, learning_rate=options.train.learning_rate)
        if self.trainable.replaced and options.loss.beta:
            changed = self.trainable.replaced[0]
            raise ConfigError([f"beta {options.loss.beta}: the adapter replaced {changed} of the base, so there is no "
                               "reference without it: set beta 0, or merge the adapter first"])  # fmt: skip
        self.family.model.to(self.accelerator.device)
        self.policy = Policy(
            self.family,
            peft_model=self.trainable.peft_model,
            clips=self.clips,
            feature_memory_mb=options.train.feature_memory_mb,
            gradient_checkpointing=options.train.gradient_checkpointing,
            keep_reference=bool(options.loss.beta),
        )
        self.run = Run(options.train.output, active=self.ranks.main)
        self.train_seconds = 0.0

    # -- set-up --------------------------------------------------------------------------------------------------

    def _check_data(self) -> None:
        """Every clip is decoded for this, so the first process checks for all; then clips are fitted.

        Raises:
            ConfigError: broken and over-long clips and overlap, all together, before anything trains.
        """
        data, longest = self.options.data, self.family.max_clip_seconds
        problems = questions.question_problems(self.rows, data, longest) if self.ranks.main else []
        if problems := self.ranks.from_main(problems):
            raise ConfigError([*problems[:50], *([f"... and {len(problems) - 50} more"] if problems[50:] else [])])
        self.examples, notes = questions.fit_clips(self.rows.train, longest, data.long_audio)
        self.held_out, more = questions.fit_clips(self.rows.held_out, longest, data.long_audio)
        texts = written_texts([*self.examples, *self.held_out], self.options.prompt)
        self._print(*self.rows.notes, *notes, *more, *special_token_notes(texts, self.family.tokenizer))

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
        weights = {term.name: term.weight for term in self.terms}
        files = {f"reward:{name}": path for name, path in reward_files(weights).items()}
        record = environment({**self.rows.files, **files})
        record |= {"judge_templates": template_hashes()} if options.reward.judge else {}
        self.run.write_json("environment.json", record)
        tables = console.summary_table("run", self._summary(weights)), render_report(self.trainable.report)
        self._print(*tables, *self.trainable.notes)
        self.self_check = asdict(self_check(self.policy, self._prompts(4), options.rollout))
        self._print(console.summary_table("self-check", list(self.self_check.items())))

    def _prompts(self, count: int) -> list:
        return [build_prompt(row, self.family, self.clips, self.options.prompt) for row in self.examples[:count]]

    def _summary(self, rewards: dict[str, float]) -> list[tuple[str, Any]]:
        options, train, rollout = self.options, self.options.train, self.options.rollout
        terms = " + ".join(f"{'' if w == 1 else f'{w:g} '}R_{name}" for name, w in rewards.items())
        gate = "" if options.reward.reward_gate == "none" else f", gated by {options.reward.reward_gate}"
        return [
            ("model", f"{options.model.model} ({self.family.model_type})"),
            ("device", f"{self.accelerator.device}, {self.ranks.world} process(es)"),
            ("data", f"{len(self.examples)} rows from {self.rows.files['data']}"),
            ("held out", f"{len(self.held_out)} rows from {self.rows.files.get('eval_data', self.rows.files['data'])}"),
            ("step", f"{train.prompts_per_step} prompts x {rollout.num_generations} rollouts, {train.max_steps} steps"),
            ("R_total", terms + gate),
            ("judge", options.reward.judge or "none: deterministic checkers"),
            ("loss", f"{options.loss.loss_type}, beta {options.loss.beta:g}, lr {train.learning_rate:g}"),
            ("seed", train.seed),
            ("run folder", train.output),
        ]

    def _print(self, *lines: Any) -> None:
        """Lines and tables, by the main process."""
        if self.ranks.main:
            for line in lines:
                console.console.print(line)

    # -- phases --------------------------------------------------------------------------------------------------

    def evaluate(self, *, audio: str = "real", modes: Sequence[str] = ("greedy", "sampled")) -> dict[str, Any]:
        """Summaries on the held-out rows, one per mode; `audio` may be real, silent or swapped."""
        options = self.options
        return {
            mode: evaluate(
                self.policy,
                self.held_out,
                prompt_config=options.prompt,
                rollout_config=options.rollout,
                reward_config=replace(options.reward, rewards=self.terms),
                clips=self.clips,
                audio=audio,
                greedy=mode == "greedy",
                num_generations=1 if mode == "greedy" else options.eval.eval_num_generations,
                seed=options.train.seed,
                batch_size=options.eval.eval_batch_size,
                # ranks share the rows, unless they share the parameters: then all must run the same forwards
                ranks=Ranks() if self.policy.sharded else self.ranks,
            ).summary()
            for mode in modes
        }

    def before(self) -> dict[str, Any]:
        """`evaluate` of the untrained policy; a resumed run reads what the first one wrote."""
        path = self.run.folder / "before.json"
        if not (self.options.train.resume and path.is_file()):
            self.run.write_json("before.json", summaries := self.evaluate())
            return summaries
        return json.loads(path.read_text(encoding="utf-8"))

    def train(self) -> Trainer:
        """Run GRPO, from a checkpoint if asked for, and record every step.

        Raises:
            StoppedBySignal: SIGTERM, SIGHUP or Ctrl-C came and a checkpoint was saved; a SystemExit with code 75.
        """
        trainer = Trainer(self.options, self.policy, self.clips, self.examples, self.accelerator)
        start, train = time.perf_counter(), self.options.train
        with StopSignals() as stop:
            saver = Saver(self.options, self.run.folder, stop, self._export_step if train.export_checkpoints else None)
            self._print(*saver.resume(trainer, train.resume, allow_changed=train.allow_changed_config))
            with console.ProgressDisplay(
                "GRPO", train.max_steps, done=trainer.step, active=self.ranks.main, steps=5
            ) as progress:

                def on_step(metrics: dict[str, Any], batch: Batch) -> float | None:
                    step_score = self._score(metrics)
                    self.run.log_metrics(metrics)
                    if train.log_rollouts:
                        rows = rollout_rows(batch.groups, batch.table, batch.advantages)
                        self.run.log_rollouts(metrics["step"], self.ranks.joined(rows))
                    progress.update(metrics["step"], console.step_line(metrics))
                    return step_score

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

    def export(self, folder: Path | None = None) -> Path:
        """Write RUN/adapter (LoRA) or RUN/model (full), or `folder`, verified by logits in a fresh process.

        Raises:
            ExportError: on every rank, where the check failed or training changed nothing; nothing is left.
        """
        exported = export_run_adapter(
            self.trainable, self.run.folder, self._prompts(2), self.clips,
            base_model=hub_name(self.options.model.model), folder=folder,
        )  # fmt: skip
        if self.ranks.main:  # the wording it was trained with, for evaluation
            text = yaml.safe_dump(asdict(self.options.prompt), sort_keys=False, allow_unicode=True)
            (exported / "prompt.yaml").write_text(text, encoding="utf-8")
        return exported

    def _export_step(self, checkpoint: Path) -> None:
        """RUN/exports/step_N of a checkpoint just saved; an export that fails is reported, and training goes on."""
        try:
            self.export(self.run.folder / "exports" / checkpoint.name)
        except ExportError as error:
            self._print(f"{checkpoint.name} was not exported, training goes on: {error}")

    # -- the end -------------------------------------------------------------------------------------------------

    def finish(self, exported: Path, steps: int, evaluations: dict[str, dict[str, Any]] | None = None) -> Path:
        """Write result.json, and with `evaluations` (before, after, silent, swapped) the curves and the table."""
        result = {
            "seed": self.options.train.seed,
            "steps": steps,
            "train_seconds": round(self.train_seconds, 1),
            "trainable_parameters": self.trainable.trainable_parameters,
            "adapter": str(exported.relative_to(self.run.folder)),
            "self_check": self.self_check,
            **(evaluated(evaluations) if evaluations else {"before": None, "after": None}),
        }
        path = self.run.write_json("result.json", result)
        if evaluations and self.ranks.main:
            update_card(exported, self.run.folder)
            self._show_result(evaluations, exported, path)
        return path

    def _show_result(self, evaluations: dict[str, dict[str, Any]], exported: Path, result: Path) -> None:
        rows: list[tuple[str, Any]] = [
            *((f"{audio} audio, sampled", console.interval(evaluations[audio]["sampled"]))
              for audio in ("silent", "swapped")),
            ("training", f"{self.train_seconds:.0f} s"),
            ("exported", exported),
            ("result", result),
        ]  # fmt: skip
        try:
            rows.append(("curves", curves(self.run.metrics(), self.run.folder / "curves.png")))
        except ImportError as error:
            rows.append(("curves", f"not drawn: {error}"))
        accuracies = console.before_after_table(evaluations["before"], evaluations["after"])
        self._print(accuracies, console.summary_table("after training", rows))


def evaluated(evaluations: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures that result.json promises, and every summary under `details`."""

    def figures(summaries: dict[str, Any]) -> dict[str, Any]:
        sampled = summaries["sampled"]
        rewards = {name: value for name, value in sampled.items() if name.startswith("reward_")}
        accuracies = {f"accuracy_{mode}": summaries[mode]["accuracy"] for mode in ("greedy", "sampled")}
        return {**accuracies, **rewards, "n": sampled["n"]}

    return {
        **{when: figures(evaluations[when]) for when in ("before", "after")},
        **{f"after_{audio}_audio": {"accuracy_sampled": evaluations[audio]["sampled"]["accuracy"]}
           for audio in ("silent", "swapped")},
        "details": evaluations,
    }  # fmt: skip
