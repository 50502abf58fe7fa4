"""`covo-rl eval`: one command for a model or a predictions file, and `covo-rl eval compare A B`.

covo-rl eval --set mmau-test-mini --data mmau-test-mini.json --audio-dir . --model PATH --output runs/eval
covo-rl eval --set mmar --data MMAR-meta.jsonl --predictions replies.jsonl --output runs/eval
covo-rl eval compare runs/before runs/after
"""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from covo_rl.config import RewardConfig
from covo_rl.data.files import file_sha256, write_json
from covo_rl.data.terminal import say
from covo_rl.evaluate.answer import CONDITIONS
from covo_rl.evaluate.folder import check_folder, claim_folder, joined_ranks, owned
from covo_rl.evaluate.inputs import Inputs, read_inputs
from covo_rl.evaluate.report import compare_runs, comparison_markdown, write_report
from covo_rl.evaluate.runner import Request, answer_rows, run_predictions
from covo_rl.evaluate.sets import EvalInputError, PromptStyle, load_set
from covo_rl.records.folder import package_versions
from covo_rl.train.shutdown import exit_after
from covo_rl.types import user_errors

app = typer.Typer(
    add_completion=False, invoke_without_command=True, no_args_is_help=True, rich_markup_mode=None,
    pretty_exceptions_enable=False,
)  # fmt: skip
#: what a number depends on; a predictions file depends on the first alone
PACKAGES = ("covo-rl", "torch", "transformers", "peft", "numpy", "soxr")


def evaluate_command(context: typer.Context, **options: Any) -> None:
    """Score a model, or replies from a file, by the official rule and strictly."""
    if context.invoked_subcommand is None:
        with user_errors("covo-rl eval"):
            _evaluate(Request(**options))


_context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
_options = inspect.signature(Request, eval_str=True).parameters.values()
evaluate_command.__signature__ = inspect.Signature([_context, *_options])  # pyright: ignore[reportFunctionMemberAccess]
app.callback()(evaluate_command)


@app.command("compare")
def compare_command(
    a: Annotated[Path, typer.Argument(help="--output of one evaluation")],
    b: Annotated[Path, typer.Argument(help="--output of the other, over the same rows")],
    output: Annotated[Path | None, typer.Option(help="also write the comparison as JSON")] = None,
) -> None:
    """B minus A over the same rows: paired bootstrap interval and exact McNemar test."""
    with user_errors("covo-rl eval compare"):
        result = compare_runs(a, b)
        say(comparison_markdown(result))
        if output is not None:
            write_json(output, result)


def _evaluate(request: Request) -> None:
    """One evaluation from options to report, which rank 0 writes.

    Raises:
        EvalInputError: everything wrong with options, data, clips and predictions, before a model is loaded.
    """
    if problems := request.problems():
        raise EvalInputError(problems)
    assert request.set_ is not None and request.output is not None
    eval_set = load_set(request.set_)
    style = eval_set.style(request.prompt)
    problems = request.model_problems()
    try:
        inputs = read_inputs(
            eval_set, request.data, request.audio_dir, predictions=request.predictions, limit=request.limit,
            allow_outside=request.allow_outside_audio, columns=request.columns,
        )  # fmt: skip
    except EvalInputError as error:
        raise EvalInputError([*error.problems, *problems]) from error
    if problems:
        raise EvalInputError(problems)
    settings = _settings(request, inputs, style)
    ranks = joined_ranks()
    with owned(request.output, ranks):
        if request.model is None:
            check_folder(request.output, settings, ranks, overwrite=request.overwrite)
            claim_folder(request.output, settings, ranks, overwrite=request.overwrite)
            by_audio = (
                {"real": run_predictions(inputs, request.output, request.reward_config())} if ranks.main else None
            )
        else:
            conditions = CONDITIONS if request.listen else ("real",)
            by_audio = answer_rows(request, inputs, settings, conditions, ranks, style=style)
        if by_audio is not None:
            write_report(inputs, by_audio, settings, request.output, plots=request.plots)


def _settings(request: Request, inputs: Inputs, style: PromptStyle | None) -> dict[str, Any]:
    """What the figures depend on: a folder never mixes two."""
    from covo_rl.policy.saved_adapter import read_adapter
    from covo_rl.resolve import resolve_model

    rewards = request.rewards or RewardConfig().rewards
    if request.model is None:
        packages = package_versions(PACKAGES[:1])
        return {**inputs.meta, "set": inputs.eval_set.name, "rewards": rewards, "packages": packages}
    notes = read_adapter(request.adapter, model=resolve_model(request.model)).notes if request.adapter else ()
    return {
        **inputs.meta,
        **({"adapter_notes": notes} if notes else {}),
        "model": request.model,
        "model_sha256": _weights_sha256(resolve_model(request.model)),
        "adapter": request.adapter,
        "adapter_sha256": _weights_sha256(request.adapter) if request.adapter else None,
        "dtype": str(request.dtype),
        **({"load_in_4bit": True} if request.load_in_4bit else {}),
        "prompt": {"name": request.prompt, **asdict(style or request.prompt_config())},
        "decoding": {
            "greedy": request.greedy, "num_generations": request.num_generations, "seed": request.seed,
            "temperature": None if request.greedy else request.temperature, "top_p": request.top_p,
            "max_completion_length": request.max_completion_length, "batch_size": request.batch_size,
        },
        "rewards": rewards,
        "packages": package_versions([*PACKAGES, *(["bitsandbytes"] if request.load_in_4bit else [])]),
    }  # fmt: skip


def _weights_sha256(path: str) -> str | None:
    """One hash over the weight files of a local folder; None for a hub name, whose revision is not known here."""
    files = sorted(Path(path).glob("*.safetensors")) or sorted(Path(path).glob("*.bin"))
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest() if files else None


if __name__ == "__main__":
    exit_after(app)  # accelerate launch -m covo_rl.evaluate.cli
