"""R_barge_in: the model stops for a user who interrupts; half for stopping within a second, half for how soon.

    b = break_time, o = onset of the barge-in
    no BREAK, or before o     0
    else                      0.5 [b - o <= 1.0]  +  0.5 clip(1 - max(0, b - o - 0.48) / 0.72, 0, 1)
                              0.4 s: 1, 0.84 s: 0.75, 1.2 s: 0

None where the user does not interrupt.
"""

from covo_rl.rewards.rules.turns import ROUNDING, of_kind


def barge_in(completions, kind, break_time, onset, **kwargs):
    """
    >>> barge_in([""] * 4, kind=["barge_in"] * 4, break_time=[2.4, 2.88, 1.6, None], onset=[2.04] * 4)
    [1.0, 0.75, 0.0, 0.0]
    """
    rows = zip(of_kind(kind, ["barge_in"]), break_time, onset, strict=True)
    return [_score(time, start) if interrupts and start is not None else None for interrupts, time, start in rows]


def _score(time, start):
    if time is None or time - start <= ROUNDING:
        return 0.0
    late = time - start
    soon = min(max(1.0 - max(0.0, late - 0.48) / 0.72, 0.0), 1.0)
    return round(0.5 * (late <= 1.0 + ROUNDING) + 0.5 * soon, 9)
