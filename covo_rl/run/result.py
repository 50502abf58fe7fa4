"""What a run shows: its options at the start; at the end result.json, the table before and after, and the curves."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.text import Text

from covo_rl.audio import ClipStore
from covo_rl.config import SPOKEN_SET, EngineConfig, LossConfig, Options, corrects_sampler
from covo_rl.data.files import plain, read_record
from covo_rl.data.memory import IN_MEMORY
from covo_rl.export import ExportError
from covo_rl.export.card import update_card
from covo_rl.export.verify import NOOP
from covo_rl.records import console
from covo_rl.records.folder import Run
from covo_rl.rewards import Component, components
from covo_rl.run.report.curves import curves
from covo_rl.synth.dialogue import spoken_questions
from covo_rl.train.checkpoint.identity import data_fingerprint
from covo_rl.train.ranks import Ranks
from covo_rl.types import Example

#: a share of completions above which their limit is named
MOSTLY = 0.5


@contextmanager
def noop_explained(run: Run, options: Options, ranks: Ranks) -> Iterator[None]:
    """Where an export is refused because it changes nothing, and no step had anything to learn from, that is said.

    Raises:
        ExportError: on every rank, the one of the block or the one that says why.
    """
    try:
        yield
    except ExportError as error:
        why = _nothing_learned(run, options) if ranks.main and NOOP in str(error) else None
        if why := ranks.from_main(why):
            raise ExportError(why) from error
        raise


def _nothing_learned(run: Run, options: Options) -> str | None:
    """Why a run left the weights as they were, if no step had a gradient: every group of rollouts got one reward."""
    steps = run.metrics()
    if not steps or any(step.get("grad_norm") != 0 or step.get("zero_variance_groups") != 1 for step in steps):
        return None
    names = [name for name in steps[0] if name.startswith("reward_")]
    means = {name: [step[name] for step in steps if step.get(name) is not None] for name in names}
    said = ", ".join(f"{name} {fmean(values):.3g}" for name, values in means.items() if values)
    count, cut = options.rollout.num_generations, fmean(step.get("truncated") or 0 for step in steps)
    limit = f" {cut:.0%} of the completions were cut: raise --max_completion_length." if cut > MOSTLY else ""
    return (
        f"nothing was learned: in all {len(steps)} steps the {count} rollouts of every question got the same reward "
        f"({said or 'none could be graded'}), so there was no gradient, the weights are as they were, and no "
        f"adapter was written. Texts and scores are in {run.folder / 'rollouts'}. What tells rollouts apart: rewards "
        "that pay in part (format(pattern='tags') for a model that never writes the grammar), easier rows, more "
        f"--num_generations, a higher --temperature, or a cold start first (covo-rl sft).{limit}"
    )


def summary_rows(
    options: Options, rewards: Sequence[Component], files: Mapping[str, Path], sizes: tuple[int, int], model_type: str,
    device: str,
) -> list[tuple[str, Any]]:  # fmt: skip
    """Rows of the table that a run begins with; `sizes` are the numbers of training and held-out rows."""
    train, rollout, gate = options.train, options.rollout, options.reward.reward_gate
    terms = " + ".join(f"{'' if term.weight == 1 else f'{term.weight:g} '}R_{term.name}" for term in rewards)
    sources = [files["data"], files.get("eval_data", files["data"])]
    data, held_out = ("memory" if str(path).startswith(IN_MEMORY) else path for path in sources)
    return [
        ("model", f"{options.model.model} ({model_type})"),
        ("device", device),
        ("data", f"{sizes[0]} rows from {data}"),
        ("held out", f"{sizes[1]} rows from {held_out}"),
        ("step", f"{train.prompts_per_step} prompts x {rollout.num_generations} rollouts, {train.max_steps} steps"),
        ("R_total", terms + ("" if gate == "none" else f", gated by {gate}")),
        ("judge", options.reward.judge or "none: deterministic checkers"),
        ("loss", f"{options.loss.loss_type}, beta {options.loss.beta:g}, lr {train.learning_rate:g}"),
        *_sampling_row(options.engine, options.loss),
        ("seed", train.seed),
        ("run folder", train.output),
    ]


def _sampling_row(engine: EngineConfig, loss: LossConfig) -> list[tuple[str, str]]:
    """Who samples and whether that is corrected, where it is not just the policy itself."""
    if not (engine.use_vllm or engine.rollout_ahead):
        return []
    who = f"vLLM, {engine.vllm_mode}" if engine.use_vllm else "the policy's own decoder"
    corrects = corrects_sampler(loss.sampler_correction, engine.use_vllm, engine.rollout_ahead)
    how = f"{loss.sampler_correction_mode}, cap {loss.sampler_correction_cap:g}" if corrects else "none: it is off"
    return [("sampling", f"{who}{', one step ahead' * engine.rollout_ahead}; sampler_correction {how}")]


def before_settings(options: Options, rows: Sequence[Example], clips: ClipStore) -> Any:
    """What the evaluation before training depends on, JSON-ready; `clips` has named those of `rows`."""
    rooms = (options.model, options.adapter, options.prompt, options.rollout, options.reward)
    numbers = options.train.seed, options.eval.eval_num_generations
    return plain([data_fingerprint(rows, clips.key), *(asdict(room) for room in rooms), *numbers])


def stored_before(run: Run, settings: Any) -> dict[str, Any] | None:
    """The summaries in before.json; None where it is missing, damaged, or was made of other rows or options."""
    try:
        stored = read_record(run.folder / "before.json")
    except ValueError:
        return None
    return stored if stored.pop("settings", None) == settings else None


def show_end(
    run: Run, options: Options, exported: Path, evaluations: Mapping[str, Mapping[str, Any]] | None, seconds: float,
    rows: Sequence[Example],
) -> None:  # fmt: skip
    """What a run ends with on the screen, result.json being written: figures, curves, and what to type next."""
    if evaluations:
        update_card(exported, run.folder)
    facts = {"training": f"{seconds:.0f} s", "exported": exported, "result": run.folder / "result.json"}
    show_result(run, evaluations, facts)
    show_next(options, run.folder, exported, rows)


def show_result(run: Run, evaluations: Mapping[str, Mapping[str, Any]] | None, rows: Mapping[str, Any]) -> None:
    """Print held-out figures before and after, and what was heard; draw curves.png. `rows` close the second table."""
    heard = []
    if evaluations:
        heard = [(f"{audio} audio, sampled", console.interval(evaluations[audio]["sampled"]))
                 for audio in ("silent", "swapped")]  # fmt: skip
        console.console.print(console.before_after_table(evaluations["before"], evaluations["after"]), markup=False)
    try:
        picture: Any = curves(run.metrics(), run.folder / "curves.png")
    except (ImportError, OSError) as error:
        (run.folder / "curves.png").unlink(missing_ok=True)  # half of it
        picture = f"not drawn: {error}"
    table = console.summary_table("after training", [*heard, *rows.items(), ("curves", picture)])
    console.console.print(table, markup=False)


def next_commands(options: Options, folder: Path, exported: Path, rows: Sequence[Example] = ()) -> list[str]:
    """What to type after a run in `folder` whose policy was `exported`: a line each, quoted for the shell. The model is
    asked the question of the first of `rows` whose clip is a file."""
    data, lora = options.data, options.adapter.lora
    policy = ["--model", options.model.model, "--adapter", exported] if lora else ["--model", exported]
    code = ["--family", options.model.family] if options.model.family else []
    code += ["--trust-remote-code"] if options.model.trust_remote_code else []
    test_rows: list[Any] = ["--set", "builtin"]
    if data.data is not None:
        own = data.eval_data or (str(spoken_questions()["test"]) if data.data == SPOKEN_SET else IN_MEMORY)
        own = "OTHER_ROWS.json" if own.startswith(IN_MEMORY) else own
        audio = ["--audio-dir", data.eval_audio_dir] if data.eval_audio_dir else []
        test_rows = ["--set", "own", "--data", own, *audio]
    if whole := [term for term in components(options.reward.rewards) if term.reads_whole]:
        test_rows += ["--rewards", whole[0].name]
    row = next((row for row in rows if row.clips and all(clip.path for clip in row.clips)), None)
    clips = [clip.path for clip in row.clips] if row else ["CLIP.wav"]
    asked: list[Any] = [word for path in clips for word in ("--audio", path)]
    asking = "generate" if options.prompt.written_question else "chat"
    if asking == "chat":  # the sound alone asks, and the reply is heard
        asked += ["--speak", "reply.wav"]
    elif row:
        asked += ["--question", row.question, *(word for choice in row.choices for word in ("--choice", choice))]
    else:
        asked += ["--question", "What do you hear?"]
    commands: list[list[Any]] = [
        ["report", folder],
        [asking, *policy, *code, *asked],
        ["eval", *test_rows, *policy, *code, "--output", f"{folder}-eval", "--listen"],
        *([["export", folder, *code, "--merged", f"{folder}-merged"]] if lora else []),
    ]
    return [f"covo-rl {' '.join(shlex.quote(str(word)) for word in words)}" for words in commands]


def show_next(options: Options, folder: Path, exported: Path, rows: Sequence[Example]) -> None:
    """Print `next_commands`, each in a line of its own, however long."""
    console.console.print(Text("next", style="bold"))
    for command in next_commands(options, folder, exported, rows):
        console.console.print(f"  {command}", soft_wrap=True)


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
