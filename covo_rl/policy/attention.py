"""Attention over a packed row: a prompt attends to itself, a completion to its prompt and to itself.

Registered in transformers' AttentionInterface under NAME and set once on the decoder's configuration. Without a
`covo_layout` keyword it is plain SDPA, so the same model still serves `generate` and ordinary forwards.

Three exact ways to compute the same thing:
    varlen  own part and prompt part as two flash calls a layer over one softmax (flash.py). CUDA in 16 bits.
    split   the same parts as flash calls by bucket and by prompt. CPU.
    concat  prompt keys put before each completion's own, one masked SDPA per bucket: public functions and autograd
            only. CUDA in float32, cards and torch versions without the kernel, other devices; and everywhere the
            layers whose sliding window is shorter than a sequence, with the window in the mask.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from covo_rl.policy.attention_parts import OwnBuckets, Part, PromptRuns, Segments, one_run
from covo_rl.policy.flash import available
from covo_rl.policy.packing import Bucket, Packed, Span, buckets

NAME = "covo_grouped"
#: queries that a layer with a window takes at once, where the window is no longer
PIECE = 256


class Layout(Protocol):
    """What the attention function needs to know of the row that is being computed."""

    def attend(self, layer: int, q_LHd, k_LKd, v_LKd, scale: float, window: int | None = None) -> torch.Tensor:
        """(L, H, d) queries and (L, K, d) keys and values of one layer -> (L, H, d).

        `layer` is the one that made the keys. With a `window` position q sees k where 0 <= q - k < window.
        """
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
    if dropout or kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise NotImplementedError(
            f"the grouped pass has no attention dropout ({dropout}), no softcap ({kwargs.get('softcap')}) and no "
            "attention sinks; turn the dropout off in the config, or let the family say packable = False"
        )
    tensors, device = (query, key, value), query.device.type
    if torch.is_autocast_enabled(device):  # as SDPA's: rotary positions made queries and keys float32 again
        tensors = (tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)
    q_LHd, k_LKd, v_LKd = (tensor.squeeze(0).transpose(0, 1) for tensor in tensors)  # [0] would copy in the backward
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out_LHd = covo_layout.attend(key_layer(module), q_LHd, k_LKd, v_LKd, scale, kwargs.get("sliding_window"))
    return out_LHd[None], None


def key_layer(attention: Any) -> int:
    """The layer whose keys this attention reads: its own, or that of the same type from which Gemma shares them."""
    if not getattr(attention, "is_kv_shared_layer", False):
        return attention.layer_idx
    config = attention.config
    types = config.layer_types[: config.num_hidden_layers - config.num_kv_shared_layers]
    return len(types) - 1 - types[::-1].index(config.layer_types[attention.layer_idx])


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
        self._parts: dict[str, tuple[Part, Part | None]] = {}
        self._bands: dict[tuple[int, int, int, torch.dtype], torch.Tensor] = {}
        lengths = [end - start for start, end in packed.prompt_spans]
        #: completion inputs of each prompt, in the order of the row
        self.groups: list[list[Span]] = [[] for _ in lengths]
        self.longest = max(lengths, default=0)
        for prompt, span in sorted(zip(packed.row_prompts, packed.row_spans, strict=True)):
            self.groups[prompt] += [span] if span[1] > span[0] else []
            self.longest = max(self.longest, lengths[prompt] + span[1] - span[0])

    def attend(self, layer: int, q_LHd, k_LKd, v_LKd, scale: float, window: int | None = None) -> torch.Tensor:
        if self.capture is not None and layer not in self.capture:
            end = self.prompt_positions
            self.capture[layer] = (k_LKd[:end].detach().contiguous(), v_LKd[:end].detach().contiguous())
        if self.prompt_keys is not None and torch.is_grad_enabled():
            raise RuntimeError("cached prompt keys carry no gradient: score under torch.no_grad()")
        end = self.prompt_positions
        prompt_k, prompt_v = (k_LKd[:end], v_LKd[:end]) if self.prompt_keys is None else self.prompt_keys[layer]
        window = self.longest if window is None else window
        method = "concat" if window < self.longest else self.method or self._default_method(q_LHd)
        if method == "concat":
            return _concat_attention(q_LHd, k_LKd, v_LKd, prompt_k, prompt_v, self, scale, window)
        parts = self.parts(method)
        return _MergedAttention.apply(q_LHd, k_LKd, v_LKd, prompt_k.detach(), prompt_v.detach(), self, parts, scale)

    def _default_method(self, q_LHd: torch.Tensor) -> str:
        """Of heads of this width: those of Gemma's layers differ, and not every one has a kernel."""
        if available(self.device, q_LHd.dtype, q_LHd.shape[-1]):
            return "varlen"
        return "split" if self.device.type == "cpu" else "concat"

    def parts(self, method: str) -> tuple[Part, Part | None]:
        """Own part of all positions, and prompt part of the completions where there are any, for split or varlen."""
        if method not in self._parts:
            self._parts[method] = self._made_parts(split=method == "split")
        return self._parts[method]

    def _made_parts(self, *, split: bool) -> tuple[Part, Part | None]:
        start, runs = 0, []
        for spans in self.groups:
            runs.append((start, start + sum(end - begin for begin, end in spans)))
            start = runs[-1][1]
        cached = self.prompt_keys is not None
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

    def band(self, before: int, length: int, window: int, dtype: torch.dtype) -> torch.Tensor:
        """(length, before + length), added to scores: -inf but for what queries see of `before` keys and of their own.

        The last `window` keys, the query's own among them; one mask for all layers.
        """
        key, width = (before, length, window, dtype), before + length
        if key not in self._bands:
            hidden = torch.ones(length, -(-width // 16) * 16, dtype=torch.bool, device=self.device)  # CUDA's alignment
            hidden = ~hidden.tril_(before).triu_(before - window + 1)
            self._bands[key] = torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf)[:, :width]
        return self._bands[key]


class _MergedAttention(torch.autograd.Function):
    """Own part and prompt part as calls over one softmax; the prompt's keys are read once per group, never copied.

    With s the scores, softmax over both parts is exp(s - lse) with the joint log-sum-exp. The flash backward computes
    probabilities as exp(s - lse) from the lse it is given and needs sum(dO * O), so the joint lse and output turn each
    call into the exact gradient of its part.
    """

    @staticmethod
    def forward(ctx: Any, q, k, v, prompt_k, prompt_v, layout: PackedLayout, parts, scale: float):  # pyright: ignore
        own, cross = parts
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
        ctx.layout, ctx.parts, ctx.scale = layout, parts, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse = ctx.saved_tensors
        own, cross = ctx.parts
        dq, dk, dv = own.backward(grad_out, q, k, v, out, lse, ctx.scale)
        if cross is not None:
            end = ctx.layout.prompt_positions
            rows = (x[end:] for x in (grad_out, q))
            grads = cross.backward(*rows, k[:end], v[:end], out[end:], lse[:, end:], ctx.scale)
            for target, grad in zip((dq[end:], dk[:end], dv[:end]), grads, strict=True):
                target += grad
        return dq, dk, dv, *[None] * 5


def _concat_attention(q, k, v, prompt_k, prompt_v, layout: PackedLayout, scale: float, window: int) -> torch.Tensor:
    """Public SDPA and autograd only."""
    repeats = q.shape[1] // k.shape[1]

    def attention(q_BHLd: torch.Tensor, k_BKTd: torch.Tensor, v_BKTd: torch.Tensor) -> torch.Tensor:
        """Queries are the last ones of the keys; in pieces, so that scores and masks are two windows wide."""
        length, total = q_BHLd.shape[2], k_BKTd.shape[2]
        if repeats > 1:
            k_BKTd, v_BKTd = (x.repeat_interleave(repeats, 1) for x in (k_BKTd, v_BKTd))
        piece, outs = length if window >= total else max(window, PIECE), []
        for start in range(0, length, piece):
            end = min(start + piece, length)
            queries, last = q_BHLd[:, :, start:end], total - length + end
            first = max(0, last - (end - start) - window + 1)
            keys, values = (x[:, :, first:last] for x in (k_BKTd, v_BKTd))
            before = last - first - (end - start)
            causal = before == 0 and window >= end
            mask = None if causal else layout.band(before, end - start, window, q.dtype)
            outs.append(scaled_dot_product_attention(queries, keys, values, mask, is_causal=causal, scale=scale))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    prompts, groups = layout.buckets
    for bucket in prompts:
        bucket.put(out, attention(bucket.take(q), bucket.take(k), bucket.take(v)))
    for (start, end), bucket in groups:
        # older prompt keys are beyond the window of a completion's first position already
        keys = (max(start, end - window + 1), end)
        both = [
            torch.cat((one_run(prompt, keys).expand(bucket.rows, -1, -1, -1), bucket.take(own)), 2)
            for prompt, own in ((prompt_k, k), (prompt_v, v))
        ]
        bucket.put(out, attention(bucket.take(q), *both))
    return out
