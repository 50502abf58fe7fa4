"""R_accuracy: no wrong answer is paid for and no right one refused, on the cases of fixtures/tricky_answers.jsonl."""

import accuracy_rules
import pytest

from covo_rl.rewards import load_reward
from covo_rl.rewards.rules.answers import answer_kind, find_gold, grade, interpret
from covo_rl.rewards.rules.formula import FormulaError, tokenize
from tests.own_time import seconds

DOG_CAT = ["dog", "cat"]


@pytest.mark.parametrize(
    "case", accuracy_rules.cases(), ids=lambda c: f"{c['trap']}: {c['answer']!r} for {c['gold']!r}"[:80]
)
def test_tricky_answers(case):
    completion = f"<think>x</think><answer>{case['answer']}</answer>"
    assert load_reward("accuracy")([completion], answer=[case["gold"]], choices=[case["choices"]]) == [
        float(case["right"])
    ]


def test_the_other_rules_fail_where_ours_does_not():
    assert accuracy_rules.errors(accuracy_rules.ours) == (0, 0)
    for name, rule in accuracy_rules.RULES.items():
        assert name == "ours" or sum(accuracy_rules.errors(rule)) >= 20


def test_the_documented_table_is_the_generated_one():
    assert accuracy_rules.table() in accuracy_rules.DOCS.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("bell", 0.0),
        ("<answer>dog</answer>", 1.0),  # the form is another reward's business
        ("<answer>dog</answer><answer>dog</answer>", 0.0),
        ("<think><answer>dog</answer></think>", 0.0),
        ("", 0.0),
    ],
)
def test_only_the_one_answer_block_counts(completion, score):
    assert load_reward("accuracy")([completion], answer=["dog"], choices=[DOG_CAT]) == [score]


def test_every_option_is_found_by_its_own_text():
    for options in (
        ["A", "C", "B"],
        ["1", "2"],
        ["A.", "B."],
        ["the", "a"],
        ["", "dog"],
        ["+", "-"],
        ["(B)", "(A)"],
        ["?", "!"],
    ):
        for i, option in enumerate(options):
            assert interpret(option, options) in (i, None)
            if option.isalnum():
                assert interpret(option, options) == i


@pytest.mark.parametrize(
    ("gold", "index"), [("cat", 1), ("B", 1), ("(B)", 1), (1, 1), ("bird", None), (None, None), (7, None)]
)
def test_the_gold_answer_may_be_text_letter_or_index(gold, index):
    assert find_gold(gold, DOG_CAT) == index


def test_a_row_without_a_gradeable_answer_is_none_and_says_why():
    said = {}
    scores = load_reward("accuracy")(
        ["<answer>dog</answer>"] * 2, answer=["bird", "dog"], choices=[DOG_CAT] * 2, log_missing=said.__setitem__
    )
    assert scores == [None, 1.0] and "bird" in said[0]


@pytest.mark.parametrize(
    ("gold", "choices", "kind"),
    [("dog", DOG_CAT, "choice"), ("12", [], "numeric"), ("12 kHz", [], "numeric"), ("\\frac12", [], "numeric"),
     ("x^2", [], "numeric"), ("a dog", [], "text"), ("C4", [], "text"), ("9**9**9", [], "text")],
)  # fmt: skip
def test_the_kind_is_read_from_the_row(gold, choices, kind):
    assert answer_kind(gold, choices) == kind


def test_the_kind_can_be_forced():
    answer = ["<answer>1/2</answer>"]
    assert load_reward("accuracy")(answer, answer=["0.5"]) == [1.0]
    assert load_reward("accuracy(kind='text')")(answer, answer=["0.5"]) == [0.0]
    assert load_reward("accuracy")(answer, answer=["0.5"], answer_kind=["text"]) == [0.0]
    with pytest.raises(ValueError, match="choice, numeric, text, wer"):
        load_reward("accuracy(kind='maths')")(answer, answer=["0.5"])


def test_several_right_answers_are_allowed():
    assert grade("kitten", ["cat", "kitten"]) == 1.0 and grade("dog", ["cat", "kitten"]) == 0.0


def test_word_error_rate_is_a_threshold():
    pytest.importorskip("jiwer")
    said, gold = "<answer>the cat sat on a mat</answer>", "The cat sat on the hat."  # 1 of 4 words, articles dropped
    assert load_reward("accuracy(kind='wer', max_wer=0.25)")([said], answer=[gold]) == [1.0]
    assert load_reward("accuracy(kind='wer', max_wer=0.2)")([said], answer=[gold]) == [0.0]


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [("sqrt(8)", "2\\sqrt{2}", 1), ("x^2-1", "(x-1)(x+1)", 1), ("sin(x)^2+cos(x)^2", "1", 1), ("x=5", "5", 1),
     ("{1,2}", "{2,1}", 1), ("(1,2)", "(2,1)", 0), ("0.333", "1/3", 0), ("0.3333333", "1/3", 1), ("3.14", "\\pi", 0),
     ("-5", "5", 0), ("1e3", "1000", 1), ("1,000", "1000", 1), ("50%", "0.5", 1), ("y", "x", 0), ("2x", "2y", 0),
     ("x^2", "x^2+0", 1), ("5 or 6", "5", 0), ("120", "120 bpm", 1), ("e^x", "exp(x)", 1), ("3/4", "4/3", 0)],
)  # fmt: skip
def test_numbers_and_formulas(answer, gold, right):
    assert grade(answer, gold) == right


def test_a_unit_that_the_gold_answer_lacks_must_stand_in_the_question():
    assert grade("120 bpm", "120") == 0.0
    assert grade("120 bpm", "120", question="What is the tempo in BPM?") == 1.0


HOSTILE = [
    "9**9**9", "9^9^9^9", "((9^9)^9)^9^9", "__import__('os').system('true')", "(" * 5000 + "1" + ")" * 5000,
    "[" * 10_000,
    "1" * 10_000, "9" * 40 + "^64^64", "exp(exp(exp(99)))", "2^(2^(2^x))", "1/(1-1)", "0^0", "0^-1", "\\frac{1}{0}",
    "log(0)",
    "factorial(99999)", "9!!!!!!!!", "lambda: 0", "x.__class__", "eval('1')", "1e999999", "sqrt(" * 30 + "2" + ")" * 30,
    "tan(pi/2)", "\\input{/etc/passwd}", "{" * 200, "-" * 200 + "1", "+".join(["x"] * 200), "oo-oo", "oo", "0*oo",
    "(x+1)^64*(x+2)^64*(x+3)^64", "i^i^i", "1" + "0" * 39 + "^64",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: t[:24])
def test_hostile_formulas_are_wrong_within_milliseconds(text):
    grade("1/2", "x/2")  # mpmath is loaded
    grades = []
    assert seconds(lambda: grades.extend([grade(text, "5"), grade(text, "x+1"), grade("5", text)])) < 0.25
    assert grades[:2] == [0.0, 0.0] and grades[2] in (0.0, 1.0)


def test_the_tokeniser_refuses_by_name():
    with pytest.raises(FormulaError, match="character '_'"):
        tokenize("__import__")
    with pytest.raises(FormulaError, match="name 'os' is not allowed"):
        tokenize("os")
