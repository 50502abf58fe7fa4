"""Keys and values of decoding: a prompt's once for all its rows, a row's own in memory laid out beforehand.

Nothing grows or moves while rows are written, so that a step can be captured; between steps rows that finished give
their place to others (`arrange`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from covo_rl.engines.decode_attention import Grid, Varlen
from covo_rl.policy.attention import KeyValues
from covo_rl.policy.packing import Span

#: own positions that rooms which may move grow by
GROWTH = 64


def in_blocks(spans: Sequence[Span], *, slack: float = 0.7, small: int = 96) -> list[list[int]]:
    """Prompts by length, longest first, cut where padding would cost more than another block."""
    lengths = {p: end - start for p, (start, end) in enumerate(spans)}
    remaining = sorted(lengths, key=lambda p: -lengths[p])
    parts: list[list[int]] = []
    while remaining:
        longest = lengths[remaining[0]]
        part = [p for p in remaining if longest <= small or lengths[p] >= slack * longest]
        parts.append(part)
        remaining = remaining[len(part) :]
    return parts


class KeyMemory:
    """Prompt keys as `prefill` made them, and room for `limit` own positions of `rows` rows, in each layer.

    `rank` of their prompts sorts rows as the attention wants them. `counts_R` int64 on the device: own positions of
    each row, the one of the current step included. With `varlen` the flash kernel reads what is used of a room that
    never moves; else rooms grow, and what rows of unequal length have not written yet is masked.
    """

    def __init__(
        self, keys: KeyValues, spans: Sequence[Span], *, rows: int, limit: int, widest: int, varlen: bool = False
    ) -> None:  # fmt: skip
        device = next(iter(keys.values()))[0].device
        parts = [list(range(len(spans)))] if varlen else in_blocks(spans)
        self.rank = {p: n for n, p in enumerate(p for part in parts for p in part)}
        self.varlen = Varlen(keys, spans, rows=rows, limit=limit, widest=widest) if varlen else None
        self.attention = self.varlen or Grid(keys, spans, parts)
        self.limit = limit
        self.longest_prompt = max(end - start for start, end in spans)
        room = limit if varlen else min(limit, GROWTH)
        self.own = {layer: k.new_zeros(2, rows, k.shape[1], room, k.shape[2]) for layer, (k, _) in keys.items()}
        self.each_R = torch.arange(rows, device=device)
        self.places_C = torch.arange(limit, device=device)
        self.prompt_lengths_P = torch.tensor([end - start for start, end in spans], device=device)
        self.prompt_lengths_R = torch.zeros(rows, dtype=torch.int64, device=device)
        self.used: torch.Tensor | None = None
        self.views: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.rows, self.positions = 0, 0

    @property
    def longest(self) -> int:
        """Positions of the longest sequence, at most."""
        return self.longest_prompt + self.positions

    def arrange(self, sources: Sequence[int], prompt_of_row: Sequence[int]) -> None:
        """The rows from now on, sorted by `rank` of their prompts: `sources` are present rows, -1 for new ones."""
        if list(sources) != list(range(self.rows)) and self.rows:
            index = torch.tensor([max(source, 0) for source in sources], device=self.each_R.device)
            for layer, own in self.own.items():
                moved = own.index_select(1, index)
                if self.varlen:
                    own[:, : len(sources)] = moved
                else:
                    self.own[layer] = moved  # the room of finished rows is free
        self.rows = len(sources)
        prompt_R = torch.tensor(prompt_of_row, dtype=torch.int64, device=self.each_R.device)
        self.prompt_lengths_R[: self.rows] = self.prompt_lengths_P[prompt_R]
        self.attention.arrange(prompt_of_row)

    def begin(self, counts_R: torch.Tensor, positions: int, *, equal: bool) -> None:
        """A step with keys number `counts_R` of each row; `positions` is the largest, `equal` says that all are."""
        self.places_R, self.positions = counts_R - 1, self.limit if self.varlen else positions
        self.views = {}
        room = next(iter(self.own.values())).shape[3]
        if self.positions > room:
            more = min(self.limit, max(self.positions, room + GROWTH)) - room
            for layer, own in self.own.items():  # one after the other, so that one alone is there twice
                self.own[layer] = torch.nn.functional.pad(own, (0, 0, 0, more))
        if self.varlen:
            self.used = counts_R.int()
        elif equal:
            self.used = None
        else:
            beyond = self.places_C[: self.positions] >= counts_R[:, None]
            self.used = torch.zeros(beyond.shape, device=beyond.device).masked_fill_(beyond, -torch.inf)

    def _view(self, window: int | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(`used`, the first position of each row's sequence that it sees, None for all) of a layer with this window.

        A row's query is its last own position; made once a step for all such layers.
        """
        if window is None or window >= self.longest:
            return self.used, None
        if window not in self.views:
            counts_R = self.places_R + 1
            used = self.used
            if not self.varlen:
                beyond = self.places_C[: self.positions] < counts_R[:, None] - window
                mask = torch.zeros(beyond.shape, device=beyond.device).masked_fill_(beyond, -torch.inf)
                used = mask if used is None else mask.add_(used)
            assert used is not None
            self.views[window] = used, self.prompt_lengths_R[: self.rows] + counts_R - window
        return self.views[window]

    def attend_fused(
        self, layer: int, heads_RXd: torch.Tensor, kv_heads: int, scale: float, window: int | None = None
    ) -> torch.Tensor:
        """[query | key | value] heads (R, H + 2K, d) of a step -> attention output (R, H, d)."""
        own, split = self.own[layer][:, : self.rows], heads_RXd.shape[1] - 2 * kv_heads
        own[:, self.each_R[: self.rows], :, self.places_R] = heads_RXd[:, split:].view(
            -1, 2, kv_heads, heads_RXd.shape[2]
        )
        own = own[:, :, :, : self.positions]
        used, first_R = self._view(window)
        return self.attention.attend(layer, heads_RXd[:, :split], own, used, scale, first_R)

    def attend(self, layer: int, q_LHd, k_LKd, v_LKd, scale: float, window: int | None = None) -> torch.Tensor:
        """The same of separate heads, as policy.attention asks a layout."""
        return self.attend_fused(layer, torch.cat((q_LHd, k_LKd, v_LKd), 1), k_LKd.shape[1], scale, window)
