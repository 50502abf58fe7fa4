"""One HTML page from run folders: `covo-rl report RUN`; two or more are compared: `covo-rl report RUN_A RUN_B`.

    run folders -> payload.py -> JSON, gzip, base64 -> one file with its styles and scripts -> static/main.js draws it

What a model, a row or a run wrote is in the packed payload and in escaped text; scripts put it in by textContent. The
page's policy admits the scripts that this file hashed and no address of the network.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import webbrowser
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast, get_args

import jinja2
import typer
from markupsafe import Markup

from covo_rl.data.files import write_atomically
from covo_rl.data.terminal import LAYOUT, say
from covo_rl.records.console import ProgressDisplay
from covo_rl.run.report.payload import Sounds, report_payload
from covo_rl.run.report.replies import decoder_codes
from covo_rl.types import visible

app = typer.Typer(add_completion=False, help=__doc__)
ROOM = Path(__file__).parent
STYLES = ("page.css", "charts.css", "groups.css", "timeline.css")
SCRIPTS = (
    "dom.js", "data.js", "charts.js", "player.js", "rollout.js", "timeline.js", "list.js", "group.js", "browser.js",
    "overview.js", "main.js",
)  # fmt: skip


def report_page(
    folders: str | Path | Sequence[str | Path], *, max_mb: float = 20.0, sounds: Sounds = "interest",
    page: str | Path | None = None, speech_decoder: str | None = None,
) -> str:  # fmt: skip
    """The HTML text of the report of one run folder, or of several, compared; see `report_payload`."""
    folders = [folders] if isinstance(folders, (str, Path)) else list(folders)
    return render(_payload(folders, max_mb=max_mb, sounds=sounds, page=page, speech_decoder=speech_decoder))


def _payload(folders: Sequence[str | Path], **options: Any) -> dict[str, Any]:
    """The payload, with a bar for each part of it."""
    bars: dict[str, ProgressDisplay] = {}
    with ExitStack() as shown:

        def progress(part: str, done: int, total: int) -> None:
            if part not in bars:
                shown.close()
                bars[part] = shown.enter_context(ProgressDisplay(part, total, stderr=True))
            bars[part].update(done, "")

        return report_payload(folders, progress=progress, **options)


def render(payload: Mapping[str, Any]) -> str:
    """The HTML text that shows a payload."""
    text = json.dumps(payload, allow_nan=False, separators=(",", ":")).encode()
    style, scripts = _style(), [_chart_library(), _script()]
    policy = "; ".join((
        "default-src 'none'", f"script-src {' '.join(map(_hash, scripts))}", f"style-src {_hash(style)}",
        "img-src data:", "media-src 'self' data: file:", "base-uri 'none'", "form-action 'none'",
    ))  # fmt: skip
    several = len(payload["runs"]) > 1
    notes = [*payload["notes"], *(f"{run['name']}: {note}" if several else note
                                  for run in payload["runs"] for note in run["notes"])]  # fmt: skip
    template = jinja2.Template((ROOM / "template.html.jinja").read_text("utf-8"), autoescape=True)
    return template.render(
        title=visible(" and ".join(run["name"] for run in payload["runs"])),
        notes=[visible(note, LAYOUT) for note in notes],
        payload=base64.b64encode(gzip.compress(text, 9, mtime=0)).decode(),
        policy=Markup(policy),
        style=Markup(style),
        scripts=[Markup(script) for script in scripts],
    )


def _style() -> str:
    """The sheets as one; the dark colours stand in it twice, for the system's wish and for the reader's."""
    dark = (ROOM / "static/dark.css").read_text("utf-8").strip()
    return "\n".join((ROOM / "static" / name).read_text("utf-8") for name in STYLES).replace("@DARK", dark)


def _chart_library() -> str:
    """uPlot with its licence, which every copy carries."""
    licence, script = ((ROOM / "vendor" / f"uPlot.{end}").read_text("utf-8") for end in ("LICENSE", "iife.min.js"))
    return f"/*!\n{licence}\n*/\n{script}"


def _script() -> str:
    """The scripts as one, with no name of theirs in the page's global scope."""
    parts = "\n".join((ROOM / "static" / name).read_text("utf-8") for name in SCRIPTS)
    return f'"use strict";\n(() => {{\n{parts}}})();'


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _contents(payload: Mapping[str, Any]) -> str:
    counts, notes = payload["counts"], len(payload["notes"]) + sum(len(run["notes"]) for run in payload["runs"])
    return (
        f"{counts['rollouts']:,} rollouts of {counts['steps']:,} steps, {counts['sounds_embedded']:,} sounds, "
        f"{counts['sounds_linked']:,} linked, {counts['sounds_missing']:,} missing; "
        + (f"notes in its overview: {notes}" if notes else "nothing is left out")
    )


@app.command()
def report_command(
    runs: list[str] = typer.Argument(..., metavar="RUN [RUN_B ...]", help="run folders; several are compared"),
    output: str | None = typer.Option(None, help="the page; default RUN/report.html, of several runs RUN/compare.html"),
    max_mb: float = typer.Option(20.0, min=0.5, help="MB that the page may weigh; sounds beyond it are linked"),
    sounds: str = typer.Option("interest", help="sounds in the page: interest (of groups to look at), none, all"),
    speech_decoder: str | None = typer.Option(None, help="plays spoken replies: folder, or builtin:NAME; default: the "
                                              "run's own"),
    open_page: bool = typer.Option(False, "--open", help="open the page in the browser"),
) -> None:  # fmt: skip
    """Write one HTML file: curves, rollouts with their sound, evaluations, configuration."""
    for run in runs:
        if not (Path(run) / "config.yaml").is_file():
            raise typer.BadParameter(f"{visible(run)} is no run folder: it has no config.yaml")
    if sounds not in (kinds := get_args(Sounds)):
        raise typer.BadParameter(f"--sounds {visible(sounds)}: the choices are {', '.join(kinds)}")
    path = Path(output) if output else Path(runs[0]) / ("compare.html" if len(runs) > 1 else "report.html")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"{visible(path.parent)} is no folder; give another --output")
    if path.is_dir():
        raise typer.BadParameter(
            f"{visible(path)} is a folder; give --output a file, as {visible(path / 'report.html')}"
        )
    if speech_decoder:
        decoder_codes(speech_decoder)
    payload = _payload(runs, max_mb=max_mb, sounds=cast(Sounds, sounds), page=path, speech_decoder=speech_decoder)
    text = render(payload)
    try:
        write_atomically(path, lambda file: file.write(text))
    except OSError as error:
        raise typer.BadParameter(f"{error}; give another --output") from error
    say(f"{path}  ({path.stat().st_size / 1e6:.1f} MB): {_contents(payload)}")
    if open_page and not webbrowser.open(path.resolve().as_uri()):
        say("no browser could be opened", err=True)
