"""Attention over a packed row: a prompt attends to itself, a completion to its prompt and to itself.

Registered in transformers' AttentionInterface under NAME and set once on the decoder's configuration. Without a
`covo_layout` keyword it is plain SDPA, so the same model still serves `generate` and ordinary forwards.

Three exact ways to compute the same thing:
    varlen  own part and prompt part as two flash calls a layer over one softmax (flash.py). CUDA in 16 bits.
    split   the same parts as flash calls by bucket and by prompt. CPU.
    concat  prompt keys put before each completion's own, one masked SDPA per bucket: public functions and autograd
            only. CUDA in float32, cards and torch versions without the kernel, other devices.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from covo_rl.policy.attention_parts import OwnBuckets, Part, PromptRuns, Segments, one_run
from covo_rl.policy.flash import available
from covo_rl.policy.packing import Bucket, Packed, Span, buckets

NAME = "covo_grouped"


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
    q_LHd, k_LKd, v_LKd = (tensor.squeeze(0).transpose(0, 1) for tensor in tensors)  # [0] would copy in the backward
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return covo_layout.attend(module.layer_idx, q_LHd, k_LKd, v_LKd, scale)[None], None  # pyright: ignore


# Known to transformers on import: the attention function, and how to mask when it falls back.
AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

KeyValues = dict[int, tuple[torch.Tensor, torch.Tensor]]


class PackedLayout:
    """Attention plan of a `Packed` row; all index tensors are made once, for all layers.

    `capture` collects each layer's keys and values of the prompts (L_prompts, K, d). `prompt_keys`, collected so
    before, replaces the prompts in a row that holds completions only (no gradient reaches them). `method` is one of
    the three above (default: split on a CPU, varlen where its kernel is available, else concat).
    """

    def __init__(
        self, packed: Packed, *, method: str | None = None, capture: KeyValues | None = None,
        prompt_keys: KeyValues | None = None,
    ) -> None:  # fmt: skip
        self.device, self.method = packed.input_ids_L.device, method
        self.capture, self.prompt_keys = capture, prompt_keys
        self.prompt_positions, self.prompt_spans = packed.prompt_positions, packed.prompt_spans
        lengths = [end - start for start, end in packed.prompt_spans]
        #: completion inputs of each prompt, in the order of the row
        self.groups: list[list[Span]] = [[] for _ in lengths]
        self.longest = max(lengths, default=0)
        for prompt, span in sorted(zip(packed.row_prompts, packed.row_spans, strict=True)):
            self.groups[prompt] += [span] if span[1] > span[0] else []
            self.longest = max(self.longest, lengths[prompt] + span[1] - span[0])

    def attend(self, layer: int, q_LHd, k_LKd, v_LKd, scale: float) -> torch.Tensor:
        if self.capture is not None:
            end = self.prompt_positions
            self.capture[layer] = (k_LKd[:end].detach().contiguous(), v_LKd[:end].detach().contiguous())
        if self.prompt_keys is not None and torch.is_grad_enabled():
            raise RuntimeError("cached prompt keys carry no gradient: score under torch.no_grad()")
        if self.method is None and available(self.device, q_LHd.dtype, q_LHd.shape[-1]):
            self.method = "varlen"
        self.method = self.method or ("split" if self.device.type == "cpu" else "concat")
        end = self.prompt_positions
        prompt_k, prompt_v = (k_LKd[:end], v_LKd[:end]) if self.prompt_keys is None else self.prompt_keys[layer]
        if self.method == "concat":
            return _concat_attention(q_LHd, k_LKd, v_LKd, prompt_k, prompt_v, self, scale)
        return _MergedAttention.apply(q_LHd, k_LKd, v_LKd, prompt_k.detach(), prompt_v.detach(), self, scale)

    @cached_property
    def parts(self) -> tuple[Part, Part | None]:
        """Own part of all positions, and prompt part of the completions where there are any."""
        start, runs = 0, []
        for spans in self.groups:
            runs.append((start, start + sum(end - begin for begin, end in spans)))
            start = runs[-1][1]
        cached, split = self.prompt_keys is not None, self.method == "split"
        own = [*(() if cached else self.prompt_spans), *(span for spans in self.groups for span in spans)]
        causal = OwnBuckets(own, self.device) if split else Segments.of(own, own, self.device, causal=True)
        if start == 0:
            return causal, None
        if split:
            return causal, PromptRuns(list(zip(runs, self.prompt_spans, strict=True)))
        # cached keys are those of all that was sampled, in another order
        return causal, Segments.of(runs, self.prompt_spans, self.device, causal=False, slots=cached)

    @cached_property
    def buckets(self) -> tuple[list[Bucket], list[tuple[Span, Bucket]]]:
        """For concat: prompts, and completions by prompt."""
        prompts = buckets([] if self.prompt_keys is not None else self.prompt_spans, self.device)
        groups = zip(self.prompt_spans, self.groups, strict=True)
        return prompts, [(keys, bucket) for keys, spans in groups for bucket in buckets(spans, self.device)]


class _MergedAttention(torch.autograd.Function):
    """Own part and prompt part as calls over one softmax; the prompt's keys are read once per group, never copied.

    With s the scores, softmax over both parts is exp(s - lse) with the joint log-sum-exp. The flash backward computes
    probabilities as exp(s - lse) from the lse it is given and needs sum(dO * O), so the joint lse and output turn each
    call into the exact gradient of its part.
    """

    @staticmethod
    def forward(ctx: Any, q, k, v, prompt_k, prompt_v, layout: PackedLayout, scale: float):  # pyright: ignore
        own, cross = layout.parts
        out, lse = own.forward(q, k, v, scale)
        if cross is not None:
            here = slice(layout.prompt_positions, None)
            other_out, other = cross.forward(q[here], prompt_k, prompt_v, scale)
            mine = lse[:, here]
            joint = torch.logaddexp(mine, other)
            terms = (o * (part - joint).exp_().t()[..., None] for o, part in ((out[here], mine), (other_out, other)))
            torch.add(*terms, out=out[here])
            lse[:, here] = joint
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse = ctx.saved_tensors
        own, cross = ctx.layout.parts
        dq, dk, dv = own.backward(grad_out, q, k, v, out, lse, ctx.scale)
        if cross is not None:
            end = ctx.layout.prompt_positions
            rows = (x[end:] for x in (grad_out, q))
            grads = cross.backward(*rows, k[:end], v[:end], out[end:], lse[:, end:], ctx.scale)
            for target, grad in zip((dq[end:], dk[:end], dv[:end]), grads, strict=True):
                target += grad
        return dq, dk, dv, None, None, None, None


def _concat_attention(q, k, v, prompt_k, prompt_v, layout: PackedLayout, scale: float) -> torch.Tensor:
    """Public SDPA and autograd only."""
    repeats = q.shape[1] // k.shape[1]

    def attention(q_BHLd: torch.Tensor, k_BKLd: torch.Tensor, v_BKLd: torch.Tensor, **mask: Any) -> torch.Tensor:
        if repeats > 1:
            k_BKLd, v_BKLd = (x.repeat_interleave(repeats, 1) for x in (k_BKLd, v_BKLd))
        return torch.nn.functional.scaled_dot_product_attention(q_BHLd, k_BKLd, v_BKLd, scale=scale, **mask)

    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    prompts, groups = layout.buckets
    for bucket in prompts:
        bucket.put(out, attention(bucket.take(q), bucket.take(k), bucket.take(v), is_causal=True))
    for keys, bucket in groups:
        n, length = keys[1] - keys[0], bucket.length
        mask = torch.ones(length, n + length, dtype=torch.bool, device=q.device).tril(n)
        both = [
            torch.cat((one_run(prompt, keys).expand(bucket.rows, -1, -1, -1), bucket.take(own)), 2)
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
