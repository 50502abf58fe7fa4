"""A question set in the MMAU schema from recordings of Debian packages.

    packages.yaml -> apt-get download, SHA-256 -> dpkg-deb -x -> recordings by speaker, kit, species -> rows and clips

    python recipes/real_recordings/build.py --output data/real      # about 0.6 GB to fetch; five minutes

Needs apt-get and dpkg-deb (Debian, Ubuntu); nothing is installed, no root is needed, and no sound is part of this
repository. SOURCES.md beside the rows says whose the recordings are and under which licence. The same packages and
seed make the same rows and clips.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).parent))  # where a test or another script loads this file by its path

from debian_packages import fetch, pinned, unpack, write_sources
from recordings import SPLITS, Recording, find_recordings
from scenes import RATE, TASKS, Library, Task, finished, load_sounds

from covo_rl.data.files import write_json
from covo_rl.data.terminal import say
from covo_rl.records.console import ProgressDisplay
from covo_rl.types import user_errors

ROWS = {"train": 10500, "validation": 420, "test": 840}
CHOICES = 4


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetch, unpack, render; says how many rows there are and what length and level tell of the answers."""
    options = parser().parse_args(arguments)
    with user_errors("build", code=1):
        root, packages = Path(options.packages), pinned()
        for package in packages:
            unpack(package, fetch(package, root), root / "unpacked")
        output = Path(options.output)
        output.mkdir(parents=True, exist_ok=True)
        write_sources(packages, root / "unpacked", output / "SOURCES.md")
        recordings = find_recordings(root / "unpacked")
        build(recordings, output, {split: getattr(options, split) for split in SPLITS}, options.seed)
        say(f"licences: {output / 'SOURCES.md'}")
        say("next: python recipes/sft_cot.py --config recipes/real_recordings/cold_start.yaml")


def build(recordings: Sequence[Recording], output: Path, rows: dict[str, int], seed: int) -> dict[str, Path]:
    """Render `rows` of each split into `output`; split -> its file of rows."""
    check_split(recordings)
    say(f"reading {len(recordings)} recordings")
    sounds, left_out = load_sounds(recordings)
    for line in left_out:
        say(f"left out: {line}")
    files, features = {}, {}
    for split in SPLITS:
        library = Library(sounds, split)
        folder = output / f"{split}-audios"
        folder.mkdir(parents=True, exist_ok=True)
        table = []
        with ProgressDisplay(f"rendering {split}", rows[split]) as display:
            for i in range(rows[split]):
                row, clip = sample(library, i, seed)
                soundfile.write(output / row["audio_id"], clip, RATE, subtype="PCM_16")
                table.append(row)
                features.setdefault(split, []).append((len(clip), float(np.mean((clip / 32768.0) ** 2))))
                display.update(i + 1, "")
        files[split] = write_json(output / f"{split}.json", table, indent=1)
        say(f"{files[split]}: {len(table)} rows, {sources_of(list(sounds), split)}")
    tables = {split: json.loads(path.read_text(encoding="utf-8")) for split, path in files.items()}
    for line in shortcuts(tables, features):
        say(line)
    return files


def check_split(recordings: Sequence[Recording]) -> None:
    """Raises ValueError where a source has recordings in two splits, or a recording is in two."""
    splits: dict[tuple[str, str], set[str]] = {}
    for recording in recordings:
        splits.setdefault((recording.group, recording.source), set()).add(recording.split)
        splits.setdefault(("path", str(recording.path)), set()).add(recording.split)
    if both := [name for name, found in splits.items() if len(found) > 1]:
        raise ValueError(f"in two splits: {both[:5]}")


def sources_of(recordings: Sequence[Recording], split: str) -> str:
    counts = Counter(group for group, _ in {(r.group, r.source) for r in recordings if r.split == split})
    return ", ".join(f"{group} of {count} sources" for group, count in sorted(counts.items()))


def sample(library: Library, index: int, seed: int) -> tuple[dict[str, Any], np.ndarray]:
    """Row `index` of the library's split and its clip, (samples,) int16 at `RATE` Hz.

    Answers and their places among the choices go round, so that each is equally frequent.
    """
    rng = np.random.default_rng([seed, SPLITS.index(library.split), index])
    task, turn = TASKS[index % len(TASKS)], index // len(TASKS)
    facts = {name: str(rng.choice(values)) for name, values in task.lexicon.items()}
    asked = next(iter(task.lexicon))
    facts[asked] = task.lexicon[asked][turn % len(task.lexicon[asked])]
    answer = facts[asked].split(" then ")[0]
    clip = finished(task.render(library, facts, rng), rng)
    name = f"{library.split}-{seed}-{index:05d}"
    row = {
        "id": name,
        "audio_id": f"{library.split}-audios/{name}.wav",
        "question": str(rng.choice(task.questions)),
        "choices": choices(task, answer, turn, rng),
        "answer": answer,
        "dataset": "real_recordings",
        "task": task.modality,
        "split": library.split,
        "category": "Reasoning" if task.name in ("words", "hits", "order") else "Information Extraction",
        "sub-category": task.name,
        "difficulty": "medium",
        "facts": facts,
        "fact_lexicon": {fact: list(values) for fact, values in task.lexicon.items()},
        "evidence": task.evidence.format(**facts),
    }
    return row, clip


def choices(task: Task, answer: str, turn: int, rng: np.random.Generator) -> list[str]:
    """Four options; the answer's place goes round in an order that is not that of the answers."""
    others = [str(option) for option in rng.permutation([o for o in task.options if o != answer])[: CHOICES - 1]]
    others.insert((turn // len(next(iter(task.lexicon.values()))) + turn) % CHOICES, answer)
    return others


def shortcuts(tables: dict[str, list[dict[str, Any]]], features: dict[str, list[tuple[int, float]]]) -> list[str]:
    """What length and level of a file alone tell: by task, the answers of the 15 nearest training clips vote.

    Chance is 1 of 4; over it by more than the noise of the test split, and the set would have a shortcut.
    """
    lines = []
    for task in TASKS:
        (train, known), (test, unknown) = (_of_task(tables[s], features[s], task.name) for s in ("train", "test"))
        if not train or not test:
            continue
        scale, right = known.std(0) + 1e-9, 0
        for row, x in zip(test, unknown, strict=True):
            nearest = np.argsort((((known - x) / scale) ** 2).sum(1), kind="stable")[:15]
            votes = Counter(train[i]["answer"] for i in nearest)
            right += max(row["choices"], key=lambda choice: votes[choice]) == row["answer"]
        lines.append(f"length and level alone, {task.name}: {right}/{len(test)} right, chance 1 of {CHOICES}")
    return lines


def _of_task(
    rows: list[dict[str, Any]], features: list[tuple[int, float]], task: str
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """(Rows of a task, their length in seconds and level in dB, (N, 2))."""
    chosen = [i for i, row in enumerate(rows) if row["sub-category"] == task]
    values = [(features[i][0] / RATE, 10 * np.log10(features[i][1] + 1e-12)) for i in chosen]
    return [rows[i] for i in chosen], np.array(values).reshape(-1, 2)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="data/real", help="folder of rows and clips (default: data/real)")
    parser.add_argument("--packages", default="data/real_packages", help="folder that the packages are kept in")
    parser.add_argument("--seed", type=int, default=0)
    for split, count in ROWS.items():
        parser.add_argument(f"--{split}", type=int, default=count, metavar="N", help=f"rows (default: {count})")
    return parser


if __name__ == "__main__":
    main()
