"""Supervised updates of a model that listens while it speaks: cross-entropy at its decisions, its text, its codes.

    loss, figures = supervised_loss(family, lessons, ids)

The user's chunks are never targets. Decisions are few and decide all: by default a decision weighs 2, an id of text 1,
a code 0.3, and the loss is the weighted mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from covo_rl.duplex.ids import DuplexIds
from covo_rl.duplex.questions import DuplexLesson
from covo_rl.duplex.trunk import path_states

if TYPE_CHECKING:
    from covo_rl.models.base import AudioFamily


@dataclass(frozen=True)
class LessonWeights:
    """What a target counts, by what it is."""

    decision: float = 2.0
    text: float = 1.0
    code: float = 0.3


def supervised_loss(
    family: AudioFamily, lessons: Sequence[DuplexLesson], ids: DuplexIds, weights: LessonWeights | None = None
) -> tuple[Tensor, dict[str, float]]:
    """The weighted mean of -log p over all targets; by kind `loss_NAME`, its mean, and `targets_NAME`, how many.

    text_pad counts as text.
    """
    weights = weights or LessonWeights()
    paths = [lesson.ids for lesson in lessons]
    states_NTD = path_states(
        family, paths, [lesson.places for lesson in lessons], [lesson.features_UD for lesson in lessons]
    )
    rows, columns, targets = zip(*_targets(lessons, ids), strict=True)
    targets_M = torch.tensor(targets, device=states_NTD.device)
    # the hidden state of the id before predicts a target
    logits_MV = family.lm_head(states_NTD[list(rows), [column - 1 for column in columns]]).float()
    nll_M = F.cross_entropy(logits_MV, targets_M, reduction="none")
    figures: dict[str, float] = {}
    for name, here_M in target_kinds(targets_M, ids).items():
        count = int(here_M.sum())
        figures[f"targets_{name}"] = count
        if count:
            figures[f"loss_{name}"] = float(nll_M[here_M].detach().mean())
    weight_M = target_weights(targets_M, ids, weights)
    return (nll_M * weight_M).sum() / weight_M.sum(), figures


def target_kinds(targets_M: Tensor, ids: DuplexIds) -> dict[str, Tensor]:
    """Name of each of LessonWeights -> (M,) bool, which of these ids of streams it is of."""
    controls = torch.tensor([ids.think, ids.shift, ids.break_], device=targets_M.device)
    is_code_M, is_decision_M = targets_M >= ids.first_code, torch.isin(targets_M, controls)
    return {"decision": is_decision_M, "text": ~(is_code_M | is_decision_M), "code": is_code_M}


def target_weights(targets_M: Tensor, ids: DuplexIds, weights: LessonWeights) -> Tensor:
    """(M,) float32, what each of these ids of streams counts."""
    weight_M = torch.zeros(targets_M.shape, device=targets_M.device)
    for name, here_M in target_kinds(targets_M, ids).items():
        weight_M[here_M] = getattr(weights, name)
    return weight_M


def _targets(lessons: Sequence[DuplexLesson], ids: DuplexIds) -> list[tuple[int, int, int]]:
    """(row, column, id) of every target."""
    return [
        (row, column, token) for row, lesson in enumerate(lessons)
        for column, token in enumerate(lesson.ids) if column >= lesson.taught_from and token != ids.placeholder
    ]  # fmt: skip
