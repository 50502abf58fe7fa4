"""Decoding for decoders that cannot be packed: prompt by prompt, every row with the model's own cache.

The rows of a prompt have the same length, so that nothing is padded and whatever state the layers keep is theirs alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from covo_rl.policy.head import head_of
from covo_rl.policy.packing import Packed, pack
from covo_rl.policy.products import float32_logits
from covo_rl.policy.rows import decoder_call
from covo_rl.types import Group

if TYPE_CHECKING:
    from covo_rl.models.base import AudioFamily
    from covo_rl.policy.features import Features
    from covo_rl.policy.policy import Policy
    from covo_rl.types import Prompt


class CacheMemory:
    """The model's own cache of one prompt, once for each row; takes the place of a KeyMemory in the decode loop."""

    rank = (0,)

    def __init__(self, cache: DynamicCache, device: torch.device) -> None:
        self.cache, self.device, self.rows = cache, device, 0

    def arrange(self, sources: Sequence[int], prompt_of_row: Sequence[int]) -> None:
        """The rows from now on: `sources` are present rows, or all of them -1 at the start, copies of the prompt's."""
        if list(sources) != list(range(self.rows)):
            self.cache.reorder_cache(torch.tensor([max(source, 0) for source in sources], device=self.device))
        self.rows = len(sources)

    def begin(self, counts_R: torch.Tensor, positions: int, *, equal: bool) -> None:
        """The cache counts for itself."""


class CacheDecoder:
    """The model's own modules, a position at a time."""

    def __init__(self, family: AudioFamily) -> None:
        self.family, self.head = family, head_of(family)

    def prefill(self, packed: Packed, embeds_LD: torch.Tensor) -> tuple[DynamicCache, torch.Tensor]:
        """The cache of the one prompt in the row, and its last hidden state (1, D)."""
        cache = DynamicCache(config=self.family.decoder.config)
        return cache, self._call(packed.input_ids_L[None], embeds_LD[None], packed.position_ids_L[None], cache)

    def hidden(self, ids_R: torch.Tensor, positions_R: torch.Tensor, memory: Any) -> torch.Tensor:
        embeds_R1D = self.family.embed_tokens(self.family.embeddable(ids_R))[:, None]
        return self._call(ids_R[:, None], embeds_R1D, positions_R[:, None], memory.cache)

    def _call(self, ids_RT, embeds_RTD, positions_RT, cache: DynamicCache) -> torch.Tensor:
        hidden_RTD = decoder_call(
            self.family, ids_RT, embeds_RTD, position_ids=positions_RT, past_key_values=cache, use_cache=True
        )
        return hidden_RTD[:, -1]

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        return float32_logits(self.head, hidden_RD)


def prefill_alone(
    policy: Policy, decoder: CacheDecoder, prompt: Prompt, features: Features
) -> tuple[CacheMemory, torch.Tensor]:
    """Memory of one prompt, and its last hidden state (1, D)."""
    packed = pack([Group(prompt, ())], policy.family.audio_token_id, policy.device)
    embeds_LD = policy.embedder.embed(packed, features, policy.family)
    cache, last_1D = decoder.prefill(packed, embeds_LD)
    policy.count(packed)
    return CacheMemory(cache, policy.device), last_1D
