"""The packed row's attention on a CPU: own part and prompt part as flash calls over one softmax.

The prompt's keys are read once per group and never copied. With s the scores, softmax over both parts is
exp(s - lse) with the joint log-sum-exp. The flash backward computes probabilities as exp(s - lse) from the lse it is
given and needs sum(dO * O), so the joint lse and output turn each call into the exact gradient of its part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from covo_rl.policy.attention import PackedLayout
    from covo_rl.policy.packing import Span

#: stands for +inf in a log-sum-exp of padding: exp(score - FAR) is 0 without producing nan
FAR = 1e30

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def split_attention(q_LHd, k_LKd, v_LKd, prompt_k, prompt_v, layout: PackedLayout, scale: float) -> torch.Tensor:
    """(L, H, d) queries and (L, K, d) keys and values -> (L, H, d); `prompt_k` and `prompt_v` hold the prompts'."""
    return _SplitAttention.apply(q_LHd, k_LKd, v_LKd, prompt_k, prompt_v, layout, scale)


def one_run(x_LHd: torch.Tensor, span: Span) -> torch.Tensor:
    """A run of positions as a batch of one: (1, H, n, d), a view."""
    return x_LHd[span[0] : span[1]].transpose(0, 1)[None]


class _SplitAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, prompt_k, prompt_v, layout: PackedLayout, scale: float):  # pyright: ignore
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        for bucket in (*layout.prompt_buckets, *layout.own_buckets):
            o, total = _flash(bucket.take(q), bucket.take(k), bucket.take(v), 0.0, True, scale=scale)
            bucket.put(out, o)
            bucket.put(lse[..., None], total[..., None])
        for rows, keys in layout.cross:
            o, total = _flash(
                one_run(q, rows), one_run(prompt_k, keys), one_run(prompt_v, keys), 0.0, False, scale=scale
            )
            here = slice(*rows)
            own, other = lse[here], total[0].t()
            joint = torch.logaddexp(own, other)
            mixed = out[here] * (own - joint).exp_()[..., None]
            mixed += o[0].transpose(0, 1) * (other - joint).exp_()[..., None]
            out[here], lse[here] = mixed, joint
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse = ctx.saved_tensors
        layout, scale = ctx.layout, ctx.scale
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        for bucket in (*layout.prompt_buckets, *layout.own_buckets):
            do, total = bucket.take(grad_out), bucket.take(lse[..., None])[..., 0]
            if bucket.places is not None:
                padding = torch.ones(bucket.rows * bucket.length, dtype=torch.bool, device=q.device)
                padding = padding.index_fill_(0, bucket.places, False).view(bucket.rows, 1, bucket.length)
                do, total = do.masked_fill(padding[..., None], 0.0), total.masked_fill(padding, FAR)
            inputs = (bucket.take(x) for x in (q, k, v, out))
            grads = _flash_backward(do, *inputs, total.contiguous(), 0.0, True, scale=scale)
            for target, grad in zip((dq, dk, dv), grads, strict=True):
                bucket.put(target, grad)
        for rows, keys in layout.cross:
            total = lse[slice(*rows)].t()[None].contiguous()
            inputs = (one_run(x, span) for x, span in ((q, rows), (k, keys), (v, keys), (out, rows)))
            grads = _flash_backward(one_run(grad_out, rows), *inputs, total, 0.0, False, scale=scale)
            for target, grad, span in zip((dq, dk, dv), grads, (rows, keys, keys), strict=True):
                target[slice(*span)] += grad[0].transpose(0, 1)
        return dq, dk, dv, None, None, None, None
