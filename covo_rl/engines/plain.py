"""Decoding for decoders that cannot be packed: every row with the model's own cache, prompts of one length together.

So nothing is padded, and whatever state the layers keep is that of the row alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from covo_rl.engines.prefill import PREFILL_POSITIONS
from covo_rl.policy.head import head_of
from covo_rl.policy.packing import pack
from covo_rl.policy.products import float32_logits
from covo_rl.policy.rows import decoder_call
from covo_rl.types import Group

if TYPE_CHECKING:
    from covo_rl.models.base import AudioFamily
    from covo_rl.policy.features import Features
    from covo_rl.policy.policy import Policy
    from covo_rl.types import Prompt


class CacheMemory:
    """The model's own cache of some prompts, a copy for each row; takes the place of a KeyMemory in the decode loop."""

    def __init__(self, cache: DynamicCache, prompts: int, device: torch.device) -> None:
        self.cache, self.device = cache, device
        self.rank = range(prompts)
        self.rows: int | None = None

    def arrange(self, sources: Sequence[int], prompt_of_row: Sequence[int]) -> None:
        """The rows from now on: `sources` are present rows; at the start all are -1, copies of their prompts."""
        index = prompt_of_row if self.rows is None else sources
        if list(index) != list(range(self.rows or len(self.rank))):
            places: Any = torch.tensor(index, device=self.device)
            self.cache.reorder_cache(places)
        self.rows = len(sources)

    def begin(self, counts_R: torch.Tensor, positions: int, *, equal: bool) -> None:
        """The cache counts for itself."""


class CacheDecoder:
    """The model's own modules, a position at a time."""

    def __init__(self, family: AudioFamily) -> None:
        self.family, self.head = family, head_of(family)

    def hidden(self, ids_R: torch.Tensor, positions_R: torch.Tensor, memory: Any) -> torch.Tensor:
        embeds_R1D = self.family.embed_tokens(self.family.embeddable(ids_R))[:, None]
        return self.last(ids_R[:, None], embeds_R1D, positions_R[:, None], memory.cache)

    def last(self, ids_RT, embeds_RTD, positions_RT, cache: DynamicCache) -> torch.Tensor:
        """Hidden states (R, D) of the last of these positions, which come after those of the cache."""
        hidden_RTD = decoder_call(
            self.family, ids_RT, embeds_RTD, position_ids=positions_RT, past_key_values=cache, use_cache=True
        )
        return hidden_RTD[:, -1]

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        return float32_logits(self.head, hidden_RD)


def blocks_of_one_length(prompt_lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows that are written together: their prompts have the same length, and at most PREFILL_POSITIONS in all."""
    rows: dict[int, list[int]] = {}
    for row, length in enumerate(prompt_lengths):
        rows.setdefault(length, []).append(row)
    rooms = {length: max(1, min(capacity, PREFILL_POSITIONS // length)) for length in rows}
    return [part[i : i + rooms[n]] for n, part in rows.items() for i in range(0, len(part), rooms[n])]


def prefill_caches(
    policy: Policy, decoder: CacheDecoder, prompts: Sequence[Prompt], features: Features
) -> tuple[CacheMemory, torch.Tensor]:
    """Memory of these prompts, all of one length, and their last hidden states (P, D)."""
    packed = pack([Group(prompt, ()) for prompt in prompts], policy.family.audio_token_id, policy.device)
    embeds_LD = policy.embedder.embed(packed, features, policy.family)
    model: Any = policy.family.decoder
    cache = DynamicCache(config=model.config)
    ids_PT, embeds_PTD, positions_PT = (
        x.unflatten(0, (len(prompts), -1)) for x in (packed.input_ids_L, embeds_LD, packed.position_ids_L)
    )
    last_PD = decoder.last(ids_PT, embeds_PTD, positions_PT, cache)
    policy.count(packed)
    return CacheMemory(cache, len(prompts), policy.device), last_PD
