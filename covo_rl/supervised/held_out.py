"""Rows that no stage sees, and how a model answers them: greedily, scored by the accuracy and format rewards."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from covo_rl.audio import ClipStore
from covo_rl.config import PromptConfig, RolloutConfig
from covo_rl.data.check import sound_of
from covo_rl.types import Example

if TYPE_CHECKING:
    from covo_rl.models.base import AudioFamily

BATCH = 32
LONGEST = 512  # tokens of a held-out reply


def split_held_out(
    examples: Sequence[Example], share: float, seed: int, clips: ClipStore
) -> tuple[list[Example], list[Example]]:
    """(rows for training, held-out rows), all rows of a clip on the same side; at least one clip where `share` > 0."""
    sounds = [sound_of(row, clips) for row in examples]
    names = sorted(set(sounds))
    random.Random(seed).shuffle(names)
    chosen = set(names[: max(1, round(share * len(names)))] if share and len(names) > 1 else [])
    sides: tuple[list[Example], list[Example]] = ([], [])
    for row, sound in zip(examples, sounds, strict=True):
        sides[sound in chosen].append(row)
    return sides


@contextmanager
def as_it_was(family: AudioFamily) -> Iterator[None]:
    """Give the model its mode and the decoder its attention back: a policy sets its own."""
    from covo_rl.policy.packable import restored_attention

    training = family.model.training
    try:
        with restored_attention(family.decoder):
            yield
    finally:
        family.model.train(training)


def held_out_figures(
    family: AudioFamily, rows: Sequence[Example], prompt: PromptConfig, clips: ClipStore, *, length: int
) -> dict[str, float | int | None]:
    """Rows, share of right answers and of well-formed replies (None where nothing can be graded), greedy.

    `length` bounds a reply in tokens. The model goes on as it was: in its mode and with its attention.
    """
    import torch

    from covo_rl.engines import own
    from covo_rl.policy import Policy
    from covo_rl.prompt import build_prompt
    from covo_rl.rewards import score

    config = RolloutConfig(num_generations=1, max_completion_length=min(length, LONGEST))
    tables = []
    with torch.no_grad(), as_it_was(family):
        policy = Policy(family.__class__(family.model, family.processor), None, clips=clips, feature_memory_mb=64)
        policy.eval()
        for start in range(0, len(rows), BATCH):
            prompts = [build_prompt(row, family, clips, prompt) for row in rows[start : start + BATCH]]
            groups = own.sample(
                policy, prompts, policy.features(prompts), config, seed=0, greedy=True, num_generations=1
            )
            tables.append(score(groups, rewards="accuracy,format").rewards_PGR[:, 0])
    rewards_PR = np.concatenate(tables)
    means = [None if np.isnan(column).all() else round(float(np.nanmean(column)), 4) for column in rewards_PR.T]
    return {"rows": len(rows), "accuracy": means[0], "format": means[1]}
