"""Attention of a decode step: every row's one query against its prompt's keys, read once for all rows of the prompt,
and against the keys of what the row has written itself.

    Grid     prompts of about the same length as blocks of prompts x columns. Any device and dtype.
    Varlen   two calls of the CUDA flash kernel for all rows, no padding; sizes never change, as a CUDA graph needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

import torch

from covo_rl.policy import flash
from covo_rl.policy.attention import KeyValues
from covo_rl.policy.packing import Span
from covo_rl.policy.products import HALF, batched_product

_cpu_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class _TwoParts:
    """Softmax over two parts from the outputs and log-sum-exps of each."""

    def __init__(self) -> None:
        self.shares: dict[torch.Size, torch.Tensor] = {}  # of the second part; stay where they are, for graphs

    def joined(self, a: torch.Tensor, lse_a: torch.Tensor, b: torch.Tensor, lse_b: torch.Tensor) -> torch.Tensor:
        if lse_a.shape not in self.shares:
            self.shares[lse_a.shape] = torch.empty(lse_a.shape, dtype=a.dtype, device=a.device)
        torch.sigmoid(lse_b - lse_a, out=self.shares[lse_a.shape])
        return a.lerp(b, self.shares[lse_a.shape][..., None])


class Grid:
    """Blocks of prompts, a column per row of the fullest prompt.

    Rows come in the order of `prompt_of_row`, which goes block by block. In 16 bits on a CPU a block makes
    two flash calls, merged by their log-sum-exp; elsewhere one softmax over both products, which is faster for the few
    queries of a step.
    """

    def __init__(self, keys: KeyValues, spans: Sequence[Span], parts: Sequence[Sequence[int]]) -> None:
        self.blocks = [_Block(keys, spans, part) for part in parts]

    def arrange(self, prompt_of_row: Sequence[int]) -> None:
        for block in self.blocks:
            block.arrange([block.number[p] for p in prompt_of_row if p in block.number])

    def attend(
        self, layer: int, q_RHd: torch.Tensor, own_2RKCd: torch.Tensor, mask_RC, scale: float, first_R=None
    ) -> torch.Tensor:
        """(R, H, d) queries -> (R, H, d); `own_2RKCd` keys and values, `mask_RC` is added to own scores.

        `first_R`: the first position of its sequence that a row sees, None for all.
        """
        outs, start = [], 0
        for block in self.blocks:
            part = slice(start, start := start + block.rows)
            if block.rows:
                mask, first = (None if x is None else x[part] for x in (mask_RC, first_R))
                outs.append(block.attend(layer, q_RHd[part], own_2RKCd[:, part], mask, scale, first))
        return outs[0] if len(outs) == 1 else torch.cat(outs)


class _Block(_TwoParts):
    """Some prompts and their keys, padded: (P, K, T, d) per layer."""

    def __init__(self, keys: KeyValues, spans: Sequence[Span], prompts: Sequence[int]) -> None:
        super().__init__()
        self.number = {prompt: n for n, prompt in enumerate(prompts)}
        mine = [spans[prompt] for prompt in prompts]
        lengths = torch.tensor([end - start for start, end in mine])
        self.device = next(iter(keys.values()))[0].device
        padding: torch.Tensor | None = None  # (P, 1, 1, T), to be added to scores
        if int(lengths.min()) < int(lengths.max()):
            beyond = torch.arange(int(lengths.max()))[None, :] >= lengths[:, None]
            padding = torch.zeros(beyond.shape).masked_fill_(beyond, -torch.inf)[:, None, None, :].to(self.device)
        padded: KeyValues = {}
        for layer, pair in keys.items():
            k, v = (x.new_zeros(len(mine), x.shape[1], int(lengths.max()), x.shape[2]) for x in pair)
            for block, source in ((k, pair[0]), (v, pair[1])):
                for p, (start, end) in enumerate(mine):
                    block[p, :, : end - start] = source[start:end].transpose(0, 1)
            padded[layer] = (k, v)
        self.everything, self.live = (padded, padding), list(range(len(mine)))
        self.keys, self.padding = self.everything

    def arrange(self, prompt_of_row: list[int]) -> None:
        """Give every row (sorted by prompt) a cell of prompts x columns; cells without a row repeat row 0."""
        counts, columns = Counter(prompt_of_row), []
        for n, prompt in enumerate(prompt_of_row):
            columns.append(columns[-1] + 1 if n and prompt_of_row[n - 1] == prompt else 0)
        self.rows, self.columns = len(prompt_of_row), max(counts.values(), default=0)
        if sorted(counts) != self.live and counts:  # prompts without rows, now, are left out
            self.live = sorted(counts)
            live = torch.tensor(self.live, device=self.device)
            keys, padding = self.everything
            self.keys = {layer: (k[live], v[live]) for layer, (k, v) in keys.items()}
            self.padding = None if padding is None else padding[live]
        self.row_of_cell: torch.Tensor | None = None
        self.cell_of_row: torch.Tensor | None = None
        if len(counts) * self.columns != self.rows:
            place = {prompt: n for n, prompt in enumerate(self.live)}
            cells = torch.tensor([place[p] * self.columns + c for p, c in zip(prompt_of_row, columns, strict=True)])
            rows = torch.zeros(len(self.live) * self.columns, dtype=torch.int64)
            rows[cells] = torch.arange(self.rows)
            self.row_of_cell, self.cell_of_row = rows.to(self.device), cells.to(self.device)

    def attend(self, layer: int, q_RHd, own_2RKCd, mask_RC, scale: float, first_R=None) -> torch.Tensor:
        # a window may leave a row nothing of its prompt, and flash has no softmax over nothing
        if first_R is None and q_RHd.device.type == "cpu" and q_RHd.dtype in HALF:
            return self._merged(layer, q_RHd, own_2RKCd, mask_RC, scale)
        return self._joint(layer, q_RHd, own_2RKCd, mask_RC, scale, first_R)

    def _merged(self, layer: int, q_RHd, own_2RKCd, mask_RC, scale: float) -> torch.Tensor:
        """Two flash calls; softmax over both parts is their mean, weighted by sigmoid of the difference of the lse."""
        prompt_k, prompt_v = self.keys[layer]
        cells = q_RHd if self.row_of_cell is None else q_RHd.index_select(0, self.row_of_cell)
        q_PHGd = cells.view(len(prompt_k), self.columns, *cells.shape[1:]).transpose(1, 2)
        out_PHGd, lse_PHG = _cpu_flash(q_PHGd, prompt_k, prompt_v, attn_mask=self.padding, scale=scale)
        own_mask = None if mask_RC is None else mask_RC[:, None, None]
        own_RH1d, own_RH1 = _cpu_flash(q_RHd[:, :, None], own_2RKCd[0], own_2RKCd[1], attn_mask=own_mask, scale=scale)
        out, lse = out_PHGd.transpose(1, 2), lse_PHG.transpose(1, 2)  # (P, G, ...)
        if self.cell_of_row is not None:
            out, lse = (x.reshape(len(cells), *x.shape[2:]).index_select(0, self.cell_of_row) for x in (out, lse))
        return self.joined(out, lse, own_RH1d[:, :, 0].view(out.shape), own_RH1.view(lse.shape)).view(q_RHd.shape)

    def _joint(self, layer: int, q_RHd, own_2RKCd, mask_RC, scale: float, first_R) -> torch.Tensor:
        """One softmax over [scores of the prompt | scores of the own keys], in float32 for 16-bit operands."""
        prompt_k, prompt_v = self.keys[layer]
        P, K, T, d = prompt_k.shape
        if self.row_of_cell is not None:
            q_RHd, own_2RKCd = q_RHd.index_select(0, self.row_of_cell), own_2RKCd.index_select(1, self.row_of_cell)
            mask_RC, first_R = (None if x is None else x.index_select(0, self.row_of_cell) for x in (mask_RC, first_R))
        G, heads = self.columns, q_RHd.shape[1]
        share, own = heads // K, own_2RKCd.shape[3]
        own_k, own_v = (x.view(-1, own, d) for x in own_2RKCd)
        # 16-bit scores of 60 are off by an eighth: operands are what the model made, products and sums float32
        wide = own_k.dtype in HALF
        q_RHd = q_RHd.contiguous() if wide else q_RHd * scale
        q = q_RHd.view(P, G, K, share, d).transpose(1, 2).clone(memory_format=torch.contiguous_format)
        q = q.view(P * K, G * share, d)
        scores = batched_product(q, prompt_k.view(P * K, T, d).transpose(1, 2)).view(P, K, G, share, T)
        if self.padding is not None:
            scores += self.padding[..., None, :]
        if first_R is not None:
            beyond = torch.arange(T, device=self.device) < first_R[:, None]
            scores.masked_fill_(beyond.view(P, 1, G, 1, T), -torch.inf)
        own_scores = batched_product(q_RHd.view(-1, share, d), own_k.transpose(1, 2)).view(P, G, K, share, own)
        if mask_RC is not None:
            own_scores += mask_RC.view(P, G, 1, 1, own)
        scores = torch.cat((scores, own_scores.transpose(1, 2)), -1)
        probs = (scores.mul_(scale) if wide else scores).softmax(-1, dtype=torch.float32)
        out = batched_product(probs[..., :T].view(P * K, G * share, T), prompt_v.view(P * K, T, d))
        own_probs = probs[..., T:].transpose(1, 2).clone(memory_format=torch.contiguous_format).view(-1, share, own)
        total = batched_product(own_probs, own_v).view(P, G, K, share, d)
        total += out.view(P, K, G, share, d).transpose(1, 2)
        total = total.view(-1, heads, d)
        total = total.to(own_k.dtype) if wide else total
        return total if self.cell_of_row is None else total.index_select(0, self.cell_of_row)


class Varlen(_TwoParts):
    """All rows in one call over the packed prompt keys and one over the own keys, merged by their log-sum-exp.

    Rows come sorted by prompt, at most `widest` of each and `rows` in all, with room for `limit` own keys each. What
    changes with them changes in place, as a captured graph needs.
    """

    def __init__(self, keys: KeyValues, spans: Sequence[Span], *, rows: int, limit: int, widest: int) -> None:
        super().__init__()
        self.keys, self.widest = keys, widest
        self.longest = max(end - start for start, end in spans)
        any_key = next(iter(keys.values()))[0]
        device = any_key.device
        self.starts_P1 = torch.tensor([*(start for start, _ in spans), spans[-1][1]], dtype=torch.int32, device=device)
        self.lengths_P = torch.tensor([end - start for start, end in spans], dtype=torch.int32, device=device)
        self.rows_P1 = torch.zeros(len(spans) + 1, dtype=torch.int32, device=device)
        self.each_R1 = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.prompt_R = torch.zeros(rows, dtype=torch.int64, device=device)
        # a row's keys lie as (heads, positions): taken as positions x heads, the next row starts heads * limit later
        self.own_R1 = {heads: self.each_R1 * (heads * limit) for heads in {k.shape[1] for k, _ in keys.values()}}

    def arrange(self, prompt_of_row: Sequence[int]) -> None:
        counts = Counter(prompt_of_row)
        ends = accumulate((counts[p] for p in range(len(self.lengths_P))), initial=0)
        self.rows_P1.copy_(torch.tensor(list(ends), dtype=torch.int32, device=self.rows_P1.device))
        self.prompt_R[: len(prompt_of_row)] = torch.tensor(
            prompt_of_row, dtype=torch.int64, device=self.prompt_R.device
        )

    def attend(
        self, layer: int, q_RHd: torch.Tensor, own_2RKCd: torch.Tensor, used_R, scale: float, first_R=None
    ) -> torch.Tensor:
        """(R, H, d) queries -> (R, H, d); `used_R` int32: how many own keys each row has.

        `first_R`: the first position of its sequence that a row sees, None for all.
        """
        k, v = self.keys[layer]
        _, rows, heads, limit, width = own_2RKCd.shape
        each_R1, own_R1 = self.each_R1[: rows + 1], self.own_R1[heads][: rows + 1]
        cu_q, cu_k, used, widest, gone_R = self.rows_P1, self.starts_P1, self.lengths_P, self.widest, None
        if first_R is not None:
            cu_q, widest = each_R1, 1
            cu_k, used, own_R1, used_R, gone_R = self._within(first_R, own_R1, used_R)
        out_RHd, lse_HR = flash.varlen(
            q_RHd, k, v, cu_q, cu_k, widest, self.longest, causal=False, scale=scale, used_k=used
        )
        if gone_R is not None:
            lse_HR = lse_HR.masked_fill(gone_R, -torch.inf)
        size, stride = ((rows * heads - heads + 1) * limit, heads, width), (width, limit * width, 1)
        own_k, own_v = (x.as_strided(size, stride) for x in own_2RKCd)
        own_RHd, own_HR = flash.varlen(
            q_RHd, own_k, own_v, each_R1, own_R1, 1, limit, causal=False, scale=scale, used_k=used_R
        )
        return self.joined(out_RHd, lse_HR.t(), own_RHd, own_HR.t())

    def _within(self, first_R: torch.Tensor, own_R1: torch.Tensor, used_R: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Keys from `first_R` on, each row a segment of its own: where its prompt's start and how many, where its own
        start and how many, and which rows see nothing of their prompt: they are given a key to be ignored.
        """
        rows = len(first_R)
        starts_R, lengths_R = (x[self.prompt_R[:rows]] for x in (self.starts_P1, self.lengths_P))
        first_R = first_R.int()
        skipped_R = torch.minimum(first_R.clamp(min=0), lengths_R - 1)
        keys_R1 = torch.cat((starts_R + skipped_R, self.starts_P1[-1:]))
        own_skipped_R = (first_R - lengths_R).clamp(min=0)
        own_R1 = torch.cat((own_R1[:-1] + own_skipped_R, own_R1[-1:]))
        return keys_R1, lengths_R - skipped_R, own_R1, used_R - own_skipped_R, first_R >= lengths_R
