"""Trackers get what the run folder has: read back from what each library stored, offline, in a folder of the test."""

import json
import os
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from accelerate import PartialState

from covo_rl.config import TRACKERS, ConfigError, Options, TrackerConfig, option_problems
from covo_rl.records import trackers as room
from covo_rl.records.folder import Run
from covo_rl.records.steps import StepRecord
from covo_rl.records.trackers import Trackers, is_logged, table_rows

EVIL = "<script>alert(1)</script>\n![x](http://evil.example/x.png)\u202e\x1b[31m"
TONE = (np.sin(np.arange(1600) / 5).astype(np.float32) / 2, 16000)
METRICS = {"step": 3, "reward_total": 2.5, "reward_accuracy": None, "kl": float("nan"), "note": "text",
           "seconds": {"step": 1.5, "update": 0.5}}  # fmt: skip


def rollout(name, total, text=EVIL):
    return {"id": name, "clips": ["a.wav"], "question": "What?", "choices": ["bell", "dog"], "answer": "dog",
            "completion": text, "stop_reason": "stop", "rewards": {"accuracy": 1.0, "thinking": float("nan")},
            "reward_total": total, "advantage": total - 1.0}  # fmt: skip


RECORD = StepRecord(3, METRICS, [rollout("row0", 0.0), rollout("row0", 2.0, "good"), rollout("row1", 1.0)])


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """No library asks for a network, or writes outside of the test's folder."""
    PartialState(cpu=True)
    places = {"WANDB_CACHE_DIR": "w", "WANDB_CONFIG_DIR": "w", "WANDB_DATA_DIR": "w", "TRACKIO_DIR": "t", "HOME": "h"}
    for name, place in places.items():
        monkeypatch.setenv(name, str(tmp_path / "home" / place))
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "SWANLAB_MODE": "offline"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)


def started(folder, name, **options):
    folder.mkdir(exist_ok=True)
    trackers = Trackers(TrackerConfig(report_to=name), folder)
    assert trackers.start({"learning_rate": 1e-3, "judge": None, "rewards": {"accuracy": 1.0}}, **options) is None
    return trackers


def tracked(folder, name):
    """A run of two steps with a table and an evaluation, stopped after the second and continued there."""
    first = started(folder, name)
    first.log_evaluation("", {"greedy": {"accuracy": 0.25, "ci95": [0, 1], "audio": "real"}}, 0)
    first.log_step(StepRecord(2, {**METRICS, "step": 2}, []))
    first.finish()
    time.sleep(1.1)  # wandb names a folder by the second
    again = started(folder, name, resume=True, step=2)
    assert again.ids == first.ids
    again.log_step(RECORD)
    again.log_table(table_rows(RECORD, lambda row: [TONE] if row == "row0" else []), 3)
    again.finish()
    return again


@pytest.mark.skipif(not find_spec("tensorboard"), reason="tensorboard is not installed")
def test_tensorboard_holds_metrics_evaluations_text_and_sound(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked(tmp_path / "run", "tensorboard")
    log = EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"scalars": 0, "audio": 0, "tensors": 0})
    log.Reload()
    assert [(event.step, event.value) for event in log.Scalars("reward_total")] == [(2, 2.5), (3, 2.5)]
    assert [event.value for event in log.Scalars("seconds/update")] == [0.5, 0.5]
    assert [(event.step, event.value) for event in log.Scalars("eval/greedy/accuracy")] == [(0, 0.25)]
    assert not {"reward_accuracy", "kl", "note", "step", "eval/greedy/ci95"} & {*log.Tags()["scalars"]}
    (sound,) = log.Audio("rollouts/0/clip_0")
    assert sound.sample_rate == 16000 and sound.encoded_audio_string[:4] == b"RIFF"
    assert len([tag for tag in log.Tags()["audio"] if "rollouts" in tag]) == 2, "the third rollout has no clip"
    texts = [event.tensor_proto.string_val[0].decode() for event in log.Tensors("rollouts/1/text_summary")]
    assert "http://evil.example" in texts[0], "nothing is left out"
    assert all(line.startswith("    ") for line in texts[0].split("\n")), "Markdown has nothing but a code block"
    assert "\x1b" not in texts[0] and "\u202e" not in texts[0]
    (config,) = (tmp_path / "run" / "tensorboard").glob("*/hparams.yml")
    assert "learning_rate: 0.001" in config.read_text()
    overwritten(tmp_path / "run", "tensorboard")


