"""A live full-duplex dialogue: sound in, events and codes out, one forward of the decoder per new id.

    session = DuplexSession.of(family)
    for samples in microphone:                      # 24 kHz, as many at once as there are
        for event in session.push(samples):
            if event.type == "codes":
                player.write(event.codes)           # 0.16 s of speech
            elif event.type == "flush":
                player.clear()                      # BREAK: what has not sounded yet never shall
    session.end()

The decoder's cache holds everything fed so far; the last id of a chunk is fed together with the next chunk's feature.
What the session holds is what `layout.build` makes of the same history.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, Protocol

import torch
from transformers import DynamicCache

from covo_rl.duplex.grid import CHUNK_SECONDS, decision_time
from covo_rl.duplex.ids import DuplexIds, TokenKind
from covo_rl.duplex.latency import ChunkCost
from covo_rl.duplex.layout import (
    CHUNK_POSITIONS,
    ChunkDecision,
    ContextWindow,
    DuplexContext,
    DuplexHistory,
    build,
    check,
    chunk_ids,
    system_block,
)
from covo_rl.duplex.machine import DuplexState, Legal, legal_masks
from covo_rl.engines.draws import Drawing, draw, noise_dtype
from covo_rl.models.covo_audio.persona import SPOKEN_SYSTEM
from covo_rl.models.covo_audio.streaming import TextPieces
from covo_rl.models.covo_audio.streaming_encoder import StreamingEncoder
from covo_rl.prompt import position_limit
from covo_rl.types import UserError

logger = logging.getLogger("covo_rl.duplex")
#: positions of a context: 10.9 minutes of listening, 3.6 of speech
MAX_POSITIONS = 8192
MAX_TURN_SECONDS = 60.0
GREEDY = Drawing(greedy=True)
EventType = Literal["decision", "text", "codes", "flush", "dropped", "end"]


class SessionError(UserError, RuntimeError):
    """A session that cannot begin, or go on."""


class StreamEncoder(Protocol):
    """What hears: samples at 24 kHz, (n,) -> the features (K, D) that are complete now."""

    def push(self, samples: Any) -> torch.Tensor: ...

    def end(self) -> torch.Tensor: ...

    def reset(self) -> None: ...


@dataclass(frozen=True)
class DuplexEvent:
    """What happened in a chunk, whose decision falls at `time` (s of the stream).

    "decision": `token`, its kind as `decision`, its log-prob (of all that was legal; None where it was `forced`), and
    `stop_logit`, of SHIFT or BREAK against all else that was legal, also where the decision was forced.
    "text": a piece of the reply's text. "codes": four (0 is the first), 0.16 s of speech. "flush": the reply is over,
    what is queued must not sound. "dropped": `count` chunks left the context. "end": the stream is over.
    """

    type: EventType
    chunk: int
    time: float
    token: int | None = None
    decision: str | None = None
    logp: float | None = None
    stop_logit: float | None = None
    forced: bool = False
    text: str = ""
    codes: tuple[int, ...] = ()
    count: int = 0


class DuplexSession:
    """One dialogue of a loaded family with one user.

    `encoder` hears (anything with push, end and reset, at its beginning). `system` is the system message,
    `max_positions` the context's (never beyond the model's), `max_turn_seconds` ends a reply by a forced BREAK.
    `decision`, `text` and `codes` say how each is drawn: text also where BREAK is among what is legal with it.

    Raises:
        DuplexIdsError: the model has no ids for it.
        SessionError: a turn of `max_turn_seconds` does not fit into the context.
    """

    def __init__(
        self, family: Any, encoder: StreamEncoder, *, ids: DuplexIds | None = None, system: str = SPOKEN_SYSTEM,
        max_positions: int = MAX_POSITIONS, max_turn_seconds: float = MAX_TURN_SECONDS, decision: Drawing = GREEDY,
        text: Drawing = GREEDY, codes: Drawing = GREEDY, seed: int = 0,
    ) -> None:  # fmt: skip
        self.family, self.encoder, self.seed = family, encoder, seed
        self.ids = DuplexIds.of(family) if ids is None else ids
        self.system_ids = system_block(family, system, self.ids)
        limit = position_limit(family.model.config)
        self.max_positions = min(max_positions, limit or max_positions)
        self.max_turn_chunks = int(min(max_turn_seconds, 1e9) / CHUNK_SECONDS + 1e-9)
        # SHIFT's chunk, the reply's, and room for one more
        needed = len(self.system_ids) + (self.max_turn_chunks + 1) * CHUNK_POSITIONS + 2
        if self.max_turn_chunks < 1 or needed > self.max_positions:
            raise SessionError(
                f"max_turn_seconds {max_turn_seconds:g} needs a context of {needed} positions with the system message "
                f"of {len(self.system_ids)}; max_positions is {max_positions}, the model's limit {limit or 'none'}; a "
                f"turn has at least {CHUNK_SECONDS} s"
            )
        self.drawing = {Legal.LISTENING: decision, Legal.CLOSED: decision, Legal.OPEN: text, Legal.CODE: codes}
        self.device = family.embed_tokens.weight.device
        self.masks = legal_masks(self.ids, family.model.config.get_text_config().vocab_size, self.device)
        self._begin()

    @classmethod
    def of(cls, family: Any, **options: Any) -> DuplexSession:
        """Of a model that its own streaming encoder hears for."""
        ids = DuplexIds.of(family)  # says what a model lacks that was not made for it
        return cls(family, StreamingEncoder.of(family.model), ids=ids, **options)

    def _begin(self) -> None:
        self.decisions: list[ChunkDecision] = []
        self.costs: list[ChunkCost] = []
        self.ended = False
        self._state = DuplexState()
        self._window = ContextWindow(len(self.system_ids), self.max_positions, self.ids)
        self._features: list[torch.Tensor] = []
        self._pieces = TextPieces(self.family.tokenizer)
        self._noise = torch.Generator().manual_seed(self.seed % 2**63)
        self._script: deque[ChunkDecision] = deque()
        self._turn_chunks = 0
        self._encoder_seconds = 0.0
        self._refill(list(self.system_ids))

    def reset(self) -> None:
        """Forget everything; the next push begins another dialogue."""
        self.encoder.reset()
        self._begin()

    def push(self, samples: Any) -> list[DuplexEvent]:
        """The next samples at 24 kHz -> what happened in the chunks that are complete now; of too few, nothing.

        Raises:
            SessionError: the stream has ended.
        """
        return list(self._chunks(self.encoder.push, samples))

    def end(self) -> list[DuplexEvent]:
        """Nothing more is heard: what happened in the last chunks, and the end, which cuts a reply short.

        Raises:
            SessionError: the stream has ended.
        """
        events = list(self._chunks(self.encoder.end))
        self.ended = True
        self._tokens.append(self.ids.audio_eos)
        chunk = len(self.decisions) - 1
        rest = self._pieces.rest()
        events += [self._event("text", chunk, text=rest)] if rest else []
        return [*events, self._event("end", chunk, token=self.ids.audio_eos, forced=True)]

    def follow(self, decisions: Iterable[ChunkDecision]) -> None:
        """The next chunks' decisions, instead of the model's (codes are, where a decision lacks them).

        One that is not legal is a LayoutError when its chunk comes.
        """
        self._script.extend(decisions)

    def _chunks(self, hear: Any, *samples: Any) -> Iterator[DuplexEvent]:
        if self.ended:
            raise SessionError("the stream has ended; reset() begins another")
        began = perf_counter()
        features_KD = hear(*samples)
        self._encoder_seconds += perf_counter() - began
        share = self._encoder_seconds / len(features_KD) if len(features_KD) else 0.0
        for feature_D in features_KD:
            self._encoder_seconds = 0.0
            yield from self._chunk(feature_D, share)

    @torch.no_grad()
    def _chunk(self, feature_D: torch.Tensor, encoder_seconds: float) -> list[DuplexEvent]:
        began = perf_counter()
        chunk = len(self.decisions)
        events = self._decide(chunk, feature_D)
        if dropped := self._window.add(self.decisions[-1]):
            logger.warning("chunk %d: the context is full, its %d oldest chunks are dropped", chunk, dropped)
            self._drop(dropped)
            events.append(self._event("dropped", chunk, count=dropped))
        speaking = bool(self.decisions[-1].codes)
        self.costs.append(ChunkCost(chunk, speaking, encoder_seconds, perf_counter() - began))
        return events

    def _decide(self, chunk: int, feature_D: torch.Tensor) -> list[DuplexEvent]:
        """One chunk of the state machine."""
        planned = self._script.popleft() if self._script else None
        self._features.append(feature_D)
        self._take(self.ids.placeholder)
        logits_V = self._forward(feature_D[None])
        stop_logit = float(self.masks.stop_logits(logits_V[None], [self._state.legal]))
        at_limit = self._turn_chunks >= self.max_turn_chunks
        if planned is not None or at_limit:
            token, logp = planned.token if planned is not None else self.ids.break_, None
        else:
            token, logp = self._draw(logits_V)
        self._take(token)
        kind = self.ids.kind(token)
        codes: list[int] = []
        given = planned.codes if planned is not None else ()
        for place in range(self._state.codes_left):
            logits_V = self._forward()
            codes.append(given[place] if given else self._draw(logits_V)[0] - self.ids.first_code)
            self._take(self.ids.first_code + codes[-1])
        self._turn_chunks = self._turn_chunks + 1 if codes else 0
        self.decisions.append(ChunkDecision(token, tuple(codes), logp is None))
        decision = self._event(
            "decision", chunk, token=token, decision=kind.name.lower(), logp=logp, stop_logit=stop_logit,
            forced=logp is None,
        )  # fmt: skip
        return [decision, *self._effects(chunk, token, kind, tuple(codes))]

    def _effects(self, chunk: int, token: int, kind: TokenKind, codes: tuple[int, ...]) -> list[DuplexEvent]:
        """What else happens in a chunk with this decision."""
        piece = self._pieces.push(token) if kind is TokenKind.TEXT else ""
        piece += self._pieces.rest() if kind in (TokenKind.TEXT_PAD, TokenKind.BREAK) else ""
        events = [self._event("text", chunk, text=piece)] if piece else []
        events += [self._event("codes", chunk, codes=codes)] if codes else []
        return [*events, self._event("flush", chunk)] if kind is TokenKind.BREAK else events

    def _event(self, kind: EventType, chunk: int, **values: Any) -> DuplexEvent:
        return DuplexEvent(kind, chunk, decision_time(chunk), **values)

    def _take(self, token: int) -> None:
        self._state = self._state.after(self.ids.kind(token))
        self._tokens.append(token)

    def _draw(self, logits_V: torch.Tensor) -> tuple[int, float]:
        """An id among what is legal now, and its log-prob."""
        how = self.drawing[self._state.legal]
        scaled_1V = self.masks.masked(logits_V[None], [self._state.legal]) / how.temperature
        noise_1 = torch.rand(1, generator=self._noise, dtype=torch.float64).to(self.device, noise_dtype(self.device))
        token_1, logp_1 = draw(scaled_1V, noise_1, how)
        return int(token_1), float(logp_1)

    def _forward(self, audio_SD: torch.Tensor | None = None) -> torch.Tensor:
        """Feed what is not in the cache yet -> logits (V,) after it; `audio_SD` fills the placeholders among it."""
        new = torch.tensor([self._tokens[self._fed :]], device=self.device)
        out = self.family.model(
            input_ids=new, audio_embeds=audio_SD, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self._fed = len(self._tokens)
        return out.logits[0, -1]

    @torch.no_grad()
    def _refill(self, tokens: list[int]) -> None:
        """A new cache, with these ids and the features of their placeholders."""
        self._cache = DynamicCache(config=self.family.model.config.get_text_config())
        self._tokens, self._fed = tokens, 0
        self._forward(torch.stack(self._features) if self._features else None)

    def _drop(self, count: int) -> None:
        self._features = self._features[count:]
        self._refill([*self.system_ids, *chunk_ids(self.decisions[self._window.first :], self.ids)])

    @property
    def context(self) -> DuplexContext:
        """What the session holds: what `build` makes of the same history."""
        none = torch.zeros(0, self.family.embed_tokens.embedding_dim)
        features_SD = torch.stack(self._features) if self._features else none
        held = DuplexHistory(self.system_ids, tuple(self.decisions[self._window.first :]), features_SD)
        context = build(held, self.ids, ended=self.ended)
        return DuplexContext(tuple(self._tokens), context.legal, features_SD, self._window.first)

    def resume(self, history: DuplexHistory) -> None:
        """Begin with this dialogue behind, instead of live; the encoder must have heard the same.

        Raises:
            SessionError: the session has begun already, or its system message is another.
            LayoutError: the history is no dialogue.
        """
        if self.decisions or history.system_ids != self.system_ids:
            raise SessionError("a history is taken up by a new session with the same system message")
        context = build(history, self.ids, max_positions=self.max_positions)
        for decision in history.decisions:
            self._window.add(decision)
            self._effects(0, decision.token, self.ids.kind(decision.token), ())  # of a text half a character may wait
        self.decisions = list(history.decisions)
        self._features = list(context.features_SD)
        self._state = check(chunk_ids(history.decisions, self.ids), self.ids)
        spoken = [bool(decision.codes) for decision in history.decisions]
        self._turn_chunks = next((i for i, codes in enumerate(reversed(spoken)) if not codes), len(spoken))
        self._refill(list(context.ids))
