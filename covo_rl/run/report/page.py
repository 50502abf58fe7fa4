"""One HTML page from a run folder: `covo-rl report RUN`.

Everything a model wrote is escaped: completions are untrusted input.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import typer

from covo_rl.data.files import read_record, whole_lines, write_atomically
from covo_rl.data.terminal import LAYOUT, say
from covo_rl.run.report.curves import curves
from covo_rl.types import visible

app = typer.Typer(add_completion=False, help=__doc__)
TEMPLATE = Path(__file__).with_name("template.html.jinja")


def report_page(folder: str | Path, limit: int = 40) -> str:
    """The HTML text of a run's report: results, curves, the last step's first rollouts, configuration.

    What is missing is left out; what is damaged is left out and named.
    """
    folder = Path(folder)
    notes: list[str] = []
    result, config = (_record(folder / name, notes) for name in ("result.json", "config.yaml"))
    before, after = (value if isinstance(value := result.get(when), dict) else {} for when in ("before", "after"))
    tables: list[tuple[str, Sequence[str], Sequence[Sequence[Any]]]] = []
    if after:
        rows = [(name, before.get(name, "-"), value) for name, value in after.items()]
        tables.append(("held-out", ("", "before", "after"), rows))
    elif result:
        notes.append("the run was not evaluated")
    metrics, damaged = whole_lines(folder / "metrics.jsonl")
    picture = ""
    if metrics:
        try:
            curves(metrics, stream := io.BytesIO())
            picture = base64.b64encode(stream.getvalue()).decode()
        except ImportError as error:
            notes.append(str(error))
    if files := sorted((folder / "rollouts").glob("step_*.jsonl"), key=lambda path: (len(path.name), path.name)):
        columns = ("id", "completion", "answer", "reward_total", "advantage")
        rollouts, more = whole_lines(files[-1])
        rows = [[row.get(name, "-") for name in columns] for row in rollouts[:limit]]
        tables.append(("last rollouts", ("row", "completion", "key", "R_total", "advantage"), rows))
        damaged += more
    tables.append(("configuration", ("option", "value"), list(config.items())))
    if notes := notes + damaged:
        tables.insert(0, ("notes", ("",), [(note,) for note in notes]))
    template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), autoescape=True, finalize=_cell)
    return template.render(name=folder.name, picture=picture, tables=tables)


def _record(path: Path, notes: list[str]) -> dict[str, Any]:
    """A JSON or YAML mapping; empty where there is none, and with a note where it is damaged."""
    try:
        return read_record(path)
    except ValueError as error:
        notes.append(str(error))
        return {}


def _cell(value: Any) -> Any:
    """What stands in the page: text with what does not print escaped, other values as they are."""
    return visible(value, LAYOUT) if type(value) is str else value


@app.command()
def report_command(run: str = typer.Argument(..., help="run folder"), output: str | None = None) -> None:
    """Write RUN/report.html (or OUTPUT): results, curves, last rollouts, configuration."""
    if not (Path(run) / "config.yaml").is_file():
        raise typer.BadParameter(f"{visible(run)} is no run folder: it has no config.yaml")
    path = Path(output) if output else Path(run) / "report.html"
    page = report_page(run)
    try:
        write_atomically(path, lambda file: file.write(page))
    except OSError as error:
        raise typer.BadParameter(f"{error}; give another --output") from error
    say(str(path))
