"""Pictures and one HTML page from a run folder: `covo-rl report RUN`.

Everything a model wrote is escaped: completions are untrusted input.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
import typer

from covo_rl.data.files import read_json_lines
from covo_rl.data.terminal import LAYOUT, say
from covo_rl.records.folder import Run
from covo_rl.resolve import ConfigError, read_yaml
from covo_rl.types import visible

app = typer.Typer(add_completion=False, help=__doc__)
TEMPLATE = Path(__file__).with_name("page.html.jinja")


def curves(metrics: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Draw the learning curves as a PNG.

    Raises:
        ImportError: matplotlib is missing (it is the extra `plots`).
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("curves need matplotlib: pip install 'covo-rl[plots]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [row["step"] for row in metrics]
    names = [name for name in (metrics[0] if metrics else {}) if name.startswith("reward_") and name != "reward_total"]
    panels = {
        "R_total": ["reward_total"],
        "components": names,
        "completion length": ["completion_length"],
        "shares": ["zero_variance_groups", "truncated"],
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), layout="constrained")
    for axis, (title, keys) in zip(axes, panels.items(), strict=True):
        for key in keys:
            values = [float("nan") if row.get(key) is None else row[key] for row in metrics]
            axis.plot(steps, values, label=visible(key.removeprefix("reward_")))
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if len(keys) > 1:
            for label in axis.legend(fontsize="small").get_texts():
                label.set_parse_math(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return Path(path)


def report_page(folder: str | Path, limit: int = 40) -> str:
    """The HTML text of a run's report: results, curves, the last step's first rollouts, configuration."""
    folder = Path(folder)
    tables: list[tuple[str, Sequence[str], Sequence[Sequence[Any]]]] = []
    if (folder / "result.json").is_file():
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        rows = [(k, result["before"][k], v) for k, v in result["after"].items() if k in result.get("before", {})]
        tables.append(("held-out", ("", "before", "after"), rows))
    picture = ""
    if metrics := Run(folder, active=False).metrics():
        picture = base64.b64encode(curves(metrics, folder / "curves.png").read_bytes()).decode()
    if files := sorted((folder / "rollouts").glob("step_*.jsonl")):
        columns = ("id", "completion", "answer", "reward_total", "advantage")
        rows = [[row[name] for name in columns] for row in islice(read_json_lines(files[-1]), limit)]
        tables.append(("last rollouts", ("row", "completion", "key", "R_total", "advantage"), rows))
    config = read_yaml(folder / "config.yaml")
    tables.append(("configuration", ("option", "value"), list(config.items())))
    template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), autoescape=True, finalize=_cell)
    return template.render(name=folder.name, picture=picture, tables=tables)


def _cell(value: Any) -> Any:
    """What stands in the page: text with what does not print escaped, other values as they are."""
    return visible(value, LAYOUT) if type(value) is str else value


@app.command()
def report_command(run: str = typer.Argument(..., help="run folder"), output: str | None = None) -> None:
    """Write RUN/report.html (or OUTPUT): results, curves, last rollouts, configuration."""
    if not (Path(run) / "config.yaml").is_file():
        raise typer.BadParameter(f"{visible(run)} is no run folder: it has no config.yaml")
    path = Path(output) if output else Path(run) / "report.html"
    try:
        page = report_page(run)
    except ConfigError as error:
        raise typer.BadParameter(error.problems[0]) from None
    path.write_text(page, encoding="utf-8", errors="backslashreplace")
    say(str(path))


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
