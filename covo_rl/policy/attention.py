"""Attention over a packed row: a prompt attends to itself, a completion to its prompt and to itself.

Registered in transformers' AttentionInterface under NAME and set once on the decoder's configuration. Without a
`covo_layout` keyword it is plain SDPA, so the same model still serves `generate` and ordinary forwards.

Two exact ways to compute the same thing:
    split   own part (causal) and prompt part as separate flash calls, merged through their log-sum-exp. The prompt's
            keys are read once per group and never copied. The backward calls the flash backward of each part with
            the merged output and log-sum-exp, which is exactly its share of the gradient. CPU.
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


class Layout(Protocol):
    """What the attention function needs to know of the row that is being computed."""

    longest: int

    def attend(
        self, layer: int, q_LHd: torch.Tensor, k_LKd: torch.Tensor, v_LKd: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """(L, H, d) queries and (L, K, d) keys and values of one layer -> (L, H, d)."""
        ...


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    covo_layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
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
    q_LHd, k_LKd, v_LKd = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return covo_layout.attend(module.layer_idx, q_LHd, k_LKd, v_LKd, scale)[None], None  # pyright: ignore


def register() -> None:
    """Make transformers know the attention function, and how to mask when it falls back."""
    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


register()

KeyValues = dict[int, tuple[torch.Tensor, torch.Tensor]]


class PackedLayout:
    """Attention plan of a `Packed` row.

    `capture` collects each layer's keys and values of the prompts (L_prompts, K, d). `prompt_keys`, collected so
    before, replaces the prompts in a row that holds completions only (no gradient reaches them).
    """

    def __init__(
        self,
        packed: Packed,
        *,
        method: str | None = None,
        capture: KeyValues | None = None,
        prompt_keys: KeyValues | None = None,
    ) -> None:
        device = packed.input_ids_L.device
        self.method = method or ("split" if device.type == "cpu" else "concat")
        self.capture, self.prompt_keys = capture, prompt_keys
        self.prompt_positions = packed.prompt_positions
        lengths = [end - start for start, end in packed.prompt_spans]
        self.longest = max(
            (lengths[p] + e - s for p, (s, e) in zip(packed.row_prompts, packed.row_spans, strict=True)),
            default=max(lengths, default=0),
        )
        prompts = [] if prompt_keys is not None else list(packed.prompt_spans)
        self.prompt_buckets = buckets(prompts, device)
        self.own_buckets = buckets(packed.row_spans, device) if self.method == "split" else []
        self.cross: list[tuple[Span, Span]] = []
        self.group_buckets: list[tuple[Span, Bucket]] = []
        for p, keys in enumerate(packed.prompt_spans):
            spans = [s for s, q in zip(packed.row_spans, packed.row_prompts, strict=True) if q == p and s[1] > s[0]]
            if not spans:
                continue
            if self.method == "split":
                self.cross.append(((min(s[0] for s in spans), max(s[1] for s in spans)), keys))
            else:
                self.group_buckets += [(keys, bucket) for bucket in buckets(spans, device)]

    def attend(self, layer: int, q_LHd, k_LKd, v_LKd, scale: float) -> torch.Tensor:
        if self.capture is not None:
            end = self.prompt_positions
            self.capture[layer] = (k_LKd[:end].detach().contiguous(), v_LKd[:end].detach().contiguous())
        prompt_k, prompt_v = (k_LKd, v_LKd) if self.prompt_keys is None else self.prompt_keys[layer]
        if self.method == "split":
            if self.prompt_keys is not None and torch.is_grad_enabled():
                raise RuntimeError("cached prompt keys carry no gradient: score under torch.no_grad()")
            return _SplitAttention.apply(q_LHd, k_LKd, v_LKd, prompt_k, prompt_v, self, scale)
        return _concat_attention(q_LHd, k_LKd, v_LKd, prompt_k, prompt_v, self, scale)


def _take(x_LHd: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    """(L, H, d) -> (B, H, Lb, d) of one bucket; a view where the bucket is one run of positions."""
    if bucket.start is not None:
        block = x_LHd[bucket.start : bucket.start + bucket.rows * bucket.length]
    else:
        assert bucket.index is not None
        block = x_LHd.index_select(0, bucket.index)
    return block.unflatten(0, (bucket.rows, bucket.length)).transpose(1, 2)


def _put(target_LHd: torch.Tensor, block_BHLd: torch.Tensor, bucket: Bucket) -> None:
    """Inverse of `_take` into a preallocated tensor; padding is dropped."""
    flat = block_BHLd.transpose(1, 2).flatten(0, 1)
    if bucket.start is not None:
        target_LHd[bucket.start : bucket.start + flat.shape[0]] = flat
        return
    assert bucket.index is not None
    if bucket.places is None:
        target_LHd.index_copy_(0, bucket.index, flat)
    else:
        target_LHd.index_copy_(0, bucket.index[bucket.places], flat[bucket.places])


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _SplitAttention(torch.autograd.Function):
    """Own part and prompt part as flash calls over one softmax.

    With s the scores, softmax over both parts is exp(s - lse) with the joint lse. The flash backward computes
    probabilities as exp(s - lse) from the lse it is given and needs sum(dO * O), so the joint lse and output turn
    each call into the exact gradient of its part.
    """

    @staticmethod
    def forward(ctx: Any, q, k, v, prompt_k, prompt_v, layout: PackedLayout, scale: float):  # pyright: ignore
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        for bucket in (*layout.prompt_buckets, *layout.own_buckets):
            o, total = _flash(_take(q, bucket), _take(k, bucket), _take(v, bucket), 0.0, True, scale=scale)
            _put(out, o, bucket)
            _put(lse[..., None], total[..., None], bucket)
        for (start, end), keys in layout.cross:
            o, total = _flash(
                _one(q, (start, end)), _one(prompt_k, keys), _one(prompt_v, keys), 0.0, False, scale=scale
            )
            own, other = lse[start:end], total[0].t()
            joint = torch.logaddexp(own, other)
            mixed = out[start:end] * (own - joint).exp_()[..., None]
            mixed += o[0].transpose(0, 1) * (other - joint).exp_()[..., None]
            out[start:end] = mixed
            lse[start:end] = joint
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
            do, total = _take(grad_out, bucket), _take(lse[..., None], bucket)[..., 0]
            if bucket.valid is not None:
                padding = ~bucket.valid.view(bucket.rows, 1, bucket.length)
                do, total = do.masked_fill(padding[..., None], 0.0), total.masked_fill(padding, FAR)
            grads = _flash_backward(
                do, _take(q, bucket), _take(k, bucket), _take(v, bucket), _take(out, bucket), total.contiguous(),
                0.0, True, scale=scale,
            )  # fmt: skip
            for target, grad in zip((dq, dk, dv), grads, strict=True):
                _put(target, grad, bucket)
        for rows, keys in layout.cross:
            total = lse[rows[0] : rows[1]].t()[None].contiguous()
            grads = _flash_backward(
                _one(grad_out, rows), _one(q, rows), _one(k, keys), _one(v, keys), _one(out, rows), total,
                0.0, False, scale=scale,
            )  # fmt: skip
            for target, grad, span in zip((dq, dk, dv), grads, (rows, keys, keys), strict=True):
                target[span[0] : span[1]] += grad[0].transpose(0, 1)
        return dq, dk, dv, None, None, None, None


def _one(x_LHd: torch.Tensor, span: Span) -> torch.Tensor:
    """A run of positions as a batch of one: (1, H, n, d), a view."""
    return x_LHd[span[0] : span[1]].transpose(0, 1)[None]


def _concat_attention(q, k, v, prompt_k, prompt_v, layout: PackedLayout, scale: float) -> torch.Tensor:
    """Public SDPA and autograd only."""
    repeats = q.shape[1] // k.shape[1]
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def heads(x_BKLd: torch.Tensor) -> torch.Tensor:
        return x_BKLd if repeats == 1 else x_BKLd.repeat_interleave(repeats, 1)

    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for bucket in layout.prompt_buckets:
        o = sdpa(_take(q, bucket), heads(_take(k, bucket)), heads(_take(v, bucket)), is_causal=True, scale=scale)
        out = _placed(out, o, bucket)
    for keys, bucket in layout.group_buckets:
        n, length = keys[1] - keys[0], bucket.length
        mask = torch.ones(length, n + length, dtype=torch.bool, device=q.device).tril(n)
        both = [
            torch.cat((_one(prompt, keys).expand(bucket.rows, -1, -1, -1), _take(own, bucket)), 2)
            for prompt, own in ((prompt_k, k), (prompt_v, v))
        ]
        o = sdpa(_take(q, bucket), heads(both[0]), heads(both[1]), attn_mask=mask, scale=scale)
        out = _placed(out, o, bucket)
    return out


def _placed(out: torch.Tensor, block_BHLd: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    """Differentiable `_put`, out of place."""
    flat = block_BHLd.transpose(1, 2).flatten(0, 1)
    index = bucket.index
    if bucket.start is not None:
        index = torch.arange(bucket.start, bucket.start + flat.shape[0], device=out.device)
    assert index is not None
    if bucket.places is not None:
        index, flat = index[bucket.places], flat[bucket.places]
    return out.index_copy(0, index, flat)


def use_grouped_attention(decoder: torch.nn.Module) -> None:
    """Set the attention function on every configuration object that the decoder's layers read."""
    found = 0
    for module in decoder.modules():
        if hasattr(module, "config") and hasattr(module, "layer_idx"):
            module.config._attn_implementation = NAME  # pyright: ignore
            found += 1
    if not found:
        raise TypeError(
            f"{type(decoder).__name__} has no attention layers that read transformers' AttentionInterface "
            "(modules with `config` and `layer_idx`)"
        )
    decoder.config._attn_implementation = NAME  # pyright: ignore
