"""A tiny model that listens while it speaks, and an encoder whose features are fixed: random, so it says nothing."""

import torch
from speaking_cases import speaking_model

from covo_rl.duplex.grid import CHUNK_SAMPLES, LOOK_AHEAD_SAMPLES
from covo_rl.duplex.ids import DuplexIds
from covo_rl.engines.draws import Drawing
from covo_rl.models.covo_audio.family import CovoAudio

SAMPLED = Drawing(temperature=1.0)


class FixedFeatures:
    """Feature k is row k of a random matrix, once the samples of chunk k and the look-ahead are there."""

    def __init__(self, width=48, chunks=400):
        self.features_CD = torch.randn(chunks, width, generator=torch.Generator().manual_seed(1))
        self.reset()

    def reset(self):
        self.samples, self.done = 0, 0

    def push(self, samples):
        self.samples += len(samples)
        return self._until((self.samples - LOOK_AHEAD_SAMPLES) // CHUNK_SAMPLES)

    def end(self):
        return self._until(-(-self.samples // CHUNK_SAMPLES))

    def _until(self, end):
        new, self.done = self.features_CD[self.done : max(end, self.done)], max(end, self.done)
        return new


def duplex_family():
    """The family and its ids: three of the tokenizer's bytes are the controls."""
    model, processor = speaking_model()
    family = CovoAudio(model.eval(), processor)
    model.config.duplex = {"think": 20, "shift": 21, "break": 22, "text_pad": 23, "silence_codes": [1, 2, 3, 4]}
    return family, DuplexIds.of(family)
