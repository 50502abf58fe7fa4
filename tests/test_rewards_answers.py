"""Answers by kind and in sentences: what a careful reader would pay for (fixtures/), and what it costs to read."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from covo_rl.prompt import parse
from covo_rl.rewards import load_reward
from covo_rl.rewards.rules.answers import grade
from covo_rl.rewards.rules.formula import read_formula

FIXTURES = Path(__file__).parent / "fixtures"


def rows(name):
    return [json.loads(line) for line in (FIXTURES / name).read_text(encoding="utf-8").splitlines()]


ANSWERS = rows("answer_cases.jsonl")
CASES = ANSWERS + rows("sentence_cases.jsonl")


def verdict(said, row):
    return grade(
        said.strip() or None, row["answer"], row.get("choices", ()), kind=row.get("kind"),
        question=row.get("question", ""),
    )  # fmt: skip


def test_no_wrong_answer_is_paid_for():
    """finding 36: a sign with a space, a label against the text, superscripts, mixed numbers, dates, chord names..."""
    paid = [(row["class"], said, row["answer"]) for row in CASES for said in row.get("wrong", ()) if verdict(said, row)]
    assert not paid


def test_no_right_answer_is_refused():
    """finding 37: LaTeX and markdown around it, brackets and marks of all scripts, clocks, ranges, number words..."""
    refused = [
        (row["class"], said, row["answer"])
        for row in CASES
        for said in row.get("right", ())
        if verdict(said, row) != 1.0
    ]
    assert not refused


def test_where_readers_differ_the_verdict_is_recorded_with_its_reason():
    """finding 37: debatable answers. What makes a careful reader hesitate is refused; punctuation decorates."""
    decided = [(row, *decision) for row in CASES for decision in row.get("decided", ())]
    assert [(said, verdict(said, row)) for row, said, right, _ in decided] == [
        (said, float(right)) for _, said, right, _ in decided
    ]


def test_the_cases_cover_both_sides_of_many_kinds():
    right = Counter(row["class"] for row in CASES for _ in row.get("right", ()))
    wrong = Counter(row["class"] for row in CASES for _ in row.get("wrong", ()))
    assert right.total() > 1200 and wrong.total() > 1200 and len(right.keys() & wrong.keys()) > 50


FRAMES = [
    "%s", "$%s$", "$$%s$$", "\\(%s\\)", "\\[%s\\]", "\\boxed{%s}", "\\text{%s}", "\\boxed{\\text{%s}}", "**%s**",
    "*%s*", "`%s`", '"%s"', "The answer is %s", "Answer: %s", "**Answer:** %s", "**Answer: %s**", "## Answer\n%s",
    "> %s",
    "The final answer is \\boxed{%s}.", "Final Answer: $\\text{%s}$", "```\n%s\n```", '["%s"]', '{"answer": "%s"}',
    "\u201c%s\u201d", "\u00ab%s\u00bb", "\u200b%s\ufeff", "%s<|im_end|>", "%s</s>", "<b>%s</b>", "Therefore, %s",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["numeric", "text", None])
def test_the_right_answer_itself_is_right_in_every_frame_under_every_kind(kind):
    """finding 37: `$...$` around the key under answer_kind numeric was refused for 97 of 518 keys."""
    keys = {key for row in ANSWERS for key in (row["answer"], *row.get("choices", ()))}
    refused = [(frame, key) for key in keys if not set(key) & set('"\\') for frame in FRAMES
               if grade(frame % key, key, kind=kind) != 1.0]  # fmt: skip
    assert not refused


@pytest.mark.parametrize("case", rows("format_cases.jsonl"), ids=lambda case: case["case"])
def test_tags(case):
    """finding 36: a <think> of zero-width characters was format; finding 37: a tag opened twice hid the answer."""
    arguments = {"answer": ["cat"], "choices": [["dog", "cat", "cow"]]}
    scores = [load_reward(name)([case["completion"]], **arguments)[0] for name in ("accuracy", "format")]
    assert scores == [case["accuracy"], case["format"]]


@pytest.mark.parametrize(
    "blank", ["\u200b\u200b", "\u2060", "\ufeff", "\u3164", "\u115f", "\u2800", "\ufe0f", "\u00ad", "\u0301", "\u202e",
              "\x00", "\u2003\u200d", "\U000e0020", "\u180e"]
)  # fmt: skip
def test_a_block_that_nobody_can_see_is_empty(blank):
    """finding 36: invisible characters are no thinking and no answer."""
    assert not parse(f"<think>{blank}</think><answer>cat</answer>").ok
    assert not parse(f"<think>It meows.</think><answer>{blank}</answer>").ok
    assert parse(f"<think>{blank}It meows.</think><answer>cat{blank}</answer>").ok


FORMULAS = [
    "sin(((exp(64))^64)^64)", "sin((((exp(64))^64)^64)^64)", "cos(((exp(64))^64)^64)+1", "tan(exp(exp(exp(64))))",
    "((((9^64)^64)^64)^64)", "(((2^64)^64)^64)", "((x^64)^64)^64", "(x+1)^64^64", "log(((exp(64))^64)^64)", "sin(1e64)",
    "cos(10^40*pi)", "sqrt(" * 22 + "2" + ")" * 22, "exp(" * 22 + "1" + ")" * 22, "\\sqrt{" * 22 + "x" + "}" * 22,
    "*".join(["1e64"] * 20), "*".join(["(x+1)"] * 15) + "^64", "+".join(["exp(64)^64"] * 8), "1/" * 50 + "3",
    "exp(-64)^64", "(exp(64)^64-exp(64)^64)", "i^i^i", "exp(i*10^40)", "sin(i*64)", "(-8)^(1/3)", "sqrt(2)^64" * 8,
    "(1/3)^64/(1/7)^64", "exp(exp(4))" * 10, "{" + ",".join(["x"] * 59) + "}", "99!", "(99!)!", "(e^(e^(e^3)))",
    "pi^pi^pi", "(pi^64)^64", "9." + "9" * 39, "(x^x)^x", "(x^(64*x))^64", "exp(x^64)", "log(-1)^64", "1e64^64",
]  # fmt: skip
PIECES = [
    "(", "[", "{", "9", "9 ", "1,", "1.", "- ", "+ -", "*", "_", "$", "\\boxed{", "'", '"', "```\n", "a ", "A. ",
    "not ", "one hundred ", "million ", "minus ", "1 to ", "between 1 and ", "1:3", "1 000 ", "1'000", "1.000",
    "12,34,", "A.B.", "&amp;", "<|a|>", "</s>", "<", "\xbd", "x\xb2", "\ufdfa", "e\u0301\u0327", "\u0327\u0301",
    "\u1e9b\u0323", "\u200b", "\u3164", "\U0001f431", "\x00", "\n", "\n\n---", " ", "\xa0", "\u3067\u3059",
    "\u7b54\u6848", "the answer is ", "so ", "is correct ", "because ", "not a but b ", "5 May ", "2020-10-20 ",
    "-", "+",
    "in her 30s ", "the sound is ", "the sound is a", "yes not ", "Yes, it is ", "A -> ", "(x) ", "\\text{a} ",
    "\\text{", "\\,", "nineteen ", "twenty nineteen ", "3 in the ", "n't ", "cannot", " - a b ", "(option ", "then ",
    "C# min ", "Cm7 ", "3 p.m", '{"a":', "[[", "\u0964", "\u2460", "1\xbd", "2^", "1/2 ", "and a half ", " ; ", ",",
    "B | ", "I hear a ", "<think>", "</think>",
]  # fmt: skip
CPU_SECONDS = 0.2  # for one completion and one component
CHILD = """
import json, resource, sys, threading, time
resource.setrlimit(resource.RLIMIT_CPU, (100, 100))
from covo_rl.rewards import load_reward
rows = [("5", ()), ("x+1", ()), ("cat", ("dog", "cat"))]
rewards = [load_reward(name) for name in ("accuracy", "format", "consistency", "thinking")]
seconds = []
for text in ["warm", *json.load(sys.stdin)]:
    for gold, choices in rows:
        for reward in rewards:
            begun = time.process_time()
            reward([f"<think>{text}</think><answer>{text}</answer>"], answer=[gold], choices=[choices], question=["?"])
            seconds.append((round(time.process_time() - begun, 3), reward.source.name, gold, text[:30], len(text)))
