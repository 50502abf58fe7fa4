"""Tiny models of the same classes as the published ones, for tests, the demo and a first run on a laptop.

Nothing is fetched: the tokenizer is trained on the texts given, the weights are random from a seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers

from covo_rl.types import TAG_TOKENS

END_OF_TEXT = "<|endoftext|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", TURN_END)
COVO_AUDIO_TOKENS = ("<|begofcAUDIO|>", "<|cAUDIO|>", "<|endofcAUDIO|>")
QWEN2_AUDIO_TOKENS = ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")
#: Single tokens, but not special: decoding with special tokens skipped must keep them.
TAGS = TAG_TOKENS
POSITIONS_PER_SECOND = 50
BYTES = 256


def tiny_tokenizer(
    texts: Sequence[str], vocab_size: int = 512, *, audio_tokens: Sequence[str] = COVO_AUDIO_TOKENS
) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts`: any text round-trips, frequent words are one token.

    `vocab_size` bounds the whole vocabulary, special tokens and tags included. Raises ValueError where it has no room
    for the 256 bytes and the added tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    from covo_rl.models.covo_audio.processing import CHAT_TEMPLATE

    special = [*SPECIAL_TOKENS, *audio_tokens]
    room = vocab_size - len(special) - len(TAGS)
    if room < BYTES:
        raise ValueError(f"vocab_size={vocab_size} is too small: {BYTES} bytes and {vocab_size - room} added tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=room, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in TAGS])
    template = CHAT_TEMPLATE if tuple(audio_tokens) == COVO_AUDIO_TOKENS else None
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=TURN_END, pad_token=END_OF_TEXT, padding_side="left",
        chat_template=template, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def tiny_covo_audio(
    tokenizer: Any, *, encoder_width: int = 96, encoder_layers: int = 2, encoder_heads: int = 4,
    decoder_width: int = 128, decoder_layers: int = 4, decoder_heads: int = 4, segment_seconds: float = 3.0,
    mel_bins: int = 128, adapter_hidden: int = 256, adapter_downsample: int = 8, audio_codes: int = 0,
    initializer_range: float = 0.02, max_position_embeddings: int = 4096, seed: int = 0,
) -> tuple[Any, Any]:  # fmt: skip
    """A CovoAudioForConditionalGeneration of about 1.5 M parameters (float32) and its CovoAudioProcessor.

    A 3 s clip fills 19 slots. `segment_seconds` fixes the encoder's length, as 30 s does in the published model: a
    longer clip becomes several segments. `audio_codes` output codes follow the tokenizer's ids. The caller's random
    state is left alone.
    """
    from covo_rl.models.covo_audio import CovoAudioConfig, CovoAudioForConditionalGeneration, CovoAudioProcessor

    end_of_text, _, turn_end, audio_bos, placeholder, audio_eos = tokenizer.convert_tokens_to_ids(
        [*SPECIAL_TOKENS, *COVO_AUDIO_TOKENS]
    )
    config = CovoAudioConfig(
        llm_config={
            **_decoder_sizes(decoder_width, decoder_layers, decoder_heads),
            "vocab_size": len(tokenizer) + audio_codes,
            "initializer_range": initializer_range, "max_position_embeddings": max_position_embeddings,
            "bos_token_id": end_of_text, "pad_token_id": end_of_text, "eos_token_id": turn_end,
        },
        encoder_config={
            **_encoder_sizes(encoder_width, encoder_layers, encoder_heads, 4 * encoder_width, mel_bins),
            "max_source_positions": round(segment_seconds * POSITIONS_PER_SECOND),
            "init_std": initializer_range,
        },
        adapter_hidden_dim=adapter_hidden, adapter_downsample=adapter_downsample, audio_token_index=len(tokenizer),
        audio_bos_token_id=audio_bos, audio_placeholder_token_id=placeholder, audio_eos_token_id=audio_eos,
        turn_end_token_id=turn_end, text_end_token_id=end_of_text, dtype="float32",
    )  # fmt: skip
    model = _random_model(CovoAudioForConditionalGeneration, config, seed)
    return model, CovoAudioProcessor.from_model_config(config, tokenizer)


def tiny_qwen2_audio(
    texts: Sequence[str] = ("What do you hear?",), *, vocab_size: int = 512, encoder_width: int = 64,
    encoder_layers: int = 2, decoder_width: int = 64, decoder_layers: int = 2, mel_bins: int = 32, seed: int = 0,
) -> tuple[Any, Any]:  # fmt: skip
    """A Qwen2AudioForConditionalGeneration with random weights (float32) and its Qwen2AudioProcessor.

    Segments are of 30 s, as transformers fixes them.
    """
    tokenizer = tiny_tokenizer(texts, vocab_size, audio_tokens=QWEN2_AUDIO_TOKENS)
    config = transformers.Qwen2AudioConfig(
        text_config={
            "model_type": "qwen2",
            **_decoder_sizes(decoder_width, decoder_layers, 4),
            "vocab_size": len(tokenizer), "bos_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        },
        audio_config={
            "model_type": "qwen2_audio_encoder",
            **_encoder_sizes(encoder_width, encoder_layers, 4, 2 * encoder_width, mel_bins),
        },
        audio_token_index=tokenizer.get_vocab()["<|AUDIO|>"], dtype="float32",
    )  # fmt: skip
    model = _random_model(transformers.Qwen2AudioForConditionalGeneration, config, seed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    extractor = transformers.WhisperFeatureExtractor(feature_size=mel_bins)
    return model, transformers.Qwen2AudioProcessor(extractor, tokenizer)


def _random_model(model_class: Any, config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).eval()


def _decoder_sizes(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 2),
    }  # fmt: skip


def _encoder_sizes(width: int, layers: int, heads: int, inner: int, mel_bins: int) -> dict[str, Any]:
    return {
        "d_model": width, "encoder_layers": layers, "encoder_attention_heads": heads, "encoder_ffn_dim": inner,
        "num_mel_bins": mel_bins,
    }  # fmt: skip


@torch.no_grad()
def fold_feature_statistics(model: Any, mean: torch.Tensor | float, std: torch.Tensor | float) -> None:
    """Make the encoder standardise its log-mel: `conv1((mel - mean) / std)`, folded into conv1's weights in place.

    `mean` and `std` are scalars or (M,), of the log-mel over the training clips. A network that learns from scratch
    on few clips needs inputs of mean 0 and deviation 1; the front end stays as specified. Exact for every frame but
    the first and the last, where the convolution's zero padding stands for mel 0, not for the mean.
    Raises ValueError for a deviation that is not positive.
    """
    conv = model.encoder.conv1
    bins = conv.weight.shape[1]
    mean_M = torch.as_tensor(mean, dtype=torch.float64).expand(bins)
    std_M = torch.as_tensor(std, dtype=torch.float64).expand(bins)
    if not bool((std_M > 0).all()):
        raise ValueError("every deviation must be positive: a bin that never changes cannot be standardised")
    weight = conv.weight.cpu().double() / std_M[None, :, None]
    shift = (weight * mean_M[None, :, None]).sum((1, 2))
    conv.bias.copy_(conv.bias.cpu().double() - shift)
    conv.weight.copy_(weight)
