"""Can a model tell a pause from the end of a turn at all? A linear probe on its hidden states, before any RL.

places = probe_places(stream)                   decisions 0.3 s into a silence, and whether the turn is over
probe_auc(states_ND, over_N, streams_N)         0.5: it cannot; RL wants 0.85 or more, it cannot teach perception
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from covo_rl.duplex.grid import chunk_of, decision_time
from covo_rl.duplex.rollout import TimingStream

PROBE_AFTER = 0.3  # seconds
#: parts of the streams, each judged by a probe that is fitted on the others
FOLDS = 5
#: AUC from which on RL of timing has something to work with
GATE = 0.85


def probe_places(stream: TimingStream, after: float = PROBE_AFTER) -> list[tuple[int, bool]]:
    """(decision, is the turn over) `after` seconds into each silence of a listening stream that lasts that long."""
    if not stream.listening or stream.turn_end is None:
        return []
    silences = [(start, end, False) for start, end in stream.pauses] + [(stream.turn_end, np.inf, True)]
    places = [(chunk_of(start + after), end, over) for start, end, over in silences]
    return [
        (chunk - stream.first_chunk, over) for chunk, end, over in places
        if decision_time(chunk) <= end and 0 <= chunk - stream.first_chunk < stream.decisions
    ]  # fmt: skip


def probe_auc(
    states_ND: np.ndarray, over_N: np.ndarray, streams_N: Sequence[str], *, folds: int = FOLDS, ridge: float = 1.0,
    seed: int = 0,
) -> float:  # fmt: skip
    """AUC of a ridge regression of `over_N` on the states, each judged by one fitted on other streams only.

    Raises:
        ValueError: fewer streams than folds, or only pauses, or only ends.
    """
    over_N = np.asarray(over_N, dtype=bool)
    names = sorted(set(streams_N))
    if len(names) < folds or over_N.all() or not over_N.any():
        raise ValueError(f"{len(names)} streams with {int(over_N.sum())} ends among {len(over_N)} silences: the probe "
                         f"needs pauses and ends, of {folds} streams or more")  # fmt: skip
    order = np.random.default_rng(seed).permutation(len(names))
    fold_of = {names[i]: place % folds for place, i in enumerate(order)}
    fold_N = np.array([fold_of[name] for name in streams_N])
    states_ND = np.asarray(states_ND, dtype=np.float64)
    scores_N = np.zeros(len(over_N))
    for fold in range(folds):
        judged_N = fold_N == fold
        weights_D, offset = _ridge(states_ND[~judged_N], over_N[~judged_N], ridge)
        scores_N[judged_N] = states_ND[judged_N] @ weights_D + offset
    return ranking_auc(scores_N, over_N)


def ranking_auc(scores_N: np.ndarray, positive_N: np.ndarray) -> float:
    """How likely a positive outranks a negative; equal scores count one half.

    >>> ranking_auc(np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, False, True, True]))
    0.875
    """
    ordered = np.sort(scores_N[~positive_N])
    scores = scores_N[positive_N]
    below, not_above = (np.searchsorted(ordered, scores, side=side).sum() for side in ("left", "right"))
    return float((below + not_above) / (2 * len(scores) * len(ordered)))


def _ridge(states_ND: np.ndarray, over_N: np.ndarray, ridge: float) -> tuple[np.ndarray, float]:
    """Weights (D,) and offset, of standardised states."""
    mean_D, std_D = states_ND.mean(0), states_ND.std(0) + 1e-8
    scaled_ND = (states_ND - mean_D) / std_D
    target_N = over_N - over_N.mean()
    weights_D = np.linalg.solve(scaled_ND.T @ scaled_ND + ridge * np.eye(len(mean_D)), scaled_ND.T @ target_N) / std_D
    return weights_D, -float(mean_D @ weights_D)
