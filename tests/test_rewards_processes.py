"""Plugins that fork, hang, shout, stop, or answer late: the limit holds, nothing stays, no score is another's."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from covo_rl.config import RewardConfig
from covo_rl.rewards import score
from covo_rl.rewards.columns import example_from_row, group_from_completions
from covo_rl.rewards.worker import close

GROUP = group_from_completions(example_from_row({"id": "r1", "question": "?", "answer": "b"}), ["a", "b"])
LIMIT, SLACK = 1.0, 2.0  # seconds; what ending the processes may take
PLUGINS = """
import decimal, os, signal, subprocess, sys, threading, time
import numpy as np
def note():
    with open(os.environ["PIDS"], "a") as file: file.write(f"{os.getpid()}\\n")
def ready(completions, **kw): note(); return [0.0, 1.0]
def forks_and_hangs(completions, **kw):
    note()
    if os.fork() == 0: note()
    time.sleep(3600)
def leaves_a_daemon(completions, **kw):
    note()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            note(); signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(3600)
        os._exit(0)
    time.sleep(3600)
def starts_a_shell(completions, **kw):
    note()
    subprocess.Popen("echo $$ >> $PIDS; sleep 3600", shell=True, start_new_session=True)
    time.sleep(3600)
def ignores_signals(completions, **kw):
    note()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)
    time.sleep(3600)
def stops_its_keeper(completions, **kw): note(); os.kill(os.getppid(), signal.SIGSTOP); time.sleep(3600)
def ends_its_keeper(completions, **kw): note(); os.kill(os.getppid(), signal.SIGKILL); time.sleep(3600)
def stops_itself(completions, **kw): note(); os.kill(os.getpid(), signal.SIGSTOP)
def threads_on(completions, **kw):
    note(); threading.Thread(target=time.sleep, args=(3600,)).start(); time.sleep(3600)
def waits_in_an_endless_list(completions, **kw):
    note(); kw["log_extra"]("x", iter(int, 1))
def forks_and_ends(completions, **kw):
    note()
    if os.fork() == 0: note(); time.sleep(3600)
    os._exit(3)
def kills_its_group(completions, **kw): note(); os.killpg(0, signal.SIGKILL)
def closes_everything(completions, **kw): note(); os.closerange(0, 256); return [0.0, 1.0]
def scribbles(completions, **kw):
    note()
    for fd in range(3, 4096):
        try: os.write(fd, b"\\x00\\x00\\x00\\x05hello" * 20)
        except OSError: pass
    return [0.0, 1.0]
def overruns_its_stack(completions, **kw):
    note()
    import ctypes
    ctypes.string_at(0)
def forks_twice(completions, trainer_state, **kw):
    if os.fork() == 0: time.sleep(0.2)
    return [trainer_state.step / 100] * 2
def slow_step(completions, trainer_state, **kw):
    time.sleep(0.3); return [trainer_state.step / 100] * 2
def interrupts(completions, **kw): raise KeyboardInterrupt
def recurses(completions, **kw): return recurses(completions)
class Odd:
    def tolist(self): raise MemoryError("no list")
    def __repr__(self): raise ValueError("no repr")
def odd_result(completions, **kw): return Odd()
def odd_values(completions, **kw): return [object.__new__(type("Loud", (), {"__repr__": Odd.__repr__})), 1.0]
def odd_object(completions, **kw): return [Odd(), 1.0]
def odd_list(completions, **kw):
    values = []
    values.append(values)
    return [values, 1.0]
def odd_error(completions, **kw): raise type("Loud", (Exception,), {"__str__": Odd.__repr__})("x")
def huge_number(completions, **kw): return [10**400, -10**5000]
def huge_value(completions, **kw): return ["x" * 20_000_000, ["y" * 10_000_000]]
def huge_error(completions, **kw): raise ValueError("z" * 20_000_000)
def huge_log(completions, **kw): kw["log_extra"]("e", ["x" * 100_000_000, ""]); return [0.0, 1.0]
def a_generator(completions, **kw): return (0.5 for _ in completions)
def scalars(completions, **kw): return [np.float32(0.5), np.array(1.0)]
def arrays(completions, **kw): return [np.array([0.5]), np.bool_(True)]
def tensors(completions, **kw):
    import torch
    return [torch.tensor(0.5, requires_grad=True), torch.tensor([1.0], dtype=torch.bfloat16)]
