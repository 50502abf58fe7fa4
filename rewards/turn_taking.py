"""R_turn_taking: 1 where the model takes the turn after the user's end and at most `limit` (2.4 s) later, else 0.

    SHIFT early, or never                       0
    at most 2.4 s after the user's end          1        ends at 4.9 s: SHIFT at 4.96 s is 1, at 7.36 s (2.46 s) is 0

None where the model speaks: there is no turn to take.
"""

from covo_rl.rewards.rules.turns import ROUNDING, response_delays


def turn_taking(completions, kind, shift_time, turn_end, limit=2.4, **kwargs):
    """
    >>> turn_taking([""] * 4, kind=["single"] * 4, shift_time=[1.44, 4.96, 7.36, None], turn_end=[4.9] * 4)
    [0.0, 1.0, 0.0, 0.0]
    """
    if not limit > 0:
        raise ValueError(f"limit={limit}: write seconds above 0")
    return [
        None if delay is None else float(not isinstance(delay, str) and delay <= limit + ROUNDING)
        for delay in response_delays(kind, shift_time, turn_end)
    ]
