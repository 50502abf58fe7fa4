"""Configuration of Covo-Audio: a Whisper encoder, a down-sampling adapter and a Qwen2 decoder.

Every id and size is a field, so that a three-second toy and the published 8.4 B model are the same class. Fields
that the published `config.json` lacks have its values as defaults.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, Qwen2Config, WhisperConfig

from covo_rl.types import UserError

LLM_DEFAULTS: dict[str, Any] = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 131072,
    "vocab_size": 168055, "bos_token_id": 151643, "eos_token_id": 151643,
}  # fmt: skip
ENCODER_DEFAULTS: dict[str, Any] = {
    "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120,
    "num_mel_bins": 128, "max_source_positions": 1500,
}  # fmt: skip
FRAMES_PER_POSITION = 2  # the encoder's second convolution has stride 2
#: decisions of a model that listens while it speaks, in the order of their default ids before audio code 0
CONTROLS = ("think", "shift", "break")
LEFT_CHUNKS = 50  # 8 s


class DuplexSectionError(UserError, ValueError):
    """A `duplex` section that does not fit the model."""


class CovoAudioConfig(PreTrainedConfig):
    """Sizes and ids of a Covo-Audio model.

    `audio_token_index` is the id of audio *code* 0 (output), `audio_placeholder_token_id` the id whose embedding is
    replaced by an audio feature (input). `adapter_downsample` is a power of two: one adapter stage per factor 2.
    `turn_end_token_id` ends an answer in mode "a2ta", `text_end_token_id` in mode "a2t".
    Segment length follows from `encoder_config.max_source_positions` (1500 positions = 30 s).

    `duplex` is None, or what a model that listens while it speaks has besides: the ids `think`, `shift`, `break`
    (default: the three before audio code 0) and `text_pad` (default: `text_end_token_id`), the `silence_codes` that
    fill up a reply, and of the streaming encoder `left_chunks` (None: all) and `mel_peak`.

    Raises ValueError for an `adapter_downsample` that is not a power of two of at least 2, for a vocabulary that
    ends before `audio_token_index`; DuplexSectionError, one too, for everything that is wrong in `duplex`, at once.
    """

    model_type = "covo_audio"
    sub_configs = {"llm_config": Qwen2Config, "encoder_config": WhisperConfig}  # noqa: RUF012 # pyright: ignore (transformers' form)
    attribute_map = {  # noqa: RUF012 (transformers' form)
        "text_config": "llm_config",
        "audio_config": "encoder_config",
        "audio_token_id": "audio_placeholder_token_id",
    }
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers' form)

    # Given as a dict, a configuration or None; always a Qwen2Config and a WhisperConfig afterwards.
    llm_config: Any = None
    encoder_config: Any = None
    audio_token_index: int = 151671
    adapter_downsample: int = 8
    adapter_hidden_dim: int = 2048
    audio_placeholder_token_id: int = 151666
    audio_bos_token_id: int = 151665
    audio_eos_token_id: int = 151667
    turn_end_token_id: int = 151645
    text_end_token_id: int = 151643
    sampling_rate: int = 24000
    feature_sampling_rate: int = 16000
    whisper_feats_dim: int | None = None
    tie_word_embeddings: bool = False
    duplex: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.llm_config = _sub_config(self.llm_config, Qwen2Config, LLM_DEFAULTS)
        self.encoder_config = _sub_config(self.encoder_config, WhisperConfig, ENCODER_DEFAULTS)
        # The published model keeps embedding and head apart, whatever a sub-configuration says.
        self.llm_config.tie_word_embeddings = False
        self.tie_word_embeddings = False
        self.whisper_feats_dim = self.encoder_config.d_model
        factor = self.adapter_downsample
        if factor < 2 or factor & (factor - 1):
            raise ValueError(
                f"adapter_downsample={factor} is not a power of two of at least 2: every adapter stage halves the "
                "length, so write 2, 4, 8 (published) or 16"
            )
        if self.llm_config.vocab_size < self.audio_token_index:
            raise ValueError(
                f"llm_config.vocab_size={self.llm_config.vocab_size} ends before audio_token_index="
                f"{self.audio_token_index}, the id of audio code 0; a model without audio codes sets them equal"
            )
        if self.duplex is not None:
            self.duplex = duplex_section(self.duplex, self)
        super().__post_init__(**kwargs)

    @property
    def num_audio_codes(self) -> int:
        """Audio codes that the head can produce (published: 16384)."""
        return self.llm_config.vocab_size - self.audio_token_index

    @property
    def segment_frames(self) -> int:
        """Mel frames (10 ms each) of one segment (published: 3000)."""
        return self.encoder_config.max_source_positions * FRAMES_PER_POSITION

    @property
    def slot_frames(self) -> int:
        """Mel frames that one audio slot stands for (published: 16)."""
        return FRAMES_PER_POSITION * self.adapter_downsample


def _sub_config(value: Any, kind: type, defaults: dict[str, Any]) -> Any:
    if isinstance(value, PreTrainedConfig):
        return value
    # A partial dict means the published model with changes, as in the published config.json.
    values = {**defaults, **(value or {})}
    values.pop("model_type", None)
    return kind(**values)


def duplex_section(given: Any, config: CovoAudioConfig) -> dict[str, Any]:
    """`given` with the defaults of what it lacks; raises DuplexSectionError for all that does not fit, at once."""
    defaults = {name: config.audio_token_index - 3 + place for place, name in enumerate(CONTROLS)} | {
        "text_pad": config.text_end_token_id, "silence_codes": [], "left_chunks": LEFT_CHUNKS, "mel_peak": 0.0,
    }  # fmt: skip
    if not isinstance(given, Mapping) or (unknown := sorted(map(str, set(given) - set(defaults)))):
        what = f"has unknown keys {unknown}" if isinstance(given, Mapping) else f"is {given!r}"
        raise DuplexSectionError(f"duplex {what}; it is a mapping with {', '.join(defaults)}, or null")
    section = {**defaults, **given}
    if section["silence_codes"] is None:
        section["silence_codes"] = []
    if problems := [*_id_problems(section, config), *_stream_problems(section, config.num_audio_codes)]:
        raise DuplexSectionError("; ".join(["duplex does not fit the model", *problems]))
    return section


def _id_problems(section: Mapping[str, Any], config: CovoAudioConfig) -> list[str]:
    marks = ("audio_placeholder_token_id", "audio_bos_token_id", "audio_eos_token_id", "turn_end_token_id")
    taken = {getattr(config, name): name for name in marks}
    problems = []
    for name in (*CONTROLS, "text_pad"):
        value = section[name]
        if not _is_index(value, config.audio_token_index):
            problems.append(f"{name}={value!r} is no id of the text, 0 to {config.audio_token_index - 1}")
        elif value in taken:
            problems.append(f"{name}={value} is the id of {taken[value]}")
        else:
            taken[value] = name
    return problems


def _stream_problems(section: Mapping[str, Any], codes: int) -> list[str]:
    problems, silence = [], section["silence_codes"]
    if not isinstance(silence, list):
        problems.append(f"silence_codes={silence!r}: a list of codes")
    elif bad := [code for code in silence if not _is_index(code, codes)]:
        there = f"0 to {codes - 1}" if codes else "none"
        problems.append(f"silence_codes has {bad}: the model's audio codes are {there} (codes, not ids)")
    chunks, peak = section["left_chunks"], section["mel_peak"]
    if chunks is not None and not _is_index(chunks, math.inf):
        problems.append(f"left_chunks={chunks!r}: a whole number of chunks from 0 on, or null for all")
    if isinstance(peak, bool) or not isinstance(peak, (int, float)) or not math.isfinite(peak):
        problems.append(f"mel_peak={peak!r}: a finite number (log10 of a mel power)")
    return problems


def _is_index(value: Any, end: float) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < end
