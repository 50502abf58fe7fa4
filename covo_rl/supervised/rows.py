"""Rows with their features in memory: a clip is read and turned into features once, however many stages use it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    ends = [stage.first_row + stage.rows for stage in stages if stage.rows is not None]
    return min(stage.first_row for stage in stages), max(ends) if len(ends) == len(stages) else None


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

    result = []
    for number in numbers:
        row, clip = synth.render_sample(split, number, seed)
        own = {name: row.pop(name) for name in ("id", "question", "answer")}
        clips = (Clip(array=clip.astype("float32") / 32_768, sampling_rate=synth.RATE),)
        result.append(Example(**own, clips=clips, choices=tuple(row.pop("choices")), columns=row))
    return result


def prepare_rows(rows: Sequence[Example], family: AudioFamily, config: ColdStartConfig) -> list[Row]:
    """Prompts and features of all rows, each clip decoded once."""
    clips = ClipStore(memory_mb=64)
    features: dict[str, ClipFeatures] = {}
    result = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small operations, which waiting for a second thread only slows
    try:
        for example in rows:
            prompt = build_prompt(example, family, clips, config.prompt)
            for key in prompt.clip_keys:
                if key not in features:
                    features[key] = family.clip_features(*clips.waveform(key))
            result.append(Row(example, prompt.input_ids, tuple(features[key] for key in prompt.clip_keys)))
    finally:
        torch.set_num_threads(threads)
    return result
