"""Kill a run with SIGKILL at random moments, resume it, and ask for the very metrics and weights of an undisturbed run.

    python tests/faults/kill_and_resume.py --kills 25 [--of lora|full|updates|ahead|ranks|all] [--rewind] [--seed 0]
        [--toy] [-- FURTHER OPTIONS OF THE RECIPE]

Moments: while Python starts up, between two log lines, and while a checkpoint is being written. A run that reaches its
end is compared and a fresh one begun, until there were enough kills. With --rewind kills come up to three log lines
apart, every other one that leaves an earlier checkpoint goes back to it (--resume PATH), and the next may fall into
that. Prints a line per kill and `survived K of N`; the exit code is 0 only if K == N, and with --rewind if it went
back at all. `--of all` is LoRA, full, several updates a batch, a step ahead, and two ranks, each with as many kills.
Without --toy it kills the shipped recipe on its built-in model, whose every resume takes seconds to start; --toy kills
tests/faults/toy.py, which uses the same checkpoint code.
"""

import argparse
import atexit
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from processes import kill_all

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parents[1] / "recipes" / "grpo_mmau.py"
TOY_OPTIONS = ["--steps", "14", "--num-iterations", "2", "--steps-per-generation", "2", "--update-seconds", "0.03"]
RECIPE_OPTIONS = ["--evaluate", "false", "--max_steps", "8", "--prompts_per_step", "4", "--num_generations", "4",
                  "--max_completion_length", "40", "--limit", "10", "--check_rewards", "false",
                  "--checkpoint_every", "1"]  # fmt: skip
#: what can be killed: number of ranks, and options of the recipe
RUNS = {
    "lora": (1, []),
    "full": (1, ["--lora", "false"]),
    "updates": (1, ["--num_iterations", "2", "--steps_per_generation", "2", "--dynamic_sampling", "1"]),
    "ahead": (1, ["--rollout_ahead", "1", "--num_iterations", "2"]),
    "ranks": (2, []),
}
PATIENCE_S = 600
#: (wait for a new log line?, then at most so many seconds) and how often
MOMENTS = [(False, 3.0), (True, 0.5), (True, 0.04)]
WEIGHTS = [1, 4, 5]


@dataclass
class Kill:
    """One kill: when it struck, and whether its run came to the right end."""

    moment: str
    steps_done: int
    back_to: str = ""
    survived: bool = False


@dataclass
class Harness:
    toy: bool
    ranks: int
    options: list[str]
    random: random.Random
    rewind: bool = False
    kills: list[Kill] = field(default_factory=list)

    def start(self, output: Path, resume: str = "") -> subprocess.Popen:
        """A run in a session of its own, so that Ctrl-C reaches the harness alone."""
        launcher = [sys.executable]
        if self.ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
        script = [str(HERE / "toy.py"), *TOY_OPTIONS] if self.toy else [str(RECIPE), *RECIPE_OPTIONS]
        words = [*launcher, *script, *self.options, "--output", str(output), *(["--resume", resume] if resume else [])]
        log = open(output.with_suffix(".log"), "ab")  # noqa: SIM115 - the child keeps it
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True, env=environment)
        atexit.register(end, process)
        return process

    def undisturbed(self, output: Path) -> list[str]:
        if self.start(output).wait(PATIENCE_S) != 0:
            sys.exit(f"the undisturbed run failed:\n{tail(output)}")
        return outcome(output)

    def next_start(self, output: Path, kill: Kill, before: list[Kill]) -> str:
        """What to resume from after a kill: `auto`, or every other time an earlier checkpoint than that would take."""
        folder = output / "checkpoints"
        earlier = sorted(folder.glob("step_*"))[:-1] if folder.is_dir() else []
        if not self.rewind or not earlier or (before and before[-1].back_to):
            return "auto"
        path = self.random.choice(earlier)
        kill.back_to = path.name
        return str(path)

    def kill_once(self, process: subprocess.Popen, output: Path) -> Kill | None:
        """Wait for a random moment and kill; None when the run ended before it came.

        A checkpoint is saved right after a log line, so the moments shortly after one fall into its writing.
        """
        log, longest = self.random.choices(MOMENTS, WEIGHTS)[0]
        stale, lines = partial(output), self.random.randint(1, 3) if self.rewind else 1
        lines = max(lines, 3 - len(metrics(output))) if self.rewind else lines  # from then on there is a way back
        for _ in range(lines * log):
            before, deadline = size(output), time.monotonic() + PATIENCE_S
            while size(output) == before:
                if process.poll() is not None:
                    return None
                if time.monotonic() > deadline:
                    kill_all(process)
                    sys.exit(f"no step within {PATIENCE_S} s:\n{tail(output)}")
                time.sleep(0.001)
        time.sleep(self.random.uniform(0.0, longest))
        if process.poll() is not None:
            return None
        kill_all(process)
        where = "while writing a checkpoint" if partial(output) - stale else "in a step" if log else "while starting"
        return Kill(where, len(metrics(output)))

    def round(self, output: Path, expected: list[str], wanted: int) -> None:
        """One run to its end with up to `wanted` kills; all of them count as survived if its metrics are right."""
        mine: list[Kill] = []
        process = self.start(output)
        while len(mine) < wanted:
            kill = self.kill_once(process, output)
            if kill is None:
                break
            process = self.start(output, self.next_start(output, kill, mine))
            mine.append(kill)
        if process.wait(PATIENCE_S) != 0:
            print(f"  the resumed run failed:\n{tail(output)}", flush=True)
            fine = False
        else:
            fine = outcome(output) == expected
        for kill in mine:
            kill.survived = fine
            number = len(self.kills) + 1
            back = f", back to {kill.back_to}" if kill.back_to else ""
            print(f"kill {number}: {kill.moment}, after {kill.steps_done} logged steps{back}: "
                  f"{'same metrics and weights' if fine else 'THEY DIFFER'}", flush=True)  # fmt: skip
            self.kills.append(kill)


