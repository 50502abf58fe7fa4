"""A whole run, from options to result.json: check everything, evaluate, train, evaluate, export.

options -> data + model + rewards, all checked -> before -> GRPO -> after -> adapter -> result.json
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from covo_rl.audio import ClipStore
from covo_rl.config import ConfigError, Options
from covo_rl.engines.base import EngineLost, RolloutEngine, TextDecoder
from covo_rl.engines.choose import rollout_engine
from covo_rl.engines.health import self_check
from covo_rl.engines.vllm_checks import fit_problems, needed_positions, server_problems, vllm_problems
from covo_rl.evaluate import Evaluation, evaluate
from covo_rl.evaluate.lengths import length_problems
from covo_rl.export import ExportError
from covo_rl.export.adapter import portable_name
from covo_rl.export.exporting import export_run_adapter
from covo_rl.models import family_at
from covo_rl.models.builtin import resolve_model
from covo_rl.models.text import special_token_notes
from covo_rl.policy.loading import trainable_policy
from covo_rl.policy.trainable import render_report, training_dtype
from covo_rl.prompt import build_prompt, written_texts
from covo_rl.records import console
from covo_rl.records.folder import Run
from covo_rl.records.steps import StepRecord, rollout_rows
from covo_rl.rewards import components, lint
from covo_rl.run import doctor, questions
from covo_rl.run.checks import check_before_loading
from covo_rl.run.observers import observers
from covo_rl.run.result import before_settings, evaluated, noop_explained, show_end, stored_before, summary_rows
from covo_rl.run.start import not_shared, own, run_origin, take_up
from covo_rl.train.batch import Batch
from covo_rl.train.checkpoint.identity import run_contents
from covo_rl.train.checkpoint.saver import Saver
from covo_rl.train.guard import StoppedBySignal, StopSignals
from covo_rl.train.launch import allow_tf32, computes_in_16_bits, join
from covo_rl.train.loop import Trainer
from covo_rl.train.ranks import Ranks
from covo_rl.types import Prompt, UserError

#: what a user can mend: shown as one message, without a traceback
USER_ERRORS = (UserError, OSError)


class Session:
    """Everything a run needs, loaded and checked. Making one starts no training.

    `callbacks` see every step after it is recorded, on the main process only; what one raises ends the run. `memory`
    maps data and eval_data to rows that no file holds; the options then say IN_MEMORY, and here how many, and a hash.
    """

    def __init__(
        self,
        options: Options,
        accelerator: Accelerator | None = None,
        *,
        callbacks: Sequence[Callable[[StepRecord], object]] = (),
        memory: Mapping[str, Any] | None = None,
    ) -> None:
        self.options = options
        self.accelerator = accelerator or join()
        self.ranks = Ranks(self.accelerator.process_index, self.accelerator.num_processes)
        self.run = Run(options.train.output, active=self.ranks.main)
        self.start = take_up(self.run, options, self.ranks)
        check_before_loading(options)
        self._refuse([*dict.fromkeys(self.ranks.joined(vllm_problems(options, self.ranks.world)))])
        self._refuse(server_problems(options) if self.ranks.main and not options.train.dry_run else [])
        self.terms = components(options.reward.rewards)
        set_seed(options.train.seed % 2**32)  # rollouts have generators of their own, seeded by step and prompt
        if options.data.data is None:
            with self.accelerator.main_process_first():  # which renders the built-in set
                questions.builtin_questions()
        self.clips = ClipStore()
        self.rows = questions.read_questions(options, self.clips, self.ranks, memory)
        self.in_memory = {name: str(self.rows.files[name]) for name in memory or {} if name in self.rows.files}
        options.data = replace(options.data, **self.in_memory)
        if options.reward.check_rewards and (findings := lint(options.reward.rewards, self.rows.train[:8])):
            advice = "check_rewards false trains with it all the same"
            raise ConfigError([*map(str, findings), advice])
        model, path, lora = options.model, resolve_model(options.model.model), options.adapter.lora
        model.dtype, self.notes = training_dtype(model.dtype, path, full=not lora)
        count = len(self.rows.train) + len(self.rows.held_out)
        with console.working(f"reading {count} rows and clips", active=self.ranks.main):
            self._check_data(family_at(path).max_clip_seconds)
        device, beta, train = self.accelerator.device, options.loss.beta, options.train
        with console.working(f"loading {model.model}", active=self.ranks.main):
            self.policy, self.trainable = trainable_policy(
                model, options.adapter, clips=self.clips, device=device, learning_rate=train.learning_rate,
                feature_memory_mb=train.feature_memory_mb, gradient_checkpointing=train.gradient_checkpointing,
                recompute=train.recompute, keep_reference=bool(beta),
            )  # fmt: skip
        self.family = self.policy.family
        self.decoder = TextDecoder(self.family) if train.log_token_logps else None
        allow_tf32(device, computes_in_16_bits(self.accelerator, self.family.model), self.policy)
        rows, limit, main = [*self.examples, *self.held_out], options.rollout.max_completion_length, self.ranks.main
        prompt = partial(build_prompt, family=self.family, clips=self.clips, config=options.prompt)
        self._refuse(length_problems(rows, self.family, self.clips, prompt, limit) if main else [])
        if options.engine.use_vllm:
            everything = rows, len(rows), self.family, self.clips, options.prompt
            prompts = questions.readable_prompts(*everything) if main else []
            self._refuse(fit_problems(options, self.trainable, prompts) if main else [])
            self.positions = self.ranks.from_main(needed_positions(prompts, limit, self.family) if main else 0)
        if self.trainable.replaced and beta:
            raise ConfigError([f"beta {beta}: the adapter replaced {self.trainable.replaced[0]} of the base, so there "
                               "is no reference without it: set beta 0 or merge it first"])  # fmt: skip
        needed = main and (self.start.saved or not options.train.dry_run)
        self.contents = run_contents(options, self.examples, self.policy, self.clips.key) if needed else None
        self._refuse(self.start.changes(options, self.contents))
        self.accepted, self.train_seconds, self.record_seconds = False, 0.0, 0.0
        self.engine: RolloutEngine | None = None  # vLLM, once all is accepted; None: the policy itself
        self.trainer: Trainer | None = None
        self.observers = observers(self, callbacks)

    # -- set-up --------------------------------------------------------------------------------------------------

    def _check_data(self, longest: float | None) -> None:
        """Every clip is decoded for this, so the first process checks for all; then clips are fitted to `longest` s.

        Raises:
            ConfigError: broken and over-long clips and overlap, all together, before anything is loaded.
        """
        data = self.options.data
        self._refuse(questions.question_problems(self.rows, data, longest, self.clips) if self.ranks.main else [])
        self.examples, notes = questions.fit_clips(self.rows.train, longest, data.long_audio)
        self.held_out, more = questions.fit_clips(self.rows.held_out, longest, data.long_audio)
        self._print(*self.rows.notes, *notes, *more)

    def _refuse(self, problems: list[str]) -> None:
        """On every rank, what the main one has seen."""
        if problems := self.ranks.from_main(problems):
            raise ConfigError([*problems[:50], *([f"... and {len(problems) - 50} more"] if problems[50:] else [])])

    def show_budget(self) -> None:
        """End of a dry run: the estimate of memory, and that nothing is started."""
        self._print(doctor.budget(self.options, self.examples[:64], self.clips))
        self._print("dry run: data, configuration, model and rewards are fine; nothing was started")

    def show(self) -> None:
        """Print the configuration summary, what trains, the reward check and the self-check; then own the folder."""
        options = self.options
        device = f"{self.accelerator.device}, {self.ranks.world} process(es)"
        sizes = len(self.examples), len(self.held_out)
        rows = summary_rows(options, self.terms, self.rows.files, sizes, self.family.model_type, device)
        texts = written_texts([*self.examples, *self.held_out], options.prompt)
        notes = [*self.notes, *self.trainable.notes, *special_token_notes(texts, self.family.tokenizer)]
        self._print(console.summary_table("run", rows), render_report(self.trainable.report), *notes)
        with console.working("self-check: does scoring equal sampling?", active=self.ranks.main):
            self.self_check = asdict(self_check(self.policy, self._prompts(4), options.rollout))
        self._print(console.summary_table("self-check", list(self.self_check.items())))
        if not options.train.dry_run:
            self.accept()

    def accept(self) -> None:
        """All checks are passed: from here on the run owns its folder, and writes to it.

        Raises:
            ConfigError: on every rank: another process was faster, or the folder cannot be written.
        """
        if not self.accepted:
            problem = not_shared(self.run, self.ranks)
            if not problem:
                self._start_engine()
            origin = self.rows.files, self.in_memory, self._prompts(1), self.family
            files, more = run_origin(self.options, self.terms, *origin)
            if problem := problem or self.ranks.from_main(
                own(self.run, self.options, files, more) if self.ranks.main else None
            ):
                self.close()
                raise ConfigError([problem])
            problems = [problem for o in self.observers if (problem := o.start())] if self.ranks.main else []
            if problems := self.ranks.from_main(problems):
                self.close()
                raise ConfigError(problems)
        self.accepted = True

    def _start_engine(self) -> None:
        """vLLM as the options say, given the policy and held to it.

        Raises:
            EngineError: it cannot start, no server answers, or it does not run the policy.
        """
        if self.options.engine.use_vllm:
            prompts = self._prompts(16)
            with console.working("vLLM: started, given the policy, compared with it", active=self.ranks.main):
                self.engine = rollout_engine(
                    self.options, self.policy, self.trainable, max_model_len=self.positions,
                    probe_prompt=next((prompt for prompt in prompts if prompt.clip_keys), prompts[0]),
                    rank=self.ranks.rank, world=self.ranks.world,
                )  # fmt: skip

    def current_engine(self) -> RolloutEngine | None:
        """What evaluations sample with, given the policy as it is; None: the policy itself."""
        if self.engine is not None and self.trainer is not None:
            self.trainer.sync()
        return self.engine

    def _prompts(self, count: int) -> list[Prompt]:
        return questions.readable_prompts(self.examples, count, self.family, self.clips, self.options.prompt)

    def _print(self, *lines: Any) -> None:
        """Lines and tables, by the main process."""
        if self.ranks.main:
            for line in lines:
                console.console.print(line)

    # -- phases --------------------------------------------------------------------------------------------------

    def evaluate(
        self, *, audio: str = "real", modes: Sequence[str] = ("greedy", "sampled"), title: str = ""
    ) -> dict[str, Any]:
        """Summaries on the held-out rows, one per mode; `audio` may be real, silent or swapped; `title` is shown."""
        title = title or ("after" if self.train_seconds else "before")
        return {mode: self._evaluation(title, audio, mode).summary() for mode in modes}

    def _evaluation(self, title: str, audio: str, mode: str) -> Evaluation:
        options = self.options
        title = ", ".join([title, *([] if audio == "real" else [audio]), mode])
        with console.ProgressDisplay(title, len(self.held_out), active=self.ranks.main) as display:
            return evaluate(
                self.policy, self.held_out, prompt_config=options.prompt, rollout_config=options.rollout,
                reward_config=replace(options.reward, rewards=self.terms), clips=self.clips, audio=audio,
                greedy=mode == "greedy", num_generations=1 if mode == "greedy" else options.eval.eval_num_generations,
                seed=options.train.seed, batch_size=options.eval.eval_batch_size, ranks=self.ranks,
                progress=display.rated, engine=self.current_engine(),
            )  # fmt: skip

    def before(self) -> dict[str, Any]:
        """`evaluate` of the untrained policy; a resumed run reads what it wrote at first, if that is of these rows."""
        self.accept()
        settings = before_settings(self.options, self.held_out, self.clips) if self.ranks.main else None
        resumes = self.options.train.resume is not None
        stored = self.ranks.from_main(stored_before(self.run, settings) if resumes and self.ranks.main else None)
        if stored is None:
            if resumes:
                self._print("before.json is missing, or of other rows or options: evaluating before training again")
            stored = self.evaluate()
            with self.run.going_on("a resume will evaluate before training again"):
                self.run.write_json("before.json", {**stored, "settings": settings})
        return stored

    def train(self) -> Trainer:
        """Run GRPO, from a checkpoint if asked for, and record every step.

        Raises:
            StoppedBySignal: SIGTERM, SIGHUP or Ctrl-C came, or no engine answers any more, and a checkpoint was saved;
                a SystemExit with code 75.
        """
        self.accept()
        trainer = Trainer(self.options, self.policy, self.clips, self.examples, self.accelerator, self.engine)
        self.trainer = trainer
        start, train = time.perf_counter(), self.options.train
        with StopSignals() as stop, ExitStack() as ends:
            on_saved = self._export_step if train.export_checkpoints else None
            saver = Saver(self.options, self.run.folder, stop, on_saved, self.contents)
            self._print(*saver.resume(trainer, train.resume, allow_changed=train.allow_changed_config))
            for observer in self.observers:
                observer.begin(trainer.step)
                ends.callback(observer.end)
            try:
                trainer.run(self._after_step, saver)
            except StoppedBySignal as stopped:
                ends.close()
                self._print(stopped.message)
                raise
        self.train_seconds = time.perf_counter() - start
        return trainer

    def _after_step(self, metrics: dict[str, Any], batch: Batch) -> float | None:
        """Show a step to the observers; its held-out accuracy, where that was measured."""
        metrics["seconds"]["records"] = self.record_seconds  # of the step before, its own are not known yet
        lost: EngineLost | None = None
        for observer in self.observers:
            try:
                observer.measure(metrics)
            except EngineLost as error:  # the step itself is done, and is recorded before the run ends
                lost = error
        start, groups = time.perf_counter(), batch.groups
        first = sum(self.ranks.gathered(len(groups))[: self.ranks.rank])
        rows = rollout_rows(
            groups, batch.table, batch.advantages, first_group=first, decoder=self.decoder, version=batch.version
        )
        rows = self.ranks.joined(rows)
        if self.ranks.main:
            for observer in self.observers:
                observer.record(StepRecord(metrics["step"], metrics, rows))
        self.record_seconds = time.perf_counter() - start
        if lost is not None:
            raise lost
        return metrics.get("eval_accuracy")

    def export(self, folder: Path | None = None) -> Path:
        """Write RUN/adapter (LoRA) or RUN/model (full), or `folder`, verified by logits in a fresh process.

        Raises:
            ExportError: on every rank, where the check failed or training changed nothing; nothing is left.
        """
        doing = console.working("export: written, loaded in a fresh process, logits compared", active=self.ranks.main)
        with doing, noop_explained(self.run, self.options, self.ranks):
            return export_run_adapter(
                self.trainable, self.run.folder, self._prompts(2), self.clips,
                base_model=portable_name(self.options.model.model), folder=folder, wording=self.options.prompt,
            )  # fmt: skip

    def _export_step(self, checkpoint: Path) -> None:
        """RUN/exports/step_N of a checkpoint just saved; an export that fails is reported, and training goes on."""
        try:
            self.export(self.run.folder / "exports" / checkpoint.name)
        except ExportError as error:
            self._print(f"{checkpoint.name} was not exported, training goes on: {error}")

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
        self.run.catch_up()
        path = self.run.write_json("result.json", result)
        self._let_go(result)  # first: what observers say stands above the table
        if self.ranks.main:
            show_end(self.run, self.options, exported, evaluations, self.train_seconds, self.held_out or self.examples)
        self.close()
        return path

    def _let_go(self, result: Mapping[str, Any] | None = None) -> None:
        watching, self.observers = self.observers, []
        for observer in watching if self.ranks.main else ():
            observer.close(result)

    def close(self) -> None:
        """Let every observer and the engine go, and give the folder back; a second call does nothing."""
        self._let_go()
        if self.engine is not None:
            engine, self.engine = self.engine, None
            engine.close()
        self.run.lock.release()
