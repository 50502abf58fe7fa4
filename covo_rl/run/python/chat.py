"""Questions one after the other, each with all that was asked and heard before: `Model.chat`, and `covo-rl chat`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covo_rl.config import ConfigError
from covo_rl.prompt import messages
from covo_rl.run.python.calls import decoding_of, rows_of
from covo_rl.types import Clip

if TYPE_CHECKING:
    from covo_rl.run.python.model import Model, Reply


class Chat:
    """A conversation with a loaded model; made by `Model.chat`."""

    def __init__(self, model: Model, options: Mapping[str, Any]) -> None:
        self.model = model
        plain = {"greedy": None, "temperature": None, "num_generations": 1, "max_completion_length": 1024, "seed": 0}
        decoding = {name: options.get(name, value) for name, value in plain.items()}
        sampling = {name: value for name, value in options.items() if name not in plain}
        self.config, self.greedy = decoding_of(**decoding, sampling=sampling)
        if self.config.num_generations != 1:
            raise ConfigError(["chat: num_generations: a question has one reply"])
        self.seed = decoding["seed"]
        self.reset()

    def reset(self) -> None:
        """Forget what was said and heard."""
        self.turns: list[Mapping[str, Any]] = []
        self.heard: tuple[Clip, ...] = ()

    def ask(self, question: str, audio: Any = None, choices: Sequence[str] = ()) -> Reply:
        """The reply to a further question; `audio` is heard from this question on.

        Where it cannot be asked, the conversation stays as it was. Raises as `Model.generate`.
        """
        (row,) = rows_of(question, audio, choices)
        asked = messages(row, replace(self.model.answerer.prompt_config, written_question=True))
        chat = [*self.turns, asked[-1]] if self.turns else asked  # a system message stands at the beginning alone
        # a file is heard as it is now: another recording may take its name
        new = [clip if clip.path is None else Clip(data=Path(clip.path).read_bytes()) for clip in row.clips]
        row = replace(row, clips=(*self.heard, *new))
        self.model.clips.forget()
        reply = self.model.reply([self.model.prompt(row, chat, self.config)], self.config, self.greedy, self.seed)[0][0]
        self.turns = [*chat, {"role": "assistant", "content": [{"type": "text", "text": reply.text}]}]
        self.heard = row.clips
        return reply
