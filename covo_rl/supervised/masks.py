"""SpecAugment: what a stage hides of the features of a clip (Park et al., 2019), so that it is not known by heart."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from covo_rl.supervised.config import Stage
from covo_rl.types import UserError

if TYPE_CHECKING:
    from covo_rl.models.base import ClipFeatures

FEATURES = "input_features"


class MaskError(UserError, ValueError):
    """The family's features are no spectrogram."""


class Masks:
    """One band of at most `mask_bins` bins and one span of at most `mask_frames` frames, set to the row's mean.

    Width and place are drawn evenly for each row of `input_features` (rows, M, F); the features given stay as they are.
    """

    def __init__(self, stage: Stage, seed: int) -> None:
        self.widths = stage.mask_bins, stage.mask_frames
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, clip: ClipFeatures) -> ClipFeatures:
        """Raises MaskError for features of another name."""
        if not any(self.widths):
            return clip
        if FEATURES not in clip.tensors:
            names = ", ".join(clip.tensors)
            raise MaskError(f"mask_bins and mask_frames need a spectrogram {FEATURES!r}; this family has {names}")
        rows = clip.tensors[FEATURES].clone()
        for row in rows:
            mean = row.mean()
            for axis, widest in enumerate(self.widths):
                width = self._draw(min(widest, row.shape[axis]) + 1)
                row.narrow(axis, self._draw(row.shape[axis] - width + 1), width).fill_(mean)
        return replace(clip, tensors={**clip.tensors, FEATURES: rows})

    def _draw(self, end: int) -> int:
        return int(torch.randint(end, (1,), generator=self.generator))
