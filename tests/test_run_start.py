"""A start that is killed or meets damage leaves a folder that the next start can use, and never a traceback."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from covo_rl.config import parse_options
from covo_rl.export.adapter import run_of, wording_of
from covo_rl.export.card import update_card
from covo_rl.export.exporting import staging
from covo_rl.records.folder import Run, export_files
from covo_rl.records.lock import FolderLock
from covo_rl.run import start
from covo_rl.run.report.curves import curves
from covo_rl.run.start import look_at, own
from covo_rl.train.checkpoint import CheckpointError, CheckpointStore
from covo_rl.train.checkpoint.timeline import finish_moving
from covo_rl.types import UserError

DAMAGE = (b"", b"{", b"null", b"[]", b'"x"', b"NaN", b"\xff\x00", b"[" * 100_000, b'{"files": 3}', b'{"pid": "x"}')


def options(folder, *more):
    config = Path(__file__).parents[1] / "recipes" / "configs" / "tiny.yaml"
    return parse_options(["--config", str(config), "--output", str(folder), *more])


@pytest.fixture(autouse=True)
def no_versions(monkeypatch):
    """Asking git and every package takes most of a start's time."""
    monkeypatch.setattr(start, "environment", lambda files: {})


@pytest.fixture
def run(tmp_path):
    """What a finished run has, without its tensors."""
    folder = tmp_path / "run"
    for name in ("config.yaml", "environment.json", "before.json", "result.json", "metrics.jsonl",
                 "rollouts/step_00001.jsonl", "checkpoints/step_000001/state.json", "adapter/adapter_config.json",
                 "adapter/README.md", "debug/step_000001/x", "abandoned/001/moved.json"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "adapter" / "export.json").write_text(
        json.dumps({"files": ["README.md", "adapter_config.json", "export.json"]})
    )
    return folder


def killed_before(number, action):
    """Whether a forked `action` came to its `number`-th change on disk, before which SIGKILL ends it."""

    def audit(event, values, changes=[]):  # noqa: B006 - the count
        writes = event == "open" and isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            changes.append(event)
            if len(changes) == number:
                os.kill(os.getpid(), signal.SIGKILL)

    if not (child := os.fork()):
        sys.addaudithook(audit)
        action()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def accepted(folder, *more):
    return not look_at(Run(folder), options(folder, *more), 1).problems


def test_a_first_start_killed_at_any_moment_can_be_started_again(tmp_path):
    """finding 08: where nothing was trained yet, a plain start is as good as --resume auto."""
    number, folder = 1, tmp_path / "run"
    while killed_before(number, lambda: own(Run(folder), options(folder), {})):
        assert accepted(folder) and accepted(folder, "--resume", "auto") and accepted(folder, "--overwrite"), number
        shutil.rmtree(folder, ignore_errors=True)
        number += 1
    assert number > 5


def test_an_overwrite_killed_at_any_moment_can_be_repeated(run, tmp_path):
    """finding 09: what is left of the old run still counts as a run's."""
    number = 1
    while True:
        folder = Path(shutil.copytree(run, tmp_path / str(number)))
        if not killed_before(number, lambda folder=folder: own(Run(folder), options(folder, "--overwrite"), {})):
            break
        assert accepted(folder, "--overwrite"), (number, sorted(folder.rglob("*")))
        number += 1
    assert number > 20 and not (folder / "result.json").exists()


