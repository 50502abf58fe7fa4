"""One evaluation: its options, its model, and its folder. Resumable, shared between ranks, the same result however
often it was interrupted.

run.json       what is evaluated on what; a folder never mixes two settings
rows.jsonl     one record a row, flushed after every batch (rows.rank1.jsonl ... while several ranks work)
report.json, report.md, plots, submission.json
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from covo_rl.audio import AudioError, ClipStore
from covo_rl.config import (
    EngineConfig,
    Options,
    PromptConfig,
    RewardConfig,
    RolloutConfig,
    engine_contradictions,
    taught_prompt,
    value_problems,
)
from covo_rl.data.terminal import say
from covo_rl.evaluate.answer import PolicyAnswerer, answer_batch, check_repeats, plan_batches, with_audio
from covo_rl.evaluate.cascade import cascade_problems, is_cascade, load_cascade
from covo_rl.evaluate.duplex_streams import StreamExaminer
from covo_rl.evaluate.engine import run_options, sampling_engine
from covo_rl.evaluate.folder import WRITTEN, check_folder, claim_folder
from covo_rl.evaluate.inputs import Inputs
from covo_rl.evaluate.lengths import audio_seconds, too_long
from covo_rl.evaluate.noise import noisy_rows
from covo_rl.evaluate.records import Record, RecordLog, group_from_text, judge_groups
from covo_rl.evaluate.sets import EvalInputError, PromptStyle
from covo_rl.evaluate.through_duplex import DuplexAnswerer
from covo_rl.models.text import special_token_notes
from covo_rl.prompt import written_texts
from covo_rl.records.console import ProgressDisplay, percent
from covo_rl.train.ranks import Ranks
from covo_rl.types import Example, UserError

Dtype = StrEnum("Dtype", ["auto", "float32", "bfloat16", "float16"])
SpeechMode = StrEnum("SpeechMode", ["a2ta", "a2t"])
ChoiceStyle = StrEnum("ChoiceStyle", ["letters", "lines", "inline"])
MOST_SNR = 60.0  # dB, either way
SETS = "mmau-test-mini, mmau-test, mmar, mmsu, builtin, own, duplex, one of --list, or a manifest file"


@dataclass(frozen=True)
class Request:
    """The options of `covo-rl eval`, and of `covo-rl data profile` where it has them."""

    set_: Annotated[str | None, typer.Option("--set", help=SETS)] = None
    data: Annotated[Path | None, typer.Option(help="questions with answers: a file, a folder or hf:NAME:SPLIT")] = None
    through: Annotated[str | None, typer.Option(help="duplex: ask a live session, which hears the audio alone")] = None
    audio_dir: Annotated[Path | None, typer.Option(help="folder that audio paths start from")] = None
    columns: Annotated[str | None, typer.Option(help="names that the rows use: question=prompt,answer=label")] = None
    model: Annotated[str | None, typer.Option(help="checkpoint folder, hub name, builtin:tiny, cascade:FILE.yaml")] = (
        None
    )
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter folder on top of --model")] = None
    predictions: Annotated[Path | None, typer.Option(help="score the replies in this JSON or JSONL; no model")] = None
    output: Annotated[Path | None, typer.Option(help="folder of the report; an interrupted run goes on there")] = None
    limit: Annotated[int | None, typer.Option(min=1, help="only the first N rows")] = None
    greedy: Annotated[bool, typer.Option("--greedy/--sample", help="most likely token, or sampled")] = True
    num_generations: Annotated[int, typer.Option(min=1, help="replies per row with --sample")] = 1
    temperature: Annotated[float, typer.Option(min=1e-6, help="with --sample")] = 1.0
    top_p: Annotated[float, typer.Option(min=1e-6, max=1, help="nucleus with --sample; 1 is off")] = 1.0
    max_completion_length: Annotated[int, typer.Option(min=1, help="limit in tokens")] = 1024
    batch_size: Annotated[int, typer.Option(min=1, help="rows decoded at once")] = 32
    seed: Annotated[int, typer.Option(help="of sampling")] = 0
    dtype: Annotated[Dtype, typer.Option(help="precision of the weights")] = Dtype.auto
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="hold the decoder in 4-bit NF4")] = False
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; found by itself")] = None
    listen: Annotated[bool, typer.Option("--listen", help="also with silent, swapped and no audio")] = False
    noise_snr: Annotated[float | None, typer.Option(help="add noise so many dB below the speech of the clips")] = None
    prompt: Annotated[str, typer.Option(help="wording: covo (ours), or one that the set defines, e.g. official")] = (
        "covo"
    )
    instruction: Annotated[str | None, typer.Option(help="last line; default: the checkpoint's, else ours")] = None
    choice_style: Annotated[ChoiceStyle | None, typer.Option(help="how options are listed; default: as above")] = None
    rewards: Annotated[str | None, typer.Option(help="reward components to report; none: none")] = None
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="PNG plots (needs matplotlib)")] = True
    overwrite: Annotated[bool, typer.Option("--overwrite", help="start anew in a used --output")] = False
    family: Annotated[str | None, typer.Option(help="a family of your own: ./mine.py:Class, package.module:Class")] = (
        None
    )
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="run the checkpoint's code")] = False
    speech_mode: Annotated[SpeechMode, typer.Option(help="replies of text and audio codes, or of text alone (a2t)")] = (
        SpeechMode.a2ta
    )
    subset: Annotated[list[str] | None, typer.Option(help="of a set of speech: a part, or a group of parts")] = None
    judge: Annotated[str | None, typer.Option(help="who judges texts: openai:MODEL@URL, command:, file:")] = None
    audio_judge: Annotated[str | None, typer.Option(help="who judges sound: openai-audio:, command: or file:")] = None
    transcriber: Annotated[
        list[str] | None,
        typer.Option(help="who hears: transformers:, funasr:, command:, file:; zh=SPEC for one"),
    ] = None
    scorer_model: Annotated[
        list[str] | None, typer.Option(help="utmos, emotion, vad, embed=SPEC: command:PROGRAM or file:RESULTS.jsonl")
    ] = None
    judge_prompt: Annotated[list[str] | None, typer.Option(help="NAME=FILE: a published wording of a judge")] = None
    phrases: Annotated[list[str] | None, typer.Option(help="VoiceBench's lists: mcq=FILE, refusal=FILE")] = None
    voice: Annotated[str | None, typer.Option(help="decoder folder that makes sound of spoken replies")] = None
    neutral_voice: Annotated[
        str | None, typer.Option(help="command:PROGRAM that says replies again: what an audio judge makes of the words")
    ] = None
    allow_outside_audio: Annotated[bool, typer.Option("--allow-outside-audio", help="paths may leave --audio-dir")] = (
        False
    )
    engine: EngineConfig = field(default_factory=EngineConfig)

    def prompt_config(self) -> PromptConfig:
        """The wording that the adapter or checkpoint was trained with where its folder has a prompt.yaml, else ours;
        flags win."""
        from covo_rl.models.builtin import resolve_model

        paths = (Path(resolve_model(folder)) / "prompt.yaml" for folder in (self.adapter, self.model) if folder)
        path = next((path for path in paths if path.is_file()), None)
        config = taught_prompt(path) if path else PromptConfig()
        flags = {"instruction": self.instruction, "choice_style": self.choice_style and str(self.choice_style)}
        return replace(config, **{name: value for name, value in flags.items() if value is not None})

    def reward_config(self) -> RewardConfig | None:
        if self.rewards == "none":
            return None
        return RewardConfig() if self.rewards is None else RewardConfig(rewards=self.rewards)

    def _writes_over_predictions(self) -> bool:
        file, folder = self.predictions, self.output
        if file is None or folder is None or file.resolve().parent != folder.resolve():
            return False
        return any(file.match(pattern) for pattern in WRITTEN)

    def rollout_config(self) -> RolloutConfig:
        return RolloutConfig(
            num_generations=self.num_generations, max_completion_length=self.max_completion_length,
            temperature=self.temperature, top_p=self.top_p,
        )  # fmt: skip

    def problems(self) -> list[str]:
        """Every option that is missing or has no meaning beside another."""
        scored_as_is = "needs a --model; a predictions file is scored as it is"
        replies, samples = self.predictions is not None, self.num_generations
        rules = (
            (self.set_ is None, f"--set is missing: {SETS}"),
            (self.through not in (None, "duplex"), f"--through {self.through}: there is duplex"),
            (self.output is None, "--output is missing: the folder of the report"),
            ((self.model is None) != replies, "give one of --model (answer with it) and --predictions (score a file)"),
            (replies and self.adapter, f"--adapter {scored_as_is}"),
            (replies and self.listen, f"--listen {scored_as_is}"),
            (replies and self.noise_snr is not None, f"--noise-snr {scored_as_is}"),
            (not -MOST_SNR <= (self.noise_snr or 0) <= MOST_SNR, f"--noise-snr {self.noise_snr}: from -60 to 60 dB"),
            (replies and self.load_in_4bit, f"--load-in-4bit {scored_as_is}"),
            (self._writes_over_predictions(), f"--output {self.output} would write over --predictions"),
            (self.greedy and samples > 1, f"--num-generations {samples}: greedy replies are equal; add --sample"),
            (replies and self.engine.use_vllm, f"--use-vllm {scored_as_is}"),
        )
        problems = [text for broken, text in rules if broken]
        problems += value_problems(self.rollout_config()) + self.engine_problems()
        if (config := self.reward_config()) is not None:
            from covo_rl import rewards

            try:
                rewards.components(config.rewards)
            except rewards.RewardError as error:
                problems.append(f"--rewards: {error}")
        return problems

    def speech_problems(self) -> list[str]:
        """Options that only a set of speech has."""
        names = (
            "subset", "judge", "audio_judge", "transcriber", "scorer_model", "judge_prompt", "phrases", "voice",
            "neutral_voice",
        )  # fmt: skip
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name)]
        return [f"{', '.join(given)}: only for a set of speech (covo-rl eval --list)"] if given else []

    def engine_problems(self) -> list[str]:
        """What is wrong with the engine's options, by themselves and for an evaluation."""
        engine = self.engine
        rules = (
            (engine.use_vllm and self.load_in_4bit, "--load-in-4bit: vLLM would run the base in its own precision"),
            (engine.vllm_tensor_parallel_size > 1 and engine.vllm_mode == "colocate",
             "--vllm-tensor-parallel-size: here each process answers rows of its own; use --vllm-mode server"),
        )  # fmt: skip
        problems = value_problems(engine) or engine_contradictions(Options(engine=engine))
        return [*problems, *(text for broken, text in rules if broken)]

    def model_problems(self) -> list[str]:
        """What is wrong with model, adapter and device, as far as it can be known without loading them."""
        if self.model is None:
            return []
        if is_cascade(self.model):
            return cascade_problems(self)
        from covo_rl.models import model_config, use_family
        from covo_rl.models.builtin import resolve_model
        from covo_rl.models.quantised import check_quantisation
        from covo_rl.policy.saved_adapter import read_adapter
        from covo_rl.train.launch import device_of

        checks = [("--family", partial(use_family, self.family))]
        checks += [("--model", lambda: model_config(resolve_model(str(self.model))))]
        checks += [("--adapter", partial(read_adapter, self.adapter))] if self.adapter else []
        checks += [("--device", partial(device_of, self.device))] if self.device else []
        checks += [("--load-in-4bit", check_quantisation)] if self.load_in_4bit else []
        problems = []
        for option, check in checks:
            try:
                check()
            except (UserError, OSError) as error:
                problems += [f"{option}: {text}" for text in getattr(error, "problems", [error])]
        if self.engine.use_vllm and not problems:
            from covo_rl.engines.vllm_checks import vllm_problems

            problems = vllm_problems(run_options(self), Ranks.current().world)
        return problems


