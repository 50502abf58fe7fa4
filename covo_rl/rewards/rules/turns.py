"""What the rewards for turn-taking share: kinds of streams, and the columns that say when a rollout stopped.

A stream asks one question: in which chunk of 0.16 s does the model stop what it does? A listening model stops with
SHIFT and begins to speak, a speaking one stops with BREAK. Columns, one value per rollout, times in seconds:

    kind         pause, single (listening); barge_in, back_channel, hold (speaking)
    chunk        K, the chunk whose decision stopped the rollout; None: it never stopped
    shift_time   of a listening stream 0.16 (K + 1), when the SHIFT of chunk K is said; None: never
    break_time   of a speaking stream the same for a BREAK while codes remain; None: none, the reply was said to its end
    turn_end     where the user's turn, barge-in or back-channel ends; None in a `hold` stream
    onset        where the barge-in or back-channel begins; None in the others
    pauses       [[start, end], ...] silences inside the user's turn
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: a chunk, of which each holds a decision
CHUNK_SECONDS = 0.16
LISTENING, SPEAKING = ("pause", "single"), ("barge_in", "back_channel", "hold")
#: times that differ by less are one: 0.16 * 7 and 1.12 are not the same number
ROUNDING = 1e-6


def of_kind(kind: Sequence[str], wanted: Sequence[str]) -> list[bool]:
    """Which rollouts are of these kinds.

    Raises:
        ValueError: a kind that does not exist.
    """
    if unknown := sorted({str(name) for name in kind} - {*LISTENING, *SPEAKING}):
        raise ValueError(f"kind {', '.join(unknown)}: a stream is one of {', '.join((*LISTENING, *SPEAKING))}")
    return [name in wanted for name in kind]


def response_delays(
    kind: Sequence[str], shift_time: Sequence[float | None], turn_end: Sequence[float | None]
) -> list[float | str | None]:
    """Seconds from the end of the user's turn to SHIFT, "early" or "never"; None where no user's turn ends.

    SHIFT in the chunk that holds the end is the first that is not early: its time is the first after the end.
    """
    results: list[float | str | None] = []
    for listens, time, end in zip(of_kind(kind, LISTENING), shift_time, turn_end, strict=True):
        if not listens or end is None:
            results.append(None)
        elif time is None:
            results.append("never")
        else:
            results.append(time - end if time - end > ROUNDING else "early")
    return results


def stop_columns(
    kind: str, chunks: Sequence[int | None], *, turn_end: float | None = None, onset: float | None = None,
    pauses: Sequence[tuple[float, float]] = (),
) -> dict[str, list[Any]]:  # fmt: skip
    """The columns of rollouts of one stream that stopped in these chunks; None never stopped."""
    times = [None if chunk is None else CHUNK_SECONDS * (chunk + 1) for chunk in chunks]
    never = [None] * len(chunks)
    listens = of_kind([kind], LISTENING)[0]
    one = {"kind": kind, "turn_end": turn_end, "onset": onset, "pauses": [list(pause) for pause in pauses]}
    return {
        "chunk": list(chunks), "shift_time": times if listens else never, "break_time": never if listens else times,
        **{name: [value] * len(chunks) for name, value in one.items()},
    }  # fmt: skip
