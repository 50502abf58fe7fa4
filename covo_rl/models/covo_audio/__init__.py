"""Covo-Audio for transformers: configuration, model, processor, registered with the Auto classes on import."""

from __future__ import annotations

import transformers

from covo_rl.models.covo_audio.configuration import CovoAudioConfig
from covo_rl.models.covo_audio.features import CovoAudioFeatureExtractor
from covo_rl.models.covo_audio.generation import WindowedRepetitionPenalty
from covo_rl.models.covo_audio.modeling import CovoAudioForConditionalGeneration
from covo_rl.models.covo_audio.pattern import SpeechPattern
from covo_rl.models.covo_audio.processing import CovoAudioProcessor


def register() -> None:
    """Make the Auto classes know `covo_audio`; made once on import, harmless when repeated."""
    transformers.AutoConfig.register(CovoAudioConfig.model_type, CovoAudioConfig, exist_ok=True)
    for auto, ours in (
        (transformers.AutoModelForMultimodalLM, CovoAudioForConditionalGeneration),
        (transformers.AutoModelForCausalLM, CovoAudioForConditionalGeneration),
        (transformers.AutoFeatureExtractor, CovoAudioFeatureExtractor),
        (transformers.AutoProcessor, CovoAudioProcessor),
    ):
        auto.register(CovoAudioConfig, ours, exist_ok=True)


register()

__all__ = [
    "CovoAudioConfig", "CovoAudioFeatureExtractor", "CovoAudioForConditionalGeneration", "CovoAudioProcessor",
    "SpeechPattern", "WindowedRepetitionPenalty", "register",
]  # fmt: skip
