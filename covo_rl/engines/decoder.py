"""The decoder at one new position per row, in two ways with the same result.

    ModuleDecoder   the model's own modules, whatever they are. The reference.
    FusedDecoder    decoders of Qwen2's make with few, static calls: 18 a layer beside attention with adapters.

`decoder_for` takes the second where it knows every module of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from covo_rl.engines.decode_weights import DecodeLinear, base_linear, can_pack, is_plain
from covo_rl.engines.key_values import KeyMemory
from covo_rl.models.base import AudioFamily
from covo_rl.policy.head import head_of
from covo_rl.policy.products import float32_logits, operand_dtype
from covo_rl.policy.rows import packed_hidden

if TYPE_CHECKING:
    from covo_rl.policy.policy import Policy

#: transformers' families whose decoder layer is the one below; Qwen3 norms queries and keys by head
KNOWN = ("qwen2", "qwen3", "llama", "mistral")
#: RoPE whose angles do not depend on the length that is reached
STATIC_ROPE = ("default", "linear", "llama3", "yarn")


class Decoder(Protocol):
    """Tokens of the rows in, what predicts the next ones out."""

    def hidden(self, ids_R: torch.Tensor, positions_R: torch.Tensor, memory: Any) -> torch.Tensor:
        """Hidden states (R, D) of a step; their keys go into `memory`, whose step has begun."""
        ...

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """(R, V) float32."""
        ...


class ModuleDecoder:
    """Every call of every module."""

    def __init__(self, family: AudioFamily) -> None:
        self.family, self.head = family, head_of(family)

    def hidden(self, ids_R: torch.Tensor, positions_R: torch.Tensor, memory: KeyMemory) -> torch.Tensor:
        embeds_RD = self.family.embed_tokens(self.family.embeddable(ids_R))
        return packed_hidden(self.family, ids_R, embeds_RD, positions_R, memory)

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        return float32_logits(self.head, hidden_RD)


@dataclass
class _Layer:
    norm: Any
    qkv: DecodeLinear
    out: DecodeLinear
    mlp_norm: Any
    gate_up: DecodeLinear
    down: DecodeLinear
    act: nn.Module
    q_norm: Any
    k_norm: Any
    scale: float
    window: int | None


class FusedDecoder:
    """Weights as they are now, for `longest` positions at most: make it anew for every call of the sampler.

    `fold` copies them, with the adapters folded in; else products are in `dtype`, with adapters beside them.
    """

    def __init__(self, family: AudioFamily, dtype: torch.dtype, *, rows: int, longest: int, fold: bool) -> None:
        decoder: Any = family.decoder
        attention = decoder.layers[0].self_attn
        self.family, self.norm, self.dtype = family, decoder.norm, dtype
        self.width: int = attention.head_dim
        self.kv_heads = base_linear(attention.k_proj).out_features // self.width
        self.heads = base_linear(attention.q_proj).out_features // self.width
        weight = base_linear(attention.q_proj).weight

        def linear(*layers: nn.Module) -> DecodeLinear:
            return DecodeLinear(layers, self.dtype, fold=fold, rows=rows)

        self.layers = [
            _Layer(
                layer.input_layernorm, linear(part.q_proj, part.k_proj, part.v_proj), linear(part.o_proj),
                layer.post_attention_layernorm, linear(mlp.gate_proj, mlp.up_proj), linear(mlp.down_proj), mlp.act_fn,
                getattr(part, "q_norm", None), getattr(part, "k_norm", None), part.scaling,
                _window(part),
            )
            for layer, part, mlp in ((layer, layer.self_attn, layer.mlp) for layer in decoder.layers)
        ]  # fmt: skip
        places = torch.arange(longest, device=weight.device)
        cos, sin = decoder.rotary_emb(weight.new_empty(0, dtype=self.dtype), places[None])
        half = self.width // 2
        # x cos + turn(x) sin, where turn swaps the halves and negates the first: the sign goes into the table
        self.cos_TD, self.sin_TD = cos[0], torch.cat((-sin[0, :, :half], sin[0, :, half:]), -1)
        head: Any = head_of(family)
        self.whole_head = head
        packs = fold and is_plain(head) and base_linear(head) is head and can_pack(head.weight)
        self.head = DecodeLinear([head], self.dtype, fold=True, rows=rows) if packs else None

    def hidden(self, ids_R: torch.Tensor, positions_R: torch.Tensor, memory: KeyMemory) -> torch.Tensor:
        x_RD = self.family.embed_tokens(self.family.embeddable(ids_R))
        cos_R1d, sin_R1d = (table.index_select(0, positions_R)[:, None] for table in (self.cos_TD, self.sin_TD))
        kv, heads = self.kv_heads, self.heads
        with torch.autocast(x_RD.device.type, enabled=False):
            for index, layer in enumerate(self.layers):
                # [query heads | key heads | value heads], the first two turned in place
                qkv_RXd = layer.qkv(self.normed(layer.norm, x_RD)).view(-1, heads + 2 * kv, self.width)
                if layer.q_norm is not None:
                    qkv_RXd[:, :heads] = self.normed(layer.q_norm, qkv_RXd[:, :heads])
                    qkv_RXd[:, heads : heads + kv] = self.normed(layer.k_norm, qkv_RXd[:, heads : heads + kv])
                qk_RXd = qkv_RXd[:, : heads + kv]
                turned_RXd = qk_RXd.roll(self.width // 2, -1)
                qk_RXd.mul_(cos_R1d).addcmul_(turned_RXd, sin_R1d)
                out_RHd = memory.attend_fused(index, qkv_RXd, kv, layer.scale, layer.window)
                layer.out.add_to(x_RD, out_RHd.reshape(-1, heads * self.width))
                gate_up_RI = layer.gate_up(self.normed(layer.mlp_norm, x_RD))
                inner = gate_up_RI.shape[1] // 2
                layer.down.add_to(x_RD, layer.act(gate_up_RI[:, :inner]).mul_(gate_up_RI[:, inner:]))
            return _rms_norm(self.norm, x_RD)

    def normed(self, norm: Any, x: torch.Tensor) -> torch.Tensor:
        """What a product takes."""
        y = _rms_norm(norm, x)
        return y if y.dtype == self.dtype else y.to(self.dtype)

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        return float32_logits(self.whole_head, hidden_RD) if self.head is None else self.head(hidden_RD)


def _rms_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """In float32, rounded once to the dtype of `x`."""
    return torch.ops.aten._fused_rms_norm(x, [norm.weight.shape[0]], norm.weight, norm.variance_epsilon)[0]


def _window(attention: Any) -> int | None:
    """The layer's sliding window; Mistral's layers read it from their configuration, and Llama's have none there."""
    own = attention.config if type(attention).__name__ == "MistralAttention" else attention
    return getattr(own, "sliding_window", None)


