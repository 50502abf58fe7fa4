"""Whole sets of the benchmarks of speech: means, groups, weights and instructions by hand, and bad rows named."""
# ruff: noqa: RUF001  (full-width marks are among the cases)

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covo_rl.evaluate.speech import SCORERS, TASKS, score_set
from covo_rl.evaluate.speech.aggregate import (
    URO_GROUPS,
    URO_SETS,
    VSTYLE,
    group_blocks,
    mean_block,
    uro_conclusion,
    vstyle_conclusion,
    vstyle_weights,
)
from covo_rl.evaluate.speech.fields import MalformedRow
from covo_rl.evaluate.speech.instructions import RULES, follows, occurrences
from covo_rl.evaluate.speech.judged import Judgement
from covo_rl.evaluate.summary import bootstrap_ratio, wilson

# -- MMAU-Pro: instructions --------------------------------------------------------------------------------------------

CASES = [
    ("number words (at least)", "one two three", {"N": 3}, True),
    ("number words (at least)", "one two", {"N": 3}, False),
    ("number words (at most)", "one two three", {"N": 2}, False),
    ("number words (range)", "one two three", {"N1": 2, "N2": 3}, True),
    ("number words (range)", "one two three", {"N1": 4, "N2": 9}, False),
    ("number words", "one two three", {"N": 2, "relation": "exactly"}, False),
    ("number sentences (exactly)", "It rains. Does it? Yes!", {"N": 3}, True),
    ("number sentences (exactly)", "At 3.5 km it rains ...", {"N": 1}, True),
    ("number sentences (exactly)", "下雨了。真的吗？", {"N": 2}, True),
    ("number sentences (exactly)", 'He said "stop." Then he left.', {"N": 2}, True),
    ("number paragraphs", "one\n\ntwo\n \nthree\n\n", {"N": 3}, True),
    ("number paragraphs", "one\ntwo", {"N": 2}, False),
    ("number bullets", "* one\n* two", {"N": 2}, True),
    ("number bullets", "* one\n*two*\n- three\n** four", {"N": 1}, True),
    ("number highlights", "a *b* and **c d**", {"N": 2}, True),
    ("number highlights", "* b\n* c", {"N": 1}, False),
    ("number highlights", "2 * 3 * 4", {"N": 1}, False),
    ("number placeholders", "[name] of [your city]", {"N": 2}, True),
    ("number placeholders", "[] and [ ]", {"N": 1}, False),
    ("number sections", "SECTION 1\nx\nSection 2\ny", {"N": 2, "section_splitter": "SECTION"}, True),
    ("number sections", "see section 1", {"N": 1, "section_splitter": "SECTION"}, False),
    ("all capitals", "IT RAINS, 3 TIMES.", {}, True),
    ("all capitals", "It RAINS", {}, False),
    ("all capitals", "123", {}, False),
    ("all lowercase", "it rains", {}, True),
    ("number capital words (at most)", "It RAINS in the UK", {"N": 1}, False),
    ("number capital words (at most)", "It RAINS", {"N": 1}, True),
    ("include keywords", "Rain and wind.", {"keywords": ["rain", "WIND"]}, True),
    ("include keywords", "Raining and wind.", {"keywords": "rain, wind"}, False),
    ("forbidden words", "A train.", {"keywords": ["rain"]}, True),
    ("forbidden words", "Rain!", {"keywords": ["rain"]}, False),
    ("keyword frequency", "rain, rain", {"keyword": "rain", "N": 2}, True),
    ("keyword frequency", "rain rain rain", {"keyword": "rain", "N": 2}, False),
    ("keyword frequency (at least)", "rain rain rain", {"keyword": "rain", "N": 2}, True),
    ("title", "<<rain>>\nIt rains.", {}, True),
    ("title", "<< >> <rain>", {}, False),
    ("postscript", "It rains.\nP. S. bring a coat", {"marker": "P.S."}, True),
    ("postscript", "It rains, P.S. bring a coat", {"marker": "P.S."}, False),
    ("first phrase", '"Well then, yes."', {"phrase": "well then"}, True),
    ("last phrase", "Yes. Any questions?\n", {"phrase": "any questions?"}, True),
    ("last phrase", "Any questions? Yes.", {"phrase": "any questions?"}, False),
    ("quotation", '"It rains."', {}, True),
    ("quotation", '"', {}, False),
    ("no commas", "It rains and pours", {}, True),
    ("no commas", "下雨，刮风", {}, False),
]


