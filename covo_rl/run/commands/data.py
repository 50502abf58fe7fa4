"""`covo-rl data`: check, profile and convert question sets; build and look at packed rows of pre-training; simulate
full-duplex streams.

covo-rl data check train.json --audio-dir audio --max-seconds 30 --against mmau-test-mini.json --against-audio-dir mmau
covo-rl data profile train.json --audio-dir audio --model builtin:tiny --output runs/profile
covo-rl data convert train_qa.jsonl train.json --to mmau
covo-rl data build --config recipes/configs/pretrain_tiny.yaml --rows 20 --output runs/rows
covo-rl data inspect runs/rows --row 3 --html row.html
covo-rl data simulate-duplex --dialogues rows.jsonl --output data/duplex --seed 0
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.table import Column, Table

from covo_rl import data
from covo_rl.config import EngineConfig, PromptConfig
from covo_rl.data import DataError, Overlap, load_examples
from covo_rl.data.check import facts_by_row
from covo_rl.data.load import audio_root
from covo_rl.data.read import data_notes, some
from covo_rl.data.terminal import say
from covo_rl.evaluate.engine import with_engine_options
from covo_rl.interop.rows import TRAINERS, trainer_rows
from covo_rl.prompt import CONTROL
from covo_rl.records.console import console, summary_table
from covo_rl.types import Example, user_errors, visible

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Check, profile and convert question sets: CSV, JSON, JSONL, parquet, audio and datasets folders, the hub. "
    "Build and look at packed rows of pre-training. Simulate full-duplex streams.",
)

AudioDir = Annotated[Path | None, typer.Option(help="folder that audio paths start from; default: that of the file")]
Outside = Annotated[bool, typer.Option("--allow-outside-audio", help="let audio paths leave the audio folder")]
_FORMATS = f"auto, {', '.join(data.SCHEMAS)}"
_COLUMNS = "names that the rows use: question=prompt,answer=label,audio=wav,choices=options"
Columns = Annotated[str | None, typer.Option(help=_COLUMNS)]
_TRAINERS = "for a trainer's rows"
_FILE = "questions: CSV, TSV, JSON, JSONL, parquet, a folder, hf:NAME:SPLIT"


@app.command("check")
def check_command(
    file: Annotated[str, typer.Argument(help=_FILE)],
    audio_dir: AudioDir = None,
    columns: Columns = None,
    against: Annotated[str | None, typer.Option(help="held-out questions that FILE must not give away")] = None,
    against_audio_dir: Annotated[Path | None, typer.Option(help="audio folder of --against")] = None,
    max_seconds: Annotated[float | None, typer.Option(min=0.01, help="longest clip that the model takes")] = None,
    near: Annotated[bool, typer.Option("--near", help="also find lossy copies of held-out recordings")] = False,
    format: Annotated[str, typer.Option(help=f"field names of FILE: {_FORMATS}")] = "auto",
    against_columns: Annotated[
        str | None, typer.Option(help="--columns of --against; default: those of FILE; auto: told by their fields")
    ] = None,
    against_format: Annotated[str, typer.Option(help=f"field names of --against: {_FORMATS}")] = "auto",
    allow_outside_audio: Outside = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")] = False,
    show: Annotated[int, typer.Option(min=1, help="rows per table")] = 30,
) -> None:
    """Missing, broken and over-long clips, duplicates, bad answers, overlap with held-out rows. Exit code 1 if any."""
    examples, part, lines = _checked(file, audio_dir, columns, format, allow_outside_audio, max_seconds)
    report, overlaps, notes = {"data": part}, [], {"data": lines}
    if against is not None:
        folder = against_audio_dir or audio_dir
        names = against_columns or columns
        held_out, report["against"], notes["against"] = _checked(
            against, folder, names, against_format, allow_outside_audio, None
        )
        overlaps = data.overlap(examples, held_out, near=near)
    ok = not any(part["problems"] or part["duplicates"] for part in report.values())
    ok = ok and not any(item.serious for item in overlaps)
    if as_json:
        items = [vars(item) | {"serious": item.serious} for item in overlaps]
        shared = {"overlap": items} if against is not None else {}
        say(json.dumps(report | shared | {"notes": notes, "ok": ok}, indent=1))
    else:
        _print(report, overlaps, show)
        for name, lines in notes.items():
            for line in lines:
                console.print(f"note: {name}: {line}")
        console.print("no problems" if ok else "problems found", style="green" if ok else "red")
    raise typer.Exit(0 if ok else 1)


@app.command("convert")
def convert_command(
    source: Annotated[str, typer.Argument(metavar="IN", help="questions in any known layout")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help=".json, .jsonl or .parquet")],
    to: Annotated[
        str, typer.Option("--to", help=f"rows to write: {', '.join(data.SCHEMAS)}; of a trainer: {', '.join(TRAINERS)}")
    ],
    from_: Annotated[str, typer.Option("--from", help=f"field names to read: {_FORMATS}")] = "auto",
    audio_dir: AudioDir = None,
    columns: Columns = None,
    allow_outside_audio: Outside = False,
    system_prompt: Annotated[str | None, typer.Option(help=f"{_TRAINERS}: as in training")] = None,
    instruction: Annotated[str | None, typer.Option(help=f"{_TRAINERS}: as in training")] = None,
    choice_style: Annotated[str | None, typer.Option(help=f"{_TRAINERS}: as in training")] = None,
) -> None:
    """Write a question set with the field names of another, or as rows of verl, ms-swift or NeMo RL.

    Audio stays where it is, further columns are kept.
    """
    folder = audio_root(source, audio_dir)
    texts = {"system_prompt": system_prompt, "instruction": instruction, "choice_style": choice_style}
    texts = {name: text for name, text in texts.items() if text is not None}
    if texts and to not in TRAINERS:
        flags = ", ".join("--" + name.replace("_", "-") for name in texts)
        raise _stop(f"--to {to} writes no prompts: leave out {flags}")
    if target.exists() and Path(source).exists() and target.samefile(source):
        raise _stop(f"{visible(target)} is the file that is read: give another OUT")
    try:
        with data_notes() as notes:
            examples = load_examples(
                source, folder, columns=columns, format=from_, allow_outside=allow_outside_audio, strict=False
            )
        if to in TRAINERS:
            rows = trainer_rows(examples, to, folder, PromptConfig(**cast(Any, texts)))
        else:
            rows = data.to_rows(examples, to, folder)
        data.write(rows, target)
    except ValueError as error:  # DataError is one
        raise _stop(str(error)) from error
    for note in notes:
        say(f"note: {note}")
    if to in TRAINERS and (lost := sum(example.answer is None for example in examples)):
        say(f"note: {lost} rows have no answer: accuracy cannot grade them")
    paths = "are absolute" if to in TRAINERS else f"start from {folder}"
    say(f"{len(examples)} rows written to {target} as {to}; audio paths {paths}")


@app.command("profile")
@with_engine_options
def profile_command(
    file: Annotated[Path, typer.Argument(help="training questions")],
    output: Annotated[Path, typer.Option(help="folder of profile.jsonl, profile.json and the filtered set")],
    audio_dir: AudioDir = None,
    columns: Columns = None,
    model: Annotated[str, typer.Option(help="checkpoint folder, hub name, or builtin:tiny")] = "builtin:tiny",
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter folder on top of --model")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="sampled replies per row, with audio and with silence")] = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first N rows")] = None,
    temperature: Annotated[float, typer.Option(min=1e-6, help="of sampling")] = 1.0,
    max_completion_length: Annotated[int, typer.Option(min=1, help="limit in tokens")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="rows decoded at once")] = 32,
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
    min_rate: Annotated[float, typer.Option(min=-1, max=2, help="keep rows solved more often than this")] = 0.0,
    max_rate: Annotated[float, typer.Option(min=-1, max=2, help="keep rows solved less often than this")] = 1.0,
    max_silent_rate: Annotated[
        float, typer.Option(min=-1, max=2, help="keep rows solved from silence at most this often")
    ] = 0.5,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace another profile in --output")] = False,
    allow_outside_audio: Outside = False,
    engine: EngineConfig = EngineConfig(),
) -> None:
    """Answer every row n times with audio and with silence; write the rows that teach this policy something."""
    from covo_rl.evaluate.profile import Rule, run_profile
    from covo_rl.evaluate.sets import EvalInputError

    try:
        result = run_profile(
            file, audio_dir, output, model=model, adapter=adapter, rule=Rule(min_rate, max_rate, max_silent_rate),
            allow_outside=allow_outside_audio, num_generations=n, limit=limit, temperature=temperature,
            max_completion_length=max_completion_length, batch_size=batch_size, seed=seed, overwrite=overwrite,
            columns=columns, engine=engine,
        )  # fmt: skip
    except EvalInputError as error:
        raise _stop(str(error)) from error
    if result is not None:
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(result["verdicts"].items()))
        say(f"{result['kept']} of {result['n']} rows kept in {output / result['filtered']} ({verdicts})")


@app.command("build")
def build_command(
    config: Annotated[Path, typer.Option("--config", help="YAML of covo-rl pretrain")],
    output: Annotated[Path, typer.Option(help="a new folder for build.json and rows-*.jsonl")],
    rows: Annotated[int, typer.Option(min=1, help="packed rows to write, from the first of the training on")] = 100,
    model: Annotated[str | None, typer.Option(help="whose ids are written; default: the model of the YAML")] = None,
    stage: Annotated[int | None, typer.Option(help="of the YAML's: 1 or 2")] = None,
) -> None:
    """Write the packed rows that a pre-training would take, and what was drawn and skipped. No weights are read."""
    from covo_rl.supervised.pretrain.built import build_rows
    from covo_rl.supervised.pretrain.config import read_pretrain
    from covo_rl.supervised.pretrain.inspection import count_tables

    with user_errors("covo-rl data build"):
        options = read_pretrain(config, {"model": model, "stage": stage})
        for table in count_tables(build_rows(options, output, rows)):
            console.print(table)
    say(f"{rows} packed rows in {output}; covo-rl data inspect {output} shows one")


@app.command("inspect")
def inspect_command(
    source: Annotated[
        Path, typer.Argument(metavar="CONFIG_OR_BUILT", help="YAML of covo-rl pretrain, or a built folder")
    ],
    row: Annotated[int, typer.Option(min=0, help="which packed row, from 0")] = 0,
    html: Annotated[Path | None, typer.Option(help="also write it as one page")] = None,
    model: Annotated[
        str | None, typer.Option(help="whose ids a YAML's rows get; default: the model of the options")
    ] = None,
    stage: Annotated[int | None, typer.Option(help="of the YAML's: 1 or 2")] = None,
    runs: Annotated[int, typer.Option(min=1, help="runs of one modality that are shown of each document")] = 40,
) -> None:
    """Show a packed row: what is audio, text and code, fragment by fragment, what is taught, and whose voice it is.

    Exit code 1 where a document is not as its task writes it.
    """
    from covo_rl.supervised.pretrain.inspection import show_row, terminal_view, write_page

    with user_errors("covo-rl data inspect"):
        shown = show_row(str(source), row, model, stage)
        for part in terminal_view(shown, runs):
            console.print(part)
        if html is not None:
            write_page(shown, html)
            say(f"page: {html}")
    if any(document.problems for document in shown.documents):
        raise typer.Exit(1)


@app.command("simulate-duplex")
def simulate_duplex_command(
    dialogues: Annotated[str, typer.Option(help="rows of dialogues: turns of user and assistant, all recorded")],
    output: Annotated[Path, typer.Option(help="a new folder for sft/, rl/, test/ and statistics.json")],
    seed: Annotated[int, typer.Option(min=0, help="of all draws, each of which depends on it and the row's id")] = 0,
    audio_dir: AudioDir = None,
    preset: Annotated[list[str] | None, typer.Option(help="sft, rl or test; default: all; may be repeated")] = None,
    test_share: Annotated[float, typer.Option(help="of dialogues for test/, whose users are in no other part")] = 0.2,
    back_channels: Annotated[
        str | None, typer.Option(help="rows of speech, 0.2 to 0.6 s; default: synthesised, by language")
    ] = None,
    echo: Annotated[
        bool, typer.Option("--echo", help="the user's microphone hears the model, 25 to 40 dB down")
    ] = False,
) -> None:
    """Make two-channel streams of half-duplex dialogues: pauses, back-channels, barge-ins, noise, side talk.

    A stream is a folder: stereo.wav (left the user, right the model) and events.json.
    """
    from covo_rl.duplex.presets import PRESETS
    from covo_rl.duplex.simulated_set import STATISTICS, write_simulated_set
    from covo_rl.duplex.sources import Surroundings
    from covo_rl.run.duplex_sources import read_back_channels, source_dialogues

    with user_errors("covo-rl data simulate-duplex"):
        sources = source_dialogues(dialogues, audio_dir)
        sounds = read_back_channels(back_channels) if back_channels else ()
        written = write_simulated_set(
            output, sources, seed, presets=preset or list(PRESETS), test_share=test_share,
            around=Surroundings(sources, sounds, echo), progress=say,
        )  # fmt: skip
    for name in PRESETS:
        missed = {what: count for what, count in written.get(name, {}).get("missed", {}).items() if count}
        if missed:
            places = ", ".join(f"{what} {count}" for what, count in missed.items())
            say(f"note: {name}: no place in the dialogue for {places}")
    say(f"{output}; what it holds is in {output / STATISTICS}")


def _stop(message: str) -> typer.Exit:
    say(message, err=True)
    return typer.Exit(2)


def _checked(
    file: str, folder: Path | None, columns: str | None, format: str, outside: bool, longest: float | None
) -> tuple[list[Example], dict[str, Any], list[str]]:
    """The rows of a file that can be read; counts, lengths and problems, ready for JSON; notes."""
    problems, notes = [], []
    try:
        with data_notes() as notes:
            examples = load_examples(file, folder, columns=columns, format=format, allow_outside=outside, strict=False)
    except DataError as error:
        examples, problems = list(error.examples), list(error.problems)
    except ValueError as error:
        raise _stop(str(error)) from error
    decoded = [facts for clips in facts_by_row(examples) for facts in clips if facts.error is None]
    lengths = {facts.fingerprint: facts.seconds for facts in decoded}
    counts = {
        "file": file,
        "rows": len(examples),
        "rows_without_answer": sum(example.answer is None for example in examples),
        "rows_without_audio": sum(not example.clips for example in examples),
        "rows_with_equal_choices": sum(len(set(example.choices)) < len(example.choices) for example in examples),
        "clips": len(decoded),
        "different_clips": len(lengths),
        "hours": round(sum(lengths.values()) / 3600, 4),
        "shortest_seconds": round(min(lengths.values(), default=0.0), 3),
        "longest_seconds": round(max(lengths.values(), default=0.0), 3),
        "problems": [vars(problem) for problem in [*problems, *data.row_problems(examples, max_clip_seconds=longest)]],
        "duplicates": [vars(problem) for problem in data.duplicate_rows(examples)],
    }
    return examples, counts, [*notes, *_notes(examples)]


def _notes(examples: list[Example]) -> list[str]:
    """What keeps no row from being used: see `clip_notes`, and the rows that write control tokens of chat models."""
    texts = ((example.id, "\n".join(example.texts)) for example in examples)
    written = {row: match[0] for row, text in texts if (match := CONTROL.search(text))}
    which, tokens = some([visible(row) for row in written]), some(sorted(set(written.values())))
    note = f"{len(written)} rows ({which}) write control tokens ({tokens}); to a model they are text"
    return [*data.clip_notes(examples), *[note] * bool(written)]


def _print(report: dict[str, dict[str, Any]], overlaps: list[Overlap], show: int) -> None:
    for name, part in report.items():
        rows = [(k.replace("_", " "), v) for k, v in part.items() if not isinstance(v, list)]
        console.print(summary_table(name, rows))
        problems = [(problem["row_id"], problem["what"]) for problem in [*part["problems"], *part["duplicates"]]]
        _print_problems(part["file"], problems, show)
    _print_problems("overlap", [(item.held_out_id, str(item)) for item in overlaps if item.serious], show)
    for kind, meaning in (("near", "almost the same sound as"), ("question", "the same text, not the sound, of")):
        if items := [item for item in overlaps if item.kind == kind]:
            note = f"note: {len(items)} held-out rows have {meaning} a training row, e.g. {items[0]}"
            console.print(note)


def _print_problems(title: str, problems: list[tuple[str, str]], show: int) -> None:
    if not problems:
        return
    columns = (Column(name, overflow="fold") for name in ("row", "problem"))
    table = Table(*columns, title=f"{title}: {len(problems)} problem{'s' * (len(problems) != 1)}", title_justify="left")
    for row, what in problems[:show]:
        table.add_row(visible(row), visible(what))
    console.print(table)
    if len(problems) > show:
        console.print(f"... and {len(problems) - show} more; --json lists all")