def load_answerer(request: Request, style: PromptStyle | None, clips: ClipStore) -> PolicyAnswerer:
    """Load a checkpoint folder, hub name or `builtin:tiny`, with a PEFT adapter on it if given, ready to answer."""
    from covo_rl.policy.loading import answering_policy
    from covo_rl.train.launch import device_of

    assert request.model is not None
    options = run_options(request)
    policy, saved = answering_policy(options.model, options.adapter, clips=clips, device=device_of(request.device))
    if Ranks.current().main:
        for note in saved.notes if saved else ():
            say(f"note: {note}", err=True)
    return PolicyAnswerer(policy, clips, request.prompt_config(), request.rollout_config(), style, saved=saved)


def in_session(request: Request, inputs: Inputs, answerer: Any) -> Any:
    """What asks the rows: the policy itself, or a live session of it where request or set want one."""
    if not (request.through or inputs.eval_set.streams):
        return answerer
    from covo_rl.duplex.grid import CHUNK_SECONDS
    from covo_rl.duplex.session import DuplexSession

    if inputs.eval_set.streams:  # which are led through their replies: no turn is the session's own
        session = DuplexSession.of(answerer.policy.family, max_turn_seconds=CHUNK_SECONDS)
        return StreamExaminer(session, answerer.clips)
    return DuplexAnswerer.of(answerer.policy, answerer.clips, request.rollout_config(), greedy=request.greedy)