def overwritten(folder, name):
    """--overwrite deletes what the tracker wrote, and nothing else."""
    (folder / name / "notes.txt").write_text("mine")
    Run(folder).clear()
    assert [str(path.relative_to(folder)) for path in folder.rglob("*")] == [name, f"{name}/notes.txt"]


def leveldb_chunks(data):
    """The records of a LevelDB log behind wandb's header of 7 bytes: blocks of 32 KiB, each record in one or more parts
    of (checksum 4, length 2, kind 1) and content; kinds 1 whole, 2 first, 3 middle, 4 last."""
    place, parts = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # the rest of a block
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def wandb_records(folder):
    """The records of two offline runs in the folder, in order: what `wandb sync` would send. wandb's own process
    writes them, and ends after `finish` returned."""
    from wandb.proto import wandb_internal_pb2

    until, records = time.monotonic() + 60, []
    while sum(record.HasField("exit") for record in records) < 2 and time.monotonic() < until:
        time.sleep(0.05)
        paths = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
        chunks = [data for path in paths for data in leveldb_chunks(path.read_bytes())]
        records = [wandb_internal_pb2.Record.FromString(data) for data in chunks]
    return records


@pytest.mark.skipif(not find_spec("wandb"), reason="wandb is not installed")
@pytest.mark.filterwarnings("ignore")
def test_wandb_offline_holds_metrics_and_a_table_with_sound_under_one_id(tmp_path):
    made = tracked(tmp_path / "run", "wandb")
    records = wandb_records(tmp_path / "run")
    assert {record.run.run_id for record in records if record.HasField("run")} == {made.ids["wandb"]}
    config = {item.key: item.value_json for record in records for item in record.run.config.update}
    config |= {item.key: item.value_json for record in records for item in record.config.update}
    assert config["learning_rate"] == "0.001" and json.loads(config["rewards"]) == "{'accuracy': 1.0}"
    rows = [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            for record in records if record.HasField("history")]  # fmt: skip
    steps = [(row["step"], row["reward_total"]) for row in rows if "reward_total" in row]
    assert steps == [(2, 2.5), (3, 2.5)] and rows[0]["eval/greedy/accuracy"] == 0.25
    assert any(record.HasField("metric") and record.metric.step_metric == "step" for record in records)
    (path,) = (tmp_path / "run").glob("wandb/offline-run-*/files/media/table/*.json")
    table = json.loads(path.read_text())
    cells = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["total"] for row in cells] == [2.0, 0.0, 1.0, 1.0] and cells[0]["completion"] == "good"
    assert cells[1]["completion"].startswith("<script>") and "\x1b" not in cells[1]["completion"]
    assert [row["clip_0"] for row in cells] == ["Audio", "Audio", None, None]
    (manifest,) = [record.artifact.manifest for record in records if record.artifact.type == "run_table"]
    paths = {entry.path: entry.local_path for entry in manifest.contents}
    (sound,) = [Path(local) for name, local in paths.items() if name.endswith(".wav")]
    assert sound.read_bytes()[:4] == b"RIFF" and "rollouts.table.json" in paths
    overwritten(tmp_path / "run", "wandb")


@pytest.mark.skipif(not find_spec("trackio"), reason="trackio is not installed")
def test_trackio_continues_a_run_and_holds_sound(tmp_path):
    import sqlite3

    made = tracked(tmp_path / "run", "trackio")
    (base,) = (tmp_path / "home" / "t").glob("*.db")
    rows = sqlite3.connect(base).execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert {name for name, _, _ in rows} == {f"run-{made.ids['trackio']}"}
    values = [json.loads(text) for _, _, text in rows]
    assert [row["reward_total"] for row in values if "reward_total" in row] == [2.5, 2.5]
    (table,) = [row["rollouts"] for row in values if "rollouts" in row]
    assert table["_value"][1]["completion"].startswith("    <script>")
    assert list((tmp_path / "home" / "t").rglob("*.wav"))


