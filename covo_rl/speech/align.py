"""When each word is said: the likeliest path of its text through the CTC head's log-probabilities (Viterbi)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from covo_rl.speech.grid import CODE_SECONDS
from covo_rl.types import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from covo_rl.speech.tokenizer import SpeechTokenizer


class AlignError(UserError, ValueError):
    """A text that cannot be laid over its codes."""


def align_pieces(logps_LP: np.ndarray, ids: Sequence[int]) -> list[tuple[int, int]]:
    """First and last-plus-one code of each piece of the likeliest CTC path that writes `ids`. Blank is 0.

    Raises:
        AlignError: no pieces, or more than the codes can say.
    """
    states = [0, *(state for id in ids for state in (id, 0))]  # blank, piece, blank, ..., piece, blank
    # a blank may be skipped between two pieces that differ
    skips = np.array([i >= 2 and state != 0 and state != states[i - 2] for i, state in enumerate(states)])
    scores_LS = np.asarray(logps_LP, dtype=np.float64)[:, states]
    best_S = np.full(len(states), -np.inf)
    best_S[:2] = scores_LS[:1, :2].ravel() if len(scores_LS) else -np.inf
    moves = np.zeros(scores_LS.shape, dtype=np.int8)
    for code in range(1, len(scores_LS)):
        one = np.concatenate([[-np.inf], best_S[:-1]])
        two = np.where(skips, np.concatenate([[-np.inf, -np.inf], best_S[:-2]])[: len(states)], -np.inf)
        choices = np.stack([best_S, one, two])
        moves[code] = choices.argmax(0)
        best_S = choices.max(0) + scores_LS[code]
    state = len(states) - 1 - int(best_S[-2] > best_S[-1]) if ids else 0
    if not ids or not np.isfinite(best_S[state]):
        raise AlignError(f"{len(ids)} pieces of text do not fit {len(scores_LS)} codes")
    path = []
    for code in reversed(range(len(scores_LS))):
        path.append(state)
        state -= int(moves[code, state])
    places = np.array(path[::-1])
    spans = [np.flatnonzero(places == 2 * i + 1) for i in range(len(ids))]
    return [(int(span[0]), int(span[-1]) + 1) for span in spans]


def align_words(tokenizer: SpeechTokenizer, codes: Sequence[int] | Tensor, text: str) -> list[tuple[str, float, float]]:
    """(word, start, end in seconds), on the grid of codes, of the text that the codes say.

    CTC says a word late and briefly. So a word ends, and the next begins, around the first codes between their pieces
    that sound quiet; where none does, one code after the earlier word's last piece. A word without letters has the end
    of the one before it.

    Raises:
        AlignError: the text has no words, or more than the codes can say.
        PiecesError: a word that the tokenizer cannot write.
        CodeError: no codes, or one outside the codebook.
    """
    logps_LP = tokenizer.ctc_logps(codes).cpu().numpy()
    pieces = tokenizer.reader()[1].words(text)
    spans = iter(align_pieces(logps_LP, [id for ids in pieces for id in ids]))
    said = [[next(spans) for _ in ids] for ids in pieces]
    quiet_L = ~tokenizer.loud(codes).cpu().numpy()
    spoken = [(own[0][0], own[-1][1]) for own in said if own]
    gaps = zip([(0, 0), *spoken], [*spoken, (len(quiet_L), len(quiet_L))], strict=True)
    edges = [_pause(quiet_L, last, first) for (_, last), (first, _) in gaps]
    times = iter((start, end) for (_, start), (end, _) in pairwise(edges))
    timed, end = [], 0
    for word, own in zip(text.split(), said, strict=True):
        start, end = next(times) if own else (end, end)
        timed.append((word, round(start * CODE_SECONDS, 3), round(end * CODE_SECONDS, 3)))
    return timed


def _pause(quiet_L: np.ndarray, last: int, first: int) -> tuple[int, int]:
    """Where the word before ends, and the word after begins: between the codes `last` and `first` of their pieces."""
    quiet = last + np.flatnonzero(quiet_L[last:first])
    if not len(quiet):
        edge = min(last + 1, first) if last else 0
        return edge, edge
    start = int(quiet[0])
    loud = np.flatnonzero(~quiet_L[start:first])
    return start, start + int(loud[0]) if len(loud) else first
