"""A run folder as Python sees it: figures, adapter, metrics, report."""

from __future__ import annotations

import html
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from covo_rl.data.files import read_record, whole_lines, write_atomically
from covo_rl.types import UserError


class RunError(UserError, LookupError):
    """A run folder does not hold what is asked of it; the message says what it holds."""


class TrainedRun:
    """What `GRPO.train` returns, and what any run folder is read as: `TrainedRun("runs/tiny")`."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "config.yaml").is_file() and self.folder.exists():
            raise RunError(f"{self.folder} is no run folder: it has no config.yaml")

    def __repr__(self) -> str:
        return f"TrainedRun({str(self.folder)!r})"

    @cached_property
    def result(self) -> dict[str, Any]:
        """result.json: `before` and `after` (None where the run was not evaluated), `steps`, `adapter` ...

        Raises:
            RunError: the run is not finished.
        """
        if not (self.folder / "result.json").is_file():
            raise RunError(f"{self.folder} has no result.json: the run is not finished, or was a dry run")
        return read_record(self.folder / "result.json")

    @property
    def adapter(self) -> Path:
        """The exported LoRA adapter, for `load(model, adapter=...)`, PEFT or a server.

        Raises:
            RunError: the run is not finished, or trained the model itself.
        """
        path = self.folder / self.result["adapter"]
        if not (path / "adapter_config.json").is_file():
            raise RunError(f"{path} is a whole model, not an adapter: load({str(path)!r})")
        return path

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, one a step."""
        return whole_lines(self.folder / "metrics.jsonl")[0]

    def report(self, path: str | Path | None = None) -> Path:
        """Write the page of the run to `path`, by default into its folder; returns where it lies.

        Raises:
            RunError: there is no such folder.
        """
        from covo_rl.run.report.page import report_page

        if not self.folder.is_dir():
            raise RunError(f"{self.folder} is not there: the run has not begun, or was a dry run")
        target = Path(path) if path is not None else self.folder / "report.html"
        page = report_page(self.folder)
        write_atomically(target, lambda file: file.write(page))
        return target

    def _repr_html_(self) -> str:
        """Held-out figures before and after, for a notebook."""
        text = f"<p>run folder <code>{html.escape(str(self.folder))}</code></p>"
        if not (self.folder / "result.json").is_file():
            return text + "<p>not finished</p>"
        before, after = (self.result.get(when) for when in ("before", "after"))
        if not isinstance(after, Mapping):
            return text + "<p>not evaluated</p>"
        rows = "".join(
            f"<tr><td>{html.escape(str(name))}<td>{_cell((before or {}).get(name))}<td>{_cell(value)}</tr>"
            for name, value in after.items()
        )
        return f"{text}<table><tr><th></th><th>before</th><th>after</th></tr>{rows}</table>"


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else html.escape(str(value if value is not None else "-"))
