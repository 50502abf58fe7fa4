"""Gemma 4 and Gemma 3n, which hear at most 30 s at a time, behind the family interface.

Both read a second, per-layer embedding of every id (`decoder_inputs`), cap their logits, and scale token embeddings
inside `embed_tokens`; audio is put in after that. Their extractors take a list of clips, and cut at 30 s in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig

from covo_rl.models.registry import ModelError
from covo_rl.models.transformers_family import TransformersFamily, parts_at


class CappedHead(nn.Module):
    """`cap * tanh(logits / cap)` of a head."""

    def __init__(self, head: nn.Module, cap: float) -> None:
        super().__init__()
        self.head, self.cap, self.out_features = head, cap, head.out_features

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.cap * torch.tanh(self.head(hidden) / self.cap)


class HardTokens(nn.Module):
    """Gemma 3n's token embeddings: the last 256 ids, end of audio among them, have theirs in the two embedders."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embedders, self.table = (model.embed_vision, model.embed_audio), model.language_model.embed_tokens
        self.weight, self.num_embeddings = self.table.weight, self.table.num_embeddings

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        first = self.embedders[0].vocab_offset
        ranges = [(e, torch.arange(e.vocab_size, device=ids.device) + e.vocab_offset) for e in self.embedders]
        hard_HD = torch.cat([embedder(input_ids=ids_H) for embedder, ids_H in ranges])
        embeds = self.table(ids)
        return torch.where((ids >= first)[..., None], hard_HD[(ids - first).clamp(min=0)].to(embeds.dtype), embeds)


class Gemma(TransformersFamily):
    """What both have in common; `frame` is what their processors write around the slots of a clip."""

    parts: ClassVar[Mapping[str, str]] = parts_at(adapter="model.embed_audio.")
    unheard: ClassVar[tuple[str, ...]] = ("model.vision_tower",)
    max_clip_seconds: float | None = 30.0
    lora_leaves: ClassVar[tuple[str, ...] | None] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    frame: ClassVar[tuple[str, str]]

    def extract(self, samples_T: np.ndarray) -> dict[str, torch.Tensor]:
        return dict(self.processor.feature_extractor([samples_T], return_tensors="pt"))

    def tokenize(self, text: str, slots: Sequence[int]) -> list[int]:
        return super().tokenize(text.replace(self.audio_token, self.audio_token.join(self.frame)), slots)

    @property
    def text_config(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def unsampled_ids(self) -> tuple[int, ...]:
        """Placeholders: the model would look for a clip or a picture behind them."""
        config = self.model.config
        ids = (config.audio_token_id, config.image_token_id, getattr(config, "video_token_id", None))
        return tuple(i for i in ids if i is not None and i < self.text_config.vocab_size)

    @property
    def lm_head(self) -> nn.Module:
        head, cap = super().lm_head, self.text_config.final_logit_softcapping
        return head if cap is None else CappedHead(head, cap)


class Gemma4(Gemma):
    """E2B and E4B; the larger ones have no audio tower."""

    model_type: ClassVar[str] = "gemma4"
    model_class: ClassVar[Any] = "Gemma4ForConditionalGeneration"
    audio_token: ClassVar[str] = "<|audio|>"
    frame: ClassVar[tuple[str, str]] = ("<|audio>", "<audio|>")

    @classmethod
    def load(cls, path: str, **options: Any) -> Self:
        """Raises ModelError for one without an audio tower, before its weights are read."""
        if PreTrainedConfig.get_config_dict(path)[0].get("audio_config") is None:
            raise ModelError(f"model {path}: this Gemma 4 has no audio tower (audio_config); E2B and E4B have one")
        return super().load(path, **options)

    def slots(self, tensors: Mapping[str, torch.Tensor]) -> int:
        return int(tensors["input_features_mask"][:, ::4].sum())  # two convolutions of stride 2

    def audio_embeddings(self, tensors: Mapping[str, torch.Tensor], slots: int) -> torch.Tensor:
        out = self.model.model.get_audio_features(**tensors)
        return out.pooler_output[out.attention_mask]

    def decoder_inputs(self, ids_L: torch.Tensor, embeds_LD: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.text_config.hidden_size_per_layer_input:
            return {}
        placeholder_L = torch.isin(ids_L, torch.tensor(self.unsampled_ids, device=ids_L.device))
        ids_L = ids_L.masked_fill(placeholder_L, self.text_config.pad_token_id)
        return {"per_layer_inputs": self.model.get_decoder().get_per_layer_inputs(ids_L, None)}


class Gemma3n(Gemma):
    """E2B and E4B. A clip fills 188 slots whatever its length; what it does not fill is a learned vector.

    The features of a clip are those of the clip alone. Beside a longer one transformers pads the waveform, and the
    encoder's convolutions look into the padding: the last embeddings of the shorter clip then differ.
    """

    model_type: ClassVar[str] = "gemma3n"
    model_class: ClassVar[Any] = "covo_rl.models.gemma3n_model:Gemma3nForConditionalGeneration"
    audio_token: ClassVar[str] = "<audio_soft_token>"
    frame: ClassVar[tuple[str, str]] = ("\n\n<start_of_audio>", "<end_of_audio>\n\n")

    def slots(self, tensors: Mapping[str, torch.Tensor]) -> int:
        return self.model.config.audio_soft_tokens_per_image if tensors["input_features_mask"].any() else 0

    def audio_embeddings(self, tensors: Mapping[str, torch.Tensor], slots: int) -> torch.Tensor:
        model, mask = self.model.model, tensors["input_features_mask"]
        out = model.get_audio_features(tensors["input_features"], ~mask)  # in here True means padding
        rows_SD = out.pooler_output[~out.audio_mel_mask]
        filler = torch.tensor([self.text_config.vocab_size - 1], device=mask.device)
        return torch.cat((rows_SD, model.embed_audio(input_ids=filler).expand(slots - len(rows_SD), -1)))

    @property
    def embed_tokens(self) -> nn.Embedding:
        return HardTokens(self.model.model)  # pyright: ignore[reportReturnType]

    def decoder_inputs(self, ids_L: torch.Tensor, embeds_LD: torch.Tensor) -> dict[str, torch.Tensor]:
        beyond_L = ids_L >= self.text_config.vocab_size_per_layer_input
        return {"per_layer_inputs": self.model.get_decoder().get_per_layer_inputs(ids_L.masked_fill(beyond_L, 0))}