@pytest.mark.skipif(not find_spec("swanlab"), reason="swanlab is not installed")
def test_swanlab_offline_holds_text_and_sound(tmp_path):
    tracked(tmp_path / "run", "swanlab")
    folders = sorted((tmp_path / "run" / "swanlog").glob("run-*"))
    assert len(folders) == 2, "the run and its continuation"
    assert list((tmp_path / "run").rglob("*.wav"))
    assert any("<script>" in path.read_text() for path in (tmp_path / "run").rglob("*.txt") if "media" in path.parts)


def test_a_tracker_that_is_not_there_is_refused_with_the_line_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "package_versions", lambda names: dict.fromkeys(names))
    with pytest.raises(ConfigError, match="report_to wandb: it is not installed: pip install wandb"):
        Trackers(TrackerConfig(report_to="wandb"), tmp_path)
    with pytest.raises(ConfigError, match=r"no tracker is installed: pip install 'covo-rl\[trackers\]'"):
        Trackers(TrackerConfig(report_to="all"), tmp_path)
    assert Trackers(TrackerConfig(), tmp_path).names == [] and not any(tmp_path.iterdir())
    monkeypatch.setattr(room, "package_versions", lambda names: {**dict.fromkeys(names), "tensorboard": "2"})
    assert Trackers(TrackerConfig(report_to="all"), tmp_path).names == ["tensorboard"]


def test_an_unknown_tracker_is_named_before_anything_else():
    options = Options()
    options.tracker.report_to = "wandb,tensorbord"
    (problem,) = option_problems(options)
    assert problem == f"report_to 'wandb,tensorbord': choose none, all, or some of {', '.join(TRACKERS)}"
    options.tracker.report_to, options.tracker.trackio_space_id = "none", "me/space"
    assert option_problems(options) == ["trackio_space_id has no effect without report_to trackio"]


class Network:
    """accelerate's interface to a server."""

    down = False

    def __init__(self, *names, **options):
        self.calls = 0

    def start(self):
        pass

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None):
        self.calls += 1
        if self.down and self.calls > 1:
            raise ConnectionError("no route\x1b[31m to host")

    def finish(self):
        pass


class Broken(Network):
    """It is down from the second call on."""

    down = True


def test_a_tracker_that_fails_is_said_once_counted_and_left_alone(tmp_path, monkeypatch, capsys):
    from accelerate import tracking

    for name, kind in {"swanlab": Broken, "trackio": Network}.items():
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, kind)
    monkeypatch.setattr(room, "package_versions", lambda names: dict.fromkeys(names, "1"))
    trackers = started(tmp_path, "swanlab,trackio")
    broken = trackers.active["swanlab"]
    for step in range(1, 11):
        trackers.log({"loss": 1.0}, step)
    assert broken.calls == 1 + room.PATIENCE, "after three failures in a row it is not asked again"
    trackers.finish()
    trackers.finish()  # twice does nothing
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("training goes on") == 1 and printed.count("no route") == 2 and "\x1b[31m" not in printed
    assert "swanlab: 9 record(s) did not get there" in printed and "trackio" not in printed


def test_a_tracker_that_cannot_start_is_a_problem_and_no_other_is_left_running(tmp_path, monkeypatch):
    from accelerate import tracking

    class Refusing(Network):
        def start(self):
            raise RuntimeError("no API key")

    for name, kind in {"swanlab": Refusing, "trackio": Network}.items():
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, kind)
    monkeypatch.setattr(room, "package_versions", lambda names: dict.fromkeys(names, "1"))
    trackers = Trackers(TrackerConfig(report_to="trackio,swanlab"), tmp_path)
    problem = trackers.start({})
    assert problem is not None and problem.startswith("report_to swanlab: RuntimeError: no API key; log in")
    assert trackers.active == {}


