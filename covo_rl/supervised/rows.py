"""Rows with their features in memory: a clip is read and turned into features once, however many stages use it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from covo_rl.audio import ClipStore
from covo_rl.models.base import AudioFamily, ClipFeatures
from covo_rl.prompt import build_prompt
from covo_rl.supervised.config import ColdStartConfig
from covo_rl.types import Clip, Example


@dataclass(frozen=True)
class Row:
    """An example with the token ids of its prompt and the features of its clips."""

    example: Example
    prompt_ids: tuple[int, ...]
    clips: tuple[ClipFeatures, ...]


def used_rows(config: ColdStartConfig) -> tuple[int, int | None]:
    """First and last + 1 row that the stages to be run look at; None is the end of the data."""
    stages = config.stages[config.start_stage :]
    ends = [None if stage.rows is None else stage.first_row + stage.rows for stage in stages]
    known = [end for end in ends if end is not None]
    return min(stage.first_row for stage in stages), max(known) if len(known) == len(ends) else None


def examples(config: ColdStartConfig) -> list[Example]:
    """The used rows of `data`, or of the built-in train split, which has `rows` rows here."""
    first, end = used_rows(config)
    if config.data is not None:
        from covo_rl.data import load_examples

        return load_examples(config.data, config.audio_dir)[first:end]
    return rendered("train", range(first, min(end or config.rows, config.rows)), config.synth_seed)


def rendered(split: str, numbers: Iterable[int], seed: int) -> list[Example]:
    """Built-in questions with their clips as arrays, nothing on disk."""
    from covo_rl import synth

    built = []
    for number in numbers:
        row, clip = synth.render_sample(split, number, seed)
        rest = {name: value for name, value in row.items() if name not in ("id", "question", "choices", "answer")}
        built.append(
            Example(
                id=row["id"],
                clips=(Clip(array=clip.astype("float32") / 32_768, sampling_rate=synth.RATE),),
                question=row["question"],
                choices=tuple(row["choices"]),
                answer=row["answer"],
                columns=rest,
            )
        )
    return built


def prepare(rows: Sequence[Example], family: AudioFamily, config: ColdStartConfig) -> list[Row]:
    """Prompts and features of all rows, each clip decoded once."""
    clips = ClipStore(memory_mb=64)
    features: dict[str, ClipFeatures] = {}
    prepared = []
    with one_thread():
        for example in rows:
            prompt = build_prompt(example, family, clips, config.prompt)
            for key in prompt.clip_keys:
                if key not in features:
                    features[key] = family.clip_features(*clips.waveform(key))
            prepared.append(Row(example, prompt.input_ids, tuple(features[key] for key in prompt.clip_keys)))
    return prepared


@contextmanager
def one_thread() -> Iterator[None]:
    """Features of one short clip are many small operations, which waiting for a second thread only slows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
