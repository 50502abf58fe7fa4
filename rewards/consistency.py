"""R_consistency: 1 if the reasoning supports the answer given, 0 if it does not, None if it commits to nothing.

    covo-rl rewards try consistency --completion "<think>So it is a bell.</think><answer>knock</answer>" --row row.json

Whether the answer is right plays no part. With a judge (`judge: openai:MODEL@URL`) the judge says yes or no. Without,
a deterministic checker finds the last option that the reasoning commits to, negations and hedges respected, and
compares it with the answer. No reasoning or no readable answer is 0: there is nothing that could support it.
"""

from covo_rl.rewards.columns import completion_rows
from covo_rl.rewards.judging import judge_scores
from covo_rl.rewards.rules.answers import interpret
from covo_rl.rewards.rules.reasoning import concluded, concluded_text, supports


def consistency(
    completions, question=None, choices=None, parsed=None, judge=None, explain=None, log_extra=None, log_missing=None,
    log_metric=None, **kwargs,
):  # fmt: skip
    """
    >>> consistency(["<think>A dull thud, so it is a knock.</think><answer>B</answer>"], choices=[["bell", "knock"]])
    [1.0]
    """
    rows = completion_rows(completions, parsed, question, choices)
    if judge is not None:
        return judge_scores(judge, "consistency", rows, log_missing, log_extra, log_metric)
    scores = []
    for index, (parts, asked, options) in enumerate(rows):
        verdict = supports(parts.think, parts.answer, options or (), asked or "")
        if verdict is None and log_missing:
            log_missing(index, "the reasoning commits to no answer")
        scores.append(None if verdict is None else float(verdict))
    if explain and log_extra:
        log_extra("consistency_reason", [_reason(parts, asked or "", options or ()) for parts, asked, options in rows])
    return scores


def _reason(parts, asked, options):
    if not parts.think or not parts.answer:
        return "there is no reasoning or no answer to read"
    if not options:
        held = concluded_text(parts.think, parts.answer)
        return f"the reasoning {'commits to nothing' if held is None else 'states it' if held else 'does not state it'}"
    held, said = concluded(parts.think, tuple(options), asked), interpret(parts.answer, options, asked)
    names = ["no single option" if i is None else f"{options[i]!r:.80}" for i in (held, said)]
    return f"the reasoning commits to {names[0]}, the answer to {names[1]}"
