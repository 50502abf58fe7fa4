"""Which id may come next in a full-duplex dialogue: the same rule where ids are drawn and where they are scored.

state                 legal                      then
waiting               the user's chunk           a decision is due
listening             THINK | SHIFT              listening | speaking, text open
speaking, open        text | text_pad | BREAK    four codes, open | four codes, closed | listening
speaking, closed      text_pad | BREAK           four codes, closed | listening
codes left            an audio code              one fewer; after the last waiting
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache

import torch

from covo_rl.duplex.grid import CHUNK_CODES
from covo_rl.duplex.ids import DuplexIds, TokenKind
from covo_rl.types import UserError


class LayoutError(UserError, ValueError):
    """Ids that are no full-duplex dialogue."""


class Legal(IntEnum):
    """What is chosen from at a position. FORCED: nothing is, so it has no log-prob and is never trained."""

    FORCED = 0
    LISTENING = 1
    OPEN = 2
    CLOSED = 3
    CODE = 4


LEGAL_KINDS: dict[Legal, tuple[TokenKind, ...]] = {
    Legal.FORCED: (TokenKind.USER,),
    Legal.LISTENING: (TokenKind.THINK, TokenKind.SHIFT),
    Legal.OPEN: (TokenKind.TEXT, TokenKind.TEXT_PAD, TokenKind.BREAK),
    Legal.CLOSED: (TokenKind.TEXT_PAD, TokenKind.BREAK),
    Legal.CODE: (TokenKind.CODE,),
}


@dataclass(frozen=True)
class DuplexState:
    """Where a dialogue stands; a new one listens, and waits for the user's first chunk."""

    speaking: bool = False
    closed: bool = False
    due: bool = False
    codes_left: int = 0

    @property
    def legal(self) -> Legal:
        """What the next id is chosen from."""
        if self.codes_left:
            return Legal.CODE
        if not self.due:
            return Legal.FORCED
        if not self.speaking:
            return Legal.LISTENING
        return Legal.CLOSED if self.closed else Legal.OPEN

    def after(self, kind: TokenKind) -> DuplexState:
        """The state after an id of this kind.

        Raises:
            LayoutError: it is not legal here.
        """
        if kind not in LEGAL_KINDS[self.legal]:
            allowed = ", ".join(legal.value for legal in LEGAL_KINDS[self.legal])
            raise LayoutError(f"{kind.value} is not legal here; legal: {allowed}")
        if kind is TokenKind.USER:
            return replace(self, due=True)
        if kind is TokenKind.CODE:
            return replace(self, codes_left=self.codes_left - 1)
        if kind is TokenKind.SHIFT:
            return DuplexState(speaking=True)
        if kind in (TokenKind.TEXT, TokenKind.TEXT_PAD):
            return DuplexState(speaking=True, closed=kind is TokenKind.TEXT_PAD, codes_left=CHUNK_CODES)
        return DuplexState()


class LegalMasks:
    """The legal ids of a vocabulary of `vocabulary` ids, for logits on `device`."""

    def __init__(self, ids: DuplexIds, vocabulary: int, device: torch.device | str = "cpu") -> None:
        self.ids = ids
        kinds = [ids.kind(i) for i in range(vocabulary)]
        rows = [[kind in LEGAL_KINDS[legal] for kind in kinds] for legal in Legal]
        self.allowed_KV = torch.tensor(rows, device=device)

    def masked(self, logits_LV: torch.Tensor, legal_L: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Logits (L, V) in float32, of what is not legal -inf: before any softmax, drawn or scored."""
        legal_L = torch.as_tensor(legal_L, device=self.allowed_KV.device)
        return logits_LV.float().masked_fill(~self.allowed_KV[legal_L], -torch.inf)

    def stop_logits(self, logits_LV: torch.Tensor, legal_L: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Logits (L,) of SHIFT, or of BREAK, against all else that is legal at decisions: the hazard is its sigmoid.

        Text against text is no decision of this kind and gets no gradient from it.
        """
        legal_L = torch.as_tensor(legal_L, device=self.allowed_KV.device)
        masked_LV = self.masked(logits_LV, legal_L)
        stop_L1 = torch.where(legal_L == Legal.LISTENING, self.ids.shift, self.ids.break_)[:, None]
        going_on_LV = masked_LV.scatter(1, stop_L1, -torch.inf)
        return masked_LV.gather(1, stop_L1)[:, 0] - going_on_LV.logsumexp(1)

    def logps(
        self, logits_LV: torch.Tensor, targets_L: torch.Tensor, legal_L: Sequence[int] | torch.Tensor
    ) -> torch.Tensor:
        """Log-probs (L,) of targets among what is legal: -inf for one that is not, 0 where it was FORCED.

        Row l of the logits is the position before target l.
        """
        legal_L = torch.as_tensor(legal_L, device=self.allowed_KV.device)
        chosen_L = self.masked(logits_LV, legal_L).log_softmax(-1).gather(1, targets_L[:, None])[:, 0]
        return torch.where(legal_L == Legal.FORCED, torch.zeros_like(chosen_L), chosen_L)


@lru_cache(maxsize=8)
def legal_masks(ids: DuplexIds, vocabulary: int, device: torch.device) -> LegalMasks:
    """The masks of a model, made once: every id of its vocabulary is looked at."""
    return LegalMasks(ids, vocabulary, device)
