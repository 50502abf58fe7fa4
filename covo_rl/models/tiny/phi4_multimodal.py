"""A tiny Phi-4-multimodal, its image half included."""

from __future__ import annotations

from typing import Any

import transformers

from covo_rl.models.phi4_multimodal import Phi4Multimodal
from covo_rl.models.processor import AudioProcessor
from covo_rl.models.tiny.tokenizer import TURN_END, tiny_tokenizer
from covo_rl.models.tiny.weights import decoder_sizes, random_weights

SPECIAL = ("<|system|>", "<|user|>", "<|assistant|>", "<|image|>", Phi4Multimodal.audio_token)
TEMPLATE = (
    f"{{% for message in messages %}}{{{{ '<|' + message['role'] + '|>' + message['content'] + '{TURN_END}' }}}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
BINS = 16


def tiny_phi4_multimodal(*, seed: int = 0) -> tuple[Any, Any]:
    """A Phi4MultimodalForCausalLM (float32) and its processor; 12.5 slots for each second."""
    tokenizer: Any = tiny_tokenizer(audio_tokens=SPECIAL, template=TEMPLATE)
    image, audio = tokenizer.convert_tokens_to_ids(list(SPECIAL[-2:]))
    ends: dict[str, Any] = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0, 16.0]}
    config = transformers.Phi4MultimodalConfig(
        **decoder_sizes(), **ends, bos_token_id=tokenizer.pad_token_id, vocab_size=len(tokenizer), dtype="float32",
        rope_parameters={**rope, "rope_theta": 10_000.0, "partial_rotary_factor": 0.75},
        audio_config={
            "hidden_size": 32, "intermediate_size": 48, "num_blocks": 2, "num_attention_heads": 4, "input_size": BINS,
            "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 16,
            "bias_max_distance": 100, "audio_token_id": audio,
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 28, "crop_size": 28, "image_token_id": image,
        },
    )  # fmt: skip
    model = random_weights(transformers.Phi4MultimodalForCausalLM, config, seed)
    model.generation_config.update(**ends)
    extractor = transformers.Phi4MultimodalFeatureExtractor(feature_size=BINS)
    return model, AudioProcessor(extractor, tokenizer, Phi4Multimodal.audio_token)
