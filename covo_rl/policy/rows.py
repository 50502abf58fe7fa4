"""The two ways through the decoder: one packed row, or a plain row for every completion.

    packed_hidden(family, ids_L, embeds_LD, position_ids_L, layout)      the layout says who attends to whom
    rows = PlainRows.of(packed)                                          for decoders that cannot be packed
    rows.hidden(family, ids_L, embeds_LD)                                prompts once per completion, right-padded

Plain rows are the model's own forward, attention included: exact whatever the layers are made of, since padding comes
last and positions look back only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from covo_rl.models.base import AudioFamily
    from covo_rl.policy.attention import Layout
    from covo_rl.policy.packing import Packed


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """No dropout, no checkpointing; the modes come back as they were."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def packed_hidden(
    family: AudioFamily, ids_L: torch.Tensor, embeds_LD: torch.Tensor, position_ids_L: torch.Tensor, layout: Layout
) -> torch.Tensor:
    """Packed embeddings of these ids through the decoder -> hidden states (L, D)."""
    # a ready 4D mask is passed through untouched; the layout says who attends to whom
    mask = embeds_LD.new_zeros(1, 1, 1, 1)
    return decoder_call(
        family, ids_L[None], embeds_LD[None], position_ids=position_ids_L[None], attention_mask=mask, use_cache=False,
        covo_layout=layout,
    ).squeeze(0)  # fmt: skip


def decoder_call(family: AudioFamily, ids_NT: torch.Tensor, embeds_NTD: torch.Tensor, **options: Any) -> torch.Tensor:
    """One call of the decoder, with what the family gives it beside embeddings -> hidden states (N, T, D)."""
    more = family.decoder_inputs(ids_NT.flatten(), embeds_NTD.flatten(0, 1))
    inputs = {name: value.unflatten(0, ids_NT.shape) for name, value in more.items()}
    return family.decoder(inputs_embeds=embeds_NTD, **inputs, **options).last_hidden_state


@dataclass(frozen=True)
class PlainRows:
    """Every completion as a row [ prompt | completion inputs | padding ] of places in the packed one.

    `index_NT` int64, `mask_NT` bool; `predictors_M` are those of the packed row among the N * T hidden states.
    """

    index_NT: torch.Tensor
    mask_NT: torch.Tensor
    predictors_M: torch.Tensor

    @classmethod
    def of(cls, packed: Packed) -> PlainRows:
        spans = [(packed.prompt_spans[p], own) for p, own in zip(packed.row_prompts, packed.row_spans, strict=True)]
        places = [np.concatenate([np.arange(*prompt), np.arange(*own)]) for prompt, own in spans]
        lengths = np.array([len(row) for row in places], dtype=np.int64)
        longest = int(lengths.max(initial=0))
        index_NT = np.zeros((len(places), longest), dtype=np.int64)
        mask_NT = np.arange(longest)[None] < lengths[:, None]
        index_NT[mask_NT] = np.concatenate([np.zeros(0, dtype=np.int64), *places])
        first = np.array([end - start - 1 for (start, end), _ in spans], dtype=np.int64)  # predicts the first id
        predicts_NT = mask_NT & (np.arange(longest)[None] >= first[:, None])
        device = packed.input_ids_L.device
        tensors = (torch.from_numpy(x).to(device) for x in (index_NT, mask_NT, np.flatnonzero(predicts_NT)))
        return cls(*tensors)

    def hidden(self, family: AudioFamily, ids_L: torch.Tensor, embeds_LD: torch.Tensor) -> torch.Tensor:
        """The packed row's ids and embeddings -> hidden states (N * T, D) of the plain rows."""
        positions_NT = torch.arange(self.index_NT.shape[1], device=ids_L.device).expand_as(self.index_NT)
        hidden_NTD = decoder_call(
            family, ids_L[self.index_NT], embeds_LD[self.index_NT], position_ids=positions_NT,
            attention_mask=self.mask_NT.long(), use_cache=False,
        )  # fmt: skip
        return hidden_NTD.flatten(0, 1)
