"""A rank ends with its own exit code, also where a thread would abort Python's tear-down."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest


def ended(body: str, group: bool) -> subprocess.CompletedProcess:
    """A process that runs `body` in `main`, as one of two pretended ranks or alone."""
    ranks = "import torch.distributed as dist\ndist.is_initialized = lambda: True\ndist.get_world_size = lambda: 2\n"
    ranks += "dist.get_rank = lambda: 0\n"
    ranks += "dist.barrier = dist.destroy_process_group = lambda: None\n"
    code = f"""
import atexit, sys
from covo_rl.train.shutdown import exit_after
{ranks if group else ""}
atexit.register(print, "exit handler")
def main():
{textwrap.indent(textwrap.dedent(body), "    ")}
exit_after(main)
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize(
    ("body", "code", "stderr"),
    [
        ("return 5", 0, ""),  # what main returns is not an exit code
        ("sys.exit(75)", 75, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('grpo_mmau: no such file')", 1, "grpo_mmau: no such file\n"),
        ("raise ValueError('broken')", 1, "ValueError: broken\n"),
    ],
)
def test_the_exit_code_is_that_of_main(body, code, stderr, group):
    done = ended(body, group)
    assert done.returncode == code
    assert done.stdout == "exit handler\n"
    assert done.stderr.endswith(stderr) and bool(done.stderr) == bool(stderr)


def test_a_rank_skips_the_tear_down_that_aborts():
    """What a gloo thread does to a process: something that dies while modules are taken apart."""
    body = """
    import os
    class Held:
        def __del__(self, abort=os.abort):
            abort()
    globals()["held"] = Held()
    """
    assert ended(body, group=False).returncode == -signal.SIGABRT
    assert ended(body, group=True).returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_a_launched_process_is_told_when_its_launcher_dies():
    """The launcher kills itself outright; its process must not run on unseen."""
    child = """
import sys, time
from covo_rl.train.shutdown import exit_after
def main():
    print("started", flush=True)
    time.sleep(60)
exit_after(main)
"""
    launcher = f"""
import os, signal, subprocess, sys
process = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE, text=True)
process.stdout.readline()
print(process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "ACCELERATE_MIXED_PRECISION": "no"}
    done = subprocess.run([sys.executable, "-c", launcher], capture_output=True, text=True, env=environment, timeout=50)
    assert done.returncode == -signal.SIGKILL and done.stdout.strip().isdigit()
    # run() returns when the child, which holds the error pipe too, has ended: long before its minute is over
