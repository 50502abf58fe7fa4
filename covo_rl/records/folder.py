"""The run folder: everything needed to read, repeat and resume a run.

config.yaml        resolved options
environment.json   versions, commit, hashes of data and reward files
metrics.jsonl      one object a step
rollouts/          step_00000.jsonl: prompt, completion, components, advantage; never waveforms
result.json        before, after and the figures of the run
curves.png         learning curves
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from covo_rl.data.files import file_sha256, plain, read_json_lines, write_json

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "soundfile", "soxr", "sympy")


def _git(*words: str) -> str | None:
    try:
        answer = subprocess.run(["git", *words], capture_output=True, text=True, timeout=10, check=True,
                                cwd=Path(__file__).parent)  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None  # not a checkout, or no git: the record then says null
    return answer.stdout.strip()


def package_versions(names: Iterable[str]) -> dict[str, str | None]:
    """Versions of installed packages; None for one that is not there."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def environment(files: Mapping[str, str | Path] | None = None) -> dict[str, Any]:
    """Versions, machine, commit, and the sha256 of `files` (name -> path)."""
    from covo_rl import __version__

    return {
        "covo_rl": __version__,
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": (_git("status", "--porcelain") or "").splitlines(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "packages": package_versions(PACKAGES),
        "sha256": {name: file_sha256(path) for name, path in (files or {}).items() if Path(path).is_file()},
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


class Run:
    """One run folder, written by the main process only (`active`); others read the path and write nothing."""

    def __init__(self, folder: str | Path, *, active: bool = True) -> None:
        self.folder = Path(folder)
        self.active = active
        if active:
            (self.folder / "rollouts").mkdir(parents=True, exist_ok=True)

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    def write_config(self, options: Mapping[str, Any]) -> None:
        if self.active:
            text = yaml.safe_dump(plain(options), sort_keys=False, allow_unicode=True)
            (self.folder / "config.yaml").write_text(text, encoding="utf-8")

    def write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        """Write `name` in the run folder as a whole; NaN becomes null."""
        path = self.folder / name
        return write_json(path, content) if self.active else path

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one step to metrics.jsonl."""
        if self.active:
            with open(self.metrics_path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(json.dumps(plain(row), ensure_ascii=False) + "\n")

    def log_rollouts(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the step's rollouts to rollouts/step_NNNNN.jsonl."""
        if self.active:
            path = self.folder / "rollouts" / f"step_{step:05d}.jsonl"
            with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows)

    def metrics(self) -> list[dict[str, Any]]:
        """All steps logged so far."""
        if not self.metrics_path.is_file():
            return []
        return list(read_json_lines(self.metrics_path))
