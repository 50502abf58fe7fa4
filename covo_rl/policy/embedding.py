"""Packed ids to decoder inputs: token embeddings, with the audio slots filled by each clip's features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from covo_rl.policy.features import Features, FeatureStore
from covo_rl.policy.packing import Packed
from covo_rl.policy.sharding import is_sharded, most

if TYPE_CHECKING:
    from covo_rl.audio import ClipStore
    from covo_rl.models.base import AudioFamily
    from covo_rl.types import Prompt

#: names the features of a silent clip that only keeps ranks in step
DUMMY = ""
AUDIO_PARTS = ("encoder", "audio_adapter")


class Embedder:
    """The audio side of a policy. `frozen` says that no audio part trains, so embeddings are made once for all.

    `reference_family` makes the audio embeddings of reference passes where the policy's own ones train.
    """

    def __init__(
        self,
        root: nn.Module,
        family: AudioFamily,
        reference_family: AudioFamily,
        clips: ClipStore | None,
        memory_mb: float,
    ) -> None:
        trains = {part: part_trains(family, part) for part in AUDIO_PARTS}
        self.root = root
        self.family = family
        self.frozen = not any(trains.values())
        self.frozen_parts = [part for part, value in trains.items() if not value and part in family.parts]
        self.store = FeatureStore(family, clips, memory_mb, frozen=self.frozen)
        self.reference_store = FeatureStore(reference_family, clips, memory_mb)

    def features(self, prompts: Sequence[Prompt]) -> Features:
        """Embeddings of the prompts' unique clips: now where the audio parts are frozen, else inside each pass."""
        features = Features([key for prompt in prompts for key in prompt.clip_keys], self._embeddings)
        if self.frozen and not is_sharded(self.root):
            features.get()
        return features

    def _embeddings(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        if is_sharded(self.root):
            # every encoder call gathers weights from all ranks, so all must make as many
            mine = self.store.calls(self.store.missing(keys) if self.frozen else keys)
            dummies = most(mine, self.family.embed_tokens.weight.device) - mine
        else:
            # DDP waits for a gradient of every parameter, also from a rank whose rows have no audio
            dummies = int(not (keys or self.frozen) and torch.is_grad_enabled() and torch.distributed.is_initialized())
        result = self.store.embeddings(keys)
        if dummies:
            silent = self.family.clip_features(np.zeros(16000, dtype=np.float32), 16000)
            result = {**result, DUMMY: torch.cat([self.family.encode([silent])[0] for _ in range(dummies)])}
        return result

    def _audio(self, features: Features, keys: Sequence[str], reference: bool) -> dict[str, torch.Tensor]:
        if reference and not self.frozen:
            embeddings = self.reference_store.embeddings(features.keys)
        else:
            embeddings = features.get(fresh=torch.is_grad_enabled() and not self.frozen)
        if missing := [key for key in dict.fromkeys(keys) if key not in embeddings]:
            raise KeyError(
                f"features were made for {len(features.keys)} clips, without {len(missing)} of these prompts' "
                f"(first: {missing[0]}); call policy.features with the same prompts"
            )
        return embeddings

    def embed(
        self, packed: Packed, features: Features, family: AudioFamily, *, reference: bool = False
    ) -> torch.Tensor:
        """(L, D) token embeddings with the audio slots filled, in the decoder's dtype.

        Raises ValueError that names the row where slots and features do not match.
        """
        embeds_LD = family.embed_tokens(packed.input_ids_L)
        audio = self._audio(features, packed.audio_keys, reference)
        if packed.audio_keys:
            rows = torch.cat([audio[key].to(embeds_LD.device, embeds_LD.dtype) for key in packed.audio_keys])
            if rows.shape[0] != packed.audio_positions_S.shape[0]:
                raise ValueError(_slot_message(packed, audio))
            embeds_LD = embeds_LD.index_copy(0, packed.audio_positions_S, rows)
        if DUMMY in audio:
            embeds_LD = embeds_LD + 0.0 * audio[DUMMY].sum().to(embeds_LD.dtype)
        return embeds_LD


def part_trains(family: AudioFamily, part: str) -> bool:
    """Whether any parameter of the part asks for gradients."""
    prefix = family.parts.get(part)
    if prefix is None:
        return False
    return any(p.requires_grad for n, p in family.model.named_parameters() if n.startswith(prefix))


def _slot_message(packed: Packed, audio: dict[str, torch.Tensor]) -> str:
    for prompt in packed.prompts:
        given = [audio[key].shape[0] for key in prompt.clip_keys]
        if sum(given) != sum(prompt.slots):
            return f"row {prompt.example.id}: the prompt has slots {prompt.slots}, its clips have {given} features"
    return (
        f"{packed.audio_positions_S.shape[0]} audio positions, features for "
        f"{sum(audio[k].shape[0] for k in packed.audio_keys)}"
    )
