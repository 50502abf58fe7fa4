"""R_content: 1 where what a full-duplex model says after its SHIFT is what the stream expects, else 0.

The reply is decoded where the rollout stopped (column `reply`) and compared with the column `expected`: as `accuracy`
compares an answer with the row's, or, with a judge (`judge: openai:MODEL@URL`), by whether it tells the user the same.

    "three five" is expected: " Three, five." 1        " three" 0        nothing said, or no SHIFT 0

An early answer is judged by what it says: `early_response` has a price for when. None where the model speaks, where the
stream expects nothing, and where the judge fails.
"""

from covo_rl.rewards.judging import Question, ask_verdicts
from covo_rl.rewards.rules.answers import grade
from covo_rl.rewards.rules.turns import LISTENING, of_kind


def content(
    completions, kind, shift_time, reply, expected, judge=None, log_extra=None, log_missing=None, log_metric=None,
    **kwargs,
):  # fmt: skip
    """
    >>> content([""] * 3, kind=["single"] * 3, shift_time=[1.44, 4.96, None], reply=[" two", " Three, five.", None],
    ...         expected=["three five"] * 3)
    [0.0, 1.0, 0.0]
    """
    rows = zip(of_kind(kind, LISTENING), shift_time, reply, expected, strict=True)
    said = [(text if time is not None else "", gold if listens else None) for listens, time, text, gold in rows]
    if judge is None:
        return [grade((text or "").strip(), gold) for text, gold in said]
    questions = {
        index: Question.about("content.v1", reply=text, expected=gold)
        for index, (text, gold) in enumerate(said) if gold and text and text.strip()
    }  # fmt: skip
    scores = ask_verdicts(judge, "content", questions, len(said), log_missing, log_extra, log_metric, hears=False)
    return [score if gold else None for score, (_, gold) in zip(scores, said, strict=True)]
