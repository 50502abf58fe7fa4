"""What the user's channels of streams are heard as in a training: each once in a batch, by the streaming encoder.

samples -> encoder, kept where it is frozen -> adapter -> features, one for each chunk
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from covo_rl.models.covo_audio.streaming_encoder import StreamingEncoder

if TYPE_CHECKING:
    from covo_rl.policy import Policy


class StreamFeatures:
    """Features of streams by the encoder and adapter of a policy; gradients reach what of them trains.

    What a frozen encoder makes of a stream is kept on the CPU, `memory_mb` of it; what came later is encoded again
    (streams come again in the order of an epoch, in which dropping the oldest would keep nothing that is needed). Where
    ranks share out the parameters nothing is kept: they must make as many calls each. `encoded`: streams so far.
    """

    def __init__(self, policy: Policy, memory_mb: float = 512) -> None:
        self.policy, self.encoded = policy, 0
        self._room = int(memory_mb * 2**20)
        self._kept: dict[str, Tensor] = {}

    def of(self, waves: Mapping[str, np.ndarray]) -> list[Tensor]:
        """Key of the content -> samples at 24 kHz; features (chunks, D) of each, in their order.

        Raises:
            ValueError: the model has no section duplex, or its encoder an attention that takes no mask.
        """
        encoder = StreamingEncoder.of(self.policy.family.model)
        return [encoder.adapted(self._states(encoder, key, wave_T)) for key, wave_T in waves.items()]

    def _states(self, encoder: StreamingEncoder, key: str, wave_T: np.ndarray) -> Tensor:
        """Frames (F, D) of the encoder."""
        if key in self._kept:
            return self._kept[key].to(self.policy.device)
        frozen = "encoder" in self.policy.embedder.frozen_parts
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            states_FD = encoder.offline_states(torch.from_numpy(wave_T))
        self.encoded += 1
        if frozen and not self.policy.sharded and states_FD.nbytes <= self._room:
            self._kept[key] = states_FD.to("cpu", copy=True)
            self._room -= states_FD.nbytes
        return states_FD
