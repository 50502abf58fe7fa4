"""Signals, broken steps and memory: the small parts that keep a run alive, and whole processes under them."""

import fcntl
import json
import math
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
import torch
from processes import children, kill_all

from covo_rl.train.guard import (
    EXIT_STOPPED,
    StepGuard,
    StoppedBySignal,
    StopSignals,
    TrainingStopped,
    is_out_of_memory,
    not_finite_parameters,
    out_of_memory_advice,
)

HERE = Path(__file__).parent
PATIENCE_S = 200  # starting two ranks takes 5 s on an idle machine and a minute on a busy one
SLOW_STEPS = ["--steps", "200", "--num-iterations", "2", "--steps-per-generation", "2", "--update-seconds", "0.02"]


@pytest.fixture(autouse=True)
def not_under_nohup():
    """A suite started by nohup ignores SIGHUP, and so would the processes that these tests start and hang up."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_signal_is_noted_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_second_ctrl_c_interrupts_at_once():
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_closed_terminal_is_noted_and_what_is_printed_then_goes_nowhere():
    """finding 13: SIGHUP saved nothing; and the next line for the terminal would end the run before it saved."""
    code = """
import os, signal, sys, time
from covo_rl.train.guard import StopSignals
with StopSignals() as stop:
    os.write(3, b"ready")
    while not stop.received: time.sleep(0.01)
    for stream in (sys.stdout, sys.stderr): print("x" * 10000, file=stream, flush=True)
    os.write(3, stop.received.encode())
"""
    terminal, theirs = pty.openpty()
    ours, pipe = os.pipe()

    def become_its_leader():
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        os.dup2(pipe, 3)

    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=become_its_leader,
        close_fds=False,
    )  # fmt: skip
    os.close(theirs)
    os.close(pipe)
    with open(ours, "rb", buffering=0) as said:
        assert said.read(5) == b"ready"
        os.close(terminal)
        assert said.read(6) == b"SIGHUP" and process.wait(timeout=30) == 0


def test_nohup_stays_nohup():
    """finding 13, its neighbour: a run under nohup must outlive the terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_nothing_is_installed():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def body():
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [before]


def test_the_exit_code_is_that_of_a_temporary_failure():
    assert StoppedBySignal("SIGTERM", Path("x")).code == EXIT_STOPPED == os.EX_TEMPFAIL == 75


def test_dumps_are_bounded_and_readable(tmp_path):
    guard = StepGuard(tmp_path, limit=99, max_dumps=2)
    for step in range(4):
        guard.failed(step, {"loss": math.nan, "grad_norm": 1.0}, lambda: {"rows": [{"id": "é"}]})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000000", "step_000001"]
    dump = json.loads((tmp_path / "step_000000" / "rank_00000.json").read_text(encoding="utf-8"))
    assert dump["not_finite"] == {"loss": "nan"} and dump["rows"] == [{"id": "é"}]
    assert (guard.skipped, guard.in_a_row) == (4, 4)
    restored = StepGuard(tmp_path, limit=5)
    restored.load_state_dict(guard.state_dict())
    with pytest.raises(TrainingStopped, match=r"step 9: 5 optimiser updates in a row .*loss = inf"):
        restored.failed(9, {"loss": math.inf}, dict)
    restored.passed()
    assert (restored.skipped, restored.in_a_row) == (5, 0)


def test_broken_parameters_are_named():
    model = torch.nn.Linear(2, 2)
    model.weight.grad = torch.tensor([[0.0, math.inf], [0, 0]])
    with torch.no_grad():
        model.bias[0] = math.nan
    assert not_finite_parameters(model) == {"parameters": ["bias"], "gradients": ["weight"]}


