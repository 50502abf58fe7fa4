"""Audio slots: one placeholder per clip becomes one per feature, their number is checked, and parts fill them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn


def part_output(part: nn.Module, hidden: torch.Tensor, **kwargs: Any) -> Any:
    """`part(hidden)`, without autograd where neither the part nor its input asks for gradients."""
    trains = hidden.requires_grad or any(parameter.requires_grad for parameter in part.parameters())
    with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
        return part(hidden, **kwargs)


def expand_placeholders(
    texts: Sequence[str], slots: Sequence[int], token: str, per_row: Sequence[int] | None = None
) -> list[str]:
    """Replace the i-th `token` of the batch, row by row, by `slots[i]` of them.

    `per_row[n]` clips were given for row n (None: one flat list). Raises ValueError that names the row whose
    placeholders and clips differ in number.
    """
    counts = [text.count(token) for text in texts]
    if per_row is not None and len(per_row) != len(texts):
        raise ValueError(f"audio has {len(per_row)} rows of clips, text has {len(texts)}")
    for row, (clips, count) in enumerate(zip(per_row or counts, counts, strict=True)):
        if clips != count:
            raise ValueError(f"row {row} has {count} {token} placeholders but {clips} clips")
    left, expanded = list(slots), []
    for row, (text, count) in enumerate(zip(texts, counts, strict=True)):
        if count > len(left):
            raise ValueError(
                f"row {row} has {count} {token} placeholders but {len(left)} of {len(slots)} clips are left"
            )
        first, *others = text.split(token)
        expanded.append(first + "".join(token * n + piece for n, piece in zip(left, others, strict=False)))
        left = left[count:]
    if left:
        raise ValueError(
            f"{len(left)} of {len(slots)} clips are left over after row {len(texts) - 1}: the rows have "
            f"{counts} {token} placeholders"
        )
    return expanded


def check_slots(slots: Sequence[int], sizes: Sequence[int]) -> None:
    """Every row's placeholders must be filled by whole clips, in order, with nothing left over.

    `slots[n]` placeholders of row n; `sizes` features of each clip in order (one entry means only the sum is known).
    Raises ValueError that names the first row that does not fit.
    """
    total = sum(sizes)
    if len(sizes) == 1 and sum(slots) == total:
        return
    ends = {0, *accumulate(sizes)}
    for row, used in enumerate(accumulate(slots)):
        if used not in ends:
            raise ValueError(
                f"row {row} has {slots[row]} audio placeholders, which its clips do not fill exactly; the batch has "
                f"{list(slots)} placeholders by row and {list(sizes)} features by clip, {total} in all. Every clip "
                "needs exactly as many placeholders as it has features: use the processor's input_ids uncut"
            )
    if left := total - sum(slots):
        raise ValueError(
            f"{left} audio features are left over after row {len(slots) - 1}: {list(slots)} placeholders by "
            f"row, {list(sizes)} features by clip. Pass the clips of these rows only"
        )
