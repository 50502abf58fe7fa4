"""Decisions and codes of chunks <-> ids, and the context that a session holds after them.

listening   U T | U T | U T                 U the user's chunk, T THINK, S SHIFT, B BREAK
a reply     U S | U w cccc | U _ cccc | U B     w text, _ text_pad, c an audio code

<|im_start|>system ... <|im_end|> <|begofcAUDIO|> chunks <|endofcAUDIO|>
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from covo_rl.duplex.grid import CHUNK_CODES
from covo_rl.duplex.ids import DuplexIds, TokenKind
from covo_rl.duplex.machine import DuplexState, LayoutError, Legal

if TYPE_CHECKING:
    import torch

#: positions of the longest chunk: the user's, a decision, four codes
CHUNK_POSITIONS = 2 + CHUNK_CODES


@dataclass(frozen=True)
class ChunkDecision:
    """What the model did in one chunk: its decision token, and four codes (0 is the first) if that is text or text_pad.

    `forced`: nobody chose it, a limit did; it has no log-prob.
    """

    token: int
    codes: tuple[int, ...] = ()
    forced: bool = False


@dataclass(frozen=True)
class DuplexHistory:
    """A dialogue from its beginning: the system block's ids, every chunk's decision, its feature in (C, D)."""

    system_ids: tuple[int, ...]
    decisions: tuple[ChunkDecision, ...]
    features_CD: torch.Tensor


@dataclass(frozen=True)
class DuplexContext:
    """What a decoder is fed: `ids`, what each was chosen from, and the features (S, D) of the placeholders among them.

    `first_chunk` is the first that is held; older ones are dropped.
    """

    ids: tuple[int, ...]
    legal: tuple[Legal, ...]
    features_SD: torch.Tensor
    first_chunk: int = 0


def check(token_ids: Iterable[int], ids: DuplexIds) -> DuplexState:
    """The state after these ids of chunks (without system block and audio marks); their tail may be unfinished.

    Raises:
        LayoutError: they are no dialogue; the message names the first id that is wrong, and what is legal there.
    """
    state, chunk = DuplexState(), -1
    for position, token in enumerate(token_ids):
        kind = ids.kind(token)
        chunk += kind is TokenKind.USER
        try:
            state = state.after(kind)
        except LayoutError as error:
            raise LayoutError(f"position {position}, chunk {max(chunk, 0)}, id {token}: {error}") from error
    return state


def chunk_ids(decisions: Iterable[ChunkDecision], ids: DuplexIds) -> list[int]:
    """Decisions and codes of chunks -> their ids; `read_chunks` is the way back.

    Raises:
        LayoutError: they are no dialogue.
    """
    tokens: list[int] = []
    for decision in decisions:
        tokens += [ids.placeholder, decision.token, *(ids.first_code + code for code in decision.codes)]
    check(tokens, ids)
    return tokens


def read_chunks(token_ids: Sequence[int], ids: DuplexIds) -> list[ChunkDecision]:
    """Ids of whole chunks -> decisions and codes; of none it is known whether it was forced.

    Raises:
        LayoutError: they are no dialogue, or end within a chunk.
    """
    state = check(token_ids, ids)
    if state.due or state.codes_left:
        missing = f"{state.codes_left} codes" if state.codes_left else "the decision"
        raise LayoutError(f"the ids end within a chunk: {missing} of it are missing")
    starts = [i for i, token in enumerate(token_ids) if token == ids.placeholder]
    ends = [*starts[1:], len(token_ids)]
    return [
        ChunkDecision(token_ids[start + 1], tuple(i - ids.first_code for i in token_ids[start + 2 : end]))
        for start, end in zip(starts, ends, strict=True)
    ]


def legal_of(decisions: Iterable[ChunkDecision], ids: DuplexIds) -> list[Legal]:
    """What each of the ids of `chunk_ids` was chosen from."""
    legal: list[Legal] = []
    state = DuplexState()
    for decision in decisions:
        state = state.after(TokenKind.USER)
        legal += [Legal.FORCED, Legal.FORCED if decision.forced else state.legal]
        state = state.after(ids.kind(decision.token))
        for code in decision.codes:
            legal.append(state.legal)
            state = state.after(ids.kind(ids.first_code + code))
    return legal


def system_block(family: Any, system: str, ids: DuplexIds) -> tuple[int, ...]:
    """Ids of everything before the first chunk: the system message, and the mark that audio begins."""
    text = family.render([{"role": "system", "content": system}], add_generation_prompt=False)
    return (*family.tokenize(text, []), ids.audio_bos)


class ContextWindow:
    """Which chunks a context of `max_positions` holds: from `first` on, so that one more always has room.

    Whole oldest turns go, up to their BREAK; where there is none, the older half of the listening that leads the
    current turn. The system block stays. A session and `build` ask the same window, so both hold the same.
    """

    def __init__(self, system_positions: int, max_positions: int, ids: DuplexIds) -> None:
        self.ids, self.max_positions = ids, max_positions
        self.positions, self.first = system_positions, 0
        self._sizes: deque[tuple[int, TokenKind]] = deque()

    def add(self, decision: ChunkDecision) -> int:
        """Take in a chunk; how many old ones are dropped for the next one's room.

        Raises:
            LayoutError: the current turn alone is too long.
        """
        size = 2 + len(decision.codes)
        self._sizes.append((size, self.ids.kind(decision.token)))
        self.positions += size
        dropped = 0
        while self.positions + CHUNK_POSITIONS > self.max_positions:
            count = self._next_drop()
            self.positions -= sum(self._sizes.popleft()[0] for _ in range(count))
            dropped += count
        self.first += dropped
        return dropped

    def _next_drop(self) -> int:
        kinds = [kind for _, kind in self._sizes]
        if TokenKind.BREAK in kinds:
            return kinds.index(TokenKind.BREAK) + 1
        listening = next((i for i, kind in enumerate(kinds) if kind is not TokenKind.THINK), len(kinds))
        if not listening:
            raise LayoutError(
                f"{self.positions} positions, of {self.max_positions}, hold one turn alone: raise max_positions, or "
                "lower max_turn_seconds"
            )
        return -(-listening // 2)


def build(
    history: DuplexHistory, ids: DuplexIds, *, max_positions: int | None = None, ended: bool = False
) -> DuplexContext:
    """The context of a history, id for id and feature for feature what a live session holds after it.

    Without `max_positions` everything is held. `ended`: with the mark that the audio is over.

    Raises:
        LayoutError: the decisions are no dialogue, do not fit the features, or one turn alone is too long.
    """
    decisions = history.decisions
    if len(decisions) != len(history.features_CD):
        raise LayoutError(f"{len(decisions)} decisions for {len(history.features_CD)} features: a chunk has one each")
    first = 0
    if max_positions is not None:
        window = ContextWindow(len(history.system_ids), max_positions, ids)
        for decision in decisions:
            window.add(decision)
        first = window.first
    tokens, legal = chunk_ids(decisions[first:], ids), legal_of(decisions[first:], ids)
    end = [ids.audio_eos] if ended else []
    return DuplexContext(
        (*history.system_ids, *tokens, *end),
        (*[Legal.FORCED] * len(history.system_ids), *legal, *[Legal.FORCED] * len(end)),
        history.features_CD[first:], first,
    )  # fmt: skip