def answer_rows(
    request: Request, inputs: Inputs, settings: Mapping[str, Any], conditions: Iterable[str], ranks: Ranks,
    style: PromptStyle | None = None, answerer: PolicyAnswerer | None = None, asks: Callable[[Any], Any] | None = None,
) -> dict[str, list[Record]] | None:  # fmt: skip
    """Load the model, unless `answerer` is it; claim the folder, which is `owned`, and answer the rows under every
    audio condition, resumable. `asks` makes of the model what asks it the rows, where it does not by itself.

    Returns the records by condition on rank 0, None on others.

    Raises:
        EvalInputError: the folder holds something else, the model cannot be loaded, clips are longer than it takes.
    """
    assert request.output is not None
    check_folder(request.output, settings, ranks, overwrite=request.overwrite)
    clips = answerer.clips if answerer else ClipStore()
    files = [clip for example in inputs.examples for clip in example.clips]
    clips.watch(files, ranks.from_main(clips.watch(files) if ranks.main else None))
    try:
        if is_cascade(request.model):
            model: Any = load_cascade(request, clips, style)
        else:
            model = answerer or load_answerer(request, style, clips)
        asked = asks(model) if asks else in_session(request, inputs, model)
    except EvalInputError:
        raise
    except (OSError, ValueError) as error:
        adapter = f", --adapter {request.adapter}" if request.adapter else ""
        raise EvalInputError([f"--model {request.model}{adapter}: {error}"]) from error
    if over := too_long(inputs.examples, getattr(asked, "max_clip_seconds", None), asked.clips):
        raise EvalInputError(over)
    check = getattr(asked, "length_problems", None)
    if problems := ranks.from_main(check(inputs.examples) if check and ranks.main else []):
        raise EvalInputError(problems[:50])
    with sampling_engine(request, asked, inputs.examples, ranks) as engine:
        claim_folder(request.output, settings, ranks, overwrite=request.overwrite)
        if isinstance(asked, PolicyAnswerer):
            asked = replace(asked, engine=engine)
        if isinstance(writer := getattr(asked, "answerer", asked), PolicyAnswerer) and ranks.main:
            texts = written_texts(inputs.examples, writer.prompt_config)
            for note in special_token_notes(texts, writer.policy.family.tokenizer):
                say(note, err=True)
        by_audio = {audio: run_model(inputs, asked, request, audio=audio, ranks=ranks) or [] for audio in conditions}
    return by_audio if ranks.main else None


