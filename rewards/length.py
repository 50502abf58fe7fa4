"""R_length: full marks for reasoning of `floor` to `target` words; less below the floor, and none from `max` words on.

    covo-rl rewards score --rewards "accuracy,length(floor=20,target=120,max=300)=0.5" --input a.jsonl --output b.jsonl

With n words in the think block (a Chinese, Japanese or Korean character counts as one):

    n < floor              n / floor                        10 words with floor 20: 0.5
    floor <= n <= target   1
    target < n < max       (max - n) / (max - target)       210 words with target 120, max 300: 90 / 180 = 0.5
    n >= max               0, and 0 without reasoning

A term that only punishes length makes thinking collapse to nothing; below the floor this one pays for every word more.
It does not ask what the words say (`thinking` does): give it a small weight, and never train on it alone.
"""

from covo_rl.rewards.columns import completion_rows
from covo_rl.rewards.rules.criteria import words


def length(completions, parsed=None, floor=20, target=120, max=300, log_extra=None, **kwargs):
    """
    >>> said = [f"<think>{'word ' * n}</think><answer>x</answer>" for n in (0, 10, 60, 210, 300)]
    >>> length(said)
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if not 0 <= floor <= target < max:
        raise ValueError(f"floor={floor}, target={target}, max={max}: write 0 <= floor <= target < max, in words")
    counts = [len(words(parts.think or "", limit=None)) for (parts,) in completion_rows(completions, parsed)]
    if log_extra:
        log_extra("length_words", counts)
    return [_score(n, floor, target, max) for n in counts]


def _score(n, floor, target, most):
    if n == 0:
        return 0.0
    return n / floor if n < floor else min(1.0, (most - n) / (most - target)) if n < most else 0.0
