"""The built-in audio question set: real wav files and questions in the MMAU schema, rendered from a seed.

    python -m covo_rl.synth data/synth --seed 0 --train 2000 --validation 300 --test 400

Eleven kinds of four-choice questions over sound, music and speech-like clips of 1 to 3 seconds. Row `i` of a split
depends on (seed, split, i) only, never on how many rows are rendered. Beside MMAU's fields a row carries `facts`
(ground truth of the clip), `fact_lexicon` (what each fact could have been) and `evidence` (a true sentence), so
that reasoning can be fact-checked.
"""

from __future__ import annotations

import hashlib
import json
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from covo_rl.synth.scenes import SCENES, TASKS, Task
from covo_rl.synth.sounds import RATE, finish

SPLITS = ("train", "validation", "test")
#: changes whenever a rendered clip or a question could: names caches of the set.
VERSION = hashlib.sha256(
    b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
).hexdigest()[:8]
#: difficulty -> range of the background noise relative to the peak of the clip.
NOISE = {"easy": (0.0005, 0.002), "medium": (0.002, 0.005), "hard": (0.005, 0.012)}


def render_sample(split: str, index: int, seed: int = 0) -> tuple[dict[str, Any], np.ndarray]:
    """One row in the MMAU schema and its clip, (samples,) int16 at `RATE` Hz."""
    if split not in SPLITS:
        raise ValueError(f"no split is called {split!r}; there are {', '.join(SPLITS)}")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    task = TASKS[index % len(TASKS)]
    scene = SCENES[task.scene]
    facts = {name: str(rng.choice(values)) for name, values in scene.lexicon.items()}
    difficulty = str(rng.choice(list(NOISE)))
    clip = finish(scene.render(facts, rng), rng.uniform(0.3, 0.9), rng.uniform(*NOISE[difficulty]), rng)
    row = {
        "id": f"{split}-{seed}-{index:05d}",
        "audio_id": f"./{split}-audios/{split}-{seed}-{index:05d}.wav",
        **_question(task, facts, rng),
        "dataset": "covo_rl.synth",
        "task": task.modality,
        "split": split,
        "category": task.category,
        "sub-category": task.name,
        "difficulty": difficulty,
        "facts": facts,
        "fact_lexicon": {name: list(values) for name, values in scene.lexicon.items()},
        "evidence": scene.evidence.format(**facts),
    }
    return row, clip


def _question(task: Task, facts: dict[str, str], rng: np.random.Generator) -> dict[str, Any]:
    answer = task.answer(facts)
    others = rng.permutation([option for option in task.options if option != answer])[:3]
    choices = [str(option) for option in rng.permutation([answer, *others])]
    return {"question": str(rng.choice(task.questions)), "choices": choices, "answer": answer}


def samples(split: str, count: int, seed: int = 0) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """The first `count` rows of a split with their clips."""
    return (render_sample(split, index, seed) for index in range(count))


def render_set(
    folder: str | Path, seed: int = 0, train: int = 2000, validation: int = 300, test: int = 400
) -> dict[str, Path]:
    """Write the clips as 16-bit wav and one JSON per split; returns split -> JSON.

    A folder that already holds exactly this set is left as it is.

    Raises:
        ValueError: two rows of different splits hold the same clip.
    """
    folder = Path(folder)
    counts = dict(zip(SPLITS, (train, validation, test), strict=True))
    paths = {split: folder / f"{split}.json" for split in SPLITS}
    stamp = folder / "set.json"
    wanted = {"seed": seed, **counts, "version": VERSION}
    if stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == wanted:
        return paths
    split_of: dict[bytes, str] = {}
    for split, count in counts.items():
        (folder / f"{split}-audios").mkdir(parents=True, exist_ok=True)
        rows = []
        for row, clip in samples(split, count, seed):
            content = hashlib.sha256(clip.tobytes()).digest()
            if split_of.setdefault(content, split) != split:
                raise ValueError(f"the clip of {row['id']} is also in split {split_of[content]}; choose another seed")
            write_wav(folder / row["audio_id"], clip)
            rows.append(row)
        paths[split].write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    stamp.write_text(json.dumps(wanted) + "\n", encoding="utf-8")
    return paths


def write_wav(path: Path, clip: np.ndarray) -> None:
    """Mono 16-bit wav at `RATE`."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(clip.astype("<i2").tobytes())


def texts() -> list[str]:
    """Every sentence and option the set can contain: what a tokenizer is trained on."""
    found: set[str] = set()
    for task in TASKS:
        found.update(task.questions)
        found.update(task.options)
    for scene in SCENES.values():
        widest = max(len(values) for values in scene.lexicon.values())
        for i in range(widest):
            found.add(scene.evidence.format(**{name: v[i % len(v)] for name, v in scene.lexicon.items()}))
    return sorted(found)
