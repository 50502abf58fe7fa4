"""Streams of features.py from their sound: what a streaming encoder makes of the user's channel, not what is simulated.

    wave_T = stream_wave(stream)                        24 kHz, as many chunks as the stream has
    listen = wave_listener(encoder)                     stream -> (chunks, D), in place of `encoder_features`
    world = feature_world(family, config)               simulated or heard, as `config.features` says

perception.py teaches the encoder; then it is frozen, so each stream is heard once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from covo_rl.duplex.config import DuplexConfig
from covo_rl.duplex.features import FeatureStream
from covo_rl.duplex.ids import DuplexIds
from covo_rl.duplex.questions import FeatureWorld
from covo_rl.duplex.sonify import user_wave
from covo_rl.models.covo_audio.streaming_encoder import StreamingEncoder

if TYPE_CHECKING:
    from covo_rl.models.base import AudioFamily


def feature_world(family: AudioFamily, config: DuplexConfig) -> FeatureWorld:
    """Streams as this model meets them, by simulated features or by its own encoder.

    Raises:
        FeatureWorldError: the model cannot write such streams.
        DuplexIdsError: it has no duplex section.
    """
    ids = DuplexIds.of(family)
    listen = wave_listener(StreamingEncoder.of(family.model)) if config.features == "wav" else None
    return FeatureWorld.of(family, ids, listen, noise=config.noise)


def stream_wave(stream: FeatureStream) -> np.ndarray:
    """The user's channel, (T,) float32; streams of the preset `test` have voices that no others have."""
    return user_wave(stream, split="test" if stream.id.startswith("test-") else "train")


def wave_listener(encoder: Any) -> Callable[[FeatureStream], torch.Tensor]:
    """What gives a stream's features (chunks, D), by a StreamingEncoder."""
    return lambda stream: hear(encoder, stream_wave(stream))


@torch.no_grad()
def hear(encoder: Any, wave_T: np.ndarray) -> torch.Tensor:
    """Features (chunks, D) float32 of a whole stream, on the CPU."""
    return encoder.offline_features(torch.from_numpy(wave_T)).float().cpu()