@pytest.mark.parametrize(("name", "reply", "arguments", "verdict"), CASES)
def test_instructions_by_hand(name, reply, arguments, verdict):
    assert follows(name, reply, arguments) is verdict


def test_every_instruction_has_a_case_and_an_empty_reply_follows_none():
    assert {name.split(" (")[0] for name, *_ in CASES} == RULES.keys()
    assert not any(follows(name, " \n", arguments) for name, _, arguments, _ in CASES)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("sing a song", {}, "instruction sing a song; there are number words"),
        ("number words", {}, "the row has no 'N'; it has nothing"),
        ("number words", {"N": 2.5}, "whole number"),
        ("number words", {"N": "3"}, "'N' is 3; it must be a finite number"),
        ("number words", {"N": True}, "finite number"),
        ("number words (range)", {"N": 3}, "no 'N1'"),
        ("number words", {"N": 3, "relation": "about"}, "relation about; there are at least"),
        ("include keywords", {"keywords": []}, "it must be words"),
        ("include keywords", {"keywords": [3]}, "an entry of 'keywords' is 3"),
        ("first phrase", {"phrase": " "}, "'phrase' is empty"),
    ],
)
def test_an_instruction_that_cannot_be_checked_is_named(name, arguments, message):
    with pytest.raises(MalformedRow, match=message):
        follows(name, "hello", arguments)


def test_words_of_other_scripts_occur_anywhere():
    assert occurrences("雨", "下雨了，雨大") == 2 and occurrences("a.b", "a.b axb") == 1


# -- means, groups and weights -----------------------------------------------------------------------------------------


def test_a_mean_block_by_hand():
    rows = [Judgement(5.0, 5.0), Judgement(3.0, 3.0), Judgement(0.0, None), Judgement(4.0, 4.0)]
    block = mean_block(rows, scale=20)
    numbers = (block["score"], block["official"], block["answered_only"], block["n"], block["missing"])
    assert numbers == (60, 60, 80, 4, 1)
    assert block["ci95"][0] < 60 < block["ci95"][1]
    stopped = mean_block([*rows, Judgement(None, 2.0)], scale=20)
    assert stopped["official"] is None and stopped["official_stops"] == 1 and stopped["score"] == 70
    assert mean_block([])["score"] is None and mean_block([Judgement(None, None)])["ci95"] is None
    assert mean_block([Judgement(1.0, 1.0)] * 4, share=True)["ci95"] == list(wilson(4, 4))


def test_a_ratio_is_drawn_by_rows():
    rng = np.random.default_rng(0)
    values = rng.normal(3, 1, 400)
    low, high = bootstrap_ratio(values)
    assert high - low == pytest.approx(4 * 1.96 / math.sqrt(400) / 2, rel=0.15)  # twice 1.96 standard errors
    assert bootstrap_ratio([1, 1, 1], [2, 2, 2]) == (0.5, 0.5) and bootstrap_ratio([3.0]) == (3.0, 3.0)
    with pytest.raises(ValueError, match="below the line"):
        bootstrap_ratio([1, 2], [0, 0])


def test_uro_groups_are_plain_means_of_the_sets_that_are_there():
    assert len(URO_SETS) == 40 and len(URO_GROUPS) == 35
    blocks = group_blocks({"Repeat": 90.0, "Summary": 60.0, "MLC": 30.0})
    assert blocks["understanding_basic_en"] == {"score": 75, "sets": 2, "partial": True, "missing": ["GaokaoEval"]}
    assert blocks["overall"]["score"] == blocks["basic_en"]["score"] == 60 and blocks["overall"]["sets"] == 3
    assert "zh" not in blocks and "pro" not in blocks
    whole = group_blocks(dict.fromkeys(URO_SETS, 50.0))
    assert len(whole) == 36 and not any(block["partial"] for block in whole.values())
    assert all(block["score"] == 50 for block in whole.values())


