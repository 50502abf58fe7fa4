"""Walk the path that README shows, from the trained demo to a plain PEFT script, and say how long each command takes.

    python .ci/stranger.py        in a checkout with .venv, after `make demo`

Every fenced block between `<!-- path -->` and `<!-- /path -->` is run as printed, in order; one that is to be saved is
saved. What a reader brings along, a table of questions with clips, is made of built-in questions.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from covo_rl.data import load_examples
from covo_rl.synth import builtin_questions

ROOT = Path(__file__).resolve().parent.parent
ROWS = 60
#: what the path makes
MADE = ("runs/mine", "my_adapter", "clips")


def blocks(readme: str) -> list[tuple[str, str, str | None]]:
    """(language, code, the file that it is to be saved as) of the path, in order."""
    path = re.search(r"<!-- path -->\n(.*?)<!-- /path -->", readme, re.DOTALL)
    assert path, "README.md shows no path"
    steps, end = [], 0
    for fence in re.finditer(r"^```(\w*)\n(.*?)^```", path[1], re.DOTALL | re.MULTILINE):
        saved = re.search(r"Save this as `([\w.]+)`", path[1][end : fence.start()])
        steps.append((fence[1], fence[2], saved and saved[1]))
        end = fence.end()
    return steps


def write_questions() -> None:
    """questions.csv and clips/, as a reader may have them; a bell is among them."""
    rows = load_examples(builtin_questions()["train"])
    bell = next(row for row in rows if row.columns["facts"].get("source") == "bell")
    Path("clips").mkdir()
    shutil.copy(str(bell.clips[0].path), "clips/bell.wav")
    with open("questions.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["id", "audio", "question", "choices", "answer"])
        for row in rows[:ROWS]:
            name = Path(str(row.clips[0].path)).name
            shutil.copy(str(row.clips[0].path), Path("clips", name))
            table.writerow([row.id, name, row.question, " | ".join(row.choices), row.answer])


def main() -> None:
    os.chdir(ROOT)
    for folder in MADE:
        shutil.rmtree(folder, ignore_errors=True)
    write_questions()
    environment = {**os.environ, "PATH": f"{ROOT / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    seconds = []
    for language, code, file in blocks(Path("README.md").read_text(encoding="utf-8")):
        if file:
            Path(file).write_text(code, encoding="utf-8")
            continue
        for command in [code] if language == "python" else re.split(r"(?<!\\)\n", code.strip()):
            print(f"--- {command}", flush=True)
            start = time.perf_counter()
            words = ["python", "-c", command] if language == "python" else ["bash", "-euc", command]
            subprocess.run(words, check=True, env=environment, stdin=subprocess.DEVNULL)
            seconds.append((time.perf_counter() - start, command.strip().splitlines()[0]))
    print("\nseconds of the path")
    for spent, line in seconds:
        print(f"{spent:7.1f}  {line}")
    assert len(seconds) > 5, "README's path has lost its commands"


if __name__ == "__main__":
    main()
