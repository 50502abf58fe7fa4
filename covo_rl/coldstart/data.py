"""Rows with their features in memory: a clip is read and turned into features once, however many stages use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from covo_rl.audio import ClipStore
from covo_rl.coldstart.config import ColdStartConfig
from covo_rl.models.base import AudioFamily, ClipFeatures
from covo_rl.prompt import build
from covo_rl.types import Clip, Example


@dataclass(frozen=True)
class Row:
    """An example with the token ids of its prompt and the features of its clips."""

    example: Example
    prompt_ids: tuple[int, ...]
    clips: tuple[ClipFeatures, ...]


def examples(config: ColdStartConfig) -> list[Example]:
    """The rows of `data`, or the first `rows` questions of the built-in train split."""
    if config.data is not None:
        from covo_rl.data import load

        return load(config.data, config.audio_dir)
    return rendered("train", config.rows, config.synth_seed)


def rendered(split: str, count: int, seed: int) -> list[Example]:
    """Built-in questions with their clips as arrays, nothing on disk."""
    from covo_rl import synth

    return [
        Example(
            id=row["id"],
            clips=(Clip(array=clip.astype("float32") / 32_768, sampling_rate=synth.RATE),),
            question=row["question"],
            choices=tuple(row["choices"]),
            answer=row["answer"],
            columns={name: value for name, value in row.items() if name not in ("id", "question", "choices", "answer")},
        )
        for row, clip in synth.samples(split, count, seed)
    ]


def prepare(rows: Sequence[Example], family: AudioFamily, config: ColdStartConfig) -> list[Row]:
    """Prompts and features of all rows, each clip decoded once."""
    clips = ClipStore(memory_mb=64)
    features: dict[str, ClipFeatures] = {}
    prepared = []
    for example in rows:
        prompt = build(example, family, clips, config.prompt)
        for key in prompt.clip_keys:
            if key not in features:
                features[key] = family.clip_features(*clips.waveform(key))
        prepared.append(Row(example, prompt.input_ids, tuple(features[key] for key in prompt.clip_keys)))
    return prepared
