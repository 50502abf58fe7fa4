"""Dialogue over one key/value cache: earlier turns, audio included, are never computed again.

`generate` stops at the assistant's end token without feeding it, so the cache lacks it, and the published code goes on
without it. Here the next turn feeds it first; `keep_end_token=False` gives the published behaviour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from covo_rl.models.covo_audio.processing import conversation_clips
from covo_rl.models.text import shielded_messages


@dataclass(frozen=True)
class Turn:
    """One answer: all generated `ids`, the `text` among them, and the audio `codes` (0 is the first code)."""

    ids: tuple[int, ...]
    text: str
    codes: tuple[int, ...]


class Conversation:
    """A dialogue of any number of turns with one model.

    `system` is the system message of the first turn; `keep_end_token` says whether the cache holds the end token of
    each answer when the next turn begins; further arguments are options of `model.generate` for every turn.
    Repetition penalties see the current turn's ids only, as in the published code.

    Example:

        chat = Conversation(model, processor, max_new_tokens=200, window_penalty=1.05, repetition_penalty=1.05)
        print(chat.turn([{"type": "audio", "path": "question.wav"}]).text)
        print(chat.turn([{"type": "text", "text": "And louder?"}]).text)
    """

    def __init__(
        self, model: Any, processor: Any, *, system: str | None = None, keep_end_token: bool = True, **generation: Any
    ) -> None:
        self.model, self.processor = model, processor
        self.system, self.keep_end_token, self.generation = system, keep_end_token, generation
        self.cache = DynamicCache(config=model.config.llm_config)
        self.history: list[int] = []

    def turn(self, content: str | Sequence[Mapping[str, Any]], *, sampling_rate: int | None = None, **kw: Any) -> Turn:
        """The user says `content` (text, or parts as in the chat template); `kw` are options for this answer."""
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if self.system is not None and not self.history:
            messages.insert(0, {"role": "system", "content": self.system})
        shielded = shielded_messages(messages, self.processor.tokenizer)
        text = self.processor.apply_chat_template(shielded, add_generation_prompt=True)
        clips, rates = conversation_clips([messages], sampling_rate)
        text = ("\n" if self.history else "") + text
        inputs = self.processor(text=text, audio=clips or None, sampling_rate=rates or None).to(self.model.device)
        input_ids = inputs.pop("input_ids")
        cached = self.cache.get_seq_length()
        pending: list[int] = []
        if self.history and self.keep_end_token:  # generated but never fed, closed by the turn's end token
            pending, end = self.history[cached:], self.model.config.turn_end_token_id
            pending += [end] if pending[-1:] != [end] else []
        new_ids = torch.cat([input_ids.new_tensor([pending]), input_ids], dim=1)
        inputs["attention_mask"] = new_ids.new_ones(1, cached + new_ids.shape[1])
        fixed = {"input_ids": new_ids, "past_key_values": self.cache, "return_dict_in_generate": True, **inputs}
        out = self.model.generate(**fixed, **{**self.generation, **kw})
        answer = out.sequences[0, new_ids.shape[1] :].tolist()
        self.cache = out.past_key_values
        self.history = self.history[:cached] + out.sequences[0].tolist()
        text_ids, codes = self.processor.split(answer)
        return Turn(tuple(answer), self.processor.tokenizer.decode(text_ids, skip_special_tokens=True), tuple(codes))
