"""Covo-Audio for vLLM: encoder and audio adapter as we train them, the decoder is vLLM's Qwen2.

Parameter names are the published ones, so published checkpoints, merged exports and LoRA keys need no mapping.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import BatchFeature
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from vllm.config import VllmConfig
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.inputs import MultiModalDataDict
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsLoRA, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
)
from vllm.sequence import IntermediateTensors

from covo_rl.models.covo_audio import CovoAudioConfig, CovoAudioFeatureExtractor, CovoAudioProcessor
from covo_rl.models.covo_audio.modeling import CovoAudioAdapter
from covo_rl.models.covo_audio.processing import AUDIO_BOS_TOKEN, AUDIO_EOS_TOKEN, AUDIO_TOKEN
from covo_rl.models.waveform import mono_float, sinc_resample

PLACEHOLDER = AUDIO_BOS_TOKEN + AUDIO_TOKEN + AUDIO_EOS_TOKEN
#: Length of the clip that vLLM measures its memory with. Longer ones run while they fit max_num_batched_tokens.
PROFILED_SEGMENTS = 2


class SpecifiedResampler:
    """Takes the place of vLLM's resampler, so that served audio is what training heard."""

    def __init__(self, target_sr: int) -> None:
        self.target_sr = target_sr

    def resample(self, audio: np.ndarray, *, orig_sr: float) -> np.ndarray:
        """Mono or stereo at `orig_sr` Hz -> (samples,) float32."""
        return sinc_resample(mono_float(audio), int(orig_sr), self.target_sr).numpy()


class CovoAudioProcessingInfo(BaseProcessingInfo):
    """Sizes and ids that vLLM asks for."""

    def get_hf_config(self) -> CovoAudioConfig:
        return self.ctx.get_hf_config(CovoAudioConfig)

    def get_hf_processor(self, **kwargs: object) -> CovoAudioProcessor:
        return self.ctx.get_hf_processor(CovoAudioProcessor, **kwargs)

    @property
    def extractor(self) -> CovoAudioFeatureExtractor:
        """Waveform to log-mel segments."""
        return self.get_hf_processor().feature_extractor

    def get_data_parser(self) -> MultiModalDataParser:
        rate = self.extractor.sampling_rate
        parser = MultiModalDataParser(
            target_sr=rate,
            target_channels=1,
            expected_hidden_size=self._get_expected_hidden_size(),
            allow_missing_mm_embeddings=self.allow_missing_mm_embeddings,
        )
        parser.audio_resampler = SpecifiedResampler(rate)
        return parser

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"audio": None}

    def profiled_samples(self, seq_len: int) -> int:
        """Samples of the clip that memory is measured with: at most half of the context."""
        extractor = self.extractor
        segments = min(PROFILED_SEGMENTS, max(1, seq_len // 2 // extractor.segment_slots))
        return segments * extractor.segment_frames * extractor.frame_samples

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int] | None = None) -> Mapping[str, int]:
        if not (mm_counts or {}).get("audio"):
            return {}
        return {"audio": sum(self.extractor.slot_counts(self.profiled_samples(seq_len)))}


