"""R_hold_floor: 0 where the model breaks off its reply while the user is silent, else 1.

The user is silent in a chunk that holds nothing of a barge-in or back-channel. From the onset of a barge-in on, the
turn is the user's, pauses and all: a BREAK that comes late costs `barge_in`, not this.

    onset 2.04 s, BREAK at 1.92 s: 0        at 2.08 s, or none: 1        in a stream without any event: 0

None where the model listens.
"""

from covo_rl.rewards.rules.turns import CHUNK_SECONDS, ROUNDING, SPEAKING, of_kind


def hold_floor(completions, kind, break_time, onset, turn_end, **kwargs):
    """
    >>> hold_floor([""] * 4, kind=["barge_in"] * 3 + ["hold"], break_time=[1.92, 2.08, None, 2.08],
    ...            onset=[2.04] * 3 + [None], turn_end=[4.0] * 3 + [None])
    [0.0, 1.0, 1.0, 0.0]
    """
    rows = zip(kind, of_kind(kind, SPEAKING), break_time, onset, turn_end, strict=True)
    return [float(not _in_silence(name, *times)) if speaks else None for name, speaks, *times in rows]


def _in_silence(kind, time, start, end):
    if time is None:
        return False
    if start is None or time - start <= ROUNDING:
        return True
    return kind == "back_channel" and end is not None and time - CHUNK_SECONDS >= end - ROUNDING
