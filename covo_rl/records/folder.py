"""The run folder: everything needed to read, repeat and resume a run.

config.yaml        resolved options
environment.json   versions, commit, family, a prompt as the model reads it, hashes of data and reward files
metrics.jsonl      one object a step
rollouts/          step_00000.jsonl: row, completion, components, advantage, log-probs by token; never waveforms
clips/             sounds of rows in memory, which have no file; records/sounds.py
before.json        the evaluation before training, and what it was made of
result.json        before, after and the figures of the run; it is there once the run is finished
sounds/            of a run of turns: a long pause before and after training
curves.png         learning curves
trackers.json      what trackers call this run, with --report_to; tensorboard/, wandb/, swanlog/ are theirs
lock.json          who writes here, while somebody does
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from covo_rl.data.files import (
    append_lines,
    file_sha256,
    json_line,
    plain,
    read_record,
    whole_lines,
    write_atomically,
    write_json,
)
from covo_rl.records.console import console
from covo_rl.records.lock import FolderLock

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "deepspeed", "datasets",
            "numpy", "soundfile", "soxr", "mpmath")  # fmt: skip

#: what a run has when it was accepted, then what it adds
ORIGIN = "environment.json"  # first written and last deleted: where it lies, a run wrote the rest
BEGUN = ("config.yaml", ORIGIN)
FILES = (*BEGUN, "before.json", "result.json", "metrics.jsonl")
FOLDERS = {"rollouts": "step_*.jsonl", "checkpoints": "step_*", "adapter": "*", "model": "*", "exports": "step_*"}
#: what makes room for another run, beside these files and the exports
CLEARED = (
    "checkpoints/step_[0-9]*", "checkpoints/.partial-step_*", "checkpoints/.trash-step_*", "rollouts/step_[0-9]*.jsonl",
    "debug/step_[0-9]*", "abandoned/[0-9]*", "clips/[0-9a-f]*.*", "clips/.partial-*", "sounds/before",
    "sounds/after", "curves.png", "report.html", "trackers.json", "tensorboard/events.out.tfevents.*",
    "tensorboard/[0-9]*", "swanlog/run-*", "wandb/*run-*", "wandb/latest-run", "wandb/debug*.log",
)  # fmt: skip


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


def export_files(folder: Path) -> list[Path]:
    """What an export wrote into its folder, by its export.json, which is last; all where that does not list files.

    Raises:
        RecordError: export.json is damaged.
    """
    record = folder / "export.json"
    listed = read_record(record).get("files")
    paths = [path for path in folder.iterdir() if not isinstance(listed, list) or path.name in listed]
    return sorted(paths, key=lambda path: path == record)


class Run:
    """One run folder, written by the main process only (`active`); others read the path and write nothing.

    What only records (metrics, rollouts, the evaluation before) may fail, on a full disk: that is said, and the run
    goes on. Nothing is ever half a file or half a line.
    """

    def __init__(self, folder: str | Path, *, active: bool = True) -> None:
        self.folder = Path(folder)
        self.active = active
        self.lock = FolderLock(folder)
        self._unwritten: list[str] = []  # lines of metrics.jsonl that a full disk refused

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    def contents(self) -> list[str]:
        """Names of what is here under the names that a run writes; nothing where a run only began."""
        files = [name for name in FILES if (self.folder / name).is_file()]
        folders = [name for name, pattern in FOLDERS.items() if any((self.folder / name).glob(pattern))]
        begun = files in (list(BEGUN), [ORIGIN]) and not folders
        return [] if begun else files + folders

    def refusal(self, *, overwrite: bool = False) -> str | None:
        """Why a new run may not start here, or None; changes nothing."""
        contents, exports = self.contents(), [path for path in self._exports() if any(path.glob("*"))]
        foreign = [path.name for path in exports if not (path / "export.json").is_file()]
        if contents and ORIGIN not in contents:
            foreign = contents
        if foreign:
            return f"{self.folder} holds {', '.join(foreign)}, which no run wrote: choose another --output"
        if not contents or overwrite:
            return None
        if "result.json" in contents:
            return f"{self.folder} holds a finished run: choose another --output, or replace it with --overwrite"
        return (f"{self.folder} holds an unfinished run ({', '.join(contents)}): continue it with --resume auto, "
                "choose another --output, or replace it with --overwrite")  # fmt: skip

    def clear(self) -> None:
        """Delete what an earlier run wrote here, and nothing else; a kill leaves what can be cleared again.

        Raises:
            RecordError: the list of an export's files is damaged; nothing is deleted.
        """
        exports = [path for path in self._exports() if path.is_dir()]
        paths = [path for pattern in (*CLEARED, *FILES) for path in self.folder.glob(pattern)]
        paths += [file for export in exports for file in export_files(export)]
        for path in sorted(paths, key=lambda path: path == self.folder / ORIGIN):
            if path.name == "export.json" and len(os.listdir(path.parent)) > 1:  # what the user put beside it stays
                write_json(path, {"files": [path.name]})
            else:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for folder in {*exports, *(self.folder / Path(pattern).parent for pattern in CLEARED), self.folder / "exports"}:
            if folder != self.folder:
                with suppress(OSError):  # not empty, not there, or a link: it is left
                    folder.rmdir()

    def sweep(self) -> None:
        """Delete what an export that was killed left half done."""
        for pattern in (".adapter-*", ".model-*", "exports/.step_*", "gathered_policy"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path)

    def _exports(self) -> list[Path]:
        return [self.folder / "adapter", self.folder / "model", *(self.folder / "exports").glob("step_*")]

    def write_config(self, options: Mapping[str, Any]) -> None:
        if self.active:
            text = yaml.safe_dump(plain(options), sort_keys=False, allow_unicode=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / "config.yaml", lambda file: file.write(text))

    def write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        """Write `name` in the run folder as a whole; NaN becomes null."""
        path = self.folder / name
        if self.active:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, content)
        return path

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one step to metrics.jsonl, and those before it that a full disk refused."""
        if self.active:
            self._unwritten.append(json_line(row))
            self.catch_up()

    def catch_up(self) -> None:
        """Write the steps that wait for room."""
        if self._unwritten:
            with self.going_on(f"{len(self._unwritten)} step(s) of metrics.jsonl wait for room"):
                self.folder.mkdir(parents=True, exist_ok=True)
                append_lines(self.metrics_path, self._unwritten)
                self._unwritten.clear()

    def rollouts_path(self, step: int) -> Path:
        return self.folder / "rollouts" / f"step_{step:05d}.jsonl"

    def log_rollouts(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the step's rollouts to rollouts/step_NNNNN.jsonl."""
        if self.active:
            path = self.rollouts_path(step)
            lines = [json_line(row) for row in rows]
            with self.going_on(f"the rollouts of step {step} are not in the log"):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, lambda file: file.writelines(lines))

    @contextmanager
    def going_on(self, loss: str) -> Iterator[None]:
        """Around writing what only records: a full disk costs that and is said, the run goes on."""
        try:
            yield
        except OSError as error:
            console.print(f"{error}; {loss}, the run goes on", style="bold red", markup=False)

    def metrics(self) -> list[dict[str, Any]]:
        """All steps logged so far; damaged lines are left out (`data.files.whole_lines` names them)."""
        return whole_lines(self.metrics_path)[0]
