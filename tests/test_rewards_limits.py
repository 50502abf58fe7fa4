"""Untrusted text: nothing raises, nothing runs away; ten thousand completions in two seconds of one core."""

import random
from statistics import median

from covo_rl.prompt import parse
from covo_rl.rewards import load_reward, score
from covo_rl.rewards.columns import example_from_row, group_from_completions
from covo_rl.rewards.linter import CASES
from covo_rl.synth import render_sample
from tests.own_time import seconds, units

NAMES = ("accuracy", "format", "consistency", "thinking")
PIECES = [
    "<think>", "</think>", "<answer>", "</answer>", "bell", "knock", "not", "so", "answer is", "(A)", "B)", "option",
    ",", ".",
    "?", "\n", " ", "9**9**9", "(", ")", "\\frac{", "}", "^", "1/0", "1e99", "__import__('os')", "\u0000", "\u200b",
    "e\u0301",
    "\ud800", "\u202e", "\U0001f514", "\uff21", "\u6ca1", "\u2603", "one", "hundred", "and", "12", "-", "--", "+3 dB",
    "the", "a",
    "isn't", "'", '"', "$", "\\boxed{", "%", "x", "=", "{", "[", "\u0660", "\u00bd", "\u2460", "\u0130", "\u00df",
    "\ufdfa",
]  # fmt: skip
ROWS = [
    {"question": "What is first?", "choices": ["bell", "knock", "A", "-3 dB", "not a bell"], "answer": "bell",
     "facts": {"n": 3, "s": "bell", "o": ["bell", "knock"]}, "fact_lexicon": {"s": ["bell", "knock"]}},
    {"question": "", "choices": [], "answer": "x+1"},
    {"question": "?", "choices": [], "answer": "12 kHz"},
    {"question": "?", "choices": ["", "", "?"], "answer": "the bell"},
]  # fmt: skip


def strings(count: int, seed: int) -> list[str]:
    """Random sequences of pieces, half of them inside the right form."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        text = "".join(rng.choices(PIECES, k=rng.randrange(14)))
        made.append(f"<think>{text}</think><answer>{''.join(rng.choices(PIECES[4:], k=4))}</answer>" if i % 2 else text)
    return made


def test_twenty_thousand_adversarial_strings():
    def score_all():
        for seed, row in enumerate(ROWS):
            texts = strings(5000, seed)
            columns = {name: [value] * len(texts) for name, value in row.items()}
            parsed = [parse(text) for text in texts]
            for name in NAMES:
                scores = load_reward(name)(completions=texts, parsed=parsed, **columns)
                assert len(scores) == len(texts) == 5000 and all(s is None or 0 <= s <= 1 for s in scores)

    assert seconds(score_all) < 60


def test_long_completions_take_milliseconds():
    long = [
        "<think>" * 7000, "<answer>" + "(" * 25_000 + ")" * 25_000 + "</answer>", "<think>" + "a" * 50_000 + "</think>",
        "<think>" + "not " * 12_500 + "</think><answer>bell</answer>",
        "<think>" + "bell, " * 8000 + "</think><answer>A</answer>",
        "<think>" + "so it is (A) " * 4000 + "</think><answer>" + "bell " * 10_000 + "</answer>",
        "<think>x</think>" + " " * 50_000 + "<answer>bell</answer>",
        "<answer>" + "\\boxed{" * 8000 + "}" * 8000 + "</answer>",
        "<think>" + "one hundred and " * 3000 + "</think><answer>" + "-" * 50_000 + "</answer>", "\n" * 50_000,
        "<answer>" + "$" * 50_001 + "</answer>",
        "<think>" + "'a" * 25_000 + "</think><answer>" + "1,"* 25_000 + "</answer>",
    ]  # fmt: skip
    for row in ROWS:
        for text in long:
            columns = {"completions": [text], **{key: [value] for key, value in row.items()}}
            took = seconds(lambda columns=columns: [load_reward(name)(**columns) for name in NAMES])
            assert took < 1.0, (text[:30], row)


def realistic(count: int):
    """Rollouts as a policy in training writes them: mostly right form, all different, every kind of mistake."""
    rng = random.Random(0)
    groups = []
    rows = [render_sample("train", i)[0] for i in range(44)]
    for i in range(count // 8):
        row = rows[i % 44]
        texts = []
        for _ in range(8):
            think = f"{row['evidence']} Take {rng.randrange(10**6)} listens to be sure of that. " + " ".join(
                rng.choice(["I hear it clearly.", "It is not loud.", "So it stays.", "The noise is low."])
                for _ in range(4)
            )
            answer = rng.choice(row["choices"])
            texts.append(f"<think>{think} So the answer is {answer}.</think><answer>{answer}</answer>")
        texts[0] = rng.choice(CASES).completion
        groups.append(group_from_completions(example_from_row(row, i), texts))
    return groups


def test_ten_thousand_completions_by_four_components_take_two_seconds():
    """In units of what the core does beside it, 110 of them measured: twice the promise where one takes 0.02 s."""
    groups = realistic(10_000)
    assert score(groups[:250]).rewards_PGR.shape == (250, 8, 4)
    ratios = [units(lambda part=part: score(groups[part : part + 250])) for part in range(0, len(groups), 250)]
    assert len(ratios) == 5 and 5 * median(ratios) < 200, ratios
