"""Which queries see which keys, and the calls that compute it: out and log-sum-exp, and gradients from the joint ones.

A part takes the queries (L, H, d) and the keys and values (M, K, d) of one layer and gives `out` (L, H, d) and `lse`
(H, L) float32. Its backward takes those of a softmax over more parts and gives this part's (dq, dk, dv).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from covo_rl.policy.flash import varlen, varlen_backward
from covo_rl.policy.packing import Span, buckets

#: stands for +inf in a log-sum-exp of padding: exp(score - FAR) is 0 without producing nan
FAR = 1e30

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Tensors = tuple[torch.Tensor, ...]


class Part(Protocol):
    def forward(self, q, k, v, scale: float) -> Tensors: ...
    def backward(self, grad_out, q, k, v, out, lse, scale: float) -> Tensors: ...


@dataclass(frozen=True)
class Segments:
    """One call of the varlen kernel a layer; its arguments are those of flash.py."""

    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int
    causal: bool
    used_k: torch.Tensor | None = None

    @classmethod
    def of(
        cls, queries: Sequence[Span], keys: Sequence[Span], device: torch.device, *, causal: bool, slots: bool = False
    ) -> Segments:
        """Pairs of places. Queries follow one another from position 0 on, and so do keys unless they are `slots`.

        Raises ValueError where they do not.
        """
        for spans in (queries, () if slots else keys):
            if any(start != end for (start, _), (_, end) in zip(spans, ((0, 0), *spans), strict=False)):
                raise ValueError(f"segments {spans[:8]} do not follow one another from position 0 on")

        def tensor(values: Iterable[int]) -> torch.Tensor:
            return torch.tensor(list(values), dtype=torch.int32, device=device)

        sizes = [end - start for start, end in keys]
        cu_k = tensor([*(start for start, _ in keys), keys[-1][1]])
        cu_q = tensor([0, *(end for _, end in queries)])
        longest = max(end - start for start, end in queries)
        return cls(cu_q, cu_k, longest, max(sizes), causal, tensor(sizes) if slots else None)

    def forward(self, q, k, v, scale: float) -> Tensors:
        places = (self.cu_q, self.cu_k, self.max_q, self.max_k)
        return varlen(q, k, v, *places, causal=self.causal, scale=scale, used_k=self.used_k)

    def backward(self, grad_out, q, k, v, out, lse, scale: float) -> Tensors:
        places = (self.cu_q, self.cu_k, self.max_q, self.max_k)
        return varlen_backward(grad_out, q, k, v, out, lse, *places, causal=self.causal, scale=scale)


class OwnBuckets:
    """Every sequence to itself, causal, by the CPU's flash kernel: sequences of about the same length in one call."""

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        self.buckets = buckets(spans, device)

    def forward(self, q, k, v, scale: float) -> Tensors:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse_LH = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        for bucket in self.buckets:
            o, total = _flash(bucket.take(q), bucket.take(k), bucket.take(v), 0.0, True, scale=scale)
            bucket.put(out, o)
            bucket.put(lse_LH[..., None], total[..., None])
        return out, lse_LH.t()

    def backward(self, grad_out, q, k, v, out, lse, scale: float) -> Tensors:
        targets = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        for bucket in self.buckets:
            do, total = bucket.take(grad_out), bucket.take(lse.t()[..., None])[..., 0]
            if bucket.places is not None:
                padding = torch.ones(bucket.rows * bucket.length, dtype=torch.bool, device=q.device)
                padding = padding.index_fill_(0, bucket.places, False).view(bucket.rows, 1, bucket.length)
                do, total = do.masked_fill(padding[..., None], 0.0), total.masked_fill(padding, FAR)
            inputs = (bucket.take(x) for x in (q, k, v, out))
            grads = _flash_backward(do, *inputs, total.contiguous(), 0.0, True, scale=scale)
            for target, grad in zip(targets, grads, strict=True):
                bucket.put(target, grad)
        return targets


class PromptRuns:
    """All completions of a prompt, as one run, to its keys, by the CPU's flash kernel."""

    def __init__(self, pairs: Sequence[tuple[Span, Span]]) -> None:
        self.pairs = [pair for pair in pairs if pair[0][1] > pair[0][0]]

    def forward(self, q, k, v, scale: float) -> Tensors:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[1::-1], dtype=torch.float32, device=q.device)
        for rows, keys in self.pairs:
            o, total = _flash(one_run(q, rows), one_run(k, keys), one_run(v, keys), 0.0, False, scale=scale)
            out[slice(*rows)], lse[:, slice(*rows)] = o[0].transpose(0, 1), total[0]
        return out, lse

    def backward(self, grad_out, q, k, v, out, lse, scale: float) -> Tensors:
        targets = tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        for rows, keys in self.pairs:
            total = lse[None, :, slice(*rows)].contiguous()
            inputs = (one_run(x, span) for x, span in ((q, rows), (k, keys), (v, keys), (out, rows)))
            grads = _flash_backward(one_run(grad_out, rows), *inputs, total, 0.0, False, scale=scale)
            for target, grad, span in zip(targets, grads, (rows, keys, keys), strict=True):
                target[slice(*span)] = grad[0].transpose(0, 1)
        return targets


def one_run(x_LHd: torch.Tensor, span: Span) -> torch.Tensor:
    """A run of positions as a batch of one: (1, H, n, d), a view."""
    return x_LHd[span[0] : span[1]].transpose(0, 1)[None]