def test_a_damaged_list_of_runs_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "package_versions", lambda names: dict.fromkeys(names, "1"))
    (tmp_path / room.IDS).write_text('{"tensor')
    problem = Trackers(TrackerConfig(report_to="tensorboard"), tmp_path).start({}, resume=True)
    assert problem is not None and "trackers.json cannot be read, was it cut?" in problem


def test_a_table_has_the_best_and_the_worst_of_the_first_prompts():
    record = StepRecord(1, {}, [rollout(f"row{i % 10}", float(i // 10)) for i in range(30)])
    rows = table_rows(record, lambda name: [])
    assert [cells["id"] for cells, _ in rows] == ["row0", "row0", "row1", "row1", "row2", "row2", "row3", "row3"]
    assert [cells["total"] for cells, _ in rows[:2]] == [2.0, 0.0] and rows[0][0]["thinking"] is None
    assert [step for step in range(1, 26) if is_logged(step, 25)] == [1, 10, 20, 25]


def test_names_of_any_shape_reach_every_tracker(tmp_path):
    """A reward is named by its path, by users."""
    names = {"reward_./mine.py:score": 1.0, "logged/ä ö": 2.0, "reward_package.module:f": 3.0}
    for name in [name for name in TRACKERS if find_spec(name)]:
        trackers = started(tmp_path / name, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trackers.log_step(StepRecord(1, {"step": 1, **names}, []))
        assert trackers.lost == {}
        trackers.finish()
    assert os.environ["WANDB_MODE"] == "offline"


def test_a_reward_named_like_a_column_of_the_table_hides_nothing():
    rewards = {"question": 0.5, "id": 1.0, "total": 0.25, "clips": None}
    record = StepRecord(1, {}, [{**rollout("row0", 2.0), "rewards": rewards}])
    cells, _ = table_rows(record, lambda name: [])[0]
    assert (cells["question"], cells["id"], cells["total"], cells["clips"]) == ("What?", "row0", 2.0, "a.wav")
    assert [cells[f"reward/{name}"] for name in rewards] == [*rewards.values()]


def test_a_clip_that_resampling_made_louder_than_full_level_is_cut_to_it():
    loud = (np.array([0.5, 1.2, -1.01], dtype=np.float32), 16000)
    _, sounds = table_rows(StepRecord(1, {}, [rollout("row0", 2.0)]), lambda row: [loud])[0]
    assert sounds[0][0].tolist() == [0.5, 1.0, -1.0], "tensorboard warns on the console otherwise"


def test_the_clips_of_a_prompt_are_read_once_for_a_table():
    asked = []
    table_rows(
        StepRecord(1, {}, [rollout(f"row{i % 3}", float(i)) for i in range(12)]), lambda row: asked.append(row) or []
    )
    assert asked == ["row0", "row1", "row2"]


@pytest.mark.skipif(not find_spec("tensorboard"), reason="tensorboard is not installed")
def test_a_full_disk_costs_the_tracker_its_records_and_not_the_run(tmp_path):
    """In a process of its own, which may write 20 kB to a file."""
    code = f"""
import resource, signal, sys, time
from pathlib import Path
from accelerate import PartialState
PartialState(cpu=True)
from covo_rl.config import TrackerConfig
from covo_rl.records.trackers import Trackers
trackers = Trackers(TrackerConfig(report_to="tensorboard"), Path({str(tmp_path)!r}))
assert trackers.start({{}}) is None
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for step in range(400):
    trackers.log({{f"name{{i}}": 1.0 for i in range(10)}}, step)
    time.sleep(0.001)
for tracker in trackers.active.values():
    time.sleep(0.5)
trackers.log({{"last": 1.0}}, 400)
trackers.finish()
print("went on")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    printed = " ".join(done.stdout.split())
    assert done.returncode == 0 and "went on" in printed
    assert "tensorboard: OSError: [Errno 27]" in printed and "record(s) did not get there" in printed
