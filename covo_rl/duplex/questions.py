"""Questions of when to stop, as a model meets them: the stream, the path of its ids, and what is heard on it.

world = FeatureWorld.of(family, ids)                of streams whose features are simulated (features.py)
world.questions(draw_streams("rl", 512, seed=0))    for RL
world.lessons(draw_streams("sft", 512, seed=0))     for supervised updates (supervised.py)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from covo_rl.duplex.features import FeatureStream, encoder_features
from covo_rl.duplex.grid import CHUNK_CODES
from covo_rl.duplex.ids import DuplexIds
from covo_rl.duplex.layout import chunk_ids, system_block
from covo_rl.duplex.plan import ReplyPlan, plan_chunks
from covo_rl.duplex.rollout import TimingStream
from covo_rl.duplex.trunk import ReplyChunk, Trunk, listening_trunk, speaking_trunk
from covo_rl.models.covo_audio.persona import SPOKEN_SYSTEM
from covo_rl.synth.speech import DIGITS
from covo_rl.types import UserError

if TYPE_CHECKING:
    from covo_rl.models.base import AudioFamily


class FeatureWorldError(UserError, ValueError):
    """A model that cannot write streams of digits."""


@dataclass(frozen=True)
class TimingQuestion:
    """One stream for RL; `features_UD` (chunks of the trunk, D), as the decoder takes them."""

    stream: TimingStream
    trunk: Trunk
    features_UD: torch.Tensor


@dataclass(frozen=True)
class DuplexLesson:
    """One stream for supervised updates: all ids after `taught_from` are targets but the placeholders of its chunks."""

    ids: tuple[int, ...]
    places: tuple[int, ...]
    taught_from: int
    features_UD: torch.Tensor


@dataclass(frozen=True)
class FeatureWorld:
    """How streams of features.py are written: with a text id and four codes for each digit, after the mark that audio
    begins; those that are heard as in a session, after its system message too.

    `hear` gives a stream's features (chunks, D) float32.
    """

    ids: DuplexIds
    prefix: tuple[int, ...]
    words: Mapping[int, int]
    hear: Callable[[FeatureStream], torch.Tensor]

    @classmethod
    def of(
        cls, family: AudioFamily, ids: DuplexIds, hear: Callable[[FeatureStream], torch.Tensor] | None = None, *,
        noise: float = 0.4,
    ) -> FeatureWorld:  # fmt: skip
        """For this model; without `hear` by simulated features as wide as its decoder.

        Raises:
            FeatureWorldError: a digit is not one token, or there are no codes for ten of them and silence.
        """
        names = [family.tokenizer(f" {digit}")["input_ids"] for digit in DIGITS]
        needed = CHUNK_CODES * (len(DIGITS) + 1)
        if any(len(tokens) != 1 for tokens in names) or ids.num_codes < needed:
            longest = max(map(len, names))
            raise FeatureWorldError(
                f"a digit takes up to {longest} tokens and there are {ids.num_codes} codes: streams of features want "
                f"one token for each, and {needed} codes"
            )
        width = family.embed_tokens.weight.shape[1]

        def simulated(stream: FeatureStream) -> torch.Tensor:
            return torch.from_numpy(encoder_features(stream, width, noise=noise))

        prefix = (ids.audio_bos,) if hear is None else system_block(family, SPOKEN_SYSTEM, ids)
        return cls(ids, prefix, {word: tokens[0] for word, tokens in enumerate(names)}, hear or simulated)

    def questions(self, streams: Sequence[FeatureStream]) -> list[TimingQuestion]:
        return [self._question(stream) for stream in streams]

    def lessons(self, streams: Sequence[FeatureStream]) -> list[DuplexLesson]:
        return [self._lesson(stream) for stream in streams]

    def codes(self, stream: FeatureStream, chunks: int) -> tuple[int, ...]:
        """Of so many chunks of its reply: four of each word, and of silence (the last four) once they are said."""
        said = [*stream.reply, *[len(DIGITS)] * chunks][:chunks]
        return tuple(CHUNK_CODES * word + i for word in said for i in range(CHUNK_CODES))

    def _question(self, stream: FeatureStream) -> TimingQuestion:
        if stream.listening:
            trunk = listening_trunk(self.prefix, stream.chunks, self.ids)
        else:
            trunk = speaking_trunk(self.prefix, stream.shift_chunk, self._reply(stream), self.ids)
        return TimingQuestion(stream, trunk, self.hear(stream)[: len(trunk.places)])

    def _reply(self, stream: FeatureStream) -> list[ReplyChunk]:
        codes = [self.ids.first_code + code for code in self.codes(stream, stream.decisions)]
        texts: list[int | None] = [self.words[word] for word in stream.reply]
        texts += [None] * (stream.decisions - len(texts))
        return [ReplyChunk(text, tuple(codes[CHUNK_CODES * i :][:CHUNK_CODES])) for i, text in enumerate(texts)]

    def _lesson(self, stream: FeatureStream) -> DuplexLesson:
        text = tuple(self.words[word] for word in stream.reply)
        plan = ReplyPlan(stream.shift_chunk, text, self.codes(stream, stream.decisions), stream.break_chunk)
        ids = [*self.prefix, *chunk_ids(plan_chunks([plan], stream.chunks, self.ids), self.ids)]
        places = tuple(i for i, token in enumerate(ids) if token == self.ids.placeholder)
        return DuplexLesson(tuple(ids), places, len(self.prefix), self.hear(stream))
