"""Audio codes in the vocabulary: telling them from text by id range, and choosing what labels supervise."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch

IGNORE = -100
Supervise = Literal["all", "text", "codes"]


def split_codes(ids: Iterable[int], first_code_id: int, num_codes: int) -> tuple[list[int], list[int]]:
    """Generated ids -> text ids (below `first_code_id`) and audio codes `id - first_code_id`, each in order.

    Raises ValueError for an id beyond the last code.
    """
    text, codes = [], []
    for position, value in enumerate(ids):
        value = int(value)
        if value < first_code_id:
            text.append(value)
        elif value - first_code_id < num_codes:
            codes.append(value - first_code_id)
        else:
            raise ValueError(
                f"id {value} at position {position} is audio code {value - first_code_id}, but the model has codes "
                f"0 to {num_codes - 1} (ids {first_code_id} to {first_code_id + num_codes - 1})"
            )
    return text, codes


def make_labels(
    input_ids: torch.Tensor,
    prompt_lengths: Iterable[int],
    first_code_id: int,
    *,
    supervise: Supervise = "all",
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Labels (N, T) for teacher forcing: -100 on prompt and padding, and on what is not supervised.

    `prompt_lengths[n]` counts the real (unmasked) prompt ids of row n, so left padding needs `attention_mask`.
    `supervise`: "all" response ids, "text" only, or "codes" only (the published masked text loss).
    """
    if supervise not in ("all", "text", "codes"):
        raise ValueError(f"supervise={supervise!r} does not exist; write all, text or codes")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    lengths = torch.tensor(list(prompt_lengths), device=input_ids.device)[:, None]
    response = (mask == 1) & (mask.cumsum(1) > lengths)
    codes = input_ids >= first_code_id
    if supervise != "all":
        response &= codes if supervise == "codes" else ~codes
    return input_ids.masked_fill(~response, IGNORE)
