"""Keys and values while decoding: a prompt's are held and read once for all its rollouts.

Rows (rollouts still being written) are packed, so the linear layers see no padding. Attention works on blocks of
prompts of about the same length, as a grid of prompts and as many columns as the fullest prompt has rows:

    scores = [ q @ prompt keys (one product per prompt for all its rollouts) | q @ own keys ]  -> one softmax
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from covo_rl.policy.attention import KeyValues
from covo_rl.policy.packing import Span
from covo_rl.policy.products import HALF, batched_product

GROWTH = 64


class _Block:
    """Some prompts, their keys, and the own keys of their rows: (P, K, columns, capacity, d) per layer."""

    def __init__(self, spans: Sequence[Span], prompt_of_row: Sequence[int], device: torch.device) -> None:
        self.spans = list(spans)
        self.width = max(end - start for start, end in spans)
        self.mask: torch.Tensor | None = None
        lengths = torch.tensor([end - start for start, end in spans], device=device)
        if int(lengths.min()) < self.width:
            hidden = torch.arange(self.width, device=device)[None, :] >= lengths[:, None]
            self.mask = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -torch.inf)[:, None, None, :]
        self.prompt: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.device = device
        self._lay_out(list(prompt_of_row))

    def _lay_out(self, prompt_of_row: list[int]) -> None:
        """Give every row (sorted by prompt) a cell of the grid; cells without a row repeat row 0."""
        counts = [0] * len(self.spans)
        columns = []
        for prompt in prompt_of_row:
            columns.append(counts[prompt])
            counts[prompt] += 1
        self.prompt_of_row, self.rows, self.columns = prompt_of_row, len(prompt_of_row), max(counts)
        self.cells = [p * self.columns + c for p, c in zip(prompt_of_row, columns, strict=True)]
        self.row_of_cell: torch.Tensor | None = None
        self.cell_of_row: torch.Tensor | None = None
        if len(self.spans) * self.columns != self.rows:
            rows = torch.zeros(len(self.spans) * self.columns, dtype=torch.int64)
            rows[torch.tensor(self.cells)] = torch.arange(self.rows)
            self.row_of_cell, self.cell_of_row = rows.to(self.device), torch.tensor(self.cells, device=self.device)

    def load(self, layer: int, k_LKd: torch.Tensor, v_LKd: torch.Tensor) -> None:
        padded = []
        for source in (k_LKd, v_LKd):
            block = source.new_zeros(len(self.spans), source.shape[1], self.width, source.shape[2])
            for p, (start, end) in enumerate(self.spans):
                block[p, :, : end - start] = source[start:end].transpose(0, 1)
            padded.append(block)
        self.prompt[layer] = (padded[0], padded[1])

    def attend(self, layer: int, step: int, q_RHd, k_RKd, v_RKd, scale: float) -> torch.Tensor:
        if self.row_of_cell is not None:
            q_RHd, k_RKd, v_RKd = (x.index_select(0, self.row_of_cell) for x in (q_RHd, k_RKd, v_RKd))
        prompt_k, prompt_v = self.prompt[layer]
        P, K, T, d = prompt_k.shape
        G, heads = self.columns, q_RHd.shape[1]
        share = heads // K
        own_k, own_v = self._own(layer, step, k_RKd)
        own_k[:, :, :, step] = k_RKd.view(P, G, K, d).transpose(1, 2)
        own_v[:, :, :, step] = v_RKd.view(P, G, K, d).transpose(1, 2)
        own_k, own_v = (x.flatten(0, 2)[:, : step + 1] for x in (own_k, own_v))
        # 16-bit scores of 60 are off by an eighth: operands are what the model made, products and sums float32
        wide = own_k.dtype in HALF
        q = (q_RHd if wide else q_RHd * scale).view(P, G, K, share, d).transpose(1, 2).reshape(P * K, G * share, d)
        scores = batched_product(q, prompt_k.flatten(0, 1).transpose(1, 2)).view(P, K, G * share, T)
        if self.mask is not None:
            scores += self.mask
        own_scores = batched_product(q.reshape(-1, share, d), own_k.transpose(1, 2)).view(P, K, G * share, step + 1)
        scores = torch.cat((scores, own_scores), -1)
        probs = (scores * scale if wide else scores).softmax(-1, dtype=torch.float32)
        out = batched_product(probs[..., :T].flatten(0, 1), prompt_v.flatten(0, 1))
        own_probs = probs[..., T:].reshape(-1, share, step + 1)
        out += batched_product(own_probs, own_v).view(P * K, G * share, d)
        out = out.to(v_RKd.dtype)
        out = out.view(P, K, G, share, d).transpose(1, 2).reshape(P * G, heads, d)
        return out if self.cell_of_row is None else out.index_select(0, self.cell_of_row)

    def _own(self, layer: int, step: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for one more position; it grows GROWTH positions at a time."""
        stored = self.own.get(layer)
        if stored is not None and stored[0].shape[3] > step:
            return stored
        shape = (len(self.spans), like.shape[1], self.columns, step + GROWTH, like.shape[2])
        larger = (like.new_empty(shape), like.new_empty(shape))
        for old, new in zip(stored or (), larger, strict=False):
            new[:, :, :, :step] = old[:, :, :, :step]
        self.own[layer] = larger
        return larger

    def keep(self, rows: list[int]) -> None:
        """Drop the rows not listed, and prompts that have none left."""
        if not rows:
            self.rows = 0
            return
        old_cells, old_columns = [self.cells[row] for row in rows], self.columns
        prompts = sorted({self.prompt_of_row[row] for row in rows})
        if len(prompts) < len(self.spans):
            remaining = torch.tensor(prompts, device=self.device)
            self.spans = [self.spans[p] for p in prompts]
            self.prompt = {i: (k[remaining], v[remaining]) for i, (k, v) in self.prompt.items()}
            self.mask = None if self.mask is None else self.mask[remaining]
        number = {prompt: n for n, prompt in enumerate(prompts)}
        self._lay_out([number[self.prompt_of_row[row]] for row in rows])
        source = torch.full((len(prompts) * self.columns,), old_cells[0])
        source[torch.tensor(self.cells)] = torch.tensor(old_cells)
        source = source.view(len(prompts), self.columns).to(self.device)
        p, c = source // old_columns, source % old_columns
        for layer, pair in self.own.items():
            k, v = (x[p, :, c].transpose(1, 2).contiguous() for x in pair)
            self.own[layer] = (k, v)


