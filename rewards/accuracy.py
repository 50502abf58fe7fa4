"""R_accuracy: 1 if the answer block names the right answer, else 0; None if the row itself cannot be graded.

    covo-rl rewards try accuracy --completion "<answer>(B) cat</answer>" --row row.json

The kind of answer is read from the row and can be forced with a column `answer_kind` or `accuracy(kind='text')`:

    choice    the row has options: the option's text or its letter, exactly one option
    numeric   the right answer is a number, a quantity or a formula: equal in value, never through `eval`
    text      anything else: equal after normalisation
    wer       never chosen by itself: word error rate of at most `max_wer` (needs jiwer)

Only the answer block counts. No block, two blocks, or a block inside the reasoning is 0, whatever the text says.
`accuracy(part='text')` reads the whole reply: one that is spoken has no blocks.
"""

from covo_rl.prompt import Parsed
from covo_rl.rewards.columns import completion_rows, completion_text
from covo_rl.rewards.rules.answers import find_gold, grade, interpret


def accuracy(
    completions, answer, choices=None, question=None, parsed=None, answer_kind=None, kind=None, max_wer=0.0,
    part="answer", explain=None, log_extra=None, log_missing=None, **kwargs,
):  # fmt: skip
    """
    >>> accuracy(["<think>It barks.</think><answer>(A) dog</answer>"], answer=["dog"], choices=[["dog", "cat"]])
    [1.0]
    """
    if part not in ("answer", "text"):
        raise ValueError(f"part {part!r}: there are answer and text")
    scores = []
    if part == "text":
        parsed = [Parsed(None, completion_text(completion).strip()) for completion in completions]
    rows = completion_rows(completions, parsed, answer, choices, question, answer_kind)
    for index, (parts, gold, options, asked, row_kind) in enumerate(rows):
        score = grade(parts.answer, gold, options or (), kind=kind or row_kind, question=asked or "", max_wer=max_wer)
        if score is None and log_missing:
            log_missing(index, f"the row's answer {gold!r} is missing or not one of its options")
        scores.append(score)
    if explain and log_extra:
        log_extra("accuracy_reason", [_reason(kind, *row) for row in rows])
    return scores


def _reason(kind, parts, gold, options, asked, row_kind):
    if not parts.answer:
        return "there is no single answer block to read"
    if not options or (kind or row_kind or "choice") != "choice":
        return f"{parts.answer!r:.80} against {gold!r:.80}"
    index = interpret(parts.answer, options, asked or "")
    right = find_gold(gold, options) if not isinstance(gold, (list, tuple)) else None
    named = "no single option" if index is None else f"{options[index]!r:.80}"
    return f"the answer names {named}; right is {gold if right is None else options[right]!r:.80}"
