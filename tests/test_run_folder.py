"""A run folder has one owner and changes only when a run is accepted; its logs survive kills and full disks."""

import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_pages import packed

from covo_rl import synth
from covo_rl.config import parse_options
from covo_rl.data.files import append_lines, whole_lines
from covo_rl.records import console
from covo_rl.records.folder import Run
from covo_rl.records.lock import FolderLock
from covo_rl.run import setup as setup_room
from covo_rl.run.report.page import report_page
from covo_rl.run.session import Session

ROOT = Path(__file__).parents[1]
HOLD = """
import sys, time
from covo_rl.records.lock import FolderLock
lock = FolderLock(sys.argv[1])
print(lock.hold(), flush=True)
time.sleep(600)
"""


def holder(folder):
    """A process that asks for the lock, says what it got, and stays."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return process, process.stdout.readline().strip()


def end(*processes):
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def everything(folder):
    """Every file below, with its content and the time it was written."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


# -- the lock ----------------------------------------------------------------------------------------------------


def test_a_living_owner_is_named_and_a_killed_one_is_not_obeyed(tmp_path):
    """finding 07"""
    owner, got = holder(tmp_path / "run")
    lock = FolderLock(tmp_path / "run")
    try:
        assert got == "None"
        for why in (lock.refusal(), lock.hold()):
            assert f"in use by process {owner.pid} on {socket.gethostname()} since 20" in why
            assert "choose another --output" in why
    finally:
        end(owner)  # SIGKILL: its lock.json stays
    assert json.loads((tmp_path / "run" / "lock.json").read_text())["pid"] == owner.pid
    assert lock.refusal() is None and lock.hold() is None
    assert json.loads((tmp_path / "run" / "lock.json").read_text())["pid"] == os.getpid()
    other, got = holder(tmp_path / "run")
    end(other)
    assert f"in use by process {os.getpid()}" in got
    lock.release()
    assert not list((tmp_path / "run").iterdir())


def test_a_forked_child_does_not_keep_the_folder_of_its_dead_parent(tmp_path):
    """finding 07: a worker that outlives its run; and a child that ends does not give its parent's folder back."""
    fork = HOLD.replace(
        "time.sleep(600)", "import os; child = os.fork(); print(child, flush=True); time.sleep(child and 600)"
    )
    owner = subprocess.Popen([sys.executable, "-c", fork, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert [owner.stdout.readline().strip() for _ in range(3)].count("None") == 1
    lock = FolderLock(tmp_path)
    assert f"in use by process {owner.pid}" in lock.refusal()
    end(owner)
    fork = fork.replace("child and 600", "0 if child else 600")
    owner = subprocess.Popen([sys.executable, "-c", fork, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    lines = [owner.stdout.readline().strip() for _ in range(3)]
    owner.wait()
    owner.stdout.close()
    assert lock.hold() is None
    lock.release()
    os.kill(max(int(line) for line in lines if line.isdigit()), signal.SIGKILL)


def test_of_many_that_find_a_stale_lock_at_once_one_gets_it(tmp_path):
    """finding 07"""
    (tmp_path / "lock.json").write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(6)]
    answers = [process.stdout.readline().strip() for process in processes]
    end(*processes)
    assert answers.count("None") == 1
    assert sum("is in use by process" in answer for answer in answers) == 5


@pytest.mark.parametrize("content", ["", "{", "null", "[]", '{"pid": "7", "host": 3}', '{"host": "elsewhere"}', "\x00"])
def test_a_damaged_lock_file_belongs_to_nobody(content, tmp_path):
    """finding 07"""
    (tmp_path / "lock.json").write_text(content)
    lock = FolderLock(tmp_path)
    assert lock.refusal() is None and lock.hold() is None
    lock.release()


def test_an_owner_on_another_host_is_not_guessed_about(tmp_path):
    """finding 07"""
    (tmp_path / "lock.json").write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "2026-01-01 00:00:00"}))
    before = everything(tmp_path)
    lock = FolderLock(tmp_path)
    for why in (lock.refusal(), lock.hold()):
        assert "process 1 on elsewhere since 2026-01-01" in why and f"remove {tmp_path / 'lock.json'}" in why
    assert everything(tmp_path) == before
    (tmp_path / "lock.json").unlink()
    assert lock.hold() is None
    lock.release()


def test_without_locks_in_the_file_system_the_pid_decides(tmp_path, monkeypatch):
    """finding 07: NFS without a lock daemon says ENOLCK."""

    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("covo_rl.records.lock.fcntl.flock", no_locks)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for pid, free in ((ended.pid, True), (os.getppid(), False)):
        (tmp_path / "lock.json").write_text(json.dumps({"pid": pid, "host": socket.gethostname()}))
        assert (FolderLock(tmp_path).refusal() is None) == free
    assert f"remove {tmp_path / 'lock.json'}" in FolderLock(tmp_path).refusal()