class DecodeLayout:
    """Attention plan of decoding: one new position per active row. `step` is the number of own positions so far.

    `order` says which given row each packed row is. With `shared` False every row gets its own copy of its prompt's
    keys, the way `generate` works on an expanded cache.
    """

    def __init__(
        self,
        keys: KeyValues,
        spans: Sequence[Span],
        prompt_of_row: Sequence[int],
        *,
        shared: bool = True,
        slack: float = 0.7,
        small: int = 96,
    ) -> None:
        device = next(iter(keys.values()))[0].device
        self.step = 0
        self.longest_prompt = max(end - start for start, end in spans)
        if not shared:
            spans, prompt_of_row = [spans[p] for p in prompt_of_row], range(len(prompt_of_row))
        members: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompt_of_row):
            members.setdefault(prompt, []).append(row)
        lengths = {prompt: spans[prompt][1] - spans[prompt][0] for prompt in members}
        self.blocks: list[_Block] = []
        self.order: list[int] = []
        remaining = sorted(members, key=lambda prompt: -lengths[prompt])
        while remaining:
            longest = lengths[remaining[0]]
            fitting = 1  # prompts whose padding costs less than another block would
            while fitting < len(remaining) and (longest <= small or lengths[remaining[fitting]] >= slack * longest):
                fitting += 1
            part, remaining = remaining[:fitting], remaining[fitting:]
            rows = [(n, row) for n, prompt in enumerate(part) for row in members[prompt]]
            self.blocks.append(_Block([spans[p] for p in part], [n for n, _ in rows], device))
            self.order += [row for _, row in rows]
        for layer, (k, v) in keys.items():
            for block in self.blocks:
                block.load(layer, k, v)

    @property
    def longest(self) -> int:
        """Positions of the longest sequence so far."""
        return self.longest_prompt + self.step + 1

    def attend(self, layer: int, q_LHd, k_LKd, v_LKd, scale: float) -> torch.Tensor:
        if len(self.blocks) == 1:
            return self.blocks[0].attend(layer, self.step, q_LHd, k_LKd, v_LKd, scale)
        outs, start = [], 0
        for block in self.blocks:
            part = slice(start, start + block.rows)
            outs.append(block.attend(layer, self.step, q_LHd[part], k_LKd[part], v_LKd[part], scale))
            start += block.rows
        return torch.cat(outs)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows (sorted indices into the current rows)."""
        start = 0
        for block in self.blocks:
            mine = [row - start for row in rows if start <= row < start + block.rows]
            start += block.rows
            if len(mine) < block.rows:
                block.keep(mine)
        self.blocks = [block for block in self.blocks if block.rows]
