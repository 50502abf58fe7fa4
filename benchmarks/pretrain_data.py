"""How fast are the rows of pre-training: reading and checking them, building and packing documents, waiting for both.

    python benchmarks/pretrain_data.py                       # a made-up corpus, the tiny model, CPU
    python benchmarks/pretrain_data.py --rows 5000 --length 8192 --packed 200 --json data.json

The corpus: documents of 1 to 12 utterances of 2 to 12 s with words and codes, and texts of 10 to 20,000 words, half of
them under 150. The mixture has the report's weights. Rates are per CPU second of one core, the ones to trust on a busy
machine, and of wall time. `data_time` is the share of a tiny training step (forward and backward of a packed row) that
waits for its row while workers read ahead.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from covo_rl.models.covo_audio.family import CovoAudio
from covo_rl.models.tiny.covo_audio import tiny_covo_audio
from covo_rl.speech.grid import CODE_SECONDS, RATE
from covo_rl.supervised.pretrain.document import Vocabulary
from covo_rl.supervised.pretrain.stream import PackedStream, TaskData, stream_report
from covo_rl.synth.speech import write_wav

#: the report's, in B tokens
WEIGHTS = {
    "asr": 80, "tts": 160, "audio_only": 240, "continuation": 160, "interleave_1": 360, "interleave_2": 180,
    "text": 800,
}  # fmt: skip
WORDS = (
    "the", "speech", "of", "a", "voice", "that", "nobody", "heard", "before,", "goes", "on", "and", "then", "ends.",
)  # fmt: skip
CODES, STEP_LENGTH = 256, 1024


def write_corpus(folder: Path, rows: int, own_audio: bool, seed: int = 0) -> dict[str, TaskData]:
    """Rows of speech and of text; with `own_audio` each utterance has a recording (noise), else all have the same."""
    rng = random.Random(seed)
    speech, count = [], 0
    write_wav(folder / "shared.wav", np.zeros(RATE, np.float32))
    while len(speech) < rows:
        count += 1
        for position in range(rng.randint(1, 12)):
            seconds, name, start = rng.uniform(2, 12), f"d{count}-{position}", 0.1
            length = round(seconds / CODE_SECONDS)
            words = []
            while start + 0.5 < length * CODE_SECONDS:
                end = start + rng.uniform(0.15, 0.4)
                words.append([rng.choice(WORDS), round(start, 3), round(end, 3)])
                start = end + rng.choice([0.02, 0.05, 0.3])
            audio = f"{name}.wav" if own_audio else "shared.wav"
            if own_audio:
                noise = np.random.default_rng(len(speech)).uniform(-0.3, 0.3, length * round(CODE_SECONDS * RATE))
                write_wav(folder / audio, noise.astype(np.float32))
            speech.append({
                "id": name, "audio": audio, "text": " ".join(word[0] for word in words), "document": f"d{count}",
                "position": position, "words": words, "codes": [rng.randrange(CODES) for _ in range(length)],
                "tokenizer": "made-up",
            })  # fmt: skip
    lengths = [min(20_000, max(10, round(rng.lognormvariate(5, 1.2)))) for _ in range(rows)]
    texts = [{"id": f"t{i}", "text": " ".join(rng.choices(WORDS, k=n))} for i, n in enumerate(lengths)]
    for name, content in (("speech", speech), ("text", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    data = {name: str(folder / f"{'text' if name == 'text' else 'speech'}.jsonl") for name in WEIGHTS}
    return {name: TaskData(weight, data[name]) for name, weight in WEIGHTS.items()}


def timed(action: Callable[[], Any]) -> tuple[Any, float, float]:
    """(what it returns, wall seconds, CPU seconds)."""
    wall, cpu = time.perf_counter(), time.process_time()
    return action(), time.perf_counter() - wall, time.process_time() - cpu


def building(folder: Path, rows: int, packed: int, length: int, vocabulary: Vocabulary) -> dict[str, float]:
    """Rows checked, documents built and rows packed a second, the share of padding, and how far off its share of the
    tokens that were drawn the task is that is furthest from it."""
    tasks = write_corpus(folder, rows, own_audio=False)
    options: dict[str, Any] = {"seed": 0, "length": length, "pad_id": vocabulary.text_end}
    stream, wall, cpu = timed(lambda: PackedStream(tasks, vocabulary, **options))
    checked = sum(len(store) for store in stream.stores.values())
    figures = {"checked_rows": checked, "checked_rows_per_s": checked / wall, "checked_rows_per_cpu_s": checked / cpu}
    packer = stream.packer()
    made, wall, cpu = timed(lambda: [packer.next_row() for _ in range(packed)])
    drawn = stream_report(packer.state_dict())["tasks"]
    total, weights = sum(task["tokens"] for task in drawn.values()), sum(WEIGHTS.values())
    off = max(abs(drawn[name]["tokens"] - total * weight / weights) for name, weight in WEIGHTS.items())
    documents, tokens = sum(len(row.drawn) for row in made), sum(row.tokens for row in made)
    return figures | {
        "packed_rows": len(made), "documents": documents, "padding": 1 - tokens / (length * len(made)),
        "rows_per_s": len(made) / wall, "rows_per_cpu_s": len(made) / cpu, "documents_per_cpu_s": documents / cpu,
        "tokens_per_cpu_s": tokens / cpu, "longest": max(len(item) for row in made for item in row.drawn),
        "tokens_off_share": off,
    }  # fmt: skip


def stepping(folder: Path, steps: int, workers: int, family: CovoAudio) -> dict[str, float]:
    """Share of a tiny step that waits for its packed row, with audio."""
    tasks = write_corpus(folder, 60, own_audio=True)
    vocabulary, model = Vocabulary.of(family), family.model
    extractor = family.processor.feature_extractor
    stream = PackedStream(
        tasks, vocabulary, seed=0, length=STEP_LENGTH, pad_id=family.pad_token_id, extractor=extractor, workers=workers
    )
    stream.next_batch()  # the worker starts
    begin, waited = time.perf_counter(), stream.wait_seconds
    for _ in range(steps):
        batch = stream.next_batch()
        out = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, labels=batch.labels, use_cache=False,
            **batch.audio,
        )  # fmt: skip
        out.loss.backward()
        model.zero_grad()
    seconds, waited = time.perf_counter() - begin, stream.wait_seconds - waited
    stream.close()
    return {"steps": steps, "workers": workers, "step_s": seconds / steps, "data_time": waited / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000, help="rows of speech, and as many of text")
    parser.add_argument("--packed", type=int, default=60, help="rows that are packed")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=20, help="tiny steps with audio")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", help="where to write the figures")
    given = parser.parse_args()
    torch.manual_seed(0)
    family = CovoAudio(*tiny_covo_audio(audio_codes=CODES))
    with tempfile.TemporaryDirectory() as folder:
        figures = {
            "building": building(Path(folder), given.rows, given.packed, given.length, Vocabulary.of(family)),
            "stepping": stepping(Path(folder), given.steps, given.workers, family),
        }
    for name, part in figures.items():
        print(f"{name}: " + ", ".join(f"{key} {value:,.4g}" for key, value in part.items()))
    if given.json:
        Path(given.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
