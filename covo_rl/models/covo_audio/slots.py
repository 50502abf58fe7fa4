"""The count check between audio placeholders and audio features."""

from __future__ import annotations

from collections.abc import Sequence


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