def a_column(completions, **kw): return np.array([[0.5], [1.0]], dtype=np.float16)
def decimals(completions, **kw): return (decimal.Decimal("0.5"), True)
def shouts(completions, **kw):
    for fd in (1, 2):
        for _ in range(1024): os.write(fd, b"x" * 65536)
    print("and so on"); return [0.0, 1.0]
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    file = tmp_path / "plugins.py"
    file.write_text(PLUGINS)
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    yield lambda name: f"{file}:{name}"
    close()


def scored(spec, seconds=20.0, **options):
    return score([GROUP], RewardConfig(reward_timeout=seconds), rewards=[spec], **options)


def living(tmp_path):
    """Of the processes that noted their id, those that still run."""
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    return {pid for pid in pids if runs(pid)}


def runs(pid):
    """It is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only the process group ends")
@pytest.mark.parametrize(
    "name",
    ["forks_and_hangs", "leaves_a_daemon", "starts_a_shell", "ignores_signals", "stops_itself", "threads_on",
     "waits_in_an_endless_list"],
)  # fmt: skip
def test_the_limit_holds_and_nothing_stays_behind(plugin, tmp_path, name):
    """finding 12: a plugin that forked and hung came back after 27 s, its child never."""
    scored(plugin("ready"))
    begun = time.perf_counter()
    table = scored(plugin(name), LIMIT)
    took = time.perf_counter() - begun
    assert "was stopped after 1 s" in table.missing[0, 0, plugin(name)]
    assert table.seconds[plugin(name)] < LIMIT + SLACK and took < LIMIT + SLACK + 5  # it is loaded first
    assert len(living(tmp_path)) == 1  # the other plugin's
    assert scored(plugin("ready")).rewards_PG.tolist() == [[0.0, 1.0]]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only the process group ends")
@pytest.mark.parametrize(
    ("name", "why"),
    [("forks_and_ends", "exit code 3"), ("kills_its_group", "exit code 137"), ("overruns_its_stack", "exit code 139"),
     ("ends_its_keeper", "its process ended"),
     ("closes_everything", "its process ended"), ("scribbles", "do not pickle|its process ended")],
)  # fmt: skip
def test_a_process_that_ends_or_babbles_is_noticed_before_the_limit(plugin, tmp_path, name, why):
    """finding 12: a child that held the pipe made an ended worker look busy."""
    begun = time.perf_counter()
    assert re.search(why, scored(plugin(name)).missing[0, 1, plugin(name)])
    assert time.perf_counter() - begun < 10
    wait_for(lambda: not living(tmp_path), 1.0 if name == "ends_its_keeper" else 0.0)  # then by the kernel, in its time


def test_a_fork_that_returns_twice_answers_once(plugin):
    """finding 12: step N got the scores of step N - 1."""
    for step in range(4):
        table = scored(plugin("forks_twice"), trainer_state={"step": step})
        assert table.rewards_PG.tolist() == [[step / 100] * 2]
        time.sleep(0.25)  # meanwhile the child of this step returns


def test_scores_asked_for_at_the_same_time_do_not_mix(plugin):
    """finding 12"""
    scored(plugin("slow_step"), trainer_state={"step": 0})
    got = {}

    def ask(step):
        got[step] = scored(plugin("slow_step"), 1.5, trainer_state={"step": step}).rewards_PG[0, 0]

    threads = [threading.Thread(target=ask, args=(step,)) for step in range(1, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {step: step / 100 for step in range(1, 8)}  # waiting for one's turn is not running


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only the process group ends")
def test_a_killed_trainer_leaves_no_plugin_behind(plugin, tmp_path):
    """finding 12"""
    code = f"""
from covo_rl.config import RewardConfig
from covo_rl.rewards import score
from covo_rl.rewards.columns import example_from_row, group_from_completions
group = group_from_completions(example_from_row({{}}), ["a"])
score([group], RewardConfig(reward_timeout=3600.0), rewards=[{plugin("leaves_a_daemon")!r}])
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    wait_for(lambda: (tmp_path / "pids").exists() and len((tmp_path / "pids").read_text().split()) == 2)
    process.kill()
    process.wait()
    wait_for(lambda: not living(tmp_path), SLACK)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only the process group ends")