def test_a_folder_that_cannot_be_made_is_a_refusal(tmp_path):
    """finding 07"""
    (tmp_path / "file").write_text("")
    lock = FolderLock(tmp_path / "file" / "run")
    assert "is no folder that you may write to" in lock.hold()
    assert f"{tmp_path / 'file'} is no folder that you may write to" in lock.refusal()


# -- acceptance --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return synth.render_set(tmp_path_factory.mktemp("questions"), seed=7, train=22, validation=11, test=22)


@pytest.fixture(scope="module")
def words(questions):
    train, test = questions["train"], questions["test"]
    return ["--config", ROOT / "recipes" / "configs" / "tiny.yaml", "--data", train, "--eval-data", test, "--max-steps",
            2, "--prompts-per-step", 2, "--num-generations", 2, "--max-completion-length", 16, "--limit", 4,
            "--eval-limit", 4, "--checkpoint-every", 1, "--check-rewards", "false"]  # fmt: skip


def recipe(*words) -> Any:
    """What the recipe ends with: None, an exit code, or its message."""
    main = runpy.run_path(str(ROOT / "recipes" / "grpo_mmau.py"))["main"]
    try:
        return main([str(word) for word in words])
    except SystemExit as error:
        return error.code


@pytest.fixture(scope="module")
def finished_run(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert recipe(*words, "--output", folder) is None
    return folder


@pytest.fixture
def run(finished_run, tmp_path):
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def unfinished(run):
    """It died in step 2, after the checkpoint of step 1."""
    for name in ("result.json", "curves.png"):
        (run / name).unlink()
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "step_000002")
    return run


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model fails the test."""

    def load(*_, **__):
        raise AssertionError("a model was loaded before the run was refused")

    monkeypatch.setattr(setup_room, "trainable_policy", load)


def test_a_run_leaves_its_folder_unlocked_and_whole(finished_run):
    """finding 07"""
    names = sorted(path.name for path in finished_run.iterdir())
    assert names == ["adapter", "before.json", "checkpoints", "config.yaml", "curves.png", "environment.json",
                     "metrics.jsonl", "result.json", "rollouts"]  # fmt: skip
    environment = json.loads((finished_run / "environment.json").read_text())
    assert environment["family"] == "covo_rl.models.covo_audio.family:CovoAudio"
    (prompt,) = environment["prompts"].values()
    assert prompt.startswith("<|im_start|>user\n<|begofcAUDIO|>") and prompt.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("more", [[], ["--resume", "auto"], ["--overwrite"]])
def test_nobody_enters_the_folder_of_a_living_run(more, unfinished, words, no_model):
    """finding 07"""
    owner, _ = holder(unfinished)
    try:
        before = everything(unfinished)
        assert f"in use by process {owner.pid} on" in recipe(*words, "--output", unfinished, *more)
        assert everything(unfinished) == before
    finally:
        end(owner)


def test_a_new_run_replaces_neither_a_finished_nor_an_unfinished_one(run, words, no_model):
    """finding 09, finding 08"""
    before = everything(run)
    assert f"{run} holds a finished run: choose another --output, or replace it with --overwrite" in recipe(
        *words, "--output", run
    )
    assert everything(run) == before
    (run / "result.json").unlink()
    before = everything(run)
    message = recipe(*words, "--output", run)
    assert f"{run} holds an unfinished run" in message and "--resume auto" in message
    assert everything(run) == before


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "before.json", "rollouts/step_00001.jsonl", "checkpoints/step_000001/x"]
)
def test_any_trace_of_a_run_counts(name, tmp_path, words, no_model):
    """finding 09: without a checkpoint as well."""
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    for path in (tmp_path / "config.yaml", tmp_path / "environment.json", tmp_path / name):
        path.write_text("{}")
    assert "holds an unfinished run" in recipe(*words, "--output", tmp_path)


@pytest.mark.parametrize("name", ["config.yaml", "model/config.json", "adapter/adapter_config.json", "metrics.jsonl"])
@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume", "auto"]])
def test_what_no_run_wrote_is_not_touched(name, more, tmp_path, words, no_model):
    """finding 09: a folder of the user's that has such names of its own."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    assert "which no run wrote" in recipe(*words, "--output", tmp_path, *more)
    assert list(everything(tmp_path)) == [name]


