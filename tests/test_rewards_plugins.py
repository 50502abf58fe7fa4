"""Plugins as people write them: pools, files beside them, coroutines, classes, edits in the middle of a run."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import train_cases

from covo_rl.config import RewardConfig
from covo_rl.rewards import RewardError, components, score
from covo_rl.rewards.columns import example_from_row, group_from_completions
from covo_rl.rewards.worker import close, waited
from covo_rl.train.checkpoint.identity import reward_fingerprint
from covo_rl.train.ranks import Ranks

GROUP = group_from_completions(example_from_row({"id": "r1", "question": "?", "answer": "b"}), ["a", "bb"])
MEDDLES = """
import logging, multiprocessing, os, signal, sys, threading
with open(os.environ["PIDS"], "a") as file: file.write(f"{os.getpid()}\\n")
os.chdir("/"); os.umask(0o077); os.environ["CUDA_VISIBLE_DEVICES"] = "99"
signal.signal(signal.SIGTERM, signal.SIG_IGN); logging.disable(logging.CRITICAL); sys.stdout = None
pool = multiprocessing.Pool(2); threading.Thread(target=threading.Event().wait, daemon=True).start()
def f(completions, **kw): return pool.map(len, completions)
"""
HONEST = {
    "a pool of spawned processes": """
import multiprocessing
def size(text): return len(text) / 2
def f(completions, **kw):
    with multiprocessing.get_context("spawn").Pool(1) as pool: return pool.map(size, completions)
""",
    "executors made once": """
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
def size(text): return len(text) / 2
processes, threads = ProcessPoolExecutor(1), ThreadPoolExecutor(2)
def f(completions, **kw): return list(processes.map(size, threads.map(str, completions)))
""",
    "a module and a file beside it": """
from pathlib import Path
from own_helper_module import HALF
ONE = float((Path(__file__).parent / "one.txt").read_text())
def f(completions, **kw): return [HALF, ONE]
""",
    "a lock that belongs to the first event loop": """
import asyncio
lock = None
async def f(completions, **kw):
    global lock
    lock = lock or asyncio.Semaphore(1)
    async def one(text):
        async with lock: await asyncio.sleep(0.001); return len(text) / 2
    return await asyncio.gather(*map(one, completions))
""",
    "a class named without brackets": """
class f:
    def __init__(self, share=0.5): self.share = share
    def __call__(self, completions, **kw): return [self.share * len(text) for text in completions]
""",
    "another Python's program": """
import os, subprocess, sys
def f(completions, **kw):
    assert os.environ.get("PYTHONPATH") == "/only/the/user's"
    return [float(subprocess.run([sys.executable, "-c", f"print({len(c) / 2})"], capture_output=True).stdout)
            for c in completions]
