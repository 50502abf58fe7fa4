"""Attention over a packed row: a prompt attends to itself, a completion to its prompt and to itself.

Registered in transformers' AttentionInterface under NAME and set once on the decoder's configuration. Without a
`covo_layout` keyword it is plain SDPA, so the same model still serves `generate` and ordinary forwards.

Two exact ways to compute the same thing:
    split   own part and prompt part as separate flash calls, merged: see `cpu_attention`. CPU.
    concat  prompt keys put before each completion's own, one masked SDPA per bucket. Any device.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from covo_rl.policy.cpu_attention import one_run, split_attention
from covo_rl.policy.packing import Bucket, Packed, Span, buckets

NAME = "covo_grouped"


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
        attention = split_attention if self.method == "split" else _concat_attention
        return attention(q_LHd, k_LKd, v_LKd, prompt_k, prompt_v, self, scale)


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
