"""A byte-level tokenizer trained on the spot, with a family's audio tokens and a chat template."""

from __future__ import annotations

from collections.abc import Sequence

import transformers

from covo_rl.synth.scenes import SCENES, TASKS
from covo_rl.types import TAG_TOKENS

END_OF_TEXT = "<|endoftext|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", TURN_END)
COVO_AUDIO_TOKENS = ("<|begofcAUDIO|>", "<|cAUDIO|>", "<|endofcAUDIO|>")
#: Single tokens, but not special: decoding with special tokens skipped must keep them.
TAGS = TAG_TOKENS
BYTES = 256
#: what the built-in questions say, so that their prompts are short
BUILTIN_TEXTS = (
    *(text for task in TASKS for text in (*task.questions, *task.options)),
    *(scene.evidence for scene in SCENES.values()),
)
#: ChatML; AUDIO stands for what an audio part renders to
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ 'AUDIO' if part['type'] == 'audio' else part['text'] }}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(
    texts: Sequence[str] = BUILTIN_TEXTS, vocab_size: int = 512, *, audio_tokens: Sequence[str] = COVO_AUDIO_TOKENS,
    template: str | None = None, reserved: Sequence[str] = (), **names: str,
) -> transformers.PreTrainedTokenizerFast:  # fmt: skip
    """Byte-level BPE trained on `texts`: any text round-trips, frequent words are one token.

    `vocab_size` bounds the whole vocabulary, special tokens and tags included. `audio_tokens` are special tokens; by
    default they are, joined, what an audio part of a message renders to, in ChatML; `template` is another chat
    template; `reserved` come last and stand for nothing yet; `names` are attributes by which stock processors ask for a
    token (audio_token). Raises ValueError where `vocab_size` has no room for the 256 bytes and the added tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    from covo_rl.models.covo_audio.processing import CHAT_TEMPLATE

    special = [*SPECIAL_TOKENS, *audio_tokens]
    room = vocab_size - len(special) - len(TAGS) - len(reserved)
    if room < BYTES:
        raise ValueError(f"vocab_size={vocab_size} is too small: {BYTES} bytes and {vocab_size - room} added tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=room, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in (*TAGS, *reserved)])
    if template is None:
        ours = tuple(audio_tokens) == COVO_AUDIO_TOKENS
        template = CHAT_TEMPLATE if ours else TEMPLATE.replace("AUDIO", "".join(audio_tokens))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=TURN_END, pad_token=END_OF_TEXT, padding_side="left",
        chat_template=template, clean_up_tokenization_spaces=False, **names,
    )  # fmt: skip
