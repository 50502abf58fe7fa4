"""Audio placeholders: expanding one per clip to one per feature, and checking their number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def trains(module: nn.Module) -> bool:
    """Whether any parameter of the module asks for gradients."""
    return any(parameter.requires_grad for parameter in module.parameters())


def expand_placeholders(
    texts: Sequence[str], slots: Sequence[int], token: str, per_row: Sequence[int] | None = None
) -> list[str]:
    """Replace the i-th `token` of the batch, row by row, by `slots[i]` of them.

    `per_row[n]` clips were given for row n (None: one flat list). Raises ValueError that names the row whose
    placeholders and clips differ in number.
    """
    counts = [text.count(token) for text in texts]
    if per_row is not None and list(per_row) != counts:
        if len(per_row) != len(texts):
            raise ValueError(f"audio has {len(per_row)} rows of clips, text has {len(texts)}")
        row = next(i for i, (have, want) in enumerate(zip(per_row, counts, strict=True)) if have != want)
        raise ValueError(f"row {row} has {counts[row]} {token} placeholders but {per_row[row]} clips")
    start, out = 0, []
    for row, (text, count) in enumerate(zip(texts, counts, strict=True)):
        if start + count > len(slots):
            raise ValueError(
                f"row {row} has {count} {token} placeholders but {len(slots) - start} of {len(slots)} clips are left"
            )
        runs = [token * n for n in slots[start : start + count]]
        out.append("".join(a + b for a, b in zip(text.split(token), [*runs, ""], strict=True)))
        start += count
    if start < len(slots):
        raise ValueError(
            f"{len(slots) - start} of {len(slots)} clips are left over after row {len(texts) - 1}: the rows have "
            f"{counts} {token} placeholders"
        )
    return out


def check_slots(slots: Sequence[int], sizes: Sequence[int]) -> None:
    """Every row's placeholders must be filled by whole clips, in order, with nothing left over.

    `slots[n]` placeholders of row n; `sizes` features of each clip in order (one entry means only the sum is known).
    Raises ValueError that names the first row that does not fit.
    """
    total = sum(sizes)
    if len(sizes) == 1 and sum(slots) == total:
        return
    ends = {0}
    reached = 0
    for size in sizes:
        reached += size
        ends.add(reached)
    used = 0
    for row, count in enumerate(slots):
        used += count
        if used not in ends:
            raise ValueError(
                f"row {row} has {count} audio placeholders, which its clips do not fill exactly; the batch has "
                f"{list(slots)} placeholders by row and {list(sizes)} features by clip, {total} in all. Every clip "
                "needs exactly as many placeholders as it has features: use the processor's input_ids uncut"
            )
    if used != total:
        raise ValueError(
            f"{total - used} audio features are left over after row {len(slots) - 1}: {list(slots)} placeholders by "
            f"row, {list(sizes)} features by clip. Pass the clips of these rows only"
        )
