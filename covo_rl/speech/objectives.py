"""What trains a speech tokenizer: words, sound and pitch of codes, and vectors that stay near their code.

Each is a mean over the real positions of a batch. `total` takes the place of their number where several ranks or
micro-batches share an update: their sum divided by the ranks' mean number, so that averaged gradients are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from covo_rl.speech.heads import PITCH_SCALE


def masked_mean(values: Tensor, mask: Tensor, total: Tensor | float | None = None) -> Tensor:
    """Mean of `values` where `mask` (of the same shape) holds; 0 where it holds nowhere."""
    count = mask.sum() if total is None else torch.as_tensor(total, device=values.device)
    return values.masked_fill(~mask, 0).sum() / count.clamp(min=1)


def shortest_path(ids: Sequence[int]) -> int:
    """Codes that CTC needs to write `ids`: one each, and a blank between two that are equal."""
    return len(ids) + sum(a == b for a, b in pairwise(ids))


def ctc_loss(logits_BLP: Tensor, lengths_B: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
    """Connectionist temporal classification (Graves et al. 2006): mean over rows of -log p / pieces. Blank is 0.

    Rows whose codes are too few for their text are left out. `lengths_B` is on the CPU: nothing waits for a device.
    """
    fits = [i for i, ids in enumerate(targets) if 0 < shortest_path(ids) <= int(lengths_B[i])]
    if not fits:
        return logits_BLP.sum() * 0
    device = logits_BLP.device
    sizes = torch.tensor([len(targets[i]) for i in fits])
    flat = torch.tensor([id for i in fits for id in targets[i]], device=device)
    logps_LBP = (
        logits_BLP[fits].to(torch.promote_types(logits_BLP.dtype, torch.float32)).log_softmax(-1).transpose(0, 1)
    )
    return F.ctc_loss(logps_LBP, flat, lengths_B[fits], sizes)


def mel_loss(drawn_BZE: Tensor, mel_BZE: Tensor, mask_BZ: Tensor, total: Tensor | float | None = None) -> Tensor:
    """L1 between standardised log-mels, over real frames."""
    return masked_mean((drawn_BZE - mel_BZE).abs().mean(-1), mask_BZ, total)


def pitch_loss(
    voicing_BZ: Tensor, contour_BZ: Tensor, f0_BZ: Tensor, mask_BZ: Tensor,
    totals: tuple[Tensor | float | None, Tensor | float | None] = (None, None),
) -> Tensor:  # fmt: skip
    """Cross entropy of the voicing logits, and 3 x L1 of log2 F0 relative to the clip's voiced mean.

    `contour_BZ` is in octaves, `f0_BZ` in Hz with 0 where there is no voice. `totals`: real frames, voiced frames.
    """
    voiced_BZ = (f0_BZ > 0) & mask_BZ
    entropy = F.binary_cross_entropy_with_logits(voicing_BZ, voiced_BZ.to(voicing_BZ), reduction="none")
    octaves_BZ = f0_BZ.clamp(min=1).log2()
    level_B1 = octaves_BZ.masked_fill(~voiced_BZ, 0).sum(1, keepdim=True) / voiced_BZ.sum(1, keepdim=True).clamp(min=1)
    distance = PITCH_SCALE * (contour_BZ - (octaves_BZ - level_B1)).abs()
    return masked_mean(entropy, mask_BZ, totals[0]) + masked_mean(distance, voiced_BZ, totals[1])


def commitment_loss(
    vectors_BLC: Tensor, chosen_BLC: Tensor, mask_BL: Tensor, total: Tensor | float | None = None
) -> Tensor:
    """Mean square between unit vectors and their codes', which does not move the codes (van den Oord et al. 2017)."""
    return masked_mean((vectors_BLC - chosen_BLC.detach()).square().mean(-1), mask_BL, total)
