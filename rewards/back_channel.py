"""R_back_channel: 1 where the model goes on speaking while the user only says "mm", else 0.

    BREAK at any time until 1 s after the back-channel's end      0
    none until then                                               1

None where the user says no back-channel.
"""

from covo_rl.rewards.rules.turns import ROUNDING, of_kind


def back_channel(completions, kind, break_time, turn_end, after=1.0, **kwargs):
    """
    >>> back_channel([""] * 3, kind=["back_channel"] * 3, break_time=[2.4, 4.0, None], turn_end=[2.3] * 3)
    [0.0, 1.0, 1.0]
    """
    if not after >= 0:
        raise ValueError(f"after={after}: write seconds, 0 or more")
    rows = zip(of_kind(kind, ["back_channel"]), break_time, turn_end, strict=True)
    return [
        float(time is None or time > end + after + ROUNDING) if says and end is not None else None
        for says, time, end in rows
    ]
