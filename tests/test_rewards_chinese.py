"""R_consistency and R_thinking on Chinese reasoning: a table of verdicts as a reader gives them, and how it is read."""
# ruff: noqa: RUF001  (full-width marks are part of the text)

import json
from pathlib import Path

import pytest

from covo_rl.rewards import load_reward
from covo_rl.rewards.rules.chinese import chinese_tokens, is_chinese, pieces
from covo_rl.rewards.rules.criteria import CRITERIA, claims, flaw, judge_free
from covo_rl.rewards.rules.reasoning import clauses, concluded, supports
from tests.own_time import seconds

ROWS = [
    json.loads(line)
    for line in (Path(__file__).parent / "fixtures" / "chinese_cases.jsonl").read_text("utf-8").splitlines()
]
CONSISTENCY = [row for row in ROWS if row["kind"] == "consistency"]
THINKING = [row for row in ROWS if row["kind"] == "thinking"]


def test_the_table_has_every_verdict():
    verdicts = [row["verdict"] for row in CONSISTENCY]
    assert min(verdicts.count(value) for value in (True, False, None)) >= 20 and len(ROWS) >= 150
    assert {len(row["unmet"]) for row in THINKING} >= {0, 1, 2, 4, 5}


@pytest.mark.parametrize("row", CONSISTENCY, ids=lambda row: f"{row['think'][:16]}:{row['answer']}")
def test_what_chinese_reasoning_supports(row):
    verdict = supports(row["think"], row["answer"], row["choices"], row["question"])
    assert verdict is row["verdict"], clauses(row["think"])


@pytest.mark.parametrize("row", THINKING, ids=lambda row: row["think"][:16])
def test_how_chinese_reasoning_is_graded(row):
    met = judge_free(row["think"], row["answer"], **{name: row[name] for name in
                     ("question", "choices", "gold", "facts", "lexicon")})  # fmt: skip
    assert [name for name in CRITERIA if not met[name]] == row["unmet"]


def test_the_rewards_grade_chinese_completions():
    said = "<think>我听到木头上低沉的闷响，一共三下，所以不是钟声，而是敲门声。</think><answer>{}</answer>"
    columns = {"question": ["什么声音？"] * 2, "choices": [["钟声", "敲门声"]] * 2, "answer": ["敲门声"] * 2,
               "facts": [{"次数": "三"}] * 2, "fact_lexicon": [{"次数": ["二", "三"]}] * 2}  # fmt: skip
    completions = [said.format("B"), said.format("钟声")]
    assert load_reward("consistency")(completions, **columns) == [1.0, 0.0]
    assert load_reward("thinking")(completions, **columns) == [1.0, 0.8]


@pytest.mark.parametrize(
    ("text", "truths"),
    [
        ("一共敲了三下。", [True]),
        ("敲了四下。", [False]),
        ("不是四下。", [True]),
        ("可能是四下。", []),
        ("听到一个声音。", []),  # an article
        ("只有一下。", [False]),
        ("这两个声音很像。", []),
        ("三角铁很亮，十分清楚，持续了一段时间。", []),  # numbers that count nothing
        ("共 3 下", [True]),
        ("三十三下", [False]),
    ],
)
def test_chinese_numbers_are_claims_where_they_count(text, truths):
    lexicon = {"count": ["one", "two", "three", "four", "33"]}
    assert [claim.true for claim in claims(text, {"count": 3}, lexicon)] == truths


@pytest.mark.parametrize(
    ("number", "value"),
    [("十", "10"), ("十二", "12"), ("二十", "20"), ("二百零五", "205"), ("一千三百", "1300"), ("两万五千", "25000"),
     ("二〇二四", "2024"), ("三亿", "300000000"), ("一百二十", "120")],
)  # fmt: skip
def test_numbers_in_words(number, value):
    assert chinese_tokens(f"共{number}声") == ("共", value, "声") and chinese_tokens(number, is_name=True) == (value,)


def test_the_longest_option_wins_without_word_boundaries():
    options = ("鼓", "手鼓", "鼓掌声")
    assert [concluded(f"所以是{name}。", options) for name in options] == [0, 1, 2]
    assert concluded("听起来像手鼓敲击", options) == 1


def test_language_is_told_sentence_by_sentence():
    said = clauses("It might be a bell. 所以不是钟声。 It is a knock.")
    assert [(clause.tokens, clause.strong, clause.hedged) for clause in said] == [
        (("it", "might", "be", "bell"), False, True),
        (("therefore", "not", "钟", "声"), True, False),
        (("it", "is", "knock"), False, False),
    ]
    assert is_chinese("钟声 bell") and not is_chinese("鐘の音") and not is_chinese("종소리") and not is_chinese("bell")


def test_pieces_end_where_sense_turns():
    assert pieces("不是钟声是敲门声，但很远。") == ["不是钟声", "是敲门声", "但很远"]
    assert pieces("先是钟声，然后是敲门声，一共1,000次") == ["先是钟声，然后是敲门声", "一共1,000次"]
    assert pieces("，。！") == []


@pytest.mark.parametrize(
    ("text", "what"),
    [("我听到" * 20, "repetition"), ("哈" * 30, "one character"), ("的了是在的了和是的在了的是和", "word salad"),
     ("钟声，音调，节奏，音色，频率，响度，结论", "keyword list"), ("答案是钟声。", "echo"), ("钟声或敲门声", "echo"),
     ("我听到钟声。", None), ("金属余音悠长，慢慢变弱。", None)],
)  # fmt: skip
def test_degenerate_chinese_text(text, what):
    found = flaw(text, "你听到什么声音？", "钟声, 敲门声", ["钟声", "敲门声"])
    assert (found is None) if what is None else (found is not None and what in found)


@pytest.mark.parametrize(
    "text",
    [
        "不是",
        "在",
        "与其说",
        "一",
        "，",
        "先后",
        "钟声的可能性",
        "A选项",
        "答案应该",
        "三声",
        "\ue000A",
        "除了",
        "在之前是",
    ],
)
def test_no_text_takes_long(text):
    long = text * (20_000 // len(text))
    assert seconds(lambda: (clauses(long), chinese_tokens(long))) < 1


@pytest.mark.parametrize(
    ("answer", "choices"), [("三", ["2", "3"]), ("三次", ["2次", "3次"]), ("3", ["二", "三"]), ("选项B", ["二", "三"])]
)
def test_a_number_in_words_is_the_option_in_digits(answer, choices):
    assert supports("一共敲了三次，所以是三次。", answer, choices) is True