def test_a_dry_run_writes_nothing(run, words, tmp_path, capsys):
    """finding 08"""
    before = everything(tmp_path)
    assert recipe(*words, "--output", run, "--dry-run", "--learning-rate", "0.5") is None
    said = " ".join(capsys.readouterr().out.split())
    assert "a start would be refused" in said and "nothing was started" in said
    assert recipe(*words, "--output", tmp_path / "new", "--dry-run") is None
    assert everything(tmp_path) == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--resume", "auto", "--learning-rate", "0.5"], "learning_rate: 0.001 in the checkpoint, 0.5 now"),
        (["--resume", "auto", "--limit", "3"], "limit: 4 in the checkpoint, 3 now"),
        (["--resume", "nowhere"], "no such folder"),
        (["--resume", "auto", "--max-completion-length", "16", "--seed", "9"], "seed: 42 in the checkpoint, 9 now"),
        (["--resume", "auto", "--overwrite"], "choose one"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_refused_resume_changes_nothing_and_loads_no_model(more, message, dry, unfinished, words, no_model):
    """finding 08"""
    before = everything(unfinished)
    assert message in recipe(*words, "--output", unfinished, *more, *dry)
    assert everything(unfinished) == before


def test_metrics_that_were_replaced_are_noticed_before_a_model_is_loaded(unfinished, words, no_model):
    """finding 08"""
    (unfinished / "metrics.jsonl").write_text("")
    before = everything(unfinished)
    assert "metrics.jsonl has 0 bytes, but had" in recipe(*words, "--output", unfinished, "--resume", "auto")
    assert everything(unfinished) == before


@pytest.mark.parametrize("source", ["auto", "checkpoints/step_000001"])
def test_a_damaged_checkpoint_is_noticed_before_a_model_is_loaded(source, unfinished, words, no_model):
    """finding 08"""
    weights = unfinished / "checkpoints" / "step_000001" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    before = everything(unfinished)
    source = source if source == "auto" else unfinished / source
    assert "weights.safetensors has" in recipe(*words, "--output", unfinished, "--resume", source)
    assert everything(unfinished) == before


def test_a_resume_with_other_rows_is_refused_before_anything_is_written(unfinished, words, questions, tmp_path):
    """finding 08: the same number of rows, so that only their content tells."""
    rows = json.loads(questions["train"].read_text())
    shuffled = tmp_path / "rows.json"
    shuffled.write_text(json.dumps(rows[::-1]))
    before = everything(unfinished)
    more = ["--data", shuffled, "--audio-dir", questions["train"].parent, "--resume", "auto"]
    assert "content or order has changed" in recipe(*words, "--output", unfinished, *more)
    assert everything(unfinished) == before


def test_broken_rows_are_reported_before_a_model_is_loaded_and_leave_no_folder(words, questions, tmp_path, no_model):
    """finding 08"""
    rows = json.loads(questions["train"].read_text())[:4]
    rows[1]["audio_id"] = "broken.wav"
    for row in (rows[0], *rows[2:]):
        row["audio_id"] = str(questions["train"].parent / row["audio_id"])
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    more = ["--data", tmp_path / "rows.json", "--audio-dir", tmp_path, "--allow-outside-audio", "true"]
    more += ["--eval-audio-dir", questions["test"].parent]
    message = recipe(*words, *more, "--output", tmp_path / "run")
    assert rows[1]["id"] in message and "broken.wav" in message
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_elsewhere_does_not_open_a_folder(run, unfinished, words, tmp_path, no_model):
    """finding 09: --resume PATH continues the run at PATH, not whatever OUTPUT holds."""
    other = Path(shutil.copytree(run, tmp_path / "other"))
    before = everything(unfinished)
    step = other / "checkpoints" / "step_000001"
    assert "holds an unfinished run" in recipe(*words, "--output", unfinished, "--resume", step)
    assert everything(unfinished) == before


def test_a_finished_run_that_is_resumed_has_nothing_to_do(run, words, no_model, capsys):
    """finding 09: a job script may always pass --resume auto."""
    before = everything(run)
    assert recipe(*words, "--output", run, "--resume", "auto") == 0
    assert "finished: nothing to do" in " ".join(capsys.readouterr().out.split())
    assert everything(run) == before


def accepted(*words):
    """A session up to the moment from which it writes."""
    session = Session(parse_options([str(word) for word in words]))
    session.show()
    session.run.lock.release()
    return session


def test_overwrite_deletes_what_a_run_wrote_and_no_more(run, words):
    """finding 09"""
    mine = [run / name for name in ("notes.txt", "rollouts/notes.txt", "adapter/notes.txt", "checkpoints/notes.txt")]
    for path in mine:
        path.write_text("mine")
    before = everything(run)
    assert recipe(*words, "--output", run, "--overwrite", "--rewards", "acuracy") is not None
    assert everything(run) == before, "refused: nothing is deleted"
    accepted(*words, "--output", run, "--overwrite")
    names = sorted(everything(run))
    ours = ["config.yaml", "environment.json", "adapter/export.json"]  # which lets the new run export beside the notes
    assert names == sorted([*ours, *(str(path.relative_to(run)) for path in mine)])
    assert yaml.safe_load((run / "config.yaml").read_text())["overwrite"] is True


def test_the_untrained_policy_is_evaluated_again_where_its_figures_are_of_other_rows(
    unfinished, words, questions, tmp_path
):
    """finding 10"""
    rows = json.loads(questions["test"].read_text())[10:13]
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{**row, "category": "Elsewhere"} for row in rows]))
    more = ["--eval-data", other, "--eval-audio-dir", questions["test"].parent, "--resume", "auto"]
    session = accepted(*words, "--output", unfinished, *more)
    before = session.before()
    assert before["greedy"]["n"] == 3 and list(before["greedy"]["breakdown"]["category"]) == ["Elsewhere"]
    after = session.evaluate()
    assert console.before_after_table(before, after).row_count == console.before_after_table(after, after).row_count
    written = (unfinished / "before.json").stat().st_mtime_ns
    assert session.before() == json.loads(json.dumps(before)), "now it is of these rows, and read"
    assert (unfinished / "before.json").stat().st_mtime_ns == written
    for content in ("", "null", '{"greedy": ', "[]", "{}"):
        (unfinished / "before.json").write_text(content)
        assert session.before()["sampled"]["n"] == 3