class CovoAudioDummyInputsBuilder(BaseDummyInputsBuilder[CovoAudioProcessingInfo]):
    """What vLLM measures its memory with."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return PLACEHOLDER * mm_counts.get("audio", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> MultiModalDataDict:
        length = self.info.profiled_samples(seq_len)
        count = mm_counts.get("audio", 0)
        return {"audio": self._get_dummy_audios(length=length, num_audios=count, overrides=mm_options.get("audio"))}


class CovoAudioMultiModalProcessor(BaseMultiModalProcessor[CovoAudioProcessingInfo]):
    """Clips -> log-mel segments, clip by clip; one placeholder per clip -> one per audio slot."""

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        extractor = self.info.extractor
        clips: Any = hf_data["audio"]
        parts = [extractor.clip(clip, extractor.sampling_rate, f"audio {i}") for i, clip in enumerate(clips)]
        return BatchFeature(
            {
                "input_features": torch.cat([features for features, _ in parts]),
                "input_features_mask": torch.cat([mask for _, mask in parts]),
                "segment_counts": torch.tensor([len(features) for features, _ in parts]),
            }
        )

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        counts = hf_inputs.get("segment_counts", torch.zeros(0, dtype=torch.long))
        return {
            "input_features": MultiModalFieldConfig.flat_from_sizes("audio", counts),
            "input_features_mask": MultiModalFieldConfig.flat_from_sizes("audio", counts),
            "segment_counts": MultiModalFieldConfig.batched("audio", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        token = self.info.get_hf_config().audio_placeholder_token_id
        items = out_mm_kwargs.get("audio", [])

        def slots(index: int) -> list[int]:
            return [token] * int(items[index]["input_features_mask"].data.sum())

        return [PromptReplacement(modality="audio", target=[token], replacement=slots)]


@MULTIMODAL_REGISTRY.register_processor(
    CovoAudioMultiModalProcessor, info=CovoAudioProcessingInfo, dummy_inputs=CovoAudioDummyInputsBuilder
)
class CovoAudioOnVllm(nn.Module, SupportsMultiModal, SupportsLoRA, SupportsPP):
    """The published model; LoRA on the decoder's Linears."""

    packed_modules_mapping = {  # noqa: RUF012 (vLLM's form)
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        if modality != "audio":
            raise ValueError(f"Covo-Audio takes audio and text, not {modality}")
        return PLACEHOLDER

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: CovoAudioConfig = vllm_config.model_config.hf_config
        self.config = config
        with self._mark_tower_model(vllm_config, "audio"):
            self.encoder = WhisperEncoder(config.encoder_config)
            self.audio_adapter = CovoAudioAdapter(config)
        with self._mark_language_model(vllm_config):
            self.llm = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.llm_config,
                prefix=maybe_prefix(prefix, "llm"),
                architectures=["Qwen2ForCausalLM"],
            )
        self.make_empty_intermediate_tensors = self.llm.make_empty_intermediate_tensors

    def get_mm_mapping(self) -> MultiModelKeys:
        """Which modules are decoder, adapter and encoder."""
        return MultiModelKeys.from_string_field(
            language_model="llm.", connector="audio_adapter.", tower_model="encoder."
        )

    def embed_multimodal(self, **kwargs: Any) -> MultiModalEmbeddings:
        """Embeddings (slots, D) of every clip; all segments of the call in one encoder pass.

        `input_features` (K, M, F), `input_features_mask` (K, rows) bool and `segment_counts` (clips,) of all clips.
        """
        if kwargs.get("input_features") is None:
            return []
        conv = self.encoder.conv1.weight
        features, mask = (_joined(kwargs[name]) for name in ("input_features", "input_features_mask"))
        counts = torch.as_tensor(kwargs["segment_counts"]).flatten().tolist()
        rows = self.audio_adapter(self.encoder(features.to(conv.device, conv.dtype)).last_hidden_state)
        mask = mask.to(rows.device, torch.bool)
        clips = zip(rows.split(counts), mask.split(counts), strict=True)
        return tuple(clip_rows[clip_mask] for clip_rows, clip_mask in clips)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor | IntermediateTensors:
        """Hidden states (tokens, D) of the decoder; audio is in `inputs_embeds` already."""
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.llm.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """(tokens, D) -> (tokens, V)."""
        return self.llm.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Published names; what belongs to other parts of the release (the vocoder) is passed over."""
        own = ("llm.", "encoder.", "audio_adapter.")
        return AutoWeightsLoader(self).load_weights((name, w) for name, w in weights if name.startswith(own))


def _joined(value: Any) -> torch.Tensor:
    """vLLM hands over one tensor, or a list of one per clip where their shapes differ."""
    return torch.cat(list(value)) if isinstance(value, (list, tuple)) else value
