"""Stages that follow each other, each a command of its own, each measured on the same held-out questions.

    stage -> its command, in a process of its own -> model -> greedy, sampled, other sound -> OUTPUT/pipeline.json

Behind recipes/pipeline.py. A stage that is finished is not repeated; one that was cut off goes on (GRPO, from its
checkpoint) or begins again (SFT); what was made from the model of a stage that is trained again is trained again too.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from covo_rl.config import ConfigError, parse_options
from covo_rl.data.files import file_sha256, plain, read_json_lines, read_record, write_json
from covo_rl.data.terminal import say
from covo_rl.records.console import interval, number, percent
from covo_rl.records.folder import environment
from covo_rl.records.lock import FolderLock
from covo_rl.resolve import find, read_yaml
from covo_rl.supervised import load_config
from covo_rl.types import UserError

RECORD = "pipeline.json"
RECIPES = {"sft": "sft_cot.py", "train": "grpo_mmau.py"}  # command -> recipe
REPLIES = 4  # sampled for each question
ENDS = 5  # steps whose mean R_total is named, at either end of GRPO
TIMES = ("cpu_seconds", "wall_seconds")


@dataclass(frozen=True)
class Link:
    """A stage of a chain: the options of its YAML, its command, and where the model lies that it makes."""

    name: str
    settings: dict[str, Any]
    words: list[str]
    folder: Path
    model: Path
    adapter: Path | None = None

    @property
    def made(self) -> Path:
        """What the stage writes last."""
        return self.adapter or self.model


def links(output: Path, configs: Mapping[str, Path], seed: int | None) -> list[Link]:
    """One stage a configuration (stage name -> YAML), each from the model before it. GRPO has no `stages` of its own.

    Raises:
        ConfigError: everything that is wrong with any of them.
    """
    made: list[Link] = []
    problems: list[str] = []
    for name, path in configs.items():
        words = ["--config", str(path), "--output", str(output / name)]
        words += ["--model", str(made[-1].model)] if made else []
        words += [] if seed is None else ["--seed", str(seed)]
        try:
            made.append(_link(name, output / name, read_yaml(path), words, made[-1] if made else None, seed))
        except ConfigError as error:
            problems += [f"{path.name}: {problem}" for problem in error.problems]
            made.append(Link(name, {}, words, output / name, output / name))
    if problems:
        raise ConfigError(problems)
    return made


def _link(
    name: str, folder: Path, content: dict[str, Any], words: list[str], before: Link | None, seed: int | None
) -> Link:
    settings = plain({"config": content, "seed": seed})
    if before is not None and before.adapter is not None:
        raise ConfigError([f"{before.name} leaves an adapter, which no stage starts from: make it the last"])
    if "stages" in content:
        load_config(words[1], {"model": str(before.model)} if before else None)
        return Link(name, settings, ["sft", *words], folder, folder)
    words = ["train", *words, "--evaluate", "false"]  # it is measured as the others are
    if before is None:
        raise ConfigError(["GRPO needs a stage with `stages` before it, whose model it starts from"])
    if not parse_options(words[1:]).adapter.lora:
        return Link(name, settings, words, folder, folder / "model")
    return Link(name, settings, words, folder, before.model, folder / "adapter")


@dataclass
class Chain:
    """The stages in `output`, measured on the first `limit` rows of `data` (clips in `audio_dir`), with replies of at
    most `longest` tokens. `overwrite` repeats what is finished."""

    output: Path
    links: Sequence[Link]
    data: Path
    audio_dir: Path | None = None
    limit: int | None = None
    longest: int = 1024
    overwrite: bool = False
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.output / RECORD

    def run(self) -> dict[str, Any]:
        """Every stage that is not finished; returns the record, which lies in OUTPUT/pipeline.json.

        Raises:
            ConfigError: the folder is in use, holds something else, or stages with other settings.
            UserError: a stage failed.
        """
        self._open()
        lock = FolderLock(self.output)
        if problem := lock.hold():
            raise ConfigError([problem])
        try:
            self._open()  # nobody else writes now
            for link in self.links:
                self._train(link)
                self._measure(link)
            stages = self.record["stages"].values()
            for name in TIMES:
                self.record[name] = round(
                    sum(stage[part][name] for stage in stages for part in ("training", "measuring"))
                )
            write_json(self.path, self.record)
        finally:
            lock.release()
        return self.record

    def _open(self) -> None:
        """Read what earlier launches left, as far as it holds."""
        names = [link.name for link in self.links]
        there = sorted(path.name for path in self.output.glob("*") if path.name != "lock.json")
        record = read_record(self.path)
        if there and record.get("chain") != names:
            what = ", ".join(there[:5])
            raise ConfigError([f"{self.output} holds something else ({what}): choose another --output"])
        done = {} if self.overwrite else record.get("stages", {})
        other = [
            link.name for link in self.links if done.get(link.name, {}).get("settings", {}) not in ({}, link.settings)
        ]
        if other:
            raise ConfigError(
                [f"{self.output} holds {', '.join(other)} with other settings: --overwrite, or another --output"]
            )
        asked = {"data": str(self.data), "sha256": file_sha256(self.data), "limit": self.limit, "longest": self.longest}
        if record.get("questions") != asked:  # what is trained stays, and is measured again
            done = {name: {key: stage[key] for key in stage if key != "figures"} for name, stage in done.items()}
        self.record = {"chain": names, "questions": asked, "environment": environment(), "stages": done}

    def _train(self, link: Link) -> None:
        stages, names = self.record["stages"], self.record["chain"]
        if "training" in stages.get(link.name, {}) and not link.made.is_dir():
            del stages[link.name]
        if "training" in stages.get(link.name, {}):
            say(f"{link.name}: finished in an earlier launch")
            return
        goes_on = link.name in stages and link.words[0] == "train"
        if link.name not in stages:
            for later in names[names.index(link.name) :]:
                stages.pop(later, None)  # made from another model
        stage = stages.setdefault(link.name, {"settings": link.settings, "launches": 0})
        stage["launches"] += 1
        words = [*link.words, *(["--resume", "auto"] if goes_on else ["--overwrite"])]
        stage["command"] = " ".join(["covo-rl", *words])
        write_json(self.path, self.record)
        say(f"{link.name}: {stage['command']}")
        start = spent()
        run_command(words)
        stage["training"] = since(start) | training_figures(link.folder)
        write_json(self.path, self.record)

    def _measure(self, link: Link) -> None:
        stage, start = self.record["stages"][link.name], spent()
        if "figures" in stage:
            return
        stage["figures"] = self._figures(link)
        stage["measuring"] = since(start)
        write_json(self.path, self.record)
        sampled = stage["figures"]["sampled"]
        say(f"{link.name}: answers right {percent(stage['figures']['greedy']['accuracy'])} % greedy, "
            f"{percent(sampled['accuracy'])} % sampled, R_total {number(sampled['reward_total'])}")  # fmt: skip

    def _figures(self, link: Link) -> dict[str, dict[str, Any]]:
        """Accuracy, rewards and length of greedy and sampled replies; greedy accuracy by audio. Replies: measured/."""
        from covo_rl.run.python.model import load  # torch

        model = load(link.model, link.adapter)
        figures: dict[str, dict[str, Any]] = {}
        modes: dict[str, dict[str, Any]] = {
            "greedy": {"listen": True}, "sampled": {"greedy": False, "num_generations": REPLIES}
        }  # fmt: skip
        for mode, how in modes.items():
            report = model.evaluate(
                "own", self.data, self.audio_dir, output=self.output / "measured" / f"{link.name}-{mode}",
                overwrite=True, limit=self.limit, max_completion_length=self.longest, **how,
            ).report  # fmt: skip
            rewards = {name: value for name, value in report.items() if name.startswith("reward_")}
            figures[mode] = {
                name: report[name] for name in ("n", "accuracy", "ci95", "mean_completion_tokens")
            } | rewards
            by_audio = {name: part["accuracy"] for name, part in report["audio"].items() if "accuracy" in part}
            figures.setdefault("audio", by_audio)
        return figures


def run_command(words: Sequence[str]) -> None:
    """`covo-rl WORDS` in a process of its own. Raises UserError where it fails; it has said why."""
    process = subprocess.Popen([sys.executable, str(find("recipes", RECIPES[words[0]])), *words[1:]])
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # a run then saves a checkpoint, and ends
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()  # it has the signal too
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if code:
        raise UserError(f"covo-rl {words[0]} ended with {code}; the same command goes on from there")


def spent() -> tuple[float, float]:
    """CPU seconds of this process and of those that it waited for; wall seconds."""
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses), time.perf_counter()


def since(start: tuple[float, float]) -> dict[str, float]:
    """What was spent since `start`."""
    return {name: round(now - then, 1) for name, then, now in zip(TIMES, start, spent(), strict=True)}


def training_figures(folder: Path) -> dict[str, Any]:
    """What a stage says of itself: held-out facts and answers after each part of an SFT; R_total where GRPO began and
    ended, means of five steps."""
    if (log := folder / "training_log.json").is_file():
        rows = json.loads(log.read_text(encoding="utf-8"))
        return {
            "log": [
                {key: row[key] for key in ("kind", "rows", "held_out") if key in row} for row in rows if "kind" in row
            ]
        }
    totals = [row["reward_total"] for row in read_json_lines(folder / "metrics.jsonl")]
    return {"steps": len(totals), "reward_total": [round(fmean(part), 4) for part in (totals[:ENDS], totals[-ENDS:])]}


def table(record: Mapping[str, Any]) -> Table:
    """Figures of every stage, and what it cost."""
    shown = Table(title="held-out questions, after each stage", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("", "greedy %", "sampled %", "format %", "R_total", "silent %", "CPU s"):
        shown.add_column(column, justify="right" if column else "left")
    for name, stage in record["stages"].items():
        figures = stage["figures"]
        sampled = figures["sampled"]
        shown.add_row(
            name, interval(figures["greedy"]), interval(sampled), percent(sampled["reward_format"]),
            number(sampled["reward_total"]), percent(figures["audio"]["silent"]),
            f"{stage['training']['cpu_seconds']:.0f}",
        )  # fmt: skip
    return shown