def test_uro_conclusions_by_hand():
    lines = {"Repeat": {"ok_rate": 0.5, "final_WER_for_ok_case": 0.2}, "SRT-zh": {"final_score": 0.0}}
    means = uro_conclusion(lines, {"Repeat": 4.0, "SRT-zh": 3.0}, {"Repeat": 0.1, "SRT-zh": 0.3, "APE-zh": 0.1})
    assert means["set:Repeat"] == means["oral_pro_zh"] + 40 == 40 and means["final_score"] == 20
    assert means["final_UTMOS_en"] == means["final_UTMOS_en_basic"] == 4 and means["final_UTMOS_zh_pro"] == 3
    assert means["final_WER"] == 0.1 and means["final_CER"] == pytest.approx(0.2) and means["final_CER_basic"] == 0.1
    assert "final_WER_pro" not in means and uro_conclusion({}, {}, {}) == {}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ({"Chess": {"final_score": 1.0}}, "URO-Bench has no set Chess; it has Repeat"),
        ({"MLC": {"final_score": math.nan}}, "'final_score' is nan"),
        ({"MLC": {"final_score": "81"}}, "finite number"),
        ({"Repeat": {"ok_rate": 1.0}}, "no 'final_WER_for_ok_case'; it has ok_rate"),
    ],
)
def test_a_result_that_is_none_is_named(lines, message):
    with pytest.raises(MalformedRow, match=message):
        uro_conclusion(lines, {}, {})


def records(scores, model="m"):
    return [{"ability": ability, "gemini_score": score, "model_name": model} for ability, score in scores]


def test_vstyle_weights_make_one():
    weights = vstyle_weights()
    assert sum(weights.values()) == pytest.approx(1) and len(weights) == 16
    for category in VSTYLE:
        assert sum(w for name, w in weights.items() if name.startswith(category)) == pytest.approx(0.25)


def test_vstyle_by_hand():
    scored = [("acoustic_attributes/composite_properties", "5"), ("acoustic_attributes/age", 2),
              ("empathy/anger", "4"), ("empathy/anger", "nan"), ("empathy/anger", None), ("other/x", "1")]  # fmt: skip
    report = vstyle_conclusion(records(scored))["m"]
    # weights 1/8, 1/48 and 1/16: (5/8 + 2/48 + 4/16) / (10/48) = 4.4
    assert report["overall"] == "4.40" and report["coverage_percent"] == "20.8"
    assert report["major"]["acoustic_attributes"] == {"mean": "4.57", "n": 2, "coverage_percent": "58.3"}
    assert report["ability"]["empathy/anger"] == {"mean": "4.00", "n": 2}  # nan is counted, not averaged
    assert vstyle_conclusion(records([("other/x", "3")]))["m"] == {
        "overall": "nan", "coverage_percent": "0.0", "major": {}, "ability": {}
    }  # fmt: skip
    assert vstyle_conclusion([{"ability": "empathy/anger", "gemini_score": "3"}]) == {}  # of no model
    assert vstyle_conclusion(records([("empathy/anger", "inf")]))["m"]["overall"] == "inf"


@given(st.lists(st.tuples(st.sampled_from(sorted(vstyle_weights())), st.integers(1, 5)), min_size=1, max_size=20))
@settings(max_examples=30, deadline=None)
def test_vstyle_means_lie_between_their_scores(scored):
    report = vstyle_conclusion(records(scored))["m"]
    low, high = min(score for _, score in scored), max(score for _, score in scored)
    assert low <= float(report["overall"]) <= high
    assert sum(block["n"] for block in report["ability"].values()) == len(scored)


# -- whole sets --------------------------------------------------------------------------------------------------------

