"""Gemma 3n without its vision tower, which is timm's: neither its 300 M parameters nor timm are needed to hear.

The configuration, and every other name and number, are transformers' own. An export carries the tower's tensors over
from the base checkpoint.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoModel, Gemma3nConfig
from transformers.models.gemma3n import modeling_gemma3n as stock


class Gemma3nModel(stock.Gemma3nModel):
    """Refuses pictures: there is no tower that sees them."""

    def __init__(self, config: Gemma3nConfig) -> None:
        super(stock.Gemma3nModel, self).__init__(config)
        text, audio, vision = (getattr(config, f"{name}_config") for name in ("text", "audio", "vision"))
        self.vocab_size, self.vocab_size_per_layer_input = text.vocab_size, text.vocab_size_per_layer_input
        self.language_model, self.audio_tower = AutoModel.from_config(text), AutoModel.from_config(audio)
        self.embed_vision, self.embed_audio = (stock.Gemma3nMultimodalEmbedder(c, text) for c in (vision, audio))
        self.post_init()

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("this Gemma 3n was loaded without its vision tower: it hears, and sees no pictures")


class Gemma3nForConditionalGeneration(stock.Gemma3nForConditionalGeneration):
    """The stock class around that model, under its name, which is what a saved configuration says."""

    _keys_to_ignore_on_load_unexpected: Any = (r"vision_tower\.",)

    def __init__(self, config: Gemma3nConfig) -> None:
        super(stock.Gemma3nForConditionalGeneration, self).__init__(config)
        text: Any = config.text_config
        self.model = Gemma3nModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()
