"""Attention over a packed row: a prompt attends to itself, a completion to its prompt and to itself.

Registered in transformers' AttentionInterface under NAME and set once on the decoder's configuration. Without a
`covo_layout` keyword it is plain SDPA, so the same model still serves `generate` and ordinary forwards.

Two exact ways to compute the same thing:
    split   own part and prompt part as separate flash calls over one softmax. CPU.
    concat  prompt keys put before each completion's own, one masked SDPA per bucket. Any device.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from covo_rl.policy.packing import Bucket, Packed, Span, buckets

NAME = "covo_grouped"
#: stands for +inf in a log-sum-exp of padding: exp(score - FAR) is 0 without producing nan
FAR = 1e30

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Layout(Protocol):
    """What the attention function needs to know of the row that is being computed."""

    @property
    def longest(self) -> int:
        """Positions of the longest sequence."""
        ...

    def attend(self, layer: int, q_LHd, k_LKd, v_LKd, scale: float) -> torch.Tensor:
        """(L, H, d) queries and (L, K, d) keys and values of one layer -> (L, H, d)."""
        ...


def grouped_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None,
    covo_layout: Layout | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """The attention function: query (1, H, L, d), key and value (1, K, L, d) -> (1, L, H, d)."""
    if covo_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    window = kwargs.get("sliding_window")
    if dropout or kwargs.get("softcap") or (window is not None and window < covo_layout.longest):
        raise NotImplementedError(
            f"the grouped pass has no attention dropout ({dropout}), no softcap ({kwargs.get('softcap')}) and no "
            f"sliding window ({window}) shorter than the sequence ({covo_layout.longest}); turn it off in the config"
        )
    tensors, device = (query, key, value), query.device.type
    if torch.is_autocast_enabled(device):  # as SDPA's: rotary positions made queries and keys float32 again
        tensors = (tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)
    q_LHd, k_LKd, v_LKd = (tensor[0].transpose(0, 1) for tensor in tensors)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return covo_layout.attend(module.layer_idx, q_LHd, k_LKd, v_LKd, scale)[None], None  # pyright: ignore


# Known to transformers on import: the attention function, and how to mask when it falls back.
AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

KeyValues = dict[int, tuple[torch.Tensor, torch.Tensor]]


class PackedLayout:
    """Attention plan of a `Packed` row.

    `capture` collects each layer's keys and values of the prompts (L_prompts, K, d). `prompt_keys`, collected so
    before, replaces the prompts in a row that holds completions only (no gradient reaches them).
    """

    def __init__(
        self, packed: Packed, *, method: str | None = None, capture: KeyValues | None = None,
        prompt_keys: KeyValues | None = None,
    ) -> None:  # fmt: skip
        device = packed.input_ids_L.device
        self.method = method or ("split" if device.type == "cpu" else "concat")
        self.capture, self.prompt_keys = capture, prompt_keys
        self.prompt_positions = packed.prompt_positions
        lengths = [end - start for start, end in packed.prompt_spans]
        rows = list(zip(packed.row_prompts, packed.row_spans, strict=True))
        self.longest = max([*lengths, *(lengths[p] + end - start for p, (start, end) in rows)], default=0)
        self.prompt_buckets = buckets([] if prompt_keys is not None else packed.prompt_spans, device)
        self.own_buckets = buckets(packed.row_spans, device) if self.method == "split" else []
        self.cross: list[tuple[Span, Span]] = []  # completions of a prompt, as one run, and the prompt's keys
        self.group_buckets: list[tuple[Span, Bucket]] = []
        for p, keys in enumerate(packed.prompt_spans):
            spans = [span for q, span in rows if q == p and span[1] > span[0]]
            if spans and self.method == "split":
                self.cross.append(((min(s[0] for s in spans), max(s[1] for s in spans)), keys))
            elif spans:
                self.group_buckets += [(keys, bucket) for bucket in buckets(spans, device)]

    def attend(self, layer: int, q_LHd, k_LKd, v_LKd, scale: float) -> torch.Tensor:
        if self.capture is not None:
            end = self.prompt_positions
            self.capture[layer] = (k_LKd[:end].detach().contiguous(), v_LKd[:end].detach().contiguous())
        prompt_k, prompt_v = (k_LKd, v_LKd) if self.prompt_keys is None else self.prompt_keys[layer]
        if self.method == "split" and self.prompt_keys is not None and torch.is_grad_enabled():
            raise RuntimeError("cached prompt keys carry no gradient: score under torch.no_grad()")
        attention = _SplitAttention.apply if self.method == "split" else _concat_attention
        return attention(q_LHd, k_LKd, v_LKd, prompt_k, prompt_v, self, scale)


def _one_run(x_LHd: torch.Tensor, span: Span) -> torch.Tensor:
    """A run of positions as a batch of one: (1, H, n, d), a view."""
    return x_LHd[span[0] : span[1]].transpose(0, 1)[None]


class _SplitAttention(torch.autograd.Function):
    """Own part and prompt part as flash calls; the prompt's keys are read once per group and never copied.

    With s the scores, softmax over both parts is exp(s - lse) with the joint log-sum-exp. The flash backward computes
    probabilities as exp(s - lse) from the lse it is given and needs sum(dO * O), so the joint lse and output turn each
    call into the exact gradient of its part.
    """

    @staticmethod
    def forward(ctx: Any, q, k, v, prompt_k, prompt_v, layout: PackedLayout, scale: float):  # pyright: ignore
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        for bucket in (*layout.prompt_buckets, *layout.own_buckets):
            o, total = _flash(bucket.take(q), bucket.take(k), bucket.take(v), 0.0, True, scale=scale)
            bucket.put(out, o)
            bucket.put(lse[..., None], total[..., None])
        for rows, keys in layout.cross:
            inputs = (_one_run(q, rows), _one_run(prompt_k, keys), _one_run(prompt_v, keys))
            o, total = _flash(*inputs, 0.0, False, scale=scale)
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
            inputs = (_one_run(x, span) for x, span in ((q, rows), (k, keys), (v, keys), (out, rows)))
            grads = _flash_backward(_one_run(grad_out, rows), *inputs, total, 0.0, False, scale=scale)
            for target, grad, span in zip((dq, dk, dv), grads, (rows, keys, keys), strict=True):
                target[slice(*span)] += grad[0].transpose(0, 1)
        return dq, dk, dv, None, None, None, None


def _concat_attention(q, k, v, prompt_k, prompt_v, layout: PackedLayout, scale: float) -> torch.Tensor:
    """Public SDPA and autograd only."""
    repeats = q.shape[1] // k.shape[1]

    def attention(q_BHLd: torch.Tensor, k_BKLd: torch.Tensor, v_BKLd: torch.Tensor, **mask: Any) -> torch.Tensor:
        if repeats > 1:
            k_BKLd, v_BKLd = (x.repeat_interleave(repeats, 1) for x in (k_BKLd, v_BKLd))
        return torch.nn.functional.scaled_dot_product_attention(q_BHLd, k_BKLd, v_BKLd, scale=scale, **mask)

    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for bucket in layout.prompt_buckets:
        bucket.put(out, attention(bucket.take(q), bucket.take(k), bucket.take(v), is_causal=True))
    for keys, bucket in layout.group_buckets:
        n, length = keys[1] - keys[0], bucket.length
        mask = torch.ones(length, n + length, dtype=torch.bool, device=q.device).tril(n)
        both = [
            torch.cat((_one_run(prompt, keys).expand(bucket.rows, -1, -1, -1), bucket.take(own)), 2)
            for prompt, own in ((prompt_k, k), (prompt_v, v))
        ]
        bucket.put(out, attention(bucket.take(q), *both, attn_mask=mask))
    return out


def use_grouped_attention(decoder: torch.nn.Module) -> None:
    """Set the attention function on every configuration object that the decoder's layers read."""
    configs = [m.config for m in decoder.modules() if hasattr(m, "config") and hasattr(m, "layer_idx")]
    if not configs:
        raise TypeError(
            f"{type(decoder).__name__} has no attention layers that read transformers' AttentionInterface "
            "(modules with `config` and `layer_idx`)"
        )
    for config in (*configs, decoder.config):
        config._attn_implementation = NAME  # pyright: ignore
