"""How long a row's audio is, and whether its prompt fits the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from covo_rl.audio import AudioError
from covo_rl.data.check import clip_facts
from covo_rl.evaluate.inputs import count_rows
from covo_rl.prompt import PromptError, length_problem, position_limit
from covo_rl.types import Clip, Example, Prompt

if TYPE_CHECKING:
    from covo_rl.audio import ClipStore
    from covo_rl.models.base import AudioFamily


def audio_seconds(clips: Sequence[Clip], store: ClipStore | None) -> float:
    """Length of a row's audio in seconds, each file decoded once: a header may promise anything.

    Raises:
        AudioError: a clip that cannot be decoded.
    """
    total = 0.0
    for clip in clips:
        if clip.array is not None and clip.sampling_rate:
            total += len(clip.array) / clip.sampling_rate
        elif clip.path is not None:
            facts = clip_facts(clip)
            if facts.error is not None:
                raise AudioError(facts.error)
            total += facts.seconds
        elif store is not None:
            waveform, rate = store.waveform(store.key(clip))
            total += len(waveform) / rate
    return total


def too_long(examples: Sequence[Example], longest: float | None, store: ClipStore | None) -> list[str]:
    """One line for all rows with a clip of more than `longest` seconds; None is without limit."""
    clips = [(example.id, clip) for example in examples for clip in example.clips if longest]
    over = dict.fromkeys(name for name, clip in clips if longest and audio_seconds((clip,), store) > longest)
    return [f"audio longer than the {longest:g} s this model takes in {count_rows([*over])}"] if over else []


def length_problems(
    examples: Sequence[Example], family: AudioFamily, clips: ClipStore, prompt_of: Callable[[Example], Prompt],
    completion: int,
) -> list[str]:  # fmt: skip
    """Rows whose prompt and completion need more positions than the model has, each with its length.

    Prompts are built for rows that a generous estimate from headers and text does not clear; rows whose clips cannot
    be read are for the check of the data to report.
    """
    limit = position_limit(family.model.config)
    if limit is None:
        return []
    slots_per_second = family.clip_slots(np.zeros(160_000, dtype=np.float32), 16_000) / 10
    problems = []
    around = 1024  # tokens of template, instruction and system prompt: no more than one whole prompt has
    for example in examples[:1]:
        with suppress(AudioError, PromptError):
            around += len(prompt_of(example).input_ids)
    for example in examples:
        text = 2 * len("".join(example.texts).encode("utf-8", "surrogatepass")) + around
        try:
            seconds = audio_seconds(example.clips, clips)
        except AudioError:  # the prompt's own reading decides
            seconds = np.inf
        if text + 1.1 * slots_per_second * seconds + 8 * len(example.clips) + completion <= limit:
            continue
        with suppress(AudioError, PromptError):
            problems += length_problem(example.id, len(prompt_of(example).input_ids), completion, limit)
    return problems
