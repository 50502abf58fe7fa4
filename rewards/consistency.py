"""R_consistency: 1 if the reasoning supports the answer given, 0 if it does not, None if it commits to nothing.

    covo-rl rewards try consistency --completion "<think>So it is a bell.</think><answer>knock</answer>" --row row.json

Whether the answer is right plays no part. With a judge (`judge: openai:MODEL@URL`) the judge says yes or no. Without,
a deterministic checker finds the last option that the reasoning commits to, negations and hedges respected, and
compares it with the answer. No reasoning or no readable answer is 0: there is nothing that could support it.
"""

from covo_rl.rewards.columns import completion_rows
from covo_rl.rewards.judging import judge_scores
from covo_rl.rewards.rules.reasoning import supports


def consistency(
    completions, question=None, choices=None, parsed=None, judge=None, log_extra=None, log_missing=None,
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
    return scores