""",
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    (tmp_path / "own_helper_module.py").write_text("HALF = 0.5")
    (tmp_path / "one.txt").write_text("1.0")

    def written(code, name="own_plugin"):
        (tmp_path / f"{name}.py").write_text(code)
        return f"{tmp_path}/{name}.py:f"

    yield written
    close()


def scores(rewards, **options):
    table = score([GROUP], RewardConfig(reward_timeout=20.0, **options), rewards=rewards)
    assert not table.missing, table.missing
    return table.rewards_PGR[0, :, 0].tolist()


def test_a_plugin_is_imported_by_its_own_process_only(write, tmp_path):
    """finding 12: the trainer imported it too: its folder, signals and environment changed, and pools outlived it."""
    before = os.getcwd(), os.environ.get("CUDA_VISIBLE_DEVICES"), signal.getsignal(signal.SIGTERM), sys.stdout
    threads = threading.active_count()
    assert scores([write(MEDDLES)]) == scores([f"{tmp_path}/own_plugin.py:f"]) == [1.0, 2.0]
    after = os.getcwd(), os.environ.get("CUDA_VISIBLE_DEVICES"), signal.getsignal(signal.SIGTERM), sys.stdout
    assert after == before and threading.active_count() == threads
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 1 and int(pids[0]) != os.getpid()


@pytest.mark.parametrize("code", HONEST.values(), ids=HONEST)
def test_honest_plugins_work_step_after_step(write, monkeypatch, code):
    """finding 12: what isolates a plugin must not keep it from its work."""
    monkeypatch.setenv("PYTHONPATH", "/only/the/user's")
    spec = write(code)
    for _ in range(3):
        assert scores([spec]) == [0.5, 1.0]


@pytest.mark.parametrize(
    ("code", "why"),
    [("import os; os._exit(3)", "ended while it was loaded .exit code 3"), ("1 / 0", "raises ZeroDivisionError"),
     ("import sys; sys.exit(4)", "raises SystemExit while it is imported: 4"), ("g = 1", "has no 'f'; it has"),
     ("f = 1", "is int, not a function"), ("import os; os.closerange(3, 256)", "ended while it was loaded"),
     ("import os\nfor fd in range(3, 99):\n try: os.write(fd, b'\\0\\0hello')\n except OSError: pass", "own_plugin")],
)  # fmt: skip
def test_a_plugin_that_does_not_load_is_named_before_a_step(write, monkeypatch, code, why):
    """finding 12: whatever it does while it is imported; entries of sys.path that are no text are ignored by Python."""
    monkeypatch.setattr(sys, "path", [*sys.path, Path("/nowhere")])
    spec = write(code)
    with pytest.raises(RewardError, match=why):
        components([spec])
    write("def f(completions, **kw): return [0.5, 1.0]")
    assert scores([spec]) == [0.5, 1.0]


def test_a_file_of_a_package_says_how_it_is_named(write):
    with pytest.raises(RewardError, match=r"relative import.*a file of a package is named package.module:function"):
        components([write("from .helper import x\ndef f(completions): return x")])


def test_an_edit_during_a_run_changes_nothing(write):
    """finding 12: a file saved half way ended the run, a whole one changed the reward in the middle of it."""
    terms = components([write("def f(completions, **kw): return [0.0, 0.5]")])
    assert scores(terms) == [0.0, 0.5]
    write("def f(completions")
    assert scores(terms) == [0.0, 0.5]
    spec = write("def f(completions, answer): return [1.0, 0.5]")
    assert scores(terms) == [0.0, 0.5] and scores([spec]) == [1.0, 0.5]  # named anew, it is loaded anew


def test_a_restart_from_another_file_is_said(write, caplog):
    """finding 12: after a time-out or a crash the new content counts, which must not be silent."""
    terms = components([write("import os\ndef f(completions, **kw): return [0.0, 0.5]")])
    write("def f(completions, **kw): return [1.0, 0.5]")
    close()
    assert scores(terms) == [1.0, 0.5] and "its file has changed, and from now on the new one counts" in caplog.text


def test_the_trainer_keeps_the_rewards_it_began_with(write, tmp_path):
    spec = write("def f(completions, **kw): return [0.5] * len(completions)")
    made = train_cases.trainer(train_cases.options(tmp_path / "run", rewards=f"{spec}=2"))
    write("broken(")
    assert (made.train_step()[1].table.rewards_PG == 1.0).all()


def test_time_in_which_the_process_was_stopped_does_not_count():
    """finding 12: Ctrl-Z for an hour, then fg: the plugin had its reply ready and was killed for being late."""
    event, waits = threading.Event(), []

    class Stopped(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)
            clock[0] += 3600 if len(waits) == 2 else timeout
            return False

    clock = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("covo_rl.rewards.worker.time.monotonic", lambda: clock[0])
        assert not waited(Stopped(), 10.0) and len(waits) == 9  # the hour counts 2 s, each other wait 1 s
    event.set()
    assert waited(event, 0.0) and not waited(threading.Event(), -1.0)


def test_a_reward_that_is_an_object_has_a_fingerprint(write):
    """finding 05: only functions were compared on resume."""
    code = "class F:\n    def __call__(self, completions, **kw): return [{}] * len(completions)\nf = F()"
    before = reward_fingerprint([write(code.format(0.5))])
    assert len(before) == 1 and reward_fingerprint([write(code.format(1.0))]) != before


def test_what_one_rank_cannot_go_on_without_ends_all(monkeypatch):
    """finding 12: `reward_failure: stop` on one rank left the others waiting for it; each showed the same message."""
    monkeypatch.setattr(Ranks, "gathered", lambda self, value: [value, "f raised ValueError"])
    with pytest.raises(RewardError, match=r"^rank 1: f raised ValueError$") as error:
        Ranks(0, 2).together(lambda: 5, RewardError)
    assert error.value.everywhere and not RewardError("of one rank").everywhere
    assert Ranks().together(lambda: 5, RewardError) == 5


def test_rewards_and_stop_signals_import_where_unix_is_missing():
    """Windows has no fork, alarm or hang-up: our own rewards work there, plugins do not."""
    code = """
import os, signal, sys, torch
for name in ("SIGHUP", "SIGALRM", "SIGQUIT", "SIGCHLD", "SIGCONT", "setitimer"): delattr(signal, name)
for name in ("fork", "register_at_fork", "killpg", "setsid"): delattr(os, name)
from covo_rl.rewards import load_reward
from covo_rl.train.guard import StopSignals
with StopSignals(): print(load_reward("accuracy")(["<answer>a</answer>"], choices=[["a", "b"]], answer=["a"]))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[1.0]\n"
