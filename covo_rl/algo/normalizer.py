"""What a loss is divided by: counts taken once per optimiser step, over all micro-batches and ranks.

A share function turns masked losses (N, C) or (N, 1) of one micro-batch into its share of the step's loss, a scalar.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


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
    def from_lengths(
        cls,
        lengths: Sequence[int],
        *,
        generation_tokens: float | None = None,
        steps_per_generation: int = 1,
        world_size: int = 1,
    ) -> Normalizer:
        """From the completion lengths of all ranks, 0 for a completion that is masked.

        Give `generation_tokens`, the unmasked tokens of the whole generated batch on all ranks, where that is split
        over several optimiser steps.
        """
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
    values = values.cpu().double()  # in this order: not every device has float64
    # torch.quantile takes no more than 2^24 values
    threshold = float(np.quantile(values.numpy(), 1 - top_entropy_quantile))
    return threshold, float((values >= threshold).sum())


def sequence_means(masked: Tensor, mask_NC: Tensor, normalizer: Normalizer, limit: int) -> Tensor:
    """Mean over the tokens of a sequence, then over the sequences of the step."""
    return (masked.sum(-1) / mask_NC.sum(-1).clamp(min=1)).sum() / max(normalizer.sequences, 1.0)


def by_sequences(masked: Tensor, mask_NC: Tensor, normalizer: Normalizer, limit: int) -> Tensor:
    """A sequence counts by its length."""
    return masked.sum() / max(normalizer.sequences, 1.0)


def by_full_length(masked: Tensor, mask_NC: Tensor, normalizer: Normalizer, limit: int) -> Tensor:
    """As if every sequence had the full length."""
    return masked.sum() / max(normalizer.sequences * limit, 1.0)


def by_step_tokens(masked: Tensor, mask_NC: Tensor, normalizer: Normalizer, limit: int) -> Tensor:
    """Mean over the tokens of the step."""
    return masked.sum() / max(normalizer.tokens, 1.0)


def by_batch_tokens(masked: Tensor, mask_NC: Tensor, normalizer: Normalizer, limit: int) -> Tensor:
    """Mean over the tokens of the generated batch, as if split evenly over its steps."""
    return masked.sum() / max(normalizer.window_tokens, 1.0)
