"""Prompts into what decoding reads of them: their keys and values, each unique prompt once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from covo_rl.policy.attention import KeyValues, PackedLayout
from covo_rl.policy.features import Features
from covo_rl.policy.packing import Span, pack
from covo_rl.policy.rows import packed_hidden
from covo_rl.types import Group

if TYPE_CHECKING:
    from covo_rl.policy.policy import Policy
    from covo_rl.types import Prompt

#: prompt positions in one prefill call
PREFILL_POSITIONS = 2**16


def prefill(
    policy: Policy, prompts: Sequence[Prompt], features: Features
) -> tuple[KeyValues, list[Span], torch.Tensor]:
    """Keys and values of all prompts, packed per layer (L, K, d), their spans, and their last hidden states (P, D)."""
    parts: list[KeyValues] = []
    spans: list[Span] = []
    last: list[torch.Tensor] = []
    offset = 0
    # sharded ranks must make the same number of calls, so they take all prompts at once
    for part in [list(prompts)] if policy.sharded else _within(prompts, PREFILL_POSITIONS):
        packed = pack([Group(prompt, ()) for prompt in part], policy.family.audio_token_id, policy.device)
        capture: KeyValues = {}
        embeds_LD = policy.embedder.embed(packed, features, policy.family)
        hidden_LD = packed_hidden(
            policy.family, packed.input_ids_L, embeds_LD, packed.position_ids_L, PackedLayout(packed, capture=capture)
        )
        policy.count(packed)
        last.append(hidden_LD[[end - 1 for _, end in packed.prompt_spans]])
        spans += [(start + offset, end + offset) for start, end in packed.prompt_spans]
        offset += packed.prompt_positions
        parts.append(capture)
    keys = parts[0]
    if len(parts) > 1:
        keys = {
            layer: (torch.cat([part[layer][0] for part in parts]), torch.cat([part[layer][1] for part in parts]))
            for layer in parts[0]
        }
    return keys, spans, torch.cat(last)


def _within(prompts: Sequence[Prompt], positions: int) -> list[list[Prompt]]:
    """Consecutive prompts, at most `positions` together."""
    parts: list[list[Prompt]] = [[]]
    total = 0
    for prompt in prompts:
        if parts[-1] and total + len(prompt.input_ids) > positions:
            parts.append([])
            total = 0
        parts[-1].append(prompt)
        total += len(prompt.input_ids)
    return parts
