"""All that a run needs, read, loaded and checked: options, data, model, rewards; then the folder, and the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from covo_rl.audio import ClipStore
from covo_rl.config import ConfigError, Options
from covo_rl.engines.base import RolloutEngine, TextDecoder
from covo_rl.engines.health import self_check
from covo_rl.evaluate.in_training import read_in_training_sets
from covo_rl.evaluate.lengths import length_problems
from covo_rl.models import family_at
from covo_rl.models.builtin import resolve_model
from covo_rl.models.text import special_token_notes
from covo_rl.policy.loading import trainable_policy
from covo_rl.policy.trainable import render_report, training_dtype
from covo_rl.prompt import build_prompt, written_texts
from covo_rl.records import console
from covo_rl.records.folder import Run
from covo_rl.rewards import components, lint
from covo_rl.rewards.duplex_lint import check_timing
from covo_rl.rewards.spoken_lint import check_hearing
from covo_rl.run import doctor, questions
from covo_rl.run.checks import check_before_loading, check_code_options
from covo_rl.run.engine import engine_problems, needed_room, started_engine
from covo_rl.run.observers import Observer
from covo_rl.run.result import summary_rows
from covo_rl.run.start import not_shared, own, run_origin, take_up
from covo_rl.train.checkpoint.identity import run_contents
from covo_rl.train.launch import allow_tf32, computes_in_16_bits, join
from covo_rl.train.ranks import Ranks
from covo_rl.types import Prompt


class Setup:
    """Everything a run needs, loaded and checked. Making one starts no training.

    `memory` maps data and eval_data to rows that no file holds; the options then say IN_MEMORY, and here how many, and
    a hash.
    """

    def __init__(
        self,
        options: Options,
        accelerator: Accelerator | None = None,
        memory: Mapping[str, Any] | None = None,
    ) -> None:
        self.options = options
        self.accelerator = accelerator or join()
        self.ranks = Ranks(self.accelerator.process_index, self.accelerator.num_processes)
        self.run = Run(options.train.output, active=self.ranks.main)
        self.start = take_up(self.run, options, self.ranks)
        check_before_loading(options)
        self._refuse(engine_problems(options, self.ranks))
        self.terms = components(options.reward.rewards)
        check_timing(self.terms)
        set_seed(options.train.seed % 2**32)  # rollouts have generators of their own, seeded by step and prompt
        with self.accelerator.main_process_first():  # which renders a built-in set
            questions.rendered_set(options.data)
        self.clips = ClipStore()
        self.rows = questions.read_questions(options, self.clips, self.ranks, memory)
        self.files = self.rows.files
        self.in_memory = {name: str(self.rows.files[name]) for name in memory or {} if name in self.rows.files}
        options.data = replace(options.data, **self.in_memory)
        if options.reward.check_rewards and (findings := lint(options.reward, self.rows.train[:8])):
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
        check_code_options(options, self.family.code_ids)
        asked = self.examples[:1] if options.reward.check_rewards else []
        codes = len(self.family.code_ids) if self.family.speaks else 0
        check_hearing(self.terms, codes, asked, options.reward.scorer_model)
        self.decoder = TextDecoder(self.family) if train.log_token_logps else None
        allow_tf32(device, computes_in_16_bits(self.accelerator, self.family.model), self.policy)
        rows, limit, main = [*self.examples, *self.held_out], options.rollout.max_completion_length, self.ranks.main
        prompt = partial(build_prompt, family=self.family, clips=self.clips, config=options.prompt)
        problems = length_problems(rows, self.family, self.clips, prompt, limit) if main else []
        for one in self.eval_sets if main else ():
            problems += one.length_problems(self.policy, self.clips, options)
            rows += one.styled()  # which vLLM makes room for
        self._refuse(problems)
        room = rows, options, self.policy, self.trainable, self.clips
        problems, positions = needed_room(*room) if main and options.engine.use_vllm else ([], 0)
        self._refuse(problems)
        self.positions = self.ranks.from_main(positions)
        if self.trainable.replaced and beta:
            raise ConfigError([f"beta {beta}: the adapter replaced {self.trainable.replaced[0]} of the base, so there "
                               "is no reference without it: set beta 0 or merge it first"])  # fmt: skip
        needed = main and (self.start.saved or not options.train.dry_run)
        self.contents = run_contents(options, self.examples, self.policy, self.clips.key) if needed else None
        self._refuse(self.start.changes(options, self.contents))
        self.accepted = False
        self.engine: RolloutEngine | None = None  # vLLM, once all is accepted; None: the policy itself
        self.observers: list[Observer] = []

    def _check_data(self, longest: float | None) -> None:
        """Every clip is decoded for this, so the first process checks for all; then clips are fitted to `longest` s.

        Raises:
            ConfigError: broken and over-long clips and overlap, all together, before anything is loaded.
        """
        data, options, train = self.options.data, self.options, self.rows.train
        problems = questions.question_problems(self.rows, data, longest, self.clips) if self.ranks.main else []
        with self.accelerator.main_process_first():  # which renders a built-in set
            self.eval_sets, wrong = read_in_training_sets(options, longest, train, self.clips)
        self._refuse([*problems, *next(filter(None, self.ranks.gathered(wrong)), [])])
        files = [clip for one in self.eval_sets for row in one.inputs.examples for clip in row.clips]
        self.clips.watch(files, self.ranks.from_main(self.clips.watch(files) if self.ranks.main else None))
        self.files = {**self.files, **{f"eval_set {one.name}": one.inputs.data for one in self.eval_sets}}
        for one in self.eval_sets:
            self._print(f"eval_set {one.name}: {len(one.inputs.examples)} rows", *one.notes)
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
        rows = summary_rows(options, self.terms, self.files, sizes, self.family.model_type, device)
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
        if self.accepted:
            return
        if problem := not_shared(self.run, self.ranks):
            raise ConfigError([problem])
        prompts = self._prompts(1)  # of a row with clips, if there is one
        self.engine = started_engine(self.options, self.policy, self.trainable, self.positions, prompts, self.ranks)
        try:
            self._refuse(self._claimed(prompts) if self.ranks.main else [])
        except ConfigError:
            self.close()
            raise
        self.accepted = True

    def _claimed(self, prompts: list[Prompt]) -> list[str]:
        """The folder is ours and the observers are ready, or what is in the way."""
        files, more = run_origin(self.options, self.terms, self.files, self.in_memory, prompts, self.family)
        problem = own(self.run, self.options, files, more)
        return [problem] if problem else [problem for o in self.observers if (problem := o.start())]

    def _prompts(self, count: int) -> list[Prompt]:
        return questions.readable_prompts(self.examples, count, self.family, self.clips, self.options.prompt)

    def _print(self, *lines: Any) -> None:
        """Lines and tables, by the main process."""
        if self.ranks.main:
            for line in lines:
                console.console.print(line)

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
