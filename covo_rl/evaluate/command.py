"""What `covo-rl eval` does, without the command line: read, check, answer, judge, report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from covo_rl.config import PromptConfig, RewardConfig, RolloutConfig
from covo_rl.evaluate import report as reports
from covo_rl.evaluate.engine import audio_seconds
from covo_rl.evaluate.inputs import Inputs, read_inputs
from covo_rl.evaluate.problems import EvalInputError, named
from covo_rl.evaluate.progress import EvalProgress
from covo_rl.evaluate.records import Record
from covo_rl.evaluate.runner import Ranks, open_folder, run_model, run_predictions
from covo_rl.evaluate.sets import EvalSet, PromptStyle, load_set

PACKAGES = ("covo-rl", "torch", "transformers", "peft", "numpy", "soxr")


@dataclass(frozen=True)
class Request:
    """The options of `covo-rl eval`, as typer hands them over."""

    set_: str | None
    data: Path | None
    audio_dir: Path | None
    model: str | None
    adapter: str | None
    predictions: Path | None
    output: Path | None
    limit: int | None = None
    greedy: bool = True
    num_generations: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_completion_length: int = 1024
    batch_size: int = 32
    seed: int = 0
    dtype: str = "auto"
    device: str | None = None
    listen: bool = False
    prompt: str = "covo"
    instruction: str | None = None
    choice_style: str | None = None
    rewards: str | None = None
    plots: bool = True
    overwrite: bool = False
    trust_remote_code: bool = False
    allow_outside_audio: bool = False

    def prompt_config(self) -> PromptConfig:
        """The wording that the adapter or checkpoint was trained with where its folder has a prompt.yaml, else ours;
        flags win."""
        config = trained_wording(self.adapter, self.model) or PromptConfig()
        given = {"instruction": self.instruction, "choice_style": self.choice_style and str(self.choice_style)}
        return replace(config, **{name: value for name, value in given.items() if value is not None})

    def rollout_config(self) -> RolloutConfig:
        return RolloutConfig(
            num_generations=self.num_generations, max_completion_length=self.max_completion_length,
            temperature=self.temperature, top_p=self.top_p,
        )  # fmt: skip

    def reward_config(self) -> RewardConfig | None:
        if self.rewards == "none":
            return None
        return RewardConfig() if self.rewards is None else RewardConfig(rewards=self.rewards)

    def conditions(self) -> tuple[str, ...]:
        return ("real", "silent", "swapped", "none") if self.listen else ("real",)


def trained_wording(*folders: str | None) -> PromptConfig | None:
    """prompt.yaml of the first of these folders that has one."""
    import yaml

    from covo_rl.resolve import resolve_model

    for folder in folders:
        path = Path(resolve_model(folder)) / "prompt.yaml" if folder else None
        if path is not None and path.is_file():
            return PromptConfig(**yaml.safe_load(path.read_text(encoding="utf-8")))
    return None


def check_request(request: Request) -> None:
    """Raise EvalInputError naming every option that is missing or has no meaning beside another."""
    problems = []
    if request.set_ is None:
        problems.append("--set is missing: mmau-test-mini, mmau-test, mmar, mmsu, builtin, or a manifest file")
    if request.output is None:
        problems.append("--output is missing: the folder of the report")
    if (request.model is None) == (request.predictions is None):
        problems.append("give one of --model (answer with it) and --predictions (score a file)")
    if request.predictions is not None:
        for name, value in (("--adapter", request.adapter), ("--listen", request.listen)):
            if value:
                problems.append(f"{name} needs a --model; a predictions file is scored as it is")
    if request.greedy and request.num_generations > 1:
        problems.append(f"--num-generations {request.num_generations}: greedy replies are equal; add --sample")
    if (config := request.reward_config()) is not None:
        from covo_rl import rewards

        try:
            rewards.components(config.rewards)
        except rewards.RewardError as error:
            problems.append(f"--rewards: {error}")
    if problems:
        raise EvalInputError(problems)


def style_of(eval_set: EvalSet, name: str) -> PromptStyle | None:
    """The set's published wording, or None for ours."""
    if name == "covo":
        return None
    if name not in eval_set.prompts:
        raise EvalInputError(
            [f"--prompt {name}: {eval_set.name} has covo, {', '.join(eval_set.prompts) or '(no other)'}"]
        )
    return eval_set.prompts[name]


def run_evaluation(request: Request) -> dict[str, Any] | None:
    """One evaluation from options to report; the report on rank 0, None on others.

    Raises:
        EvalInputError: everything wrong with options, data, clips and predictions, before a model is loaded.
    """
    check_request(request)
    assert request.set_ is not None and request.output is not None
    eval_set = load_set(request.set_)
    style = style_of(eval_set, request.prompt)
    inputs = read_inputs(
        eval_set, request.data, request.audio_dir, predictions=request.predictions, limit=request.limit,
        allow_outside=request.allow_outside_audio,
    )  # fmt: skip
    if request.model is None:
        settings = {**inputs.meta, "set": eval_set.name, "packages": versions(model=False)}
        open_folder(request.output, {"predictions": True, "set": eval_set.name}, overwrite=request.overwrite)
        by_audio = {"real": run_predictions(inputs, request.output, reward_config=request.reward_config())}
        return finish(request, inputs, by_audio, settings)
    return _run_model(request, inputs, style)