def run_model(inputs: Inputs, answerer: Any, request: Request, *, audio: str, ranks: Ranks) -> list[Record] | None:
    """Evaluate what is not finished yet; the records of all rows in data order on rank 0, None on others.

    `answerer` is an Answerer with a ClipStore `clips`. Batches are dealt to the ranks in turn; each rank writes its own
    file, rank 0 joins them at the end.
    """
    examples, folder = inputs.examples, request.output
    assert folder is not None
    check_repeats(examples, greedy=request.greedy, num_generations=request.num_generations)
    name = "rows" if audio == "real" else f"rows.{audio}"
    log = RecordLog(folder / (f"{name}.rank{ranks.rank}.jsonl" if ranks.rank else f"{name}.jsonl"))

    def logs() -> list[RecordLog]:
        return [RecordLog(folder / f"{name}.jsonl"), *map(RecordLog, sorted(folder.glob(f"{name}.rank*.jsonl")))]

    def by_id() -> dict[str, Record]:
        return {record["id"]: record for each in logs() for record in each.read()}

    if ranks.main:
        for each in logs():
            each.repair()
    ranks.wait()
    done = by_id()
    ranks.wait()
    seconds = [audio_seconds(e.clips, answerer.clips) for e in examples]
    batches = list(enumerate(plan_batches(examples, seconds, request.batch_size)))[ranks.rank :: ranks.world]
    todo = [(b, batch) for b, batch in batches if not all(examples[i].id in done for i in batch)]
    rows = with_audio(examples, audio, answerer.clips) if todo else []
    title, total = f"{inputs.eval_set.name}, {audio}", len(done) + sum(len(batch) for _, batch in todo)
    with ProgressDisplay(title, total, done=len(done), active=ranks.main, stderr=True) as display:
        display.update(len(done), _standing(done.values()))
        for b, batch in todo:
            with noisy_rows([rows[i] for i in batch], request.noise_snr, request.seed) as asked:
                records = answer_batch(
                    answerer, asked, [seconds[i] for i in batch], eval_set=inputs.eval_set,
                    reward_config=request.reward_config(), greedy=request.greedy,
                    num_generations=request.num_generations, seed=request.seed,
                )  # fmt: skip
            log.append(records, batch=b)
            done |= {record["id"]: record for record in records}
            display.update(len(done), _standing(done.values()))
    ranks.wait()
    if not ranks.main:
        return None
    done = by_id()
    if missing := [e.id for e in examples if e.id not in done]:
        raise RuntimeError(f"{len(missing)} rows were not evaluated: {', '.join(missing[:20])}; run the command again")
    records = [done[e.id] for e in examples]
    log, *others = logs()
    log.replace(records)
    for other in others:
        other.path.unlink()
    return records