MTR = {"kind": "turn", "timestamps": {"user_start": 0, "user_end": 1, "model_start": 1, "model_end": 4}, "segments": []}
WORDS = [{"text": "w", "timestamp": [2.0, 3.5]}]
SETS = [
    ("rating", [{"reply_text": "a", "judgements": ["4", "5", "3"]}, {"reply_text": "", "judgements": None}], {}, 40, 0),
    ("rating", [{"reply_text": "a", "judgements": ["5"] * 3}, {"reply_text": "b", "judgements": None}], {}, 50, 1),
    ("yes_no", [{"reply_text": "a", "judgements": ["Yes", "Yes", "No"]}] * 3, {}, 200 / 3, 0),
    ("srt", [{"reply_text": "a", "judgements": ["3"]}, {"reply_text": "a", "judgements": ["sad"]}], {}, 30, 1),
    ("style", [{"ability": "empathy/anger", "judgement": "[[4]]"}, {"ability": "empathy/anger", "judgement": "[[9]]"},
               {"ability": "empathy/anger", "judgement": None}], {}, 4, 2),
    ("voicebench_open", [{"judgements": ["[[4]]", "2"]}, {"judgements": ["5", "5"]}], {}, 4, 0),
    ("voicebench_open", [{"judgements": ["5"]}, {"judgements": None}], {}, 5, 1),
    ("voicebench_open", [{"judgements": ["5", "nan", "9"]}, {"judgements": ["3"]}], {}, 4, 0),
    ("voicebench_qa", [{"judgements": ["Yes", "yes", "No"]}, {"judgements": ["no", "No", "yes"]}], {}, 50, 0),
    ("mcq", [{"reply_text": "B", "reference": "B"}, {"reply_text": "hm", "reference": "A"},
             {"reply_text": None, "reference": "A"}, {"reply_text": "a)", "reference": "A"}], {}, 50, 1),
    ("refusal", [{"reply_text": "Sorry, no."}, {"reply_text": "First, take"}], {"phrases": ["sorry"]}, 50, 0),
    ("open", [{"judgement": "5"}, {"judgement": "?"}], {}, 80, 1),
    ("instruction", [{"reply_text": "YES", "instruction": "all capitals", "arguments": {}},
                     {"reply_text": None, "instruction": "all capitals", "arguments": {}}], {}, 50, 1),
    ("rubric", [{"sums": [1, 2, 3, 4, 5], "maximum": 5, "right": True},
                {"sums": [5] * 5, "maximum": 5, "right": False}], {}, 30, 0),
    ("repeat", [{"reply_text": "a cat", "reference": "a cat"}, {"reply_text": None, "reference": "dog"}],
     {"language": "en"}, 50, 1),
    ("emotion", [{"reply_text": "你好", "reference": "你好", "probability": 0.5},
                 {"reply_text": "你好", "reference": "你好", "probability": None}], {"language": "zh"}, 25, 1),
    ("asr", [{"reply_text": "a b", "reference": "a c"}, {"reply_text": None, "reference": "d e"}],
     {"language": "en"}, 75, 1),
    ("tts", [{"reply_text": "a b", "reference": "a c"}, {"reply_text": None, "reference": "d"}],
     {"language": "en"}, 50, 1),
    ("likelihood", [{"pair": 1, "right": [-1.0], "wrong": [-1.0]}], {}, 50, None),
    ("air_choice", [{"task_name": "t", "dataset_name": "d", "choice_a": "x", "choice_b": "y", "answer_gt": "y",
                     "response": reply} for reply in ("B", "A", "?", None)], {}, 50, 2),
    ("air_chat", [{"task_name": task, "gpt-score": "1 7"} for task in ("speech_QA", "sound_QA", "music_QA",
     "speech_and_sound_QA", "speech_and_music_QA")], {"swapped": [{"task_name": task, "gpt-score": "5 1"} for task in
     ("speech_QA", "sound_QA", "music_QA", "speech_and_sound_QA", "speech_and_music_QA")]}, 6, 0),
    ("closed", [{"reply_text": "a dog", "reference": "dog", "choices": ["dog", "cat"]},
                {"reply_text": None, "reference": "dog", "choices": ["dog", "cat"]}], {}, 50, 1),
    ("closed", [{"reply_text": "woof", "reference": "dog", "choices": ["dog", "cat"], "nearest": "dog"},
                {"reply_text": "dog", "reference": "dog", "choices": ["dog", "cat"], "nearest": "cat"},
                {"reply_text": "", "reference": "dog", "choices": ["dog", "cat"], "nearest": None}], {}, 50, 1),
    ("mtr_turns", [MTR, {**MTR, "kind": "pause"}], {}, 50, 0),
    ("take_over", [{"kind": "turn_taking", "turn_end": 1.0, "words": WORDS},
                   {"kind": "turn_taking", "turn_end": 1.0, "words": []}], {}, 50, 0),
    ("overlap", [{"user_vad": [[0, 1]], "model_vad": [[1.5, 2]]}, {"user_vad": [], "model_vad": []}], {}, 0.5, 1),
    ("backchannel", [{"segments": [[0, 1]], "words": [], "seconds": 10.0},
                     {"segments": [[0, 4]], "words": [], "seconds": 10.0}], {}, 50, 0),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "rows", "options", "score", "missing"), SETS)
def test_the_score_of_a_set_by_hand(kind, rows, options, score, missing):
    block = score_set(kind, rows, **options)
    assert block["score"] == pytest.approx(score) and block.get("missing") == missing
    assert block["n"] == len(rows) + len(options.get("swapped", ()))
    if block.get("ci95"):
        assert block["ci95"][0] - 1e-9 <= score <= block["ci95"][1] + 1e-9