def test_memory_errors_are_told_from_others():
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**50, dtype=torch.float64)
    assert is_out_of_memory(real.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes")) and not is_out_of_memory(ValueError("out of memory"))
    advice = out_of_memory_advice(1, 8, can_retry=False)
    assert "micro_batch_rollouts (now 8) to 4" in advice and "covo-rl doctor" in advice and "oom_retry" not in advice


def start(output, *words, ranks=1):
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, str(HERE / "toy.py"), "--output", str(output), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for_step(process, output, step):
    """Until metrics.jsonl has `step` lines."""
    deadline = time.monotonic() + PATIENCE_S
    path = output / "metrics.jsonl"
    while not path.is_file() or path.read_bytes().count(b"\n") < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"no step within {PATIENCE_S} s"
        time.sleep(0.02)


def stop_all(*processes):
    """End what still runs of these runs, ranks included."""
    for process in processes:
        if process.poll() is None:
            kill_all(process)
        process.communicate()


def steps_of(output):
    return [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGHUP))]
)
def test_a_signalled_process_saves_and_exits_with_75(tmp_path, number):
    """finding 13: SIGHUP saved nothing."""
    process = start(tmp_path, *SLOW_STEPS, "--checkpoint-every", "1000")
    try:
        wait_for_step(process, tmp_path, 2)
        process.send_signal(number)
        output, _ = process.communicate(timeout=PATIENCE_S)
    finally:
        stop_all(process)
    assert process.returncode == 75, output
    (saved,) = (tmp_path / "checkpoints").iterdir()
    step = int(saved.name[5:11])
    assert steps_of(tmp_path) == list(range(1, step + 1))


@pytest.mark.slow
def test_two_ranks_stopped_and_resumed_end_as_undisturbed(tmp_path):
    """torchrun hands SIGTERM to both ranks; each saves its own random state and rollouts."""
    words = ["--steps", "10", "--num-iterations", "2", "--steps-per-generation", "2"]
    undisturbed = start(tmp_path / "a", *words, ranks=2)
    interrupted = start(tmp_path / "b", *words, "--update-seconds", "0.05", ranks=2)
    try:
        wait_for_step(interrupted, tmp_path / "b", 3)
        os.kill(interrupted.pid, signal.SIGTERM)
        interrupted.communicate(timeout=PATIENCE_S)
        assert len(steps_of(tmp_path / "b")) < 10
        saved = max((tmp_path / "b" / "checkpoints").iterdir())
        assert {"rank_00000.json", "rank_00001.json"} <= {p.name for p in saved.iterdir()}
        resumed = start(tmp_path / "b", *words, "--resume", "auto", ranks=2)
        output, _ = resumed.communicate(timeout=PATIENCE_S)
        assert resumed.returncode == 0, output
        output, _ = undisturbed.communicate(timeout=PATIENCE_S)
        assert undisturbed.returncode == 0, output
    finally:
        stop_all(undisturbed, interrupted)
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == (tmp_path / "b" / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_one_dead_rank_takes_the_run_down_and_it_can_be_resumed(tmp_path):
    process = start(tmp_path, *SLOW_STEPS, ranks=2)
    try:
        wait_for_step(process, tmp_path, 2)
        victim = children(process.pid)[-1]
        begun = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        output, _ = process.communicate(timeout=PATIENCE_S)
    finally:
        stop_all(process)
    assert process.returncode not in (0, None)
    assert time.monotonic() - begun < 60
    assert "SIGKILL" in output or "Signal 9" in output, output
    words = [*SLOW_STEPS[2:-2], "--steps", "200", "--resume", "auto"]
    resumed = start(tmp_path, *words, ranks=2)
    try:
        wait_for_step(resumed, tmp_path, 5)
    finally:
        stop_all(resumed)
    steps = steps_of(tmp_path)
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
def test_ranks_whose_launcher_is_killed_save_and_end(tmp_path):
    """Each rank has a session of its own: without PR_SET_PDEATHSIG they would train on unseen."""
    process = start(tmp_path, *SLOW_STEPS, ranks=2)
    try:
        wait_for_step(process, tmp_path, 2)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=PATIENCE_S)  # their output ends when both ranks have ended
    finally:
        stop_all(process)
    steps = steps_of(tmp_path)
    assert len(steps) < 200
    saved = max((tmp_path / "checkpoints").iterdir())
    assert int(saved.name[5:11]) == len(steps) and (saved / "rank_00001.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_killed_at_random_moments(ranks):
    command = [sys.executable, str(HERE / "kill_and_resume.py"), "--toy", "--kills", "5", "--ranks", ranks]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("survived 5 of 5\n")
