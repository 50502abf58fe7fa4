"""The process between the trainer and a plugin: it ends a plugin with all that it started, and stops floods.

    python keeper.py SPEC FD PATH   the trainer holds the other end of FD and of stdin; PATH is its sys.path

The plugin runs in a child (`serve` of worker.py) with a session of its own, so a Ctrl-C at the terminal does not reach
it. On Linux whatever the plugin starts becomes a child of this process once its parent is gone, also a daemon that left
the session. When stdin ends (the trainer closed it, or died by whatever signal) or the plugin's process ends, all of
them are killed; elsewhere only its process group is. What runs under another user, or in a container, is out of reach.

Nothing of covo_rl is imported before the fork: this process stays small.
"""

import codecs
import contextlib
import ctypes
import os
import select
import signal
import sys
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
OUTPUT_BYTES, OUTPUT_SECONDS = 65536, 60.0  # this much of what a plugin prints is passed on in this time
KILL_SECONDS = 1.5
PIECE = 4096  # a pipe that is ready takes PIPE_BUF bytes without blocking
LONGEST_ESCAPE = 4  # bytes that a byte becomes where it does not print


class PluginOutput:
    """What the plugin prints -> stderr as text, as far as that takes it, and never more than the limit."""

    def __init__(self, spec: str, fd: int) -> None:
        from covo_rl.types import visible  # light, and after the fork

        self.spec, self.fd, self.visible = spec, fd, visible
        self.decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self.room, self.cut, self.renewed = OUTPUT_BYTES, 0, time.monotonic()

    def relay(self) -> bool:
        """Pass on one piece; False at the end."""
        read = os.read(self.fd, PIECE // LONGEST_ESCAPE if self.room else 1 << 20)
        piece = self.visible(self.decoder.decode(read, not read), "\n\t").encode() if self.room else read
        if time.monotonic() > self.renewed + OUTPUT_SECONDS or not read:
            self.report()
            self.room, self.renewed = OUTPUT_BYTES, time.monotonic()
        sent = _write(piece[: self.room])
        self.room -= sent
        self.cut += len(piece) - sent
        return bool(read)

    def report(self) -> None:
        """Say how much was left out."""
        if self.cut and _write(f"\n[{self.spec} printed {self.cut} bytes more, left out]\n".encode(errors="replace")):
            self.cut = 0


def _write(text: bytes) -> int:
    """How many bytes stderr took: none where it is closed, or full and not read."""
    with contextlib.suppress(OSError):
        if text and select.select([], [2], [], 0)[1]:
            return os.write(2, text)
    return 0


def children() -> list[int]:
    """Process ids of this process's children, where there is /proc."""
    pids = []
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            if int(file.read().rpartition(b")")[2].split()[1]) == os.getpid():  # state, parent; the name may hold ")"
                pids.append(int(name))
    return pids


def ended_children() -> dict[int, int]:
    """Collect those that ended: process id -> exit code."""
    codes = {}
    with contextlib.suppress(ChildProcessError):  # none left
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            codes[ended[0]] = os.waitstatus_to_exitcode(ended[1])
    return codes


def kill_all(worker: int) -> None:
    """SIGKILL to the worker's group and to all children, those that become ours meanwhile too, until none is left."""
    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            os.killpg(worker, signal.SIGKILL)
        pids = children()
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
        ended_children()
        if not pids and not children():
            break


def keep(worker: int, output: PluginOutput, wake: int) -> int:
    """Until the worker, stdin or the trainer ends (a fork of the trainer may hold stdin), or SIGQUIT; the exit code."""
    watched, code, trainer = [0, wake, output.fd], None, os.getppid()
    while code is None:
        ready = select.select(watched, [], [], 1.0)[0]
        if output.fd in ready and not output.relay():
            watched.remove(output.fd)
        signals = os.read(wake, PIECE) if wake in ready else b""
        if signals:
            code = ended_children().get(worker)
        ended = signal.SIGQUIT in signals or (0 in ready and not os.read(0, 1)) or os.getppid() != trainer
        code = 0 if code is None and ended else code
    kill_all(worker)
    os.set_blocking(output.fd, False)
    with contextlib.suppress(BlockingIOError):
        while output.relay():
            pass
    output.report()
    return code if code >= 0 else 128 - code  # as a shell says that a signal ended it


def main(spec: str, fd: int) -> None:
    """Fork the worker, and stay behind to keep it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a signal to the whole job is the trainer's to answer
    for number in (signal.SIGCHLD, signal.SIGQUIT):
        signal.signal(number, lambda *_: None)
    output, printed = os.pipe()
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken)
    if worker := os.fork():
        os.close(printed)
        os.close(fd)
        os._exit(keep(worker, PluginOutput(spec, output), wake))
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (printed, 1), (printed, 2)):
        os.dup2(source, target)
    for unused in (nothing, output, printed, wake, woken):
        os.close(unused)
    from covo_rl.rewards.worker import serve

    serve(spec, fd)


if __name__ == "__main__":
    sys.path[:] = sys.argv[3].split(os.pathsep)  # not by PYTHONPATH, which whatever the plugin starts would inherit
    main(sys.argv[1], int(sys.argv[2]))
