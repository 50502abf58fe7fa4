"""`covo-rl eval`: one command for a model or a predictions file, and `covo-rl eval compare A B`.

covo-rl eval --set mmau-test-mini --data mmau-test-mini.json --audio-dir . --model PATH --output runs/eval
covo-rl eval --set mmar --data MMAR-meta.jsonl --predictions replies.jsonl --output runs/eval
covo-rl eval compare runs/before runs/after
"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from covo_rl.evaluate.problems import EvalInputError
from covo_rl.train.shutdown import exit_after

app = typer.Typer(
    add_completion=False,
    invoke_without_command=True,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class ChoiceStyle(StrEnum):
    letters = "letters"
    lines = "lines"
    inline = "inline"


@app.callback()
def evaluate_command(
    context: typer.Context,
    set_: Annotated[
        str | None, typer.Option("--set", help="mmau-test-mini, mmau-test, mmar, mmsu, builtin, or a manifest file")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="questions with answers: JSON, JSONL, parquet")] = None,
    audio_dir: Annotated[Path | None, typer.Option(help="folder that audio paths start from")] = None,
    model: Annotated[str | None, typer.Option(help="checkpoint folder, hub name, or builtin:tiny")] = None,
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter folder on top of --model")] = None,
    predictions: Annotated[Path | None, typer.Option(help="score the replies in this JSON or JSONL; no model")] = None,
    output: Annotated[Path | None, typer.Option(help="folder of the report; an interrupted run goes on there")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first N rows")] = None,
    greedy: Annotated[bool, typer.Option("--greedy/--sample", help="most likely token, or sampled")] = True,
    num_generations: Annotated[int, typer.Option(min=1, help="replies per row with --sample")] = 1,
    temperature: Annotated[float, typer.Option(min=1e-6, help="with --sample")] = 1.0,
    top_p: Annotated[float, typer.Option(help="nucleus with --sample; 1 is off")] = 1.0,
    max_completion_length: Annotated[int, typer.Option(min=1, help="limit in tokens")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="rows decoded at once")] = 32,
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="precision of the weights")] = Dtype.auto,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; found by itself")] = None,
    listen: Annotated[bool, typer.Option("--listen", help="also with silent, swapped and no audio")] = False,
    prompt: Annotated[
        str, typer.Option(help="wording: covo (ours), or one that the set defines, e.g. official")
    ] = "covo",
    instruction: Annotated[str | None, typer.Option(help="last line; default: the checkpoint's, else ours")] = None,
    choice_style: Annotated[ChoiceStyle | None, typer.Option(help="how options are listed; default: as above")] = None,
    rewards: Annotated[str | None, typer.Option(help="reward components to report; none: none")] = None,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="PNG plots (needs matplotlib)")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="start anew in a used --output")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="run the checkpoint's code")] = False,
    allow_outside_audio: Annotated[
        bool, typer.Option("--allow-outside-audio", help="let audio paths leave --audio-dir")
    ] = False,
) -> None:
    """Score a model, or replies from a file, by the official rule and strictly."""
    if context.invoked_subcommand is not None:
        return
    from covo_rl.evaluate.command import Request, run_evaluation

    given = dict(locals())
    request = Request(**{name: given[name] for name in Request.__dataclass_fields__})
    _reporting(run_evaluation, request)


@app.command("compare")
def compare_command(
    a: Annotated[Path, typer.Argument(help="--output of one evaluation")],
    b: Annotated[Path, typer.Argument(help="--output of the other, over the same rows")],
    output: Annotated[Path | None, typer.Option(help="also write the comparison as JSON")] = None,
) -> None:
    """B minus A over the same rows: paired bootstrap interval and exact McNemar test."""
    from covo_rl.evaluate.compare import compare, markdown
    from covo_rl.evaluate.report import write_json

    def work() -> None:
        result = compare(a, b)
        typer.echo(markdown(result))
        if output is not None:
            write_json(output, result)

    _reporting(work)


def _reporting(function: Any, *args: Any) -> None:
    """Wrong inputs end with exit code 2 and the list of problems, without a traceback."""
    try:
        function(*args)
    except EvalInputError as error:
        typer.echo(str(error), err=True)
        sys.exit(2)


if __name__ == "__main__":
    exit_after(app)  # accelerate launch -m covo_rl.evaluate.cli
