"""R_response_delay: full marks for SHIFT within 0.48 s of the user's end, falling to none at 2 s.

    early, or never      0
    d seconds later      clip(1 - max(0, d - 0.48) / 1.52, 0, 1)        0.4 s: 1, 1.24 s: 0.5, 2 s: 0

d is the algorithmic delay, on the clock of the chunks: the sound begins 0.173 s after it. None where the model speaks.
"""

from covo_rl.rewards.rules.turns import response_delays


def response_delay(completions, kind, shift_time, turn_end, free=0.48, none=2.0, log_extra=None, **kwargs):
    """
    >>> response_delay([""] * 4, kind=["single"] * 4, shift_time=[1.6, 3.36, 4.48, None], turn_end=[2.12] * 4)
    [0.0, 0.5, 0.0, 0.0]
    """
    if not 0 <= free < none:
        raise ValueError(f"free={free}, none={none}: write 0 <= free < none, in seconds")
    delays = response_delays(kind, shift_time, turn_end)
    if log_extra:
        log_extra("response_delay_seconds", delays)
    return [None if delay is None else _score(delay, free, none) for delay in delays]


def _score(delay, free, none):
    if isinstance(delay, str):
        return 0.0
    return round(min(max(1.0 - max(0.0, delay - free) / (none - free), 0.0), 1.0), 9)  # 3.36 - 2.12 is not 1.24