def _standing(records: Iterable[Record]) -> str:
    verdicts = [record.get("strict_correct", record.get("timing_correct")) for record in records]
    verdicts = [verdict for verdict in verdicts if verdict is not None]
    return f"{percent(sum(verdicts) / len(verdicts))} % right" if verdicts else "not graded"


def run_predictions(inputs: Inputs, folder: Path, reward_config: RewardConfig | None) -> list[Record]:
    """Judge replies from a file; rows without one are recorded as missing."""
    replies = inputs.predictions or {}
    groups = [group_from_text(example, replies.get(example.id, ())) for example in inputs.examples]
    by_id = {}
    for size in dict.fromkeys(len(group.rollouts) for group in groups):  # a reward table needs groups of one size
        part = [group for group in groups if len(group.rollouts) == size]
        seconds = [_header_seconds(group.prompt.example) for group in part]
        records = judge_groups(part, seconds, inputs.eval_set, reward_config)
        by_id |= {record["id"]: record for record in records}
    records = [by_id[example.id] for example in inputs.examples]
    RecordLog(folder / "rows.jsonl").replace(records)
    return records


def _header_seconds(example: Example) -> float | None:
    """Audio length where the files are there; scoring a predictions file does not need them."""
    if not example.clips or any(clip.path is None or not Path(clip.path).is_file() for clip in example.clips):
        return None
    try:
        return audio_seconds(example.clips, None)
    except AudioError:
        return None
