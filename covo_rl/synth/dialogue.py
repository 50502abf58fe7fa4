"""Spoken questions and their replies: somebody says digits, and the reply says them again, in text and in speech.

write_dialogues("data/spoken", split="train", count=100, seed=1000)   # wav files and rows.jsonl, as `--data` reads
spoken_questions()                                                    # the set that recipes/grpo_spoken.py asks
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from covo_rl.data.files import fill_folder, json_line, write_atomically
from covo_rl.resolve import cache_folder
from covo_rl.synth.speech import DIGITS, SPEECH_SPLITS, Utterance, say_digits, speakers, write_wav

QUESTION = "Say it again."
#: how many digits a question has, at least and at most
LENGTHS = (2, 6)
#: split -> rows of the set that a run uses without data, from SPOKEN_SEED
SPOKEN = {"train": 800, "test": 200}
SPOKEN_SEED = 2000


def dialogue(split: str, index: int, seed: int = 0) -> Iterator[Utterance]:
    """The question, then the reply: the same digits in two voices of the split.

    Row `index` depends on (seed, split, index) only. Raises ValueError where there is no such split.
    """
    voices = speakers(SPEECH_SPLITS.get(split, 1), seed, split)
    rng = np.random.default_rng([seed, list(SPEECH_SPLITS).index(split), index, 2])
    words = [str(word) for word in rng.choice(DIGITS, rng.integers(LENGTHS[0], LENGTHS[1] + 1))]
    for voice in rng.choice(len(voices), 2, replace=False):
        yield say_digits(words, voices[int(voice)], rng)


def write_dialogues(
    folder: str | Path, *, split: str = "train", count: int = 1000, seed: int = 0, replies: bool = True
) -> Path:
    """Write 16-bit wav files and one row each; returns `folder/SPLIT.jsonl`, whose paths are beside it.

    A row is a question as every set has them, `answer` being the words; `reply` is the wave of the reply, left out
    without `replies`.
    """
    folder = Path(folder)
    (folder / split).mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for index in range(count):
        name = f"{split}-{seed}-{index:05d}"
        paths = {"audio": f"{split}/{name}.wav"} | ({"reply": f"{split}/{name}-reply.wav"} if replies else {})
        said = list(islice(dialogue(split, index, seed), len(paths)))
        for path, spoken in zip(paths.values(), said, strict=True):
            write_wav(folder / path, spoken.wave)
        rows.append({"id": name, **paths, "question": QUESTION, "answer": said[0].text,
                     "speaker": said[0].speaker.name})  # fmt: skip
    path = folder / f"{split}.jsonl"
    write_atomically(path, lambda file: file.writelines(map(json_line, rows)))
    return path


def spoken_questions() -> dict[str, Path]:
    """Split name -> JSONL of the built-in spoken questions, rendered on first use; no voice is in both."""
    modules = ("sounds", "phones", "speech", "dialogue")
    sources = b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in modules)
    counts = "-".join(map(str, SPOKEN.values()))
    folder = cache_folder() / f"spoken-v{hashlib.sha256(sources).hexdigest()[:8]}-seed{SPOKEN_SEED}-{counts}"

    def write(partial: Path) -> None:
        for split, count in SPOKEN.items():
            write_dialogues(partial, split=split, count=count, seed=SPOKEN_SEED, replies=False)

    fill_folder(folder, write)
    return {split: folder / f"{split}.jsonl" for split in SPOKEN}
