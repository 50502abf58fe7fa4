"""R_early_response: 1 where the model does not answer before the user's turn has ended, and answers at all.

    e = turn_end, K = the chunk of SHIFT            a turn that ends at 4.9 s, in chunk 30
    K before the chunk that holds e, or never       0        chunk 8, inside a pause: 0
    else                                            1        chunk 30: 1, chunk 45: 1

Silence earns what an early answer earns: were it paid, it would be the best answer to a stream with long pauses.
It does not ask how late an answer is (`turn_taking`, `response_delay`). None where the model speaks: no turn ends.
"""

from covo_rl.rewards.rules.turns import response_delays


def early_response(completions, kind, shift_time, turn_end, **kwargs):
    """
    >>> early_response([""] * 3, kind=["pause"] * 3, shift_time=[1.44, 4.96, None], turn_end=[4.9] * 3)
    [0.0, 1.0, 0.0]
    """
    return [
        None if delay is None else float(not isinstance(delay, str))
        for delay in response_delays(kind, shift_time, turn_end)
    ]
