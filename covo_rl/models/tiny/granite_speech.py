"""A tiny Granite Speech."""

from __future__ import annotations

from typing import Any

import transformers

from covo_rl.models.granite_speech import GraniteMel, GraniteSpeech
from covo_rl.models.processor import AudioProcessor
from covo_rl.models.tiny.tokenizer import TURN_END, tiny_tokenizer
from covo_rl.models.tiny.weights import SCALE, decoder_sizes, random_weights

ROLE, SAID = "<|start_of_role|>", "<|end_of_role|>"
#: adds texts, as the published one, so that a content of several parts is an error
ROLES_TEMPLATE = (
    f"{{% for message in messages %}}{{{{ '{ROLE}' + message['role'] + '{SAID}' + message['content'] + '{TURN_END}\n' "
    f"}}}}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '{ROLE}assistant{SAID}' }}}}{{% endif %}}"
)
BINS = 16


def tiny_granite_speech(*, seed: int = 0) -> tuple[Any, Any]:
    """A GraniteSpeechForConditionalGeneration (float32) and its processor; 10 slots for each second.

    Its audio id lies outside the table of embeddings, as in the first published ones. Its logits are halved, where
    those are divided by 8 or 16; weights are larger than elsewhere: with a tied head it would repeat its last token.
    """
    token = GraniteSpeech.audio_token
    tokenizer: Any = tiny_tokenizer(audio_tokens=(ROLE, SAID), template=ROLES_TEMPLATE)
    known = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
    ends: dict[str, Any] = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = transformers.GraniteSpeechConfig(
        text_config={
            "model_type": "granite", **decoder_sizes(), "vocab_size": known, **ends, "logits_scaling": 2.0,
            "embedding_multiplier": 2.0, "residual_multiplier": 0.8, "attention_multiplier": 0.25,
        },
        encoder_config={
            "input_dim": 2 * BINS, "num_layers": 2, "hidden_dim": 32, "feedforward_mult": 2, "num_heads": 4,
            "dim_head": 8, "output_dim": 12, "context_size": 40, "max_pos_emb": 64,
        },
        projector_config={
            "model_type": "blip_2_qformer", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
            "intermediate_size": 64, "encoder_hidden_size": 32, "cross_attention_frequency": 1, "vocab_size": 1,
        },
        audio_token_index=tokenizer.convert_tokens_to_ids(token), has_lora_adapter=False, dtype="float32",
    )  # fmt: skip
    model = random_weights(transformers.GraniteSpeechForConditionalGeneration, config, seed, 2 * SCALE)
    model.generation_config.update(**ends)
    return model, AudioProcessor(GraniteMel(BINS), tokenizer, token)
