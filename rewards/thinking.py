"""R_thinking in {0, 0.2, 0.4, 0.6, 0.8, 1}: the share of five criteria that the reasoning meets.

    covo-rl rewards try thinking --completion "<think>I hear a bell ring.</think><answer>bell</answer>" --row row.json

Soundness, factual correctness, error identification, coherence, conciseness. With a judge: five yes/no verdicts; with
`judge_audio` it hears the clips. Without: the checkers of covo_rl/rewards/rules/criteria.py, English and Chinese, among
them a fact-check of every claim about the clip against the row's `facts` and `fact_lexicon` where it has them.

That check knows the truth, so this component alone can teach right answers: `thinking(use_gold=False)` looks neither at
facts nor at the right answer, for experiments that ask what R_accuracy contributes.
"""

from covo_rl.rewards.columns import completion_rows
from covo_rl.rewards.judging import judge_scores
from covo_rl.rewards.rules.criteria import CRITERIA, MAX_WORDS, MIN_WORDS, UNMET, flaw, judge_free


def thinking(
    completions, question=None, choices=None, answer=None, facts=None, fact_lexicon=None, parsed=None, judge=None,
    min_words=MIN_WORDS, max_words=MAX_WORDS, use_gold=True, explain=None, log_extra=None, log_missing=None,
    log_metric=None, clips=None, **kwargs,
):  # fmt: skip
    """
    >>> thinking(["<think>I hear two low knocks on wood.</think><answer>two</answer>"], choices=[["one", "two"]],
    ...          answer=["two"], facts=[{"count": "two"}], fact_lexicon=[{"count": ["one", "two"]}])
    [1.0]
    """
    if not use_gold:
        answer = facts = None
    if judge is not None:
        rows = completion_rows(completions, parsed, question, choices, answer, facts)
        return judge_scores(judge, "thinking", rows, log_missing, log_extra, log_metric, clips)
    scores, unmet, reasons, judged = [], [], [], {}
    rows = completion_rows(completions, parsed, question, choices, answer, facts, fact_lexicon)
    for parts, asked, options, gold, truth, lexicon in rows:
        # late in training the rollouts of a prompt say the same again and again
        same = (parts.think, parts.answer, asked, str(gold), tuple(options or ()), id(truth), id(lexicon))
        if same not in judged:
            judged[same] = judge_free(
                parts.think, parts.answer, question=asked or "", choices=options or (), gold=gold, facts=truth,
                lexicon=lexicon, min_words=min_words, max_words=max_words,
            )  # fmt: skip
        met = judged[same]
        scores.append(sum(met.values()) / len(CRITERIA))
        unmet.append(", ".join(name for name, value in met.items() if not value))
        if explain:
            no_reasoning = flaw(parts.think or "", asked or "", ", ".join(options or ()), options or ())
            missed = [f"{name} ({why})" for name, why in UNMET.items() if not met[name]]
            reasons.append(no_reasoning or ("without " + "; ".join(missed) if missed else "all five criteria are met"))
    if explain and log_extra:
        log_extra("thinking_reason", reasons)
    if log_extra:
        log_extra("thinking_unmet", unmet)
    return scores
