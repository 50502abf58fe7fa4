"""The codebook while it trains: nearest directions, moved by averages, begun by k-means, never left unused.

vector-quantize-pytorch does the work (`pip install 'covo-rl[speech]'`); what is trained is saved as one plain tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from covo_rl.types import UserError


class MissingQuantiser(UserError, ImportError):
    """vector-quantize-pytorch is not installed."""


class Quantiser(nn.Module):
    """Unit vectors to codes, with the rotation trick's gradient (arXiv 2410.06424).

    Directions are exponential averages of the vectors that chose them, weighted by `decay`. One that was chosen less
    than `restart_below` times an update, on average, becomes a vector of the batch. Several ranks sum their counts.
    """

    def __init__(self, size: int, dim: int, *, decay: float, restart_below: float, ranks: int = 1) -> None:
        super().__init__()
        try:
            from vector_quantize_pytorch import VectorQuantize
        except ImportError as error:
            raise MissingQuantiser(
                "training a speech tokenizer needs vector-quantize-pytorch: pip install 'covo-rl[speech]'"
            ) from error
        # its own commitment loss compares unit vectors with unnormalised ones where there is a mask (1.32)
        options: dict[str, Any] = {"threshold_ema_dead_code": restart_below, "sync_codebook": ranks > 1}
        self.vq: Any = VectorQuantize(
            dim, size, decay=decay, use_cosine_sim=True, kmeans_init=True, rotation_trick=True, commitment_weight=0.0,
            **options,
        )  # fmt: skip

    @property
    def codebook(self) -> Tensor:
        """(K, code_dim) unit vectors."""
        return self.vq.codebook

    @torch.no_grad()
    def begin(self, vectors_NC: Tensor) -> None:
        """Put the codes by k-means on vectors of many clips, those of all ranks together."""
        self.vq._codebook.init_embed_(vectors_NC[None].float())

    def forward(self, vectors_BLC: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """(vectors of the codes, through which gradients reach `vectors_BLC`; codes (B, L)); padding is not counted."""
        quantised_BLC, codes_BL, _ = self.vq(vectors_BLC, mask=mask_BL)
        return quantised_BLC, codes_BL
