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
    if pattern == "loose":
        return [float(loose(completion_text(completion))) for completion in completions]
    if parsed is None:
        reasons = stop_reason or ["stop"] * len(completions)
        parsed = [parse(completion_text(c), reason) for c, reason in zip(completions, reasons, strict=True)]
    if log_extra:
        log_extra("format_problems", ["; ".join(parts.problems) for parts in parsed])
    if explain and log_extra:
        log_extra("format_reason", ["; ".join(parts.problems) or "it follows the grammar" for parts in parsed])
    return [float(parts.ok) for parts in parsed]


def loose(text):
    """`re.search(r"<think>.*?</think>\\s*<answer>.*?</answer>", text, re.DOTALL)` in linear time."""
    start = text.find("<think>")
    middle = MIDDLE.search(text, start + len("<think>")) if start >= 0 else None
    return middle is not None and "</answer>" in text[middle.end() :]