def test_a_table_of_different_rows_has_dashes_where_there_is_nothing_to_compare():
    """finding 10"""
    none = {"accuracy": None, "ci95": None, "n": 0, "breakdown": {}}
    some = {"accuracy": 0.5, "ci95": [0.2, 0.8], "n": 2,
            "breakdown": {"task": {"music": {"n": 2, "strict": {"accuracy": 0.5, "ci95": [0.2, 0.8]}}}}}  # fmt: skip
    for before, after in ((none, some), (some, none), (none, none)):
        table = console.before_after_table(
            {"greedy": before, "sampled": before}, {"greedy": after, "sampled": {**after, "reward_total": 1.0}}
        )
        changes = list(table.columns[4].cells)
        assert changes[0] == changes[-1] == "-"


# -- readers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("result.json", "null", ""),
        ("result.json", '{"before": null, "after": null}', '"name": "before, greedy"'),
        ("result.json", '{"before": {"n": 4}, "after": null}', '"name": "before, greedy"'),
        ("result.json", '{"after": {"n": 4}}', '"result": {"after": {"n": 4}}'),
        ("result.json", '{"before": {"n": 4}, "aft', "result.json cannot be read"),
        ("result.json", "[]", ""),
        ("metrics.jsonl", "", ""),
        ("metrics.jsonl", '{"step": 1, "reward_total": 1.0}\n{"step": 2, "rew', "metrics.jsonl, line 2 is left out"),
        ("metrics.jsonl", '{"step": 1}{"step": 2}\n{"step": 3}\n', "metrics.jsonl, line 1 is left out"),
        ("metrics.jsonl", '{"step": 1, "reward_total": NaN}\n{"reward_a": null}\n{"step": "x"}\n', ""),
        ("metrics.jsonl", '{"step": 1}\n\x00\x00\x00', "metrics.jsonl, line 2 is left out"),
        ("rollouts/step_00002.jsonl", "", "1 rollouts files are empty"),
        ("rollouts/step_00002.jsonl", '{"id": "a", "completion": "x"}\n{"id": "b"', "jsonl, line 2 is left out"),
        ("config.yaml", "", "configuration"),
        ("config.yaml", "a: [1", "config.yaml cannot be read"),
    ],
)  # fmt: skip
def test_the_report_survives_and_names_what_is_damaged(name, content, said, run):
    """finding 10"""
    (run / name).write_text(content)
    page = report_page(run)
    assert said in page + json.dumps(packed(page))
    (run / name).unlink()
    report_page(run)


def test_the_report_of_a_run_without_evaluation_comes_from_the_command(run):
    """finding 10, finding 11: and is whole or absent."""
    from typer.testing import CliRunner

    from covo_rl.run.report.page import app

    (run / "result.json").write_text('{"before": null, "after": null, "steps": 2}')
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3')
    done = CliRunner().invoke(app, [str(run)])
    assert done.exit_code == 0, done.output
    assert "line 3 is left out" in (run / "report.html").read_text()


