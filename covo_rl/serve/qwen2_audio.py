"""vLLM's Qwen2-Audio with LoRA on the decoder: the class of vLLM 0.31 has the layers but does not say so."""

# pyright: reportMissingImports=false
from __future__ import annotations

from vllm.model_executor.models.interfaces import SupportsLoRA
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.qwen2_audio import (
    Qwen2AudioDummyInputsBuilder,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioMultiModalProcessor,
    Qwen2AudioProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2AudioMultiModalProcessor, info=Qwen2AudioProcessingInfo, dummy_inputs=Qwen2AudioDummyInputsBuilder
)
class Qwen2AudioWithLoRA(Qwen2AudioForConditionalGeneration, SupportsLoRA):
    """Chosen by `--hf-overrides '{"architectures": ["Qwen2AudioWithLoRA"]}'`."""

    packed_modules_mapping = {  # noqa: RUF012 (vLLM's form)
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def get_mm_mapping(self) -> MultiModelKeys:
        """Which modules are decoder, projector and encoder."""
        return MultiModelKeys.from_string_field(
            language_model="language_model.", connector="multi_modal_projector.", tower_model="audio_tower."
        )
