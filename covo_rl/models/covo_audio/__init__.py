"""Covo-Audio for transformers: configuration, model, processor, registered with the Auto classes on import."""

from __future__ import annotations

from covo_rl.models.covo_audio.configuration import CovoAudioConfig
from covo_rl.models.covo_audio.features import CovoAudioFeatureExtractor
from covo_rl.models.covo_audio.generation import WindowedRepetitionPenalty
from covo_rl.models.covo_audio.modeling import CovoAudioForConditionalGeneration
from covo_rl.models.covo_audio.processing import CovoAudioProcessor


def register() -> None:
    """Make the Auto classes know `covo_audio`; made once on import, harmless when repeated."""
    from transformers import (
        AutoConfig,
        AutoFeatureExtractor,
        AutoModelForCausalLM,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )

    AutoConfig.register(CovoAudioConfig.model_type, CovoAudioConfig, exist_ok=True)
    for auto in (AutoModelForMultimodalLM, AutoModelForCausalLM):
        auto.register(CovoAudioConfig, CovoAudioForConditionalGeneration, exist_ok=True)
    AutoFeatureExtractor.register(CovoAudioConfig, CovoAudioFeatureExtractor, exist_ok=True)
    AutoProcessor.register(CovoAudioConfig, CovoAudioProcessor, exist_ok=True)


register()

__all__ = [
    "CovoAudioConfig",
    "CovoAudioFeatureExtractor",
    "CovoAudioForConditionalGeneration",
    "CovoAudioProcessor",
    "WindowedRepetitionPenalty",
    "register",
]
