"""A conversation that is spoken: `Model.chat(speak=...)`, and `covo-rl chat --speak`."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from covo_rl.config import PromptConfig
from covo_rl.engines.base import TextDecoder, rollout_of
from covo_rl.models.covo_audio.conversation import Conversation, Turn
from covo_rl.models.covo_audio.family import CovoAudio
from covo_rl.models.covo_audio.pattern import TEXT_ALONE, parse_pattern
from covo_rl.models.covo_audio.persona import persona_problems, system_message
from covo_rl.models.covo_audio.voice import Voice
from covo_rl.prompt import PromptError, length_problem, messages, position_limit
from covo_rl.run.python.calls import rows_of
from covo_rl.run.python.chat import Chat

if TYPE_CHECKING:
    from covo_rl.models.base import AudioFamily
    from covo_rl.run.python.model import Model, Reply


def speech_problems(
    family: AudioFamily | None, pattern: str | None, speaker: str | None = None, emotion: str | None = None
) -> list[str]:
    """Why a model of this family (None: any) cannot speak in this pattern, as this speaker; empty where it can."""
    problems = persona_problems(speaker, emotion)
    if family is not None and not (isinstance(family, CovoAudio) and family.code_ids):
        name = getattr(family, "title", "") or type(family).__name__
        why = "has no audio codes" if isinstance(family, CovoAudio) else "writes text alone"
        problems.append(f"speak: this model ({name}) {why}; Covo-Audio with audio codes speaks, such as "
                        "builtin:tiny_spoken")  # fmt: skip
    elif family is not None and not family.speaks:
        problems.append("speak: the model was loaded with speech_mode a2t, text alone: load it with a2ta")
    if pattern == TEXT_ALONE:
        problems.append(f"pattern {TEXT_ALONE} forbids speech: leave speak out, or write 5:15")
    elif pattern is not None:
        try:
            parse_pattern(pattern)
        except ValueError as error:
            problems.append(str(error))
    return problems


class SpokenChat(Chat):
    """Questions and answers that are heard. Later turns see the text and the codes of earlier ones, over one cache.

    A sound may be the whole question: `ask(audio="question.wav")`. Without an instruction of the model's own, none is
    added: ours asks for tags, which nobody wants to hear. `speaker` and `emotion` are named in the system message.
    """

    def __init__(
        self, model: Model, options: Mapping[str, Any], voice: Voice, pattern: str | None = None,
        speaker: str | None = None, emotion: str | None = None,
    ) -> None:  # fmt: skip
        self.voice, self.pattern = voice, pattern
        prompt = replace(model.answerer.prompt_config, written_question=True)  # whoever types one means it
        ours = model.request.instruction is None and prompt.instruction == PromptConfig().instruction
        prompt = replace(prompt, instruction="") if ours else prompt
        if speaker is not None or emotion is not None:
            prompt = replace(prompt, system_prompt=system_message(prompt.system_prompt, speaker, emotion))
        self.prompt_config = prompt
        super().__init__(model, options)

    def reset(self) -> None:
        """Forget what was said and heard."""
        family = self.model.policy.family
        system = self.prompt_config.system_prompt
        self.conversation = Conversation(family.model, family.processor, system=system, **self._generation())
        self.answers = 0

    def ask(self, question: str = "", audio: Any = None, choices: Sequence[str] = ()) -> Reply:
        """The reply to a further question, with its `codes` and its `wave`.

        Where it cannot be asked, the conversation stays as it was. Raises as `Model.generate`.
        """
        content = self._content(question, audio, choices)
        with self._draws():
            turn = self.conversation.turn(content, speak=self.voice)
        return self._reply(turn)

    def stream(
        self, question: str = "", audio: Any = None, choices: Sequence[str] = ()
    ) -> Generator[str | np.ndarray, None, Reply]:
        """As `ask`, but while it is generated: pieces of text, and blocks (T,) of 24 kHz wave; the Reply at the end.

        Closing it stops the answer. Draws are those of torch's own generator: `seed` has no effect.
        """
        content = self._content(question, audio, choices)
        with closing(self.conversation.stream_turn(content, speak=self.voice)) as parts:
            while True:
                try:
                    part = next(parts)
                except StopIteration as end:
                    return self._reply(end.value)
                yield part if isinstance(part, str) else part.numpy()

    def _content(self, question: str, audio: Any, choices: Sequence[str]) -> list[dict[str, Any]]:
        """What the user says, checked as any prompt is."""
        (row,) = rows_of(question, audio, choices, sound_alone=True)
        asked = messages(row, self.prompt_config)
        model, begun = self.model, bool(self.conversation.history)
        model.clips.forget()  # a file is heard as it is now
        prompt = model.prompt(row, asked[-1:] if begun else asked, self.config)
        positions = len(self.conversation.history) + len(prompt.input_ids)
        limit = position_limit(model.policy.family.model.config)
        if problems := length_problem("of this turn", positions, self.config.max_completion_length, limit):
            raise PromptError(problems[0])
        sounds = (model.clips.waveform(key) for key in prompt.clip_keys)
        return [
            {**part, **dict(zip(("audio", "sampling_rate"), next(sounds), strict=True))}
            if part["type"] == "audio" else part for part in asked[-1]["content"]
        ]  # fmt: skip

    def _generation(self) -> dict[str, Any]:
        """The sampling configuration in transformers' names."""
        config = self.config
        family = self.model.policy.family
        options = {"max_new_tokens": config.max_completion_length, "eos_token_id": list(family.eos_token_ids),
                   "pattern": self.pattern, "do_sample": not self.greedy}  # fmt: skip
        if self.greedy:
            return options
        drawn = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
        return {**options, **drawn, "min_p": config.min_p or None}

    @contextmanager
    def _draws(self) -> Iterator[None]:
        """Draws depend on the seed and on the number of the answer; torch's own generator stays as it is."""
        device = self.model.policy.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed + self.answers)
            yield

    def _reply(self, turn: Turn) -> Reply:
        self.answers += 1
        family = self.model.policy.family
        stop = "stop" if turn.ids[-1] in family.eos_token_ids else "length"
        rollout = rollout_of(turn.ids, (), stop, TextDecoder(family), 0)
        assert turn.wave is not None
        return replace(self.model.reply_of(rollout), wave=turn.wave.numpy())
