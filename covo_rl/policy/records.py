"""What the policy hands out and keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from covo_rl.policy.grouped import KeyValues
from covo_rl.policy.packing import Span


class LogProbs(NamedTuple):
    """Group-major over the given groups, right-padded with 0: float32, bool, float32 in nats or None."""

    logps_NC: torch.Tensor
    mask_NC: torch.Tensor
    entropy_NC: torch.Tensor | None = None


@dataclass
class Counters:
    """Work done so far, for tests and benchmarks."""

    passes: int = 0
    prompt_positions: int = 0
    completion_positions: int = 0
    decode_positions: int = 0


@dataclass
class PromptCache:
    """Prompt keys of the last sampling call, with the weights' version they were made with."""

    keys: KeyValues
    places: dict[Any, int]
    spans: list[Span]
    last_PD: torch.Tensor
    version: int