def end(process: subprocess.Popen) -> None:
    """Leave no run behind when the harness itself is interrupted."""
    if process.poll() is None:
        kill_all(process)


def metrics(output: Path) -> list[str]:
    """Complete lines of metrics.jsonl without wall-clock times."""
    path = output / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    rows = [json.loads(line) for line in lines]
    return [json.dumps({k: v for k, v in row.items() if "seconds" not in k}, sort_keys=True) for row in rows]


def outcome(output: Path) -> list[str]:
    """The metrics, and a sha256 of weights and moments in the last checkpoint."""
    last = max((output / "checkpoints").glob("step_*"))
    digests = [hashlib.sha256((last / f"{name}.safetensors").read_bytes()) for name in ("weights", "optimizer")]
    return [*metrics(output), last.name, *(digest.hexdigest() for digest in digests)]


def size(output: Path) -> int:
    path = output / "metrics.jsonl"
    return path.stat().st_size if path.is_file() else 0


def partial(output: Path) -> set[tuple[str, int]]:
    """Half-written checkpoints: name and inode, which tells a new one from one that an earlier kill left."""
    folder = output / "checkpoints"
    found = [path for path in folder.iterdir() if path.name.startswith(".partial-")] if folder.is_dir() else []
    return {(path.name, path.stat().st_ino) for path in found}


def tail(output: Path) -> str:
    return "\n".join(output.with_suffix(".log").read_text(encoding="utf-8").splitlines()[-20:])


def kill_runs(name: str, arguments: argparse.Namespace) -> bool:
    """As many kills as asked for of one kind of run; whether all of them were survived."""
    ranks, options = (arguments.ranks or 1, []) if arguments.toy else RUNS[name]
    harness = Harness(arguments.toy, arguments.ranks or ranks, [*options, *arguments.options],
                      random.Random(arguments.seed), arguments.rewind)  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix="kill_and_resume_"))
    expected = harness.undisturbed(folder / "undisturbed")
    print(f"{name}, undisturbed: {len(metrics(folder / 'undisturbed'))} steps", flush=True)
    number = 0
    while len(harness.kills) < arguments.kills:
        harness.round(folder / f"run_{number}", expected, arguments.kills - len(harness.kills))
        number += 1
        if number > 3 * arguments.kills + 3:
            sys.exit("the runs end before a kill finds them: give them more steps")
    survived = sum(kill.survived for kill in harness.kills)
    rewinds = sum(bool(kill.back_to) for kill in harness.kills)
    back = f", went back {rewinds} times" if arguments.rewind else ""
    print(f"{name}: survived {survived} of {len(harness.kills)}{back}", flush=True)
    if survived == len(harness.kills) and (rewinds or not arguments.rewind):
        shutil.rmtree(folder)
        return True
    print(f"the runs are kept in {folder}" if rewinds or not arguments.rewind else "too few --kills to go back once")
    return False


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--of", choices=[*RUNS, "all"], default="lora", help="what to kill")
    parser.add_argument("--rewind", action="store_true", help="go back to an earlier checkpoint between kills")
    parser.add_argument("--ranks", type=int, choices=[1, 2], help="another number of ranks")
    parser.add_argument("--toy", action="store_true", help="kill the toy run instead of the recipe")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("options", nargs="*", help="further options of the run, after --")
    arguments = parser.parse_args(words)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    names = ["toy"] if arguments.toy else list(RUNS) if arguments.of == "all" else [arguments.of]
    survived = [kill_runs(name, arguments) for name in names]
    return 0 if all(survived) else 1


if __name__ == "__main__":
    sys.exit(main())