def test_what_the_user_put_beside_an_export_outlives_an_overwrite(run):
    """finding 09: and the new run goes on, and exports, beside it; it was refused after training."""
    (run / "adapter" / "notes.txt").write_text("mine")
    record = Run(run)
    assert own(record, options(run, "--overwrite"), {}) is None
    record.lock.release()
    assert sorted(os.listdir(run / "adapter")) == ["export.json", "notes.txt"]
    assert accepted(run, "--resume", "auto") and accepted(run, "--overwrite")
    with staging(run / "adapter", replace=True) as stage:
        (stage / "export.json").write_text("new")
    assert (run / "adapter" / "export.json").read_text() == "new"
    assert (run / "adapter" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("content", DAMAGE)
@pytest.mark.parametrize("name", ["adapter/export.json", "lock.json", "environment.json", "abandoned/001/moving.json"])
def test_damage_ends_in_one_message_or_none(name, content, run):
    """finding 03, finding 09: and an export whose list is damaged is not deleted."""
    (run / name).write_bytes(content)
    look_at(Run(run), options(run, "--overwrite"), 1)
    try:
        finish_moving(run)
    except CheckpointError as error:
        assert "moving.json" in str(error)
    record = Run(run)
    problem = own(record, options(run, "--overwrite"), {})
    record.lock.release()
    if problem:
        assert "export.json cannot be read" in problem and (run / "adapter" / "README.md").is_file()
        assert (run / "result.json").is_file()
        with pytest.raises(UserError):
            export_files(run / "adapter")


@pytest.mark.parametrize("name", ["export.json", "verification.json", "../result.json", "../config.yaml"])
@pytest.mark.parametrize("content", [{"a": 1}, {"before": "x", "after": [3], "rewards": 7}, {"base_model": 1}])
def test_a_record_that_lacks_something_is_one_message(name, content, run):
    """finding 10: the model card is written from four files."""
    export = {"kind": "adapter", "base_model": "b", "model_type": "t", "model_class": "c", "model_module": "m",
              "files": []}  # fmt: skip
    for file, full in (("export.json", export), ("verification.json", {"ok": True}), (name, content)):
        (run / "adapter" / file).write_text(json.dumps(full))
    with pytest.raises(UserError):
        update_card(run / "adapter", run)


def test_a_config_file_above_an_adapter_is_not_its_run(run, tmp_path):
    """finding 39: a project's own config.yaml would name another base model and another wording."""
    (tmp_path / "config.yaml").write_text("model: somebody/else")
    (tmp_path / "mine").mkdir()
    assert run_of(tmp_path / "mine") is None and run_of(run / "adapter") == run


@pytest.mark.parametrize("text", ["think: 3", "choices_style: [1]", "nothing: x", "- a", "a: ["])
def test_a_damaged_wording_is_refused_by_every_reader(text, tmp_path):
    """finding 39: the one reader of prompt.yaml checks names, types and values."""
    (tmp_path / "prompt.yaml").write_text(text)
    with pytest.raises(UserError, match=r"prompt\.yaml"):
        wording_of(tmp_path, {})


def test_a_run_folder_is_no_checkpoint(run):
    """finding 03: --resume RUN, the likely slip, says what to name."""
    with pytest.raises(CheckpointError, match="is a run's folder"):
        CheckpointStore(run / "checkpoints").meant(str(run))
    problems = look_at(Run(run), options(run, "--resume", str(run)), 1).problems
    assert "is a run's folder" in problems[0]


@pytest.mark.parametrize("value", [10**400, 1e308, -1e308, float("inf"), None, "x", [1], True])
def test_curves_are_drawn_whatever_was_logged(value, tmp_path):
    """finding 10: a run would end in matplotlib's traceback, after training."""
    rows = [{"step": 1, "reward_total": value}, {"step": 2, "reward_total": -1e308}, {"step": value}]
    curves(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_the_lock_of_a_folder_written_in_other_ways_is_the_same(tmp_path, monkeypatch):
    """finding 07: relative, with a slash at the end, through a link."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("run")
    (tmp_path / "run").mkdir()
    lock = FolderLock("run/")
    assert lock.hold() is None
    child = os.fork()
    if not child:
        names = ["run", "./run/", "link", str(tmp_path / "x" / ".." / "run"), str(tmp_path / "link") + "/"]
        os._exit(sum("in use" in (FolderLock(name).refusal() or "") for name in names))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4  # x is not there, so x/.. is nowhere
    lock.release()
