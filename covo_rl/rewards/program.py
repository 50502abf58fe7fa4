"""A program of the user's that answers JSON lines: one process for many inputs, every fault named and counted.

    {"id": "7", "path": "/data/7.wav", "language": "en"}   ->  PROGRAM  ->   {"id": "7", "text": "hello there"}

It reads lines from stdin until it ends, and writes one line for each to stdout, in any order. What does not come is
asked for once more, in a new process. It is run without a shell, with whatever it starts in a process group that is
ended with it; stderr is its own, and its last line stands in messages.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from covo_rl.audio import decode
from covo_rl.data.files import file_sha256, json_line
from covo_rl.rewards.call import seconds_left
from covo_rl.rewards.replies import AnswerError
from covo_rl.rewards.specs import RewardError
from covo_rl.rewards.transport import env_limit
from covo_rl.types import Clip, shown, visible

LINE_BYTES = 16 << 20  # of a line that is read
STRAY_LINES = 1000  # that answer nothing, before a program is stopped
GRACE = 3.0  # seconds in which what a program wrote is read after its end
TICK = 0.2
#: what is told of an answer: its id, and the result, or None where it is taken back
Keep = Callable[[str, Any], None]


class Program:
    """A command line, e.g. `python asr.py --beam 5`.

    `seconds`: so long may it write nothing (COVO_RL_PROGRAM_TIMEOUT, 600); `tries`: processes for one input. `faults`
    counts what went wrong, by kind.

    Raises:
        RewardError: there is no such program.
    """

    def __init__(self, command: str, *, seconds: float | None = None, tries: int = 2) -> None:
        self.command, self.tries, self.faults = command, tries, Counter[str]()
        self.seconds = env_limit("COVO_RL_PROGRAM_TIMEOUT", 600) if seconds is None else seconds
        try:
            self.words = shlex.split(command)
        except ValueError as error:
            raise RewardError(f"command:{command}: {error}; it is split into words as a shell does") from None
        if not self.words or shutil.which(self.words[0]) is None:
            raise RewardError(
                f"command:{command}: there is no program {(self.words or [''])[0]!r} that can be run; write "
                "command:PROGRAM with its arguments, as in command:'python asr.py'"
            )

    @cached_property
    def version(self) -> str:
        """sha256 (hex) of its words and of the files among them; what these read in turn is not seen."""
        digest = hashlib.sha256(json.dumps(self.words).encode())
        for word in [shutil.which(self.words[0]) or "", *self.words[1:]]:
            digest.update(file_sha256(word).encode() if Path(word).is_file() else b"")
        return digest.hexdigest()

    def ask(
        self, lines: Sequence[Mapping[str, Any]], read: Callable[[Mapping[str, Any]], Any], keep: Keep | None = None
    ) -> list[Any]:
        """A result of each line, made by `read` of its answer, or an AnswerError that says why there is none.

        `lines` have an "id" each, of text, and no two the same; `read` raises ValueError where an answer is no result.
        """
        results: dict[str, Any] = {}
        for _ in range(self.tries):
            todo = [line for line in lines if isinstance(results.get(line["id"], AnswerError()), AnswerError)]
            if todo and seconds_left() > 0:
                results |= _Run(self, todo, read, keep or (lambda *_: None)).results()
        late = AnswerError(f"{self.words[0]}: no time left in this step")
        return [results.get(line["id"], late) for line in lines]


class _Run:
    """One process, and what it made of its lines."""

    def __init__(self, program: Program, lines: Sequence[Mapping[str, Any]], read: Any, keep: Keep) -> None:
        self.program, self.read, self.keep = program, read, keep
        self.ids = dict.fromkeys(line["id"] for line in lines)
        self.found: dict[str, Any] = {}
        self.wrong: dict[str, str] = {}  # id -> why its answer is none
        self.stray: list[str] = []  # lines that answer nothing
        self.output: queue.Queue[tuple[float, bytes]] = queue.Queue()
        self.said: deque[str] = deque(maxlen=5)
        self.text = [json_line(line).encode("utf-8", "replace") for line in lines]

    def results(self) -> dict[str, Any]:
        words = self.program.words
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            self._count("did not start")
            return {name: AnswerError(f"{words[0]} did not start: {error}") for name in self.ids}
        threads = [threading.Thread(target=work, args=(process,), daemon=True)
                   for work in (self._feed, self._listen, self._overhear)]  # fmt: skip
        for thread in threads:
            thread.start()
        why = self._follow(process)
        with contextlib.suppress(OSError):  # it has ended, with all of its group
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        for thread, pipe in zip(threads, (process.stdin, process.stdout, process.stderr), strict=True):
            thread.join(GRACE)  # one may hang on a pipe that a process outside of the group holds
            if pipe and not thread.is_alive():
                with contextlib.suppress(OSError):  # what it did not read is still in the buffer of stdin
                    pipe.close()
        if not why and code:
            self._count("ended with an error")
            why = f"ended with exit code {code}"
        return {name: self.found[name] if name in self.found else self._error(name, why) for name in self.ids}

    def _feed(self, process: Any) -> None:
        with contextlib.suppress(OSError):  # it ended, or stopped reading
            process.stdin.writelines(self.text)
        with contextlib.suppress(OSError):
            process.stdin.close()

    def _listen(self, process: Any) -> None:
        while line := process.stdout.readline(LINE_BYTES):
            self.output.put((time.monotonic(), line))
        self.output.put((time.monotonic(), b""))

    def _overhear(self, process: Any) -> None:
        while line := process.stderr.readline(LINE_BYTES):
            self.said.append(line.decode(errors="replace"))

    def _follow(self, process: Any) -> str:
        """Take lines until the output ends; why it was stopped before that, or ""."""
        last, ended = time.monotonic(), None
        while True:
            try:
                when, line = self.output.get(timeout=TICK)
            except queue.Empty:
                when, line = time.monotonic(), None
            if ended is None and process.poll() is not None:
                ended = time.monotonic()
            if ended is not None and when > ended + GRACE:
                self._count("held its output open after its end")
                return "ended, and what it had started held its output open"
            if line is None:
                if when - last > self.program.seconds or seconds_left() <= 0:
                    self._count("hung")
                    return f"wrote nothing for {when - last:.3g} s and was stopped"
                continue
            if not line:
                return self._ending(process)
            last = when
            self._take(line)
            if len(self.stray) > STRAY_LINES + len(self.ids):
                self._count("babbled")
                return f"wrote {len(self.stray)} lines that answer nothing and was stopped"

    def _ending(self, process: Any) -> str:
        """Wait for a process whose output is closed."""
        try:
            process.wait(self.program.seconds)
        except subprocess.TimeoutExpired:
            self._count("hung")
            return "closed its output, did not end and was stopped"
        return ""

    def _take(self, line: bytes) -> None:
        try:
            answer = json.loads(line, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            return self._astray(
                "no JSON", f"{visible(line[:80].decode(errors='replace').strip())!r} is no JSON ({error})"
            )
        name = answer.get("id") if isinstance(answer, dict) else None
        if not isinstance(name, str) or name not in self.ids:
            return self._astray("an unknown id", f"an answer to {name!r:.80}, which was not asked for")
        if name in self.found or name in self.wrong:
            self._count("a second answer")
            self.wrong[name] = "answered it twice"
            if self.found.pop(name, None) is not None:
                self.keep(name, None)
            return None
        try:
            self.found[name] = self.read(answer)
            self.keep(name, self.found[name])
        except ValueError as error:
            self._count("an unusable answer")
            self.wrong[name] = f"answered: {error}"
        return None

    def _astray(self, kind: str, what: str) -> None:
        self._count(kind)
        self.stray.append(what)

    def _count(self, kind: str) -> None:
        self.program.faults[kind] += 1

    def _error(self, name: str, why: str) -> AnswerError:
        if name in self.wrong:
            return AnswerError(f"{self.program.words[0]} {self.wrong[name]}")
        self._count("no answer")
        last = next((visible(text.strip()) for text in reversed(self.said) if text.strip()), "")
        parts = [why or "ended without an answer to it"]
        parts += [f"{len(self.stray)} other lines, the first {self.stray[0]}"] if self.stray else []
        parts += [f"its last words: {shown(last)}"] if last else []
        return AnswerError(f"{self.program.words[0]} {'; '.join(parts)}")


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def reply_text(answer: Mapping[str, Any]) -> str:
    """The "text" of an answer. Raises ValueError: it is none."""
    if not isinstance(answer.get("text"), str):
        raise ValueError(f"text is {answer.get('text')!r:.80}, not a string")
    return answer["text"]


@contextmanager
def clip_paths() -> Iterator[Callable[[Clip], str]]:
    """Absolute paths of clips while the block runs: those of files as they are, others written (wav, mono, 16 bits).

    The function raises AudioError: a clip that is no file cannot be decoded.
    """
    with tempfile.TemporaryDirectory() as folder:
        count = iter(range(1 << 62))

        def path(clip: Clip) -> str:
            if clip.path is not None:
                return str(Path(clip.path).absolute())
            file = Path(folder) / f"{next(count)}.wav"
            write_pcm(file, *decode(clip))
            return str(file)

        yield path


def write_pcm(file: Path, wave_T: np.ndarray, rate: int) -> None:
    """A wav file of 16 bits; a wave that would clip is turned down as a whole."""
    import soundfile

    wave_T = wave_T * min(1.0, 0.999 / max(float(np.abs(wave_T).max(initial=0)), 1e-9))
    soundfile.write(file, wave_T, rate, format="WAV", subtype="PCM_16")
