"""How large a model is, from its configuration alone: parameters by part, widths, positions of a clip. No weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covo_rl.run.published import PER_SECOND, PUBLISHED

if TYPE_CHECKING:
    from covo_rl.config import AdapterConfig


@dataclass(frozen=True)
class Shape:
    """What the estimates need of a model: parameters by part, and the decoder's widths."""

    parameters: dict[str, int]
    layers: int
    width: int
    mlp_width: int
    kv_width: int
    vocabulary: int
    linear_parameters: int
    trainable: int = 0
    expert_parameters: int = 0
    packable: bool = True

    @property
    def total(self) -> int:
        return sum(self.parameters.values())

    def copies(self, prompts: int, rows: int) -> int:
        """How often a prompt is computed and kept: once for all its rows, or for each of them where rows are plain."""
        return prompts if self.packable else rows


def shape_of(model_config: Any, adapter: AdapterConfig | None = None) -> Shape:
    """Count the parameters of a transformers configuration, and those that train, without storage for them.

    Raises ModelError for a model type without a family, PatternError for an adapter's pattern that does not fit.
    """
    import torch

    from covo_rl.policy.saved_adapter import read_adapter
    from covo_rl.policy.trainable import make_trainable

    family = weightless_family(model_config)
    model, prefixes = family.model, family.parts
    parts = dict.fromkeys([*prefixes, "other"], 0)
    for name, parameter in model.named_parameters():
        parts[next((p for p, prefix in prefixes.items() if name.startswith(prefix)), "other")] += parameter.numel()
    linear = [m for n, m in model.named_modules() if n.startswith(prefixes["llm"]) and isinstance(m, torch.nn.Linear)]
    decoder = model_config.get_text_config()
    trainable = 0
    if adapter is not None and adapter.adapter:
        trainable = sum(tensor.numel() for tensor in read_adapter(adapter.adapter).tensors.values())
    elif adapter is not None:
        with torch.device("meta"):
            trainable = make_trainable(family, replace(adapter, load_in_4bit=False)).trainable_parameters
    mlp_width, kv_width = widths_of(decoder)
    if active := getattr(decoder, "num_experts_per_tok", None):
        mlp_width = active * decoder.moe_intermediate_size
    return Shape(
        parameters=parts,
        layers=decoder.num_hidden_layers,
        width=decoder.hidden_size,
        mlp_width=mlp_width,
        kv_width=kv_width,
        vocabulary=decoder.vocab_size,
        linear_parameters=sum(m.weight.numel() for m in linear),
        expert_parameters=sum(p.numel() for n, p in model.named_parameters() if ".experts." in n),
        trainable=trainable,
        packable=family.packable,
    )


def weightless_family(model_config: Any, processor: Any = None) -> Any:
    """The family of a transformers configuration, whose parameters have no storage."""
    import torch

    from covo_rl.models import family_class
    from covo_rl.models.transformers_family import named_class

    kind = family_class(model_config.model_type)
    with torch.device("meta"):
        # of a whole model with a voice, the half that listens
        model = named_class(kind.model_class, kind)(getattr(model_config, "thinker_config", model_config))
        return kind(model, processor)


def widths_of(decoder: Any) -> tuple[int, int]:
    """The largest of its MLPs, and of its keys; in some decoders (Gemma 4) layers have widths of their own."""
    layers = [*(getattr(decoder, "per_layer_config", None) or [decoder])]
    mlps = [layer.intermediate_size for layer in layers]
    heads = [getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads for layer in layers]
    keys = [layer.num_key_value_heads * head for layer, head in zip(layers, heads, strict=True)]
    return max(width if isinstance(width, int) else max(width) for width in mlps), max(keys)


def audio_positions(model_config: Any, seconds: float) -> int:
    """Decoder positions that one clip fills, to a few; of a family of the user's own as many as the densest of ours."""
    kind = model_config.model_type.removesuffix("_thinker").removesuffix("_plus")
    if kind == "covo_audio":
        return -(-round(seconds * 100) // model_config.slot_frames)
    if kind == "voxtral":
        return 375 * max(1, math.ceil(seconds / 30))
    if kind == "gemma3n":
        return model_config.audio_soft_tokens_per_image
    return round(seconds * PER_SECOND.get(kind, 25.0))


def sizes_of(model: str) -> Any:
    """The transformers configuration of a model: of a folder its config.json, of a published name what is known here.

    Raises:
        OSError, ModelError: neither, and the hub does not give it.
    """
    from transformers import AutoConfig

    import covo_rl.models.covo_audio  # noqa: F401  (registers its configuration)
    from covo_rl.models import model_config
    from covo_rl.models.builtin import resolve_model

    if model in PUBLISHED and not Path(model).exists():
        kind, values = PUBLISHED[model]
        return AutoConfig.for_model(kind, **values)
    model_config(resolve_model(model))
    return AutoConfig.from_pretrained(resolve_model(model))
