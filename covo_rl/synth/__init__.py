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

from covo_rl.data.files import fill_folder
from covo_rl.resolve import cache_folder
from covo_rl.synth.scenes import SCENES, TASKS
from covo_rl.synth.sounds import RATE, pcm16

SPLITS = ("train", "validation", "test")
#: Names caches of the set: another one whenever a rendered clip or a question is (a test holds what this one renders).
VERSION = "c5869656"
#: Split -> rows of the set that a run uses without data, rendered from BUILTIN_SEED.
BUILTIN = {"train": 2000, "validation": 400, "test": 400}
BUILTIN_SEED = 0
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
    clip = pcm16(scene.render(facts, rng), rng.uniform(0.3, 0.9), rng.uniform(*NOISE[difficulty]), rng)
    answer = task.answer(facts)
    others = rng.permutation([option for option in task.options if option != answer])[:3]
    choices = [str(option) for option in rng.permutation([answer, *others])]
    row = {
        "id": f"{split}-{seed}-{index:05d}",
        "audio_id": f"./{split}-audios/{split}-{seed}-{index:05d}.wav",
        "question": str(rng.choice(task.questions)),
        "choices": choices,
        "answer": answer,
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
    stamp, content = folder / "set.json", {"seed": seed, **counts, "version": VERSION}
    if stamp.is_file() and stamp.read_bytes() == (json.dumps(content) + "\n").encode():
        return paths
    split_of: dict[bytes, str] = {}
    for split, count in counts.items():
        (folder / f"{split}-audios").mkdir(parents=True, exist_ok=True)
        rows = []
        for row, clip in samples(split, count, seed):
            digest = hashlib.sha256(clip.tobytes()).digest()
            if split_of.setdefault(digest, split) != split:
                raise ValueError(f"the clip of {row['id']} is also in split {split_of[digest]}; choose another seed")
            with wave.open(str(folder / row["audio_id"]), "wb") as file:
                file.setparams((1, 2, RATE, len(clip), "NONE", ""))  # mono, 16 bits
                file.writeframes(clip.astype("<i2").tobytes())
            rows.append(row)
        paths[split].write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    stamp.write_text(json.dumps(content) + "\n", encoding="utf-8")
    return paths


def builtin_questions() -> dict[str, Path]:
    """Split name -> JSON file of the built-in set in the MMAU schema, rendered on first use.

    Rendering goes to a temporary folder that is renamed when complete, so a killed run leaves no half set.
    """
    name = f"questions-v{VERSION}-seed{BUILTIN_SEED}-{'-'.join(map(str, BUILTIN.values()))}"
    folder = cache_folder() / name
    fill_folder(folder, lambda partial: render_set(partial, seed=BUILTIN_SEED, **BUILTIN))
    return {split: folder / f"{split}.json" for split in BUILTIN}
