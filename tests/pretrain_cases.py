"""For tests of pre-training: rows of speech that are noise, a tiny Covo-Audio with codes, packed batches of both."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from policy_cases import family

from covo_rl.speech.rows import SpeechRow
from covo_rl.supervised.pretrain.document import Vocabulary
from covo_rl.supervised.pretrain.mixture import Draw, Drawn
from covo_rl.supervised.pretrain.packing import PackedBatch, PackedRow, collate_rows
from covo_rl.supervised.pretrain.rows import TextRow
from covo_rl.supervised.pretrain.tasks import TASKS, BuildOptions
from covo_rl.synth.speech import write_wav
from covo_rl.types import Clip

CODES, SAMPLES = 32, 960
WORDS = ("the", "bell", "rings", "twice", "before", "a", "dog", "barks")


def tiny_family(seed: int = 0) -> Any:
    """About 50,000 parameters, with audio codes."""
    return family(seed=seed, sizes={"audio_codes": CODES})


def speech(number: int, codes: int, words: int = 3) -> dict[str, Any]:
    """A row: `words` words, evenly spread over `codes` codes of noise."""
    rng = np.random.default_rng(number)
    text = [str(word) for word in rng.choice(WORDS, words)]
    step = 0.04 * codes / words
    return {
        "id": f"row{number}", "text": " ".join(text), "document": f"d{number // 3}", "position": number % 3,
        "words": [[word, i * step, (i + 0.9) * step] for i, word in enumerate(text)],
        "codes": rng.integers(0, CODES, codes).tolist(), "tokenizer": "t",
    }  # fmt: skip


def wave(number: int, codes: int) -> np.ndarray:
    return (np.random.default_rng(number).normal(size=codes * SAMPLES) * 0.1).astype(np.float32)


def speech_row(number: int, codes: int, **changes: Any) -> SpeechRow:
    """The same row as an object, its recording in memory."""
    row = speech(number, codes)
    words = tuple((text, start, end) for text, start, end in row["words"])
    made = SpeechRow(
        row["id"], row["text"], Clip(array=wave(number, codes), sampling_rate=24000), document=row["document"],
        position=row["position"], words=words, codes=np.array(row["codes"]), source=row,
    )  # fmt: skip
    return replace(made, **changes)


def drawn(made: Any, task: str, *rows: Any, seed: int = 0) -> Drawn:
    """What a task makes of rows."""
    unit = rows[0] if TASKS[task].unit == "text" else rows
    document = TASKS[task].build(unit, Vocabulary.of(made), random.Random(seed), BuildOptions())
    return Drawn(replace(document, task=task), Draw(task, 0, 0), unit)


def mixed(made: Any) -> list[Drawn]:
    """Documents with and without sound, in text and in codes; two clips in one, and one clip in two."""
    rows = [speech_row(number, codes) for number, codes in enumerate((30, 41, 26))]
    return [
        drawn(made, "asr", rows[0]),
        drawn(made, "text", TextRow("t", "the dog barks twice")),
        drawn(made, "interleave_1", *rows, seed=3),
        drawn(made, "tts", rows[1]),
        drawn(made, "asr", rows[0], seed=1),
        drawn(made, "audio_only", *rows),
        drawn(made, "asr", rows[2]),
    ]


def packed(made: Any, rows: Sequence[Sequence[Drawn]], length: int | None = None) -> PackedBatch:
    """Rows of documents, side by side, as a batch; as long as the longest by default."""
    length = length or max(sum(map(len, row)) for row in rows)
    packed_rows = [PackedRow(tuple(row), length) for row in rows]
    extractor = made.processor.feature_extractor
    tasks = ("asr", "tts", "audio_only", "interleave_1", "text")
    return collate_rows(packed_rows, Vocabulary.of(made), made.pad_token_id, extractor, tasks)


def write_rows(folder: Path, count: int = 9) -> dict[str, Any]:
    """Recordings and rows on disk; the options of pre-training that name them."""
    (folder / "audio").mkdir(parents=True)
    with open(folder / "speech.jsonl", "w") as file:
        for number in range(count):
            codes = 20 + 7 * (number % 4)
            write_wav(folder / "audio" / f"{number}.wav", wave(number, codes))
            file.write(json.dumps({**speech(number, codes), "audio": f"audio/{number}.wav"}) + "\n")
    with open(folder / "text.jsonl", "w") as file:
        for number in range(count):
            file.write(json.dumps({"id": f"t{number}", "text": speech(number, 9, words=6)["text"]}) + "\n")
    return {"data": str(folder / "speech.jsonl"), "text_data": str(folder / "text.jsonl")}


def save_model(folder: Path) -> str:
    made = tiny_family()
    made.model.save_pretrained(folder)
    made.processor.save_pretrained(folder)
    return str(folder)
