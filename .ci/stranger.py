"""Walk the path that README shows, from the trained demo to a plain PEFT script, and say how long each command takes.

    python .ci/stranger.py        in a checkout with .venv, after `make demo`

Every fenced block between `<!-- path -->` and `<!-- /path -->` is run as printed, in order. What a reader brings along,
a table of questions with clips, is made of twelve built-in questions.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROWS = 48


def blocks(readme: str) -> list[tuple[str, str]]:
    """(language, code) of the path, in order."""
    path = re.search(r"<!-- path -->\n(.*?)<!-- /path -->", readme, re.DOTALL)
    assert path, "README.md shows no path"
    return re.findall(r"^```(\w*)\n(.*?)^```", path[1], re.DOTALL | re.MULTILINE)


def write_questions() -> None:
    """questions.csv and clips/, as a reader may have them."""
    from covo_rl.data import load_examples
    from covo_rl.run.questions import builtin_questions

    rows = load_examples(builtin_questions().train)[:ROWS]
    shutil.rmtree("clips", ignore_errors=True)
    Path("clips").mkdir()
    with open("questions.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["id", "audio", "question", "choices", "answer"])
        for row in rows:
            name = Path(row.clips[0].path).name
            shutil.copy(row.clips[0].path, Path("clips", name))
            table.writerow([row.id, name, row.question, " | ".join(row.choices), row.answer])


def main() -> None:
    os.chdir(ROOT)
    write_questions()
    environment = {**os.environ, "PATH": f"{ROOT / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    seconds = []
    for language, code in blocks(Path("README.md").read_text(encoding="utf-8")):
        command = ["python", "-c", code] if language == "python" else ["bash", "-euc", code]
        print(f"--- {language or 'bash'}\n{code.strip()}", flush=True)
        start = time.perf_counter()
        subprocess.run(command, check=True, env=environment, stdin=subprocess.DEVNULL)
        seconds.append((time.perf_counter() - start, code.strip().splitlines()[0]))
    print("\nseconds of the path")
    for spent, line in seconds:
        print(f"{spent:7.1f}  {line}")
    assert seconds, "the path has no command"


if __name__ == "__main__":
    sys.exit(main())