def _linear_layers(decoder: Any) -> Iterator[nn.Module]:
    for layer in decoder.layers:
        for part in (layer.self_attn, layer.mlp):
            yield from (child for name, child in part.named_children() if name.endswith("_proj"))


def _is_known(decoder: Any) -> bool:
    """Modules of KNOWN alone, in the places where they are used here, with nothing hooked in."""
    homes = {f"transformers.models.{name}.modeling_{name}" for name in KNOWN}
    layers = list(getattr(decoder, "layers", []))
    ours = [decoder, getattr(decoder, "norm", None), getattr(decoder, "rotary_emb", None), *layers]
    for layer in layers:
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        norms = (getattr(layer, name, None) for name in ("input_layernorm", "post_attention_layernorm"))
        ours += [attention, mlp, *norms]
        ours += [n for n in (getattr(attention, name, None) for name in ("q_norm", "k_norm")) if n is not None]
    if not layers or any(type(module).__module__ not in homes for module in ours):
        return False
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in ours):
        return False
    if decoder.rotary_emb.rope_type not in STATIC_ROPE:
        return False
    return all(map(is_plain, _linear_layers(decoder)))


def decoder_for(policy: Policy, *, rows: int, longest: int) -> Decoder:
    """The fused one for a decoder of KNOWN that is whole on this rank and takes embeddings alone, else the modules."""
    decoder: Any = policy.family.decoder
    takes_more = getattr(type(policy.family), "decoder_inputs", None) is not AudioFamily.decoder_inputs
    if not policy.fused_decode or policy.sharded or takes_more or not _is_known(decoder):
        return ModuleDecoder(policy.family)
    weight = base_linear(decoder.layers[0].self_attn.q_proj).weight
    dtype = operand_dtype(weight)
    copy_bytes = dtype.itemsize * sum(base_linear(layer).weight.numel() for layer in _linear_layers(decoder))
    copies = copy_bytes <= policy.decode_weights_mb * 2**20
    if dtype != weight.dtype and not copies:  # autocast would need one of every weight
        return ModuleDecoder(policy.family)
    fold = dtype == torch.float32 and copies
    return FusedDecoder(policy.family, dtype, rows=rows, longest=longest, fold=fold)
