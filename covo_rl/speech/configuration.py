"""The shape of a speech tokenizer: the published one, and a tiny one that trains in minutes on a CPU."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from covo_rl.config import option, value_problems
from covo_rl.data.files import write_json
from covo_rl.resolve import ConfigError, read_yaml, typed_values

MODEL_TYPE = "covo_speech_tokenizer"
FRONT_ENDS = ["conv", "mel"]
LIMITS = {"[2, 1000000]": "codebook_size pieces", "[1, 100000]": "code_dim merge_width head_width"}
MOST_LAYERS = 1000
#: WavLM-large, as far as it differs from WavLMConfig's defaults
_LARGE = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
    "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": False,
}  # fmt: skip
_TINY = {
    "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256,
    "do_stable_layer_norm": True, "num_conv_pos_embeddings": 32, "num_conv_pos_embedding_groups": 8,
    "mask_time_prob": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0, "num_buckets": 64, "max_bucket_distance": 100,
}  # fmt: skip


@dataclass(frozen=True)
class SpeechTokenizerConfig:
    """`pieces` counts the outputs of the CTC head, its blank included. `wavlm` are fields of transformers' WavLMConfig.

    `front_end: conv` is WavLM's own convolutions on 16 kHz; `mel` puts a standardised log-mel of 24 kHz in their place.
    """

    codebook_size: int = 16_384
    code_dim: int = 16
    merge_width: int = 1024
    head_width: int = 512
    pieces: int = 5001
    front_end: str = option("conv", "what hears the wave", choices=FRONT_ENDS)
    wavlm: dict[str, Any] = field(default_factory=lambda: dict(_LARGE))

    @classmethod
    def published(cls) -> SpeechTokenizerConfig:
        """WavLM-large and 16,384 codes (arXiv 2602.09823); the report is silent about the widths of the heads."""
        return cls()

    @classmethod
    def tiny(cls, pieces: int = 12) -> SpeechTokenizerConfig:
        """Three layers 96 wide on a log-mel, 256 codes; by default for the ten digit words."""
        return cls(256, 16, 96, 96, pieces, "mel", dict(_TINY))

    @classmethod
    def read(cls, path: str | Path) -> SpeechTokenizerConfig:
        """The config.json of a saved tokenizer.

        Raises:
            ConfigError: it is no such file, or has unknown names or impossible values, all at once.
        """
        content = read_yaml(path)
        if (kind := content.pop("model_type", None)) != MODEL_TYPE:
            raise ConfigError([f"{path}: model_type {kind!r:.80} is no speech tokenizer's, which is {MODEL_TYPE!r}"])
        problems: list[str] = []
        config = cls(**typed_values(get_type_hints(cls), content, problems, str(path)))
        problems += [f"{path}: {problem}" for problem in value_problems(config, LIMITS)]
        if problems:
            raise ConfigError(problems)
        config.wavlm_config()
        return config

    def write(self, path: Path) -> None:
        write_json(path, {"model_type": MODEL_TYPE, **dataclasses.asdict(self)})

    def wavlm_config(self) -> Any:
        """transformers' configuration; layers are never dropped, as features are a sum over all of them.

        Raises:
            ConfigError: a field that it does not have, or that does not fit.
        """
        from huggingface_hub.errors import StrictDataclassError
        from transformers import WavLMConfig

        always: dict[str, Any] = {"layerdrop": 0.0, "apply_spec_augment": False}
        if self.front_end == "mel":  # what the lengths of features are computed from
            always |= {"conv_dim": [80], "conv_kernel": [1024], "conv_stride": [480]}
        known = vars(WavLMConfig())
        if strange := [name for name in self.wavlm if name not in known]:
            raise ConfigError([f"wavlm: WavLMConfig has no {', '.join(map(repr, strange[:5]))}"])
        try:
            config = WavLMConfig(**{**self.wavlm, **always})
        except (TypeError, ValueError, StrictDataclassError) as error:
            raise ConfigError([f"wavlm: {' '.join(str(error).split())}"]) from error
        if not 1 <= config.num_hidden_layers <= MOST_LAYERS:
            raise ConfigError([f"wavlm: num_hidden_layers {config.num_hidden_layers}: 1 to {MOST_LAYERS}"])
        return config
