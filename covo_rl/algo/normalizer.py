"""The global counts that loss types divide by, taken once per optimiser step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from covo_rl.algo.metrics import Reduce


@dataclass(frozen=True)
class Normalizer:
    """Global counts of one optimiser step: all micro-batches, all ranks.

    `sequences` counts rollouts, masked ones included (as TRL does); `tokens` counts completion tokens that are not
    masked; `window_tokens` is the generation batch's tokens / steps per generation. With top-entropy masking
    `entropy_threshold` is the entropy below which tokens are left out and `entropy_tokens` how many remain; None
    means "the quantile of each micro-batch", which is what TRL does.
    """

    sequences: float
    tokens: float
    window_tokens: float
    world_size: int = 1
    entropy_threshold: float | None = None
    entropy_tokens: float | None = None

    @classmethod
    def count(
        cls,
        masks: Iterable[Tensor],
        *,
        generation_tokens: float | None = None,
        steps_per_generation: int = 1,
        world_size: int = 1,
        reduce_sum: Reduce | None = None,
        device: torch.device | str = "cpu",
    ) -> Normalizer:
        """Count this rank's micro-batch masks (N, C), then sum over ranks with `reduce_sum`, once.

        Give `generation_tokens`, this rank's unmasked tokens of the whole generated batch, where that is split over
        several optimiser steps. Apply `mask_truncated` before. A rank without work passes no masks and takes part.
        """
        kept = list(masks)
        sequences, tokens = sum(len(m) for m in kept), sum(int(m.bool().sum()) for m in kept)
        window = tokens if generation_tokens is None else generation_tokens
        totals = torch.tensor([sequences, tokens, window], dtype=torch.float64, device=device)
        sequences, tokens, window = (reduce_sum(totals) if reduce_sum else totals).tolist()
        return cls(sequences, tokens, window / steps_per_generation, world_size)

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int],
        *,
        generation_tokens: float | None = None,
        steps_per_generation: int = 1,
        world_size: int = 1,
    ) -> Normalizer:
        """The same from the completion lengths of all ranks (0 for a completion that is masked)."""
        tokens = float(sum(lengths))
        window = tokens if generation_tokens is None else generation_tokens
        return cls(float(len(lengths)), tokens, window / steps_per_generation, world_size)


def entropy_threshold(
    entropies: Sequence[Tensor], masks: Sequence[Tensor], top_entropy_quantile: float
) -> tuple[float, float]:
    """(threshold, tokens at or above it) over all given (N, C) micro-batches; gather them over ranks first.

    Put both into the Normalizer to make top-entropy masking independent of the micro-batch size.
    """
    values = torch.cat([e.detach()[m.bool()].float() for e, m in zip(entropies, masks, strict=True)])
    if not values.numel():
        return math.inf, 0.0
    threshold = torch.quantile(values, 1 - top_entropy_quantile)
    return float(threshold), float((values >= threshold).sum())
