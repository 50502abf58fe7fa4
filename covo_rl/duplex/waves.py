"""Streams of features.py from their sound: what a streaming encoder makes of the user's channel, not what is simulated.

    wave_T = stream_wave(stream, seed)                  24 kHz, as many chunks as the stream has
    listen = wave_listener(encoder, seed)               stream -> (chunks, D), in place of `encoder_features`
    world = FeatureWorld.of(family, ids, listen)

perception.py teaches the encoder; then it is frozen, so each stream is heard once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from covo_rl.duplex.features import FeatureStream
from covo_rl.duplex.sonify import user_wave


def stream_wave(stream: FeatureStream, seed: int) -> np.ndarray:
    """The user's channel, (T,) float32; streams of the preset `test` have voices that no others have."""
    return user_wave(stream, seed=seed, split="test" if stream.id.startswith("test-") else "train")


def wave_listener(encoder: Any, seed: int) -> Callable[[FeatureStream], torch.Tensor]:
    """What gives a stream's features (chunks, D), on the CPU, by a StreamingEncoder."""
    return lambda stream: hear(encoder, stream_wave(stream, seed))


@torch.no_grad()
def hear(encoder: Any, wave_T: np.ndarray) -> torch.Tensor:
    """Features (chunks, D) of a whole stream, on the CPU."""
    return encoder.offline_features(torch.from_numpy(wave_T)).cpu()
