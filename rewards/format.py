"""R_format: 1 if the completion follows the one grammar `<think>...</think><answer>...</answer>`, else 0.

    covo-rl rewards try format --completion "<think>It rings.</think><answer>bell</answer>"

The grammar is anchored and strict (covo_rl/prompt.py). `format(pattern='loose')` is the pattern that published
audio-GRPO code searches for anywhere in the completion; it pays for text around the blocks, for two answers and for
tags inside the reasoning, and is here only to compare with. `format(pattern='tags')` is a quarter for each of the four
tags that is there exactly once, wherever it stands: for a model that never writes the whole grammar by itself, to start
with.
"""

import re

from covo_rl.prompt import parse
from covo_rl.rewards.columns import completion_text
from covo_rl.types import TAG_TOKENS

MIDDLE = re.compile(r"</think>\s*<answer>")


def format(completions, parsed=None, stop_reason=None, pattern="strict", explain=None, log_extra=None, **kwargs):
    """
    >>> format(["<think>It rings.</think><answer>bell</answer>", "<answer>bell</answer>"])
    [1.0, 0.0]
    """
    if pattern not in ("strict", "loose", "tags"):
        raise ValueError(f"pattern {pattern!r}: there are strict, loose and tags")
    texts = [completion_text(completion) for completion in completions]
    if pattern == "loose":
        scores = [float(loose(text)) for text in texts]
        reasons = ["the pattern is there" if score else "the pattern is nowhere" for score in scores]
    elif pattern == "tags":
        counts = [{tag: text.count(tag) for tag in TAG_TOKENS} for text in texts]
        scores = [sum(count == 1 for count in tags.values()) / len(TAG_TOKENS) for tags in counts]
        reasons = [", ".join(f"{count} {tag}" for tag, count in tags.items()) for tags in counts]
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