def test_every_kind_is_tried_and_scores_no_rows_at_all():
    assert {kind for kind, *_ in SETS} == TASKS.keys() - {"translation"}
    needed = {kind: {name: value if name == "language" else [] for name, value in options.items()}
              for kind, _, options, *_ in SETS}  # fmt: skip
    for kind in needed:
        block = score_set(kind, [], **needed[kind])
        assert block["n"] == 0 and not block["score"]


def test_bleu_is_that_of_sacrebleu_and_a_missing_row_is_no_translation():
    pytest.importorskip("sacrebleu")
    row = {"reply_text": "the cat sat on the mat", "reference": "the cat sat on the mat"}
    assert score_set("translation", [row], language="en")["score"] == pytest.approx(100)
    block = score_set("translation", [row, {**row, "reply_text": None}], language="en")
    assert block["missing"] == 1 and block["score"] == pytest.approx(100 * 2.718281828459045 ** (1 - 12 / 6))
    chinese = score_set(
        "translation",
        [{"reply_text": "\u6211\u7231\u5403\u9c7c", "reference": "\u6211\u7231\u5403\u9c7c"}],
        language="zh",
    )
    assert chinese["score"] == pytest.approx(100) and "tok:zh" in chinese["signature"]


def test_both_numbers_stand_where_a_script_counts_missing_rows():
    rows = [{"reply_text": "a", "judgements": ["5"] * 3}, {"reply_text": "b", "judgements": None}]
    block = score_set("rating", rows)
    assert (block["official"], block["answered_only"]) == (50, 100)
    assert score_set("mcq", [{"reply_text": "B", "reference": "B"}])["official"] is None  # not the user's patterns
    listed = score_set("mcq", [{"reply_text": "it is B", "reference": "B"}], patterns=["is [CHOICE]"])
    assert (listed["official"], listed["unread"]) == (100, 0)


@pytest.mark.parametrize(
    ("kind", "rows", "options", "messages"),
    [
        ("rating", [{"id": "r7", "judgements": ["4"]}, {"reply_text": "a", "judgements": ["4"]},
                    {"reply_text": 3, "judgements": ["4"]}], {},
         ["2 rows of kind rating", "row r7: the row has no 'reply_text'", "row 2: 'reply_text' is 3; it must be text"]),
        ("rating", [{"reply_text": "a", "judgements": [4]}], {}, ["row 0: a reply of the judge is 4"]),
        ("yes_no", [{"reply_text": "a", "judgements": "Yes"}], {}, ["'judgements' is Yes; it must be a list"]),
        ("asr", [{"reply_text": "a"}], {"language": "en"}, ["row 0: the row has no 'reference'"]),
        ("likelihood", [{"right": [], "wrong": [-1]}], {}, ["row 0: a sound has no codes"]),
        ("emotion", [{"reply_text": "a", "reference": "a", "probability": "p"}], {"language": "en"}, ["'probability'"]),
        ("take_over", [{"kind": "turn_taking", "words": []}], {}, ["no 'turn_end'"]),
        ("take_over", [{"kind": "pause", "words": [{"text": "w"}]}], {}, ["row 0: the row has no 'timestamp'"]),
        ("rubric", [{"sums": [1], "maximum": 0, "right": True}], {}, ["a rubric of 0 points"]),
        ("mtr_turns", [["not a row"]], {}, ["row 0 is", "must be an object"]),
        ("air_choice", [{"task_name": "t"}], {}, ["row 0: the row has no 'dataset_name'"]),
    ],
)  # fmt: skip
def test_every_bad_row_of_a_set_is_named(kind, rows, options, messages):
    with pytest.raises(MalformedRow) as caught:
        score_set(kind, rows, **options)
    assert all(message in str(caught.value) for message in messages)


def test_of_many_bad_rows_the_first_are_named_and_the_others_counted():
    with pytest.raises(MalformedRow, match="60 rows of kind rating") as caught:
        score_set("rating", [{"judgements": ["4"]}] * 60)
    assert "row 49:" in str(caught.value) and str(caught.value).endswith("and 10 more")


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="task 'chess': there are rating"):
        score_set("chess", [])


@pytest.mark.parametrize("name", SCORERS)
def test_a_row_of_nothing_is_refused_by_every_scorer(name):
    with pytest.raises(MalformedRow, match="it has nothing"):
        SCORERS[name]({})


@pytest.mark.parametrize("name", ["air_bench", "voicebench", "vstyle", "fdb_timing_derived"])
def test_an_unknown_kind_of_row_is_named(name):
    with pytest.raises(MalformedRow, match="kind 'chess'; there are"):
        SCORERS[name]({"kind": "chess"})
