"""R_majority: 1 if the answer agrees with the majority answer of its group, else 0; None where there is no majority.

    covo-rl rewards score --rewards majority --input RUN/rollouts/step_00001.jsonl --output scored.jsonl

Without labels: the rollouts of a prompt vote, and the most frequent answer stands in for the key (test-time RL, TTRL,
arXiv 2504.16084). Answers agree where R_accuracy would call one right if the other were the key, so `B`, `(B) cat` and
`cat` are one vote each for the same option. What cannot be read, or names no option, does not vote and scores 0.

The paper takes the most frequent answer and is silent on ties. A tie, or votes that are all different, says nothing
about which answer is right: every rollout of such a group is None, and so is one that is alone.

A group is what the trainer says (`group_id`); in TRL, adjacent rows of equal prompt, id, question and choices, or every
`majority(num_generations=8)` rows. A rank must hold whole groups, as ours do.

What it pays for is agreement, right or wrong: see that `majority_unanimous` does not rise while accuracy falls.
"""

from collections import Counter
from itertools import groupby
from statistics import fmean
from typing import Any

from covo_rl.rewards.columns import completion_rows
from covo_rl.rewards.rules.answers import grade, interpret
from covo_rl.rewards.rules.normalize import loose_key

#: Characters of a number, formula or quantity that is worth reading; longer answers agree word by word, or not.
LONGEST_VALUE = 400


def majority(
    completions, prompts=None, group_id=None, id=None, question=None, choices=None, answer_kind=None, answer=None,
    parsed=None, num_generations=None, log_extra=None, log_missing=None, log_metric=None, **kwargs,
):  # fmt: skip
    """
    >>> said = [f"<answer>{a}</answer>" for a in ("B", "(B) cat", "dog")]
    >>> majority(said, choices=[["dog", "cat"]] * 3)
    [1.0, 1.0, 0.0]
    """
    rows = completion_rows(completions, parsed, question, choices, answer_kind, answer)
    columns = (column for column in (prompts, group_id, id, question, choices) if column is not None)
    keys = [repr(key) for key in zip(*columns, strict=True)] or [""] * len(rows)
    scores, reasons, figures = [], [], []
    for group in _groups(keys, num_generations):
        rollouts = rows[group.start : group.stop]
        _, asked, options, kind, gold = rollouts[0]
        votes, agreeing, why = _vote([parts.answer for parts, *_ in rollouts], asked or "", options or (), kind)
        scores += map(float, agreeing or ())
        if agreeing is None:
            scores += [None] * len(rollouts)
            if log_missing:
                for index in group:
                    log_missing(index, why)
        reasons += [why] * len(rollouts)
        right = None
        if agreeing is not None and gold is not None:
            winner = next(row[0].answer for row, agrees in zip(rollouts, agreeing, strict=True) if agrees)
            right = grade(winner, gold, options or (), kind=kind, question=asked or "")
        figures.append((len(votes), max(votes, default=0) == len(rollouts) > 1, right))
    if log_extra:
        log_extra("majority_reason", reasons)
    if log_metric:
        for name, value in _figures(figures).items():
            log_metric(name, value)
    return scores


def _groups(keys, size):
    """Ranges of rows of one prompt: adjacent rows with equal keys, or blocks of `size` rows."""
    if size is None:
        sizes = [len(list(run)) for _, run in groupby(keys)]
    elif size < 1 or len(keys) % size:
        raise ValueError(f"{len(keys)} completions are no whole groups of num_generations={size}")
    else:
        sizes = [size] * (len(keys) // size)
    start = 0
    for count in sizes:
        yield range(start, start + count)
        start += count


def _vote(answers, question, choices, kind):
    """(votes of every distinct answer, whether each answer agrees with the majority or None without one, why)."""
    options = choices if (kind or "choice") == "choice" else ()
    names: list[Any] = []
    for answer in answers:
        names.append(interpret(answer, options, question) if options else loose_key(answer) if answer else None)
    ballots = Counter(name for name in names if name is not None)
    labels = {name: options[name] if options else answers[names.index(name)] for name in ballots}

    def agree(a, b):
        is_value = kind == "wer" or max(len(labels[a]), len(labels[b])) <= LONGEST_VALUE
        return a == b or (not options and is_value and grade(labels[a], labels[b], kind=kind, question=question) == 1.0)

    voters = {name: [other for other in ballots if agree(other, name)] for name in ballots}
    votes = {name: sum(ballots[other] for other in others) for name, others in voters.items()}
    most = max(votes.values(), default=0)
    first = [name for name in votes if votes[name] == most]
    if len(answers) < 2:
        why = "a group of one has no majority"
    elif not ballots:
        why = "no answer of the group can be read"
    elif most < 2 or any(name not in voters[first[0]] for name in first):
        why = f"no majority: {len(first)} answers have {most} of {len(answers)} votes"
    else:
        why = f"{most} of {len(answers)} votes for {labels[first[0]]!r:.80}"
        return list(votes.values()), [name is not None and name in voters[first[0]] for name in names], why
    return list(votes.values()), None, why


def _figures(groups):
    """Over groups: distinct answers, share that agrees throughout, and of majorities with a key, the share right."""
    if not groups:
        return {}
    right = [score for *_, score in groups if score is not None]
    figures = {
        "majority_answers": fmean(answers for answers, *_ in groups),
        "majority_unanimous": fmean(whole for _, whole, _ in groups),
    }
    return figures | ({"majority_right": fmean(right)} if right else {})
