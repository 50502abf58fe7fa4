"""`covo-rl eval`: one command for a model or a predictions file, and `covo-rl eval compare A B`.

covo-rl eval --set mmau-test-mini --data mmau-test-mini.json --audio-dir . --model PATH --output runs/eval
covo-rl eval --set mmar --data MMAR-meta.jsonl --predictions replies.jsonl --output runs/eval
covo-rl eval compare runs/before runs/after
covo-rl eval --set duplex --model PATH --output runs/turns
covo-rl eval --set own --data spoken.jsonl --model PATH --through duplex --output runs/live
covo-rl eval --set uro-bench --subset GaokaoEval --data DIR --predictions FILE --judge SPEC --output runs/gaokao
covo-rl eval --suite covo-audio --runs runs             published tables, with ours beside them
covo-rl eval --list                     which sets there are, and what each needs; with --set NAME its sub-sets
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from covo_rl.data.files import write_json
from covo_rl.data.terminal import say
from covo_rl.evaluate.engine import with_engine_options
from covo_rl.evaluate.evaluation import run_request
from covo_rl.evaluate.listing import sets_markdown
from covo_rl.evaluate.report import compare_runs, comparison_markdown
from covo_rl.evaluate.runner import Request
from covo_rl.evaluate.sets import EvalInputError
from covo_rl.evaluate.speech.report import compare_speech, is_speech_report, speech_comparison_markdown
from covo_rl.evaluate.speech.suite import suite_markdown
from covo_rl.train.shutdown import exit_after
from covo_rl.types import user_errors

app = typer.Typer(
    add_completion=False, invoke_without_command=True, no_args_is_help=True, rich_markup_mode=None,
    pretty_exceptions_enable=False,
)  # fmt: skip


def evaluate_command(
    context: typer.Context, list_sets: bool, suite: str | None, runs: list[Path] | None, **options: Any
) -> None:
    """Score a model, or replies from a file, by the official rule and strictly; or when it speaks (--set duplex)."""
    if context.invoked_subcommand is None:
        with user_errors("covo-rl eval"):
            if list_sets:
                say(sets_markdown(options["set_"]))
            elif suite is not None:
                say(suite_markdown(suite, runs or []))
            elif runs:
                raise EvalInputError(["--runs: these stand in the tables of a --suite"])
            else:
                run_request(Request(**options))


_context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
_list = inspect.Parameter(
    "list_sets", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=False,
    annotation=Annotated[bool, typer.Option("--list", help="say which sets there are, or the sub-sets of --set")],
)  # fmt: skip
_suite = inspect.Parameter(
    "suite", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None,
    annotation=Annotated[str | None, typer.Option(help="print published tables with --runs beside them: covo-audio")],
)  # fmt: skip
_runs = inspect.Parameter(
    "runs", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None,
    annotation=Annotated[list[Path] | None, typer.Option(help="finished evaluations, or a folder of them; several")],
)  # fmt: skip
_options = inspect.signature(Request, eval_str=True).parameters.values()
evaluate_command.__signature__ = inspect.Signature([_context, _list, _suite, _runs, *_options])  # pyright: ignore[reportFunctionMemberAccess]
app.callback()(with_engine_options(evaluate_command))


@app.command("compare")
def compare_command(
    a: Annotated[Path, typer.Argument(help="--output of one evaluation")],
    b: Annotated[Path, typer.Argument(help="--output of the other, over the same rows")],
    output: Annotated[Path | None, typer.Option(help="also write the comparison as JSON")] = None,
) -> None:
    """B minus A over the same rows: paired bootstrap interval and exact McNemar test."""
    with user_errors("covo-rl eval compare"):
        if is_speech_report(a) or is_speech_report(b):
            result = compare_speech(a, b)
            say(speech_comparison_markdown(result))
        else:
            result = compare_runs(a, b)
            say(comparison_markdown(result))
        if output is not None:
            write_json(output, result)


if __name__ == "__main__":
    exit_after(app)  # accelerate launch -m covo_rl.evaluate.cli