print(json.dumps([sorted(seconds[12:])[-5:], threading.active_count()]))
"""


def test_the_cost_of_an_answer_is_bounded_by_construction():
    """finding 28: a formula took 1.8 CPU seconds, with one more power over 20, in a thread that stayed behind."""
    long = [piece * (length // len(piece)) for piece in PIECES for length in (300, 20_000)]
    long += [f"a{blank * 20_000}z" for blank in (" ", "\t", "\n", "\xa0")]  # 17 s in a clause, before
    texts = json.dumps(FORMULAS + long + [piece * (10**6 // len(piece)) for piece in ("(", "9", "\u0301", "$", "a ")])
    child = subprocess.run([sys.executable, "-c", CHILD], input=texts, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-2000:]
    slowest, threads = json.loads(child.stdout)
    assert threads == 1 and slowest[-1][0] < CPU_SECONDS, slowest


def test_a_formula_beyond_the_bounds_has_no_value():
    """finding 28: what cannot be computed in numbers of fixed size is refused, not tried."""
    for text in ("sin(((exp(64))^64)^64)", "sin(1e64)", "exp(exp(exp(64)))", "2^64^64", "((9^64)^64)^64", "1/0"):
        assert read_formula(text) is None, text
    for text in ("exp(64)^40", "sin(1000)", "2^2000/2^1999", "(x+1)^64"):
        assert read_formula(text) is not None, text
