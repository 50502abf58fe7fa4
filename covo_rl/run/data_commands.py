"""`covo-rl data`: check, profile and convert question sets.

covo-rl data check train.json --audio-dir audio --max-seconds 30 --against mmau-test-mini.json --against-audio-dir mmau
covo-rl data profile train.json --audio-dir audio --model builtin:tiny --output runs/profile
covo-rl data convert train_qa.jsonl train.json --to mmau
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from covo_rl.data import (
    SCHEMAS,
    DataError,
    Overlap,
    Problem,
    duplicate_rows,
    load_examples,
    overlap,
    row_problems,
    to_rows,
    write,
)
from covo_rl.data.check import facts_by_row
from covo_rl.types import Example

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Check, profile and convert question sets: JSON, JSONL, parquet or a datasets folder.",
)

AudioDir = Annotated[Path | None, typer.Option(help="folder that audio paths start from; default: that of the file")]
Outside = Annotated[bool, typer.Option("--allow-outside-audio", help="let audio paths leave the audio folder")]
_FORMATS = f"auto, {', '.join(SCHEMAS)}"


@app.command("check")
def check_command(
    file: Annotated[str, typer.Argument(help="questions: JSON, JSONL, parquet, datasets folder, hf:NAME:SPLIT")],
    audio_dir: AudioDir = None,
    against: Annotated[str | None, typer.Option(help="held-out questions that FILE must not give away")] = None,
    against_audio_dir: Annotated[Path | None, typer.Option(help="audio folder of --against")] = None,
    max_seconds: Annotated[float | None, typer.Option(min=0.01, help="longest clip that the model takes")] = None,
    near: Annotated[bool, typer.Option("--near", help="also find lossy copies of held-out recordings")] = False,
    format: Annotated[str, typer.Option(help=f"field names of FILE: {_FORMATS}")] = "auto",
    against_format: Annotated[str, typer.Option(help=f"field names of --against: {_FORMATS}")] = "auto",
    allow_outside_audio: Outside = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")] = False,
    show: Annotated[int, typer.Option(min=1, help="rows per table")] = 30,
) -> None:
    """Missing, broken and over-long clips, duplicates, bad answers, overlap with held-out rows. Exit code 1 if any."""
    report: dict[str, Any] = {}
    examples = _checked(report, "data", file, audio_dir, format, allow_outside_audio, max_seconds)
    if against is not None:
        folder = against_audio_dir or audio_dir
        held_out = _checked(report, "against", against, folder, against_format, allow_outside_audio, None)
        report["overlap"] = overlap(examples, held_out, near=near)
    found = [item for part in ("data", "against") if part in report for item in _findings(report[part])]
    found += [item for item in report.get("overlap", ()) if item.serious]
    if as_json:
        typer.echo(json.dumps(_plain(report) | {"ok": not found}, ensure_ascii=False, indent=1))
    else:
        _print(report, show, ok=not found)
    raise typer.Exit(1 if found else 0)


@app.command("convert")
def convert_command(
    source: Annotated[str, typer.Argument(metavar="IN", help="questions in any known layout")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help=".json, .jsonl or .parquet")],
    to: Annotated[str, typer.Option("--to", help=f"field names to write: {', '.join(SCHEMAS)}")],
    from_: Annotated[str, typer.Option("--from", help=f"field names to read: {_FORMATS}")] = "auto",
    audio_dir: AudioDir = None,
    allow_outside_audio: Outside = False,
) -> None:
    """Write a question set with the field names of another. Audio stays where it is, further columns are kept."""
    folder = audio_dir if audio_dir is not None else Path(source) if Path(source).is_dir() else Path(source).parent
    try:
        examples = load_examples(source, folder, format=from_, allow_outside=allow_outside_audio, strict=False)
        write(to_rows(examples, to, folder), target)
    except ValueError as error:  # DataError is one
        raise _stop(str(error)) from error
    typer.echo(f"{len(examples)} rows written to {target} as {to}; audio paths start from {folder}")


@app.command("profile")
def profile_command(
    file: Annotated[Path, typer.Argument(help="training questions")],
    output: Annotated[Path, typer.Option(help="folder of profile.jsonl, profile.json and the filtered set")],
    audio_dir: AudioDir = None,
    model: Annotated[str, typer.Option(help="checkpoint folder, hub name, or builtin:tiny")] = "builtin:tiny",
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter folder on top of --model")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="sampled replies per row, with audio and with silence")] = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first N rows")] = None,
    temperature: Annotated[float, typer.Option(min=1e-6, help="of sampling")] = 1.0,
    max_completion_length: Annotated[int, typer.Option(min=1, help="limit in tokens")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="rows decoded at once")] = 32,
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
    min_rate: Annotated[float, typer.Option(help="keep rows solved more often than this")] = 0.0,
    max_rate: Annotated[float, typer.Option(help="keep rows solved less often than this")] = 1.0,
    max_silent_rate: Annotated[float, typer.Option(help="keep rows solved from silence at most this often")] = 0.5,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace another profile in --output")] = False,
    allow_outside_audio: Outside = False,
) -> None:
    """Answer every row n times with audio and with silence; write the rows that teach this policy something."""
    from covo_rl.evaluate.problems import EvalInputError
    from covo_rl.evaluate.profile import Rule, run_profile

    try:
        result = run_profile(
            file, audio_dir, output, model=model, adapter=adapter, rule=Rule(min_rate, max_rate, max_silent_rate),
            allow_outside=allow_outside_audio, num_generations=n, limit=limit, temperature=temperature,
            max_completion_length=max_completion_length, batch_size=batch_size, seed=seed, overwrite=overwrite,
        )  # fmt: skip
    except EvalInputError as error:
        raise _stop(str(error)) from error
    if result is not None:
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(result["verdicts"].items()))
        typer.echo(f"{result['kept']} of {result['n']} rows kept in {output / result['filtered']} ({verdicts})")


def _stop(message: str) -> typer.Exit:
    typer.echo(message, err=True)
    return typer.Exit(2)


def _checked(
    report: dict[str, Any], part: str, file: str, folder: Path | None, format: str, outside: bool, longest: float | None
) -> Sequence[Example]:
    """Load and check one file into `report[part]`; returns the rows that can be read."""
    unreadable: Sequence[Problem] = ()
    try:
        examples: Sequence[Example] = load_examples(file, folder, format=format, allow_outside=outside, strict=False)
    except DataError as error:
        examples, unreadable = error.examples, error.problems
    except ValueError as error:
        raise _stop(str(error)) from error
    report[part] = {
        "file": file,
        **_summary(examples),
        "problems": [*unreadable, *row_problems(examples, max_clip_seconds=longest)],
        "duplicates": duplicate_rows(examples),
    }
    return examples


def _summary(examples: Sequence[Example]) -> dict[str, Any]:
    """Counts and lengths of the rows that can be read."""
    heard = [facts for clips in facts_by_row(examples) for facts in clips if facts.error is None]
    lengths = {facts.fingerprint: facts.seconds for facts in heard}
    return {
        "rows": len(examples),
        "rows_without_answer": sum(example.answer is None for example in examples),
        "rows_without_audio": sum(not example.clips for example in examples),
        "rows_with_equal_choices": sum(len(set(example.choices)) < len(example.choices) for example in examples),
        "clips": len(heard),
        "different_clips": len(lengths),
        "hours": round(sum(lengths.values()) / 3600, 4),
        "shortest_seconds": round(min(lengths.values(), default=0.0), 3),
        "longest_seconds": round(max(lengths.values(), default=0.0), 3),
    }


def _findings(part: dict[str, Any]) -> list[Problem]:
    return [*part["problems"], *part["duplicates"]]


def _plain(report: dict[str, Any]) -> dict[str, Any]:
    """The report for JSON."""
    plain: dict[str, Any] = {}
    for part in ("data", "against"):
        if part in report:
            lists = {k: [vars(p) for p in report[part][k]] for k in ("problems", "duplicates")}
            plain[part] = {**report[part], **lists}
    if "overlap" in report:
        plain["overlap"] = [vars(item) | {"serious": item.serious} for item in report["overlap"]]
    return plain


def _print(report: dict[str, Any], show: int, *, ok: bool) -> None:
    from rich.markup import escape

    from covo_rl.records.console import console, summary_table

    for part in ("data", "against"):
        if part in report:
            rows = [(k.replace("_", " "), escape(str(v))) for k, v in report[part].items() if not isinstance(v, list)]
            console.print(summary_table(part, rows))
            _table(report[part]["file"], _findings(report[part]), show)
    if "overlap" in report:
        found: Sequence[Overlap] = report["overlap"]
        _table("overlap", [Problem(item.held_out_id, str(item)) for item in found if item.serious], show)
        for kind, meaning in (("near", "almost the same sound as"), ("question", "the same text, not the sound, of")):
            rows = [item for item in found if item.kind == kind]
            if rows:
                console.print(
                    f"note: {len(rows)} held-out rows have {meaning} a training row, e.g. {rows[0]}", markup=False
                )
    console.print("[green]no problems[/green]" if ok else "[red]problems found[/red]")


def _table(title: str, problems: Sequence[Problem], show: int) -> None:
    if not problems:
        return
    from rich.markup import escape
    from rich.table import Table

    from covo_rl.records.console import console

    table = Table(title=escape(f"{title}: {len(problems)} problems"), title_justify="left")
    table.add_column("row", overflow="fold")
    table.add_column("problem", overflow="fold")
    for problem in problems[:show]:
        table.add_row(escape(problem.row_id), escape(problem.what))
    console.print(table)
    if len(problems) > show:
        console.print(f"... and {len(problems) - show} more; --json lists all")


if __name__ == "__main__":
    app()
