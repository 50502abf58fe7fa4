"""Experiment trackers beside the run folder: metrics, configuration, evaluations, and a table of rollouts with sound.

    report_to: wandb,tensorboard      option -> accelerate's class of each tracker -> start, log, finish

accelerate.tracking knows how each library is started and logged to. What it lacks is here: which run is continued, a
table with audio, and that a tracker which fails costs its records and not the run. What a model or a data row wrote
reaches a tracker as text; where that renders Markdown, as a code block. Used by the main process alone.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from covo_rl.audio import AudioError
from covo_rl.config import TRACKERS, ConfigError, TrackerConfig, tracker_names
from covo_rl.data.files import RecordError, plain, read_record, write_json
from covo_rl.data.terminal import LAYOUT
from covo_rl.records.console import console
from covo_rl.records.folder import package_versions
from covo_rl.records.steps import StepRecord, is_number, scalars
from covo_rl.rewards.scoring import beside
from covo_rl.types import visible

#: the names of runs that a resume continues
IDS = "trackers.json"
#: rollouts are logged at the first step, every so many, and the last; at most this many rows
TABLE_EVERY, TABLE_ROWS = 10, 8
COLUMNS = ("clips", "question", "choices", "answer", "completion", "stop_reason")
#: failures in a row after which a tracker is left alone: each may have waited for a network
PATIENCE = 3

#: one row of the table: text and numbers by column, and of its clips the waveforms (float32 (samples,), in [-1, 1]) and
#: rates in Hz
Row = tuple[dict[str, Any], Sequence[tuple[np.ndarray, int]]]


def installed_trackers(config: TrackerConfig) -> list[str]:
    """The trackers that `report_to` means.

    Raises:
        ConfigError: one of them is not installed, or with `all` none is.
    """
    names, versions = tracker_names(config.report_to), package_versions(TRACKERS)
    if "all" in names:
        names = [name for name in TRACKERS if versions[name]]
        if not names:
            raise ConfigError(["report_to all: no tracker is installed: pip install 'covo-rl[trackers]'"])
    if missing := [name for name in names if not versions[name]]:
        raise ConfigError([f"report_to {name}: it is not installed: pip install {name}" for name in missing])
    return list(dict.fromkeys(names))


class Trackers:
    """All trackers of a run; without any, nothing happens.

    Args:
        folder: the run folder, in which tensorboard, wandb and swanlab keep their files.
    """

    def __init__(self, config: TrackerConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.names = installed_trackers(config)
        self.ids: dict[str, str] = {}
        self.continued: set[str] = set()
        self.active: dict[str, Any] = {}
        self.lost: dict[str, int] = {}
        self.in_a_row: dict[str, int] = {}
        self.error: dict[str, str] = {}

    def start(self, options: Mapping[str, Any], *, resume: bool = False, step: int = 0) -> str | None:
        """Begin a run at each tracker, or with `resume` go on with the one that trackers.json names, after `step`.

        Returns what went wrong, or None; where something did, no tracker is left running.
        """
        if not self.names:
            return None
        try:
            self._settle_ids(resume)
        except (RecordError, OSError) as error:
            return f"{error}; without {IDS} the trackers begin new runs"
        for name in self.names:
            try:
                self.active[name] = self._started(name, options, step)
            except Exception as error:  # whatever a library raises: the run has not begun and can be refused
                self.finish()
                return f"report_to {name}: {_said(error)}; log in, work offline (docs/tracking.md), or leave it out"
        return None

    def _settle_ids(self, resume: bool) -> None:
        """What each tracker calls this run: as stored, which it then continues, or new."""
        self.ids = {name: secrets.token_hex(4) for name in self.names}
        if resume:
            stored = read_record(self.folder / IDS)
            self.ids |= {name: str(value) for name, value in stored.items() if name in TRACKERS}
            self.continued = {*stored}
        write_json(self.folder / IDS, self.ids)

    def _started(self, name: str, options: Mapping[str, Any], step: int) -> Any:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        place = ("tensorboard", str(self.folder)) if name == "tensorboard" else (self.config.project,)
        tracker: Any = LOGGER_TYPE_TO_CLASS[name](*place, **self._arguments(name, step))
        tracker.start()
        if name == "wandb":  # a run may go back to a checkpoint: wandb drops what is earlier than its own count
            tracker.tracker.define_metric("*", step_metric="step")
        if name not in self.continued or name != "tensorboard":  # there every configuration is a sub-run
            tracker.store_init_configuration(_flat_config(options))
        return tracker

    def _arguments(self, name: str, step: int) -> dict[str, Any]:
        """What the tracker's own start takes, to begin this run or go on with it."""
        title = self.config.run_name or self.folder.resolve().name
        if name == "tensorboard":
            return {"purge_step": step + 1} if name in self.continued else {}
        run = {"name": title, "id": self.ids[name], "resume": "allow"}
        if name == "wandb":  # quiet: without its own curves at the end
            return {**run, "dir": str(self.folder), "settings": {"quiet": True}}
        if name == "swanlab":
            return {**run, "log_dir": str(self.folder / "swanlog")}
        space = self.config.trackio_space_id
        return {"name": f"{title}-{self.ids[name]}", "resume": "allow", "embed": False, "space_id": space}

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of a step."""
        self._send(lambda name, tracker: _log(name, tracker, dict(values), step))

    def log_step(self, record: StepRecord) -> None:
        """The metrics of a step."""
        values = scalars(record.metrics)
        self.log({name: value for name, value in values.items() if name != "step"}, record.step)

    def log_evaluation(self, name: str, summaries: Mapping[str, Any], step: int) -> None:
        """`eval/NAME/MODE/FIGURE` of the summaries by mode (greedy, sampled); NAME is left out where it is empty."""
        figures = {f"eval/{name}/{mode}/{key}".replace("//", "/"): value
                   for mode, summary in summaries.items() if isinstance(summary, Mapping)
                   for key, value in scalars(summary).items()}  # fmt: skip
        if figures:
            self.log(figures, step)

    def log_table(self, rows: Sequence[Row], step: int) -> None:
        """Some rollouts, with the sound that they were about."""
        if rows:
            self._send(lambda name, tracker: TABLES[name](tracker, rows, step))

    def finish(self) -> None:
        """Close all, and say what each of them did not get."""
        self._send(lambda name, tracker: tracker.finish(), last=True)
        for name, lost in self.lost.items():
            console.print(
                f"{name}: {lost} record(s) did not get there; the last error: {self.error[name]}. metrics.jsonl and "
                "rollouts/ have them all",
                style="bold red",
            )
        self.active, self.lost = {}, {}

    def _send(self, action: Callable[[str, Any], object], *, last: bool = False) -> None:
        for name, tracker in self.active.items():
            if self.in_a_row.get(name, 0) >= PATIENCE and not last:
                self.lost[name] += 1
                continue
            try:
                action(name, tracker)
                self.in_a_row[name] = 0
            except Exception as error:  # of any library and network: it is said, counted, and costs only the record
                if name not in self.lost:
                    console.print(f"{name}: {_said(error)}; training goes on, this is counted", style="bold red")
                self.lost[name] = self.lost.get(name, 0) + 1
                self.in_a_row[name] = self.in_a_row.get(name, 0) + 1
                self.error[name] = _said(error)


def is_logged(step: int, last: int) -> bool:
    """Whether the rollouts of this step become a table."""
    return step in (1, last) or step % TABLE_EVERY == 0


def table_rows(
    record: StepRecord, waveforms: Callable[[str], Sequence[tuple[np.ndarray, int]]], limit: int = TABLE_ROWS
) -> list[Row]:
    """The rollouts of highest and lowest advantage of the first prompts; `waveforms` gives the clips of a row's id."""
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for rollout in record.rollouts:
        by_prompt.setdefault(str(rollout["id"]), []).append(rollout)
    rows: list[Row] = []
    for name, rollouts in list(by_prompt.items())[: limit // 2]:
        ranked = sorted(rollouts, key=lambda rollout: -float(rollout["advantage"]))
        try:
            sounds, change = [(np.clip(waveform, -1, 1), rate) for waveform, rate in waveforms(name)], {}
        except AudioError as error:  # of a file that changed: training skips and counts its row
            sounds, change = [], {"clips": str(error)}
        for rollout in (ranked[0], ranked[-1]):
            cells = {"id": name, **{key: rollout[key] for key in COLUMNS}, **change}
            cells |= {"total": rollout["reward_total"], "advantage": rollout["advantage"]}
            cells = beside(cells, rollout["rewards"], "reward")
            rows.append(({key: _cell(plain(value)) for key, value in cells.items()}, sounds))
    return rows


def _cell(value: Any) -> Any:
    if isinstance(value, list | tuple):
        value = " | ".join(map(str, value))
    return value if value is None or is_number(value) else visible(value, LAYOUT)


# -- what differs between trackers -------------------------------------------------------------------------------------


def _log(name: str, tracker: Any, values: dict[str, Any], step: int) -> None:
    if name == "wandb":
        tracker.log({**values, "step": step})
    else:
        tracker.log(values, step=step)


def _tensorboard_table(tracker: Any, rows: Sequence[Row], step: int) -> None:
    writer = tracker.tracker
    for number, (cells, waveforms) in enumerate(rows):
        text = "\n".join(_code(f"{key}: {value}") for key, value in cells.items())
        writer.add_text(f"rollouts/{number}", text, step)
        for place, (waveform, rate) in enumerate(waveforms):
            writer.add_audio(f"rollouts/{number}/clip_{place}", waveform[None], step, sample_rate=rate)
    writer.flush()


def _wandb_table(tracker: Any, rows: Sequence[Row], step: int) -> None:
    import wandb

    table = _audio_rows(rows, lambda waveform, rate: wandb.Audio(waveform, sample_rate=rate))
    content = wandb.Table(columns=list(table[0]), data=[list(row.values()) for row in table])
    _log("wandb", tracker, {"rollouts": content}, step)


def _trackio_table(tracker: Any, rows: Sequence[Row], step: int) -> None:
    import trackio  # pyright: ignore[reportMissingImports]  # an extra

    def audio(waveform: np.ndarray, rate: int) -> Any:  # floats it would scale to full level
        return trackio.Audio((waveform * 32767).astype(np.int16), sample_rate=rate)

    coded = [({key: _code(value) if isinstance(value, str) else value for key, value in cells.items()}, waveforms)
             for cells, waveforms in rows]  # fmt: skip
    table = _audio_rows(coded, audio)
    tracker.log(
        {"rollouts": trackio.Table(columns=list(table[0]), data=[list(row.values()) for row in table])}, step=step
    )


def _swanlab_table(tracker: Any, rows: Sequence[Row], step: int) -> None:
    import swanlab  # pyright: ignore[reportMissingImports]  # an extra

    texts, sounds = [], []
    for cells, waveforms in rows:
        texts.append(swanlab.Text("\n".join(f"{key}: {value}" for key, value in cells.items()), caption=cells["id"]))
        sounds += [swanlab.Audio(waveform, sample_rate=rate, caption=cells["id"]) for waveform, rate in waveforms]
    tracker.log({"rollouts": texts, **({"clips": sounds} if sounds else {})}, step=step)


#: tracker -> how it takes a table
TABLES: Mapping[str, Callable[[Any, Sequence[Row], int], None]] = {
    "tensorboard": _tensorboard_table,
    "wandb": _wandb_table,
    "trackio": _trackio_table,
    "swanlab": _swanlab_table,
}


def _audio_rows(rows: Sequence[Row], audio: Callable[[np.ndarray, int], Any]) -> list[dict[str, Any]]:
    """The cells of each row with its clips in columns of their own; rows with fewer clips have None there."""
    width = max(len(waveforms) for _, waveforms in rows)
    table = []
    for cells, waveforms in rows:
        sounds = [audio(*waveform) for waveform in waveforms] + [None] * (width - len(waveforms))
        table.append({**cells, **{f"clip_{place}": sound for place, sound in enumerate(sounds)}})
    return table


def _code(value: Any) -> str:
    """A Markdown code block, which nothing within it can end: every line is indented."""
    return "\n".join(f"    {line}" for line in str(value).split("\n"))


def _flat_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers and text alone, as every tracker takes them."""
    values = plain(options)
    return {name: value if isinstance(value, int | float | str) else str(value) for name, value in values.items()}


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {visible(error)[:300]}"
