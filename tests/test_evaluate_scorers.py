"""Official scorers against verdicts of the official scripts, and the rules spelled out in rows a reader can check."""

import json
from pathlib import Path

import pytest

from covo_rl.evaluate.sets import letter_rule, reply_words, token_set_match

FIXTURES = Path(__file__).parent / "fixtures" / "scoring"


@pytest.mark.parametrize(("name", "scorer", "count"), [("mmau", token_set_match, 300), ("mmsu", letter_rule, 299)])
def test_every_official_verdict_is_matched(name, scorer, count):
    rows = json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))
    wrong = [row for row in rows if scorer(row[2], row[0], row[1]) is not row[3]]
    assert len(rows) == count
    assert wrong == []


PETS = ["dog", "cat", "horse", "sheep"]


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("(A) dog", True),
        ("A", False),
        ("dog and cat", False),
        ("dogs", False),
        ("hotdog", False),
        ("dog_like", False),
        ("dog-like", True),
        ("not a dog", True),
        ("not a cat; a dog", False),
        ("DOG", True),
        ("", False),
        ("...", False),
        (None, None),
        (3, None),
    ],
)
def test_token_set_match_on_pets(reply, verdict):
    assert token_set_match(reply, PETS, "dog") is verdict


@pytest.mark.parametrize(
    ("choices", "answer", "reply", "verdict"),
    [
        (["one", "two"], "one", "1", False),
        (["C", "D"], "C", "C#", True),
        (["+3 dB", "+6 dB"], "+3 dB", "-3 dB", True),
        (["happy, sad", "sad, angry"], "happy, sad", "sad, happy", True),
        (["10 Hz", "20 Hz"], "10 Hz", "10Hz", False),
        (["1.5", "2"], "1.5", "5.1", True),
        (["快乐", "悲伤"], "快乐", "答案是快乐", False),
        (["快乐", "悲伤"], "快乐", "答案:快乐", True),
        (["café", "bar"], "café", "cafe\u0301", False),
        (["can", "will"], "can", "can't", True),
        (["can't", "will"], "can't", "can", False),
        ([], "dog", "the dog", True),
        (["--", "dog"], "--", "anything", True),
        (["--", "dog"], "--", "a dog", False),
        (["rain", "heavy rain"], "rain", "heavy rain", False),
        (["rain", "heavy rain"], "heavy rain", "heavy rain", True),
        (["rain", "Rain"], "rain", "RAIN", True),
        (["İ", "b"], "İ", "İ", True),
    ],
)
def test_token_set_match_rules(choices, answer, reply, verdict):
    assert token_set_match(reply, choices, answer) is verdict


def test_cant_for_can_is_wrong_when_it_is_the_option():
    # benchmarks notes: `can't` for `can` is wrong where "t" belongs to another option.
    assert token_set_match("can't", ["can", "can't"], "can") is False


def test_reply_words_keep_letters_digits_and_underscore_of_any_script():
    assert reply_words("It's A_b 1.5, x² 快乐!") == {"it", "s", "a_b", "1", "5", "x²", "快乐"}


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Dog", False),  # D
        ("Both", True),  # B
        ("NASA.", False),  # second-last A
        ("(A)", False),
        ("(A).", None),
        ("(B)", True),
        ("The answer is B", None),
        ("The answer is B.", True),
        ("Answer: B", False),  # starts with A
        ("<answer>B</answer>", None),
        ("b", None),
        ("B", True),
        (" \nB\n", True),
        ("", False),
        ("\n", False),
        ("None", False),
        ("No\nne", False),  # newlines go first
        ("none", None),
        (None, None),
        (2, None),
        (["B"], None),
    ],
)
def test_letter_rule(reply, verdict):
    assert letter_rule(reply, PETS, "cat") is verdict


def test_letter_rule_compares_option_texts():
    assert letter_rule("A", ["rain", "rain", "wind"], "rain") is True
    assert letter_rule("B", ["rain", "rain", "wind"], "rain") is True
    assert letter_rule("D", ["yes", "no"], "yes") is False, "a letter without an option is a wrong answer, not a crash"