# -- a full disk -------------------------------------------------------------------------------------------------

FULL = """
import resource
from covo_rl.records.folder import Run
run = Run({folder!r})
run.write_config({{"seed": 1}})
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (250, limits[1]))  # every file ends after 250 bytes, as on a full disk
for step in range(1, 6):
    run.log_metrics({{"step": step, "reward_total": step / 7, "text": "x" * 60}})
    run.log_rollouts(step, [{{"id": "a", "completion": "y" * 50 * step}}])
try:
    run.write_config({{"seed": "z" * 500}})
except OSError as error:
    print("config:", error)
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
if {room}:
    run.log_metrics({{"step": 6}})
"""


@pytest.mark.parametrize("room", [True, False])
def test_a_full_disk_ends_no_run_and_leaves_no_half_line(room, tmp_path):
    """finding 11: steps wait for room and none is lost; rollouts are whole or absent; the old config.yaml stays."""
    script = textwrap.dedent(FULL.format(folder=str(tmp_path), room=room))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "config: [Errno 27]" in said and "the rollouts of step 5 are not in the log" in said
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    steps = [json.loads(line)["step"] for line in text.splitlines()]
    assert steps == ([1, 2, 3, 4, 5, 6] if room else [1, 2])
    assert "3 step(s) of metrics.jsonl wait for room" in said
    logs = sorted((tmp_path / "rollouts").iterdir())
    assert [path.name for path in logs] == [
        "step_00001.jsonl",
        "step_00002.jsonl",
        "step_00003.jsonl",
        "step_00004.jsonl",
    ]
    assert all(json.loads(path.read_text())["id"] == "a" for path in logs)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"seed": 1}


def test_half_a_line_stays_alone(tmp_path):
    """finding 11"""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "rew')
    append_lines(path, ['{"step": 3}\n'])
    rows, notes = whole_lines(path)
    assert [row["step"] for row in rows] == [1, 3] and len(notes) == 1 and "line 2" in notes[0]
    assert Run(tmp_path).metrics() == rows


def test_curves_that_cannot_be_written_end_no_run(run, monkeypatch, capsys):
    """finding 11"""
    from covo_rl.run import result

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(result, "curves", full)
    summary = {"accuracy": None, "ci95": None, "n": 0, "breakdown": {}}
    both = {"greedy": summary, "sampled": summary}
    result.show_result(Run(run), dict.fromkeys(("before", "after", "silent", "swapped"), both), {})
    assert "not drawn: [Errno 28]" in capsys.readouterr().out


# -- words -------------------------------------------------------------------------------------------------------


def test_commands_with_own_data_name_their_folder():
    """finding 09: README and recipes/README; a second run of the demo must not meet the user's."""
    for name in ("README.md", "recipes/README.md"):
        text = (ROOT / name).read_text().replace("\\\n", " ")
        commands = [line for line in text.splitlines() if "recipes/" in line and " --data " in line]
        assert commands and all(" --output " in line or "--dry-run" in line for line in commands), commands


@pytest.mark.slow
def test_every_rank_of_a_refused_launch_says_so_and_ends(finished_run, words):
    """finding 07, finding 08"""
    before = everything(finished_run)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, ROOT / "recipes" / "grpo_mmau.py", *words, "--output", finished_run]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=180)
    assert done.returncode != 0 and done.stderr.count("holds a finished run") == 2
    assert everything(finished_run) == before


@pytest.mark.slow
def test_a_killed_run_is_resumed_at_once(words, tmp_path):
    """finding 07: SIGKILL leaves lock.json; the next process takes it over and ends the run."""
    run = tmp_path / "run"
    command = [sys.executable, ROOT / "recipes" / "grpo_mmau.py", *words, "--output", run, "--max-steps", 3]
    command = [*map(str, command), "--evaluate", "false"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (run / "checkpoints" / "step_000001").is_dir():
        assert process.poll() is None
    second = subprocess.run([*command, "--resume", "auto"], capture_output=True, text=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert f"in use by process {process.pid}" in second.stderr
    done = subprocess.run([*command, "--resume", "auto"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_sounds_of_an_earlier_run_are_cleared_and_what_the_user_put_there_is_not(tmp_path):
    for name in ("before", "after", "mine"):
        (tmp_path / "sounds" / name).mkdir(parents=True)
        (tmp_path / "sounds" / name / "stereo.wav").touch()
    Run(tmp_path).clear()
    assert [path.name for path in (tmp_path / "sounds").iterdir()] == ["mine"]
