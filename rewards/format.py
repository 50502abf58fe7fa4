"""R_format: 1 if the completion follows the one grammar `<think>...</think><answer>...</answer>`, else 0.

    covo-rl rewards try format --completion "<think>It rings.</think><answer>bell</answer>"

The grammar is anchored and strict (covo_rl/prompt.py). `format(pattern='loose')` is the pattern that published
audio-GRPO code searches for anywhere in the completion; it pays for text around the blocks, for two answers and for
tags inside the reasoning, and is here only to compare with.
"""

from covo_rl.rewards.text import completion_text, parsed_completions


def format(completions, parsed=None, stop_reason=None, pattern="strict", log_extra=None, **kwargs):
    """
    >>> format(["<think>It rings.</think><answer>bell</answer>", "<answer>bell</answer>"])
    [1.0, 0.0]
    """
    if pattern not in ("strict", "loose"):
        raise ValueError(f"pattern {pattern!r}: there are strict and loose")
    if pattern == "loose":
        return [float(loose(completion_text(completion))) for completion in completions]
    found = parsed_completions(completions, parsed, stop_reason)
    if log_extra:
        log_extra("format_problems", ["; ".join(item.problems) for item in found])
    return [float(item.ok) for item in found]


def loose(text):
    """`re.search(r"<think>.*?</think>\\s*<answer>.*?</answer>", text, re.DOTALL)` in linear time."""
    at = text.find("<think>")
    closed = text.find("</think>", at + 7) if at >= 0 else -1
    while closed >= 0:
        rest = closed + len("</think>")
        while rest < len(text) and text[rest].isspace():
            rest += 1
        if text.startswith("<answer>", rest):
            return text.find("</answer>", rest) >= 0
        closed = text.find("</think>", rest)
    return False