def _run_model(request: Request, inputs: Inputs, style: PromptStyle | None) -> dict[str, Any] | None:
    from covo_rl.evaluate.policies import load_answerer, process_ranks, weights_sha256
    from covo_rl.resolve import resolve_model

    assert request.model is not None and request.output is not None
    ranks = process_ranks()
    settings = {
        **inputs.meta,
        "model": request.model,
        "model_sha256": weights_sha256(resolve_model(request.model)),
        "adapter": request.adapter,
        "adapter_sha256": weights_sha256(request.adapter) if request.adapter else None,
        "dtype": str(request.dtype),
        "prompt": {"name": request.prompt, **(asdict(style) if style else asdict(request.prompt_config()))},
        "decoding": {
            "greedy": request.greedy, "num_generations": request.num_generations, "seed": request.seed,
            "temperature": None if request.greedy else request.temperature, "top_p": request.top_p,
            "max_completion_length": request.max_completion_length, "batch_size": request.batch_size,
        },
        "rewards": request.rewards or RewardConfig().rewards,
        "packages": versions(model=True),
    }  # fmt: skip
    if ranks.rank == 0:
        open_folder(request.output, settings, overwrite=request.overwrite)
    ranks.wait()
    try:
        answerer = load_answerer(
            request.model, request.adapter, dtype=str(request.dtype), prompt_config=request.prompt_config(),
            rollout_config=request.rollout_config(), style=style, device=request.device,
            trust_remote_code=request.trust_remote_code,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise EvalInputError([f"--model {request.model}, --adapter {request.adapter}: {error}"]) from error
    check_lengths(inputs, answerer)
    by_audio = answer_all(request, inputs, answerer, answerer.clips, ranks, conditions=request.conditions())
    return finish(request, inputs, by_audio, settings) if ranks.rank == 0 else None


def check_lengths(inputs: Inputs, answerer: Any) -> None:
    """Raise EvalInputError naming the rows whose audio is longer than the model takes."""
    longest = getattr(answerer, "max_clip_seconds", None)
    if longest is None:
        return
    over = [e.id for e in inputs.examples if any(audio_seconds((c,), answerer.clips) > longest for c in e.clips)]
    if over:
        raise EvalInputError([f"audio longer than the {longest:g} s this model takes in {named(over)}"])


def answer_all(
    request: Request, inputs: Inputs, answerer: Any, clips: Any, ranks: Ranks, *, conditions: tuple[str, ...]
) -> dict[str, list[Record]]:
    """Every audio condition, each resumable, with a progress bar on rank 0."""
    assert request.output is not None
    by_audio = {}
    for audio in conditions:
        with EvalProgress(f"{inputs.eval_set.name}, {audio}", active=ranks.rank == 0) as progress:
            records = run_model(
                inputs, answerer, request.output, clips=clips, reward_config=request.reward_config(), audio=audio,
                greedy=request.greedy, num_generations=request.num_generations, seed=request.seed,
                batch_size=request.batch_size, ranks=ranks, progress=progress,
            )  # fmt: skip
        by_audio[audio] = records or []
    return by_audio


def versions(*, model: bool) -> dict[str, str | None]:
    """Versions of what a number depends on; a predictions file depends on this package alone."""
    found: dict[str, str | None] = {}
    for name in PACKAGES if model else PACKAGES[:1]:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def finish(
    request: Request, inputs: Inputs, by_audio: Mapping[str, list[Record]], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Write report.json, report.md, the plots and the submission; print the tables."""
    import typer

    folder = request.output
    assert folder is not None
    report = reports.build_report(inputs.eval_set, by_audio, settings)
    reports.write_json(folder / "report.json", report)
    text = reports.markdown(report)
    (folder / "report.md").write_text(text + "\n", encoding="utf-8", errors="replace")
    typer.echo(text)
    if inputs.eval_set.submission:
        from covo_rl.evaluate.predictions import read_rows

        path = folder / "submission.json"
        reports.write_json(path, reports.submission(by_audio["real"], read_rows(inputs.data)))
        typer.echo(f"to submit: {path}")
    if request.plots:
        from covo_rl.evaluate.plots import PlotsMissing, draw

        try:
            draw(report, folder)
        except PlotsMissing as error:
            typer.echo(str(error), err=True)
    typer.echo(f"report: {folder / 'report.json'}")
    for warning in inputs.warnings:
        typer.echo(f"note: {warning}", err=True)
    return report