@pytest.mark.parametrize("killed", [False, True])
def test_a_fork_of_the_trainer_keeps_no_plugin_alive(plugin, tmp_path, killed):
    """finding 12, its neighbour: a data worker holds copies of all that the trainer has open."""
    code = f"""
import multiprocessing, os, sys, threading, time
from covo_rl.config import RewardConfig
from covo_rl.rewards import score
from covo_rl.rewards.columns import example_from_row, group_from_completions
from covo_rl.rewards.worker import close
group = group_from_completions(example_from_row({{}}), ["a", "b"])
def ask(name, seconds):
    return score([group], RewardConfig(reward_timeout=seconds), rewards=["{plugin("")}" + name])
ask("ready", 20.0)
hanging = threading.Thread(target=ask, args=("forks_and_hangs", 3600.0 if {killed} else 3.0))
hanging.start()
time.sleep(1.5)
child = os.fork()
if not child:
    if {killed}: time.sleep(8)
    sys.exit(0)  # runs the exit handlers
if not {killed}: os.waitpid(child, 0)
print(ask("ready", 20.0).rewards_PG.tolist(), flush=True)
hanging.join()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "[[0.0, 1.0]]\n"
    if killed:
        process.kill()
        process.wait()
        wait_for(lambda: not living(tmp_path), SLACK)
    assert process.wait(timeout=30) in (0, -signal.SIGKILL) and not living(tmp_path)
    process.stdout.close()


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("name", "why"),
    [("interrupts", "raised KeyboardInterrupt"), ("recurses", "raised RecursionError"),
     ("odd_result", "raised MemoryError: no list"), ("odd_values", "returned Loud (its repr raises ValueError)"),
     ("odd_object", "returned Odd (its repr raises ValueError)"), ("odd_list", "returned [[...]]"),
     ("odd_error", "raised Loud: Loud (its repr raises ValueError)"), ("huge_number", "returned 1000000"),
     ("huge_value", "returned 'xxx"), ("huge_error", "raised ValueError: zzz"), ("huge_log", "its process ended"),
     ("a_generator", "returned generator, not a list of 2 numbers")],
)  # fmt: skip
def test_whatever_a_plugin_returns_or_raises_is_a_short_reason(plugin, name, why):
    """finding 16: a value of 20 MB was copied into each message."""
    table = scored(plugin(name))
    reason = table.missing[0, 0, plugin(name)]
    assert why in reason and len(reason) < 1000 and np.isnan(table.rewards_PGR[0, 0, 0])
    if name in ("odd_values", "odd_object", "odd_list"):  # one of two
        assert table.rewards_PGR[0, 1, 0] == 1.0


@pytest.mark.parametrize("name", ["scalars", "arrays", "tensors", "a_column", "decimals"])
def test_numbers_of_any_library_are_scores(plugin, name):
    """finding 16: lists of numpy or torch scalars were refused."""
    table = scored(plugin(name))
    assert table.missing == {} and table.rewards_PG.tolist() == [[0.5, 1.0]]


def test_a_plugin_that_shouts_is_cut_short(plugin):
    """finding 12: 128 MiB of output; 64 KiB of it are passed on, and how much was left out."""
    code = f"""
from covo_rl.config import RewardConfig
from covo_rl.rewards import score
from covo_rl.rewards.columns import example_from_row, group_from_completions
group = group_from_completions(example_from_row({{}}), ["a", "b"])
table = score([group], RewardConfig(reward_timeout=20.0), rewards=[{plugin("shouts")!r}])
print(table.rewards_PG.tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.stdout == b"[[0.0, 1.0]]\n" and len(done.stderr) < 70_000
    assert b"bytes more, left out]" in done.stderr


def test_a_terminal_s_signal_reaches_the_trainer_only(plugin, tmp_path):
    """finding 13: Ctrl-C goes to the whole foreground group; the plugin's scores must not fail for it."""
    code = f"""
import signal
signal.signal(signal.SIGINT, lambda *_: print("interrupted", flush=True))
from covo_rl.config import RewardConfig
from covo_rl.rewards import score
from covo_rl.rewards.columns import example_from_row, group_from_completions
group = group_from_completions(example_from_row({{}}), ["a", "b"])
for _ in range(2):
    table = score([group], RewardConfig(), rewards=[{plugin("slow_step")!r}], trainer_state={{"step": 7}})
    print(table.rewards_PG.tolist(), flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "[[0.07, 0.07]]\n"
    time.sleep(0.1)  # the second call takes 0.3 s
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=30)
    assert rest.splitlines() == ["interrupted", "[[0.07, 0.07]]"]
