"""May completions lie in one packed row? Only where layers mix positions by attention, and that through the interface.

why = packing_obstacle(family.decoder)      ""  or what stands against it, read off the modules
nats = completion_leak(family)              how far log-probs of a completion move when another one changes
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.modeling_layers import GradientCheckpointingLayer

from covo_rl.policy.attention import NAME, PackedLayout
from covo_rl.policy.head import head_of
from covo_rl.policy.packing import pack
from covo_rl.policy.products import float32_logits
from covo_rl.policy.rows import evaluation_mode, packed_hidden
from covo_rl.types import Example, Group, Prompt, Rollout, UserError

if TYPE_CHECKING:
    from covo_rl.models.base import AudioFamily

#: kinds of layers, in transformers' words, that grouped attention computes
PACKED_KINDS = ("full_attention", "sliding_attention")


#: said once, where a decoder cannot be packed
PLAIN_ROWS = (
    "{} cannot be packed (its family says packable = False): every completion is scored and sampled as a row of its "
    "own, so that each prompt is computed once per completion. Exact, and slower: with 8 completions of 100 on a "
    "prompt of 400, 3 times in the update (measured on a small decoder); while sampling, 1.3 times where prompts have "
    "one length, 4 times where they do not, since only those of one length are written together"
)


class PackingError(UserError, TypeError):
    """A decoder that its family calls packable and that is not; the message says what is in it, and what to do."""


def packing_obstacle(decoder: Any) -> str:
    """What in the decoder's layers mixes positions otherwise than by the attention interface; empty if nothing."""
    kinds = getattr(decoder.config, "layer_types", None) or ()
    if other := sorted({kind for kind in kinds if kind not in PACKED_KINDS}):
        return f"its configuration has layers of type {', '.join(other)}"
    if getattr(decoder.config, "attn_logit_softcapping", None) is not None:
        return "its attention caps scores (attn_logit_softcapping)"
    layers = getattr(decoder, "layers", None) or [
        m for m in decoder.modules() if isinstance(m, GradientCheckpointingLayer)
    ]
    if not len(layers):
        return "it has no layers (a list `layers`, or modules of GradientCheckpointingLayer)"
    for number, layer in enumerate(layers):
        for name, module in layer.named_modules():
            if isinstance(module, (_ConvNd, nn.RNNBase)):
                return f"layer {number} has {name}, a {type(module).__name__}"
            if isinstance(getattr(module, "sinks", None), nn.Parameter):
                return f"layer {number} has {name} with attention sinks"
        if not any(map(_attends, layer.modules())):
            return f"layer {number} has no attention that reads transformers' AttentionInterface"
    return ""


def _attends(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return hasattr(module, "layer_idx") and code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def attention_configs(decoder: Any) -> list[Any]:
    """Every configuration object that the decoder's layers read."""
    return [m.config for m in decoder.modules() if hasattr(m, "config") and hasattr(m, "layer_idx")] + [decoder.config]


def prepare_attention(family: AudioFamily) -> None:
    """Set the grouped attention function, or say once, on one rank, that rows are plain.

    Raises PackingError for a decoder that the family calls packable and whose completions would change one another.
    """
    decoder: Any = family.decoder
    if not family.packable:
        if not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
            warnings.warn(PLAIN_ROWS.format(type(decoder).__name__), stacklevel=3)
        return
    if obstacle := packing_obstacle(decoder):
        raise PackingError(
            f"{type(decoder).__name__} cannot be packed: {obstacle}, so that completions in one row would change one "
            "another. Its family says `packable = False`: then every completion is scored and sampled as a row of its "
            "own, which is slower and exact"
        )
    _group_attention(decoder)


def _group_attention(decoder: Any) -> None:
    for config in attention_configs(decoder):
        config._attn_implementation = NAME


@contextmanager
def restored_attention(decoder: Any) -> Iterator[None]:
    """After it the decoder has the attention function of before."""
    configs = attention_configs(decoder)
    before = [config._attn_implementation for config in configs]
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


@torch.no_grad()
def completion_leak(family: AudioFamily, *, prompt_length: int = 9, length: int = 7, seed: int = 0) -> float:
    """Largest change in nats of a completion's log-probs in a packed row where the other completion is replaced.

    Text of random ids, either of two completions of one prompt in turn, dropout off; packed whatever the family says.
    0.0 where nothing leaks, but in an MoE, whose experts get other rows together and round otherwise (float32: 1e-6).
    """
    decoder, device = family.decoder, family.embed_tokens.weight.device
    generator = torch.Generator().manual_seed(seed)
    refused = {family.audio_token_id, *family.unsampled_ids}
    allowed = torch.tensor([i for i in range(family.embedded_ids) if i not in refused])

    def draw(count: int) -> tuple[int, ...]:
        return tuple(allowed[torch.randint(len(allowed), (count,), generator=generator)].tolist())

    prompt = Prompt(Example("probe", (), ""), (), "", draw(prompt_length))
    first, second, others = draw(length), draw(length), (draw(length), draw(length))

    def logps_NC(*completions: tuple[int, ...]) -> torch.Tensor:
        rollouts = tuple(Rollout(ids, (0.0,) * length, "", "length") for ids in completions)
        packed = pack([Group(prompt, rollouts)], family.audio_token_id, device)
        embeds_LD = family.embed_tokens(family.embeddable(packed.input_ids_L))
        hidden_LD = packed_hidden(family, packed.input_ids_L, embeds_LD, packed.position_ids_L, PackedLayout(packed))
        logits_MV = float32_logits(head_of(family), hidden_LD[packed.predictors_M])
        return logits_MV.log_softmax(-1).gather(1, packed.targets_M[:, None]).view(len(completions), length)

    with restored_attention(decoder), evaluation_mode(decoder):
        _group_attention(decoder)
        before_NC = logps_NC(first, second)
        moved = (logps_NC(others[0], second) - before_NC)[1], (logps_NC(first, others[1]) - before_NC)[0]
    return float(torch.cat(moved).abs().max())
