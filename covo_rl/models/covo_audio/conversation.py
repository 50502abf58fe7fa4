"""Dialogue over one key/value cache: earlier turns, audio and spoken answers included, are never computed again.

`generate` stops at the assistant's end token without feeding it, so the cache lacks it, and the published code goes on
without it. Here the next turn feeds it first; `keep_end_token=False` gives the published behaviour.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import DynamicCache, StoppingCriteriaList

from covo_rl.models.covo_audio.persona import system_message
from covo_rl.models.covo_audio.processing import conversation_clips
from covo_rl.models.covo_audio.streaming import IdOutlet, Outlet, TextPieces, in_background
from covo_rl.models.covo_audio.token2wav import Token2Wav
from covo_rl.models.covo_audio.voice import Voice
from covo_rl.models.text import shielded_messages

#: ids that generation may be ahead of what is taken from a stream: some seconds of speech
IDS_AHEAD = 256


class UnfinishedTurn(RuntimeError):
    """A turn was asked for while the answer before is still being streamed."""


@dataclass(frozen=True)
class Turn:
    """One answer: all generated `ids`, the `text` among them, and the audio `codes` (0 is the first code).

    `wave` (T,) float32 at 24 kHz on the CPU is what the codes sound like, where a decoder was named; without any code
    it is empty.
    """

    ids: tuple[int, ...]
    text: str
    codes: tuple[int, ...]
    wave: torch.Tensor | None = None


class Conversation:
    """A dialogue of any number of turns with one model.

    `system` is the system message of the first turn; `speaker` and `emotion` are named in it, as in training
    (`system_message`), and stand in the default one where there is none. `keep_end_token` says whether the cache holds
    the end token of each answer when the next turn begins; further arguments are options of `model.generate` for every
    turn.
    Repetition penalties see the current turn's ids only, as in the published code.

    Example:

        chat = Conversation(model, processor, max_new_tokens=200, window_penalty=1.05, repetition_penalty=1.05)
        print(chat.turn([{"type": "audio", "path": "question.wav"}]).text)
        wave = chat.turn([{"type": "text", "text": "And louder?"}], speak=Token2Wav.from_pretrained(folder)).wave
        for part in chat.stream_turn("Once more.", speak=decoder):
            print(part, end="") if isinstance(part, str) else player.write(part.numpy())
    """

    def __init__(
        self, model: Any, processor: Any, *, system: str | None = None, speaker: str | None = None,
        emotion: str | None = None, keep_end_token: bool = True, **generation: Any,
    ) -> None:  # fmt: skip
        self.model, self.processor = model, processor
        if speaker is not None or emotion is not None:
            system = system_message(system, speaker, emotion)
        self.system, self.keep_end_token, self.generation = system, keep_end_token, generation
        self.cache = DynamicCache(config=model.config.llm_config)
        self.history: list[int] = []
        self._answering = False

    def turn(
        self, content: str | Sequence[Mapping[str, Any]], *, sampling_rate: int | None = None,
        speak: Token2Wav | Voice | None = None, **kw: Any,
    ) -> Turn:  # fmt: skip
        """The user says `content` (text, or parts as in the chat template); `kw` are options for this answer.

        `speak`, a decoder or a voice of one, makes the answer's `wave`.

        Raises:
            UnfinishedTurn: the answer before is still being streamed.
            ValueError: a clip that cannot be read, an option that does not exist.
        """
        voice = self._voice(speak)
        with self._one_answer():
            turn = self._answer(self._inputs(content, sampling_rate), kw)
        return turn if voice is None else replace(turn, wave=voice.say(turn.codes))

    def stream_turn(
        self, content: str | Sequence[Mapping[str, Any]], *, sampling_rate: int | None = None,
        speak: Token2Wav | Voice | None = None, **kw: Any,
    ) -> Generator[str | torch.Tensor, None, Turn]:  # fmt: skip
        """As `turn`, but the answer comes while it is generated: pieces of text, and between them blocks (T,) of wave.

        Joined, the pieces are the turn's text and the blocks its wave; the generator's return value is the Turn.
        Closing the generator stops generation, and the conversation goes on from what was generated until then, at most
        IDS_AHEAD ids more than what was taken. Beams cannot be streamed.

        Raises: as `turn`, at the first piece.
        """
        voice = self._voice(speak)
        blocks: list[torch.Tensor] = []
        turns: list[Turn] = []
        with self._one_answer():
            inputs = self._inputs(content, sampling_rate)

            def generate(outlet: Outlet[int]) -> None:
                ids = IdOutlet(outlet)
                options = {**self.generation, **kw}
                criteria = StoppingCriteriaList([*options.get("stopping_criteria", ()), ids])
                turns.append(self._answer(inputs, {**options, "streamer": ids, "stopping_criteria": criteria}))

            def speak_ids(outlet: Outlet[str | torch.Tensor]) -> None:
                self._speak(in_background(generate, IDS_AHEAD), voice, outlet)

            for part in in_background(speak_ids, IDS_AHEAD):
                blocks += [part] if isinstance(part, torch.Tensor) else []
                yield part
        wave = None if voice is None else torch.cat([torch.zeros(0), *blocks])
        return replace(turns[0], wave=wave)

    def _speak(self, ids: Iterator[int], voice: Voice | None, outlet: Outlet[str | torch.Tensor]) -> None:
        """Text of the ids at once, and blocks of the voice as it has codes enough for one."""
        pieces, first = TextPieces(self.processor.tokenizer), self.processor.first_code_id

        def codes() -> Iterator[int]:
            for i in ids:
                outlet.check()
                if i >= first:
                    yield i - first
                elif piece := pieces.push(i):
                    outlet.put(piece)

        try:
            for sound in codes() if voice is None else voice.stream(codes()):
                if isinstance(sound, torch.Tensor):
                    outlet.put(sound)
            if piece := pieces.rest():
                outlet.put(piece)
        finally:
            ids.close()  # pyright: ignore[reportAttributeAccessIssue] (a generator)

    def _voice(self, speak: Token2Wav | Voice | None) -> Voice | None:
        voice = Voice(speak) if isinstance(speak, Token2Wav) else speak
        return None if voice is None else voice.fit(self.processor.num_audio_codes)

    @contextmanager
    def _one_answer(self) -> Iterator[None]:
        if self._answering:
            raise UnfinishedTurn("the answer before is still being streamed: read it to its end, or close it")
        self._answering = True
        try:
            yield
        finally:
            self._answering = False

    def _inputs(self, content: str | Sequence[Mapping[str, Any]], sampling_rate: int | None) -> Any:
        """What this turn adds to the cache, as the model takes it."""
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if self.system is not None and not self.history:
            messages.insert(0, {"role": "system", "content": self.system})
        shielded = shielded_messages(messages, self.processor.tokenizer)
        text = self.processor.apply_chat_template(shielded, add_generation_prompt=True)
        clips, rates = conversation_clips([messages], sampling_rate)
        text = ("\n" if self.history else "") + text
        inputs = self.processor(text=text, audio=clips or None, sampling_rate=rates or None).to(self.model.device)
        cached = self.cache.get_seq_length()
        pending: list[int] = []
        if self.history and self.keep_end_token:  # generated but never fed, closed by the turn's end token
            pending, end = self.history[cached:], self.model.config.turn_end_token_id
            pending += [end] if pending[-1:] != [end] else []
        input_ids = inputs["input_ids"]
        new_ids = torch.cat([input_ids.new_tensor([pending]), input_ids], dim=1)
        mask = new_ids.new_ones(1, cached + new_ids.shape[1])
        return {**inputs, "input_ids": new_ids, "attention_mask": mask}

    def _answer(self, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> Turn:
        """Generate, and remember; where that fails the conversation stays as it was."""
        cached, asked = self.cache.get_seq_length(), inputs["input_ids"].shape[1]
        fixed = {**inputs, "past_key_values": self.cache, "return_dict_in_generate": True}
        try:
            out = self.model.generate(**fixed, **{**self.generation, **options})
        except BaseException:
            self.cache.crop(min(cached - self.cache.get_seq_length(), 0))
            raise
        answer = out.sequences[0, asked:].tolist()
        self.cache = out.past_key_values
        self.history = self.history[:cached] + out.sequences[0].tolist()
        text_ids, codes = self.processor.split(answer)
        return Turn(tuple(answer), self.processor.tokenizer.decode(text_ids, skip_special_tokens=True), tuple(codes))
