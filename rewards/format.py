"""R_format: 1 if the completion follows the one grammar `<think>...</think><answer>...</answer>`, else 0.

    covo-rl rewards try format --completion "<think>It rings.</think><answer>bell</answer>"

The grammar is anchored and strict (covo_rl/prompt.py). `format(pattern='loose')` is the pattern that published
audio-GRPO code searches for anywhere in the completion; it pays for text around the blocks, for two answers and for
tags inside the reasoning, and is here only to compare with.
"""

import re

from covo_rl.prompt import parse
from covo_rl.rewards.columns import completion_text

MIDDLE = re.compile(r"</think>\s*<answer>")


def format(completions, parsed=None, stop_reason=None, pattern="strict", explain=None, log_extra=None, **kwargs):
    """
    >>> format(["<think>It rings.</think><answer>bell</answer>", "<answer>bell</answer>"])
    [1.0, 0.0]
    """
    if pattern not in ("strict", "loose"):
        raise ValueError(f"pattern {pattern!r}: there are strict and loose")
    texts = [completion_text(completion) for completion in completions]
    if pattern == "loose":
        scores = [float(loose(text)) for text in texts]
        reasons = ["the pattern is there" if score else "the pattern is nowhere" for score in scores]
    else:
        parsed = parsed or list(map(parse, texts, stop_reason or ["stop"] * len(texts)))
        scores = [float(parts.ok) for parts in parsed]
        reasons = ["; ".join(parts.problems) for parts in parsed]
        if log_extra:
            log_extra("format_problems", reasons)
    if explain and log_extra:
        log_extra("format_reason", [reason or "it follows the grammar" for reason in reasons])
    return scores


def loose(text):
    """`re.search(r"<think>.*?</think>\\s*<answer>.*?</answer>", text, re.DOTALL)` in linear time."""
    start = text.find("<think>")
    middle = MIDDLE.search(text, start + len("<think>")) if start >= 0 else None
    return middle is not None and "</answer>" in text[middle.end() :]
