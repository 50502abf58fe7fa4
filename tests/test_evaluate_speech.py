"""Rules of the benchmarks of speech: the official verdicts of fixtures/speech (each file names source, commit and
licence), and every rule in cases that a reader can check."""
# ruff: noqa: RUF001  (full-width digits and marks are among the cases)

import doctest
import importlib
import json
import math
import pkgutil
import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import covo_rl.evaluate.speech as speech
from covo_rl.evaluate.speech import SCORERS
from covo_rl.evaluate.speech.choices import OfficialStop, air_chat, air_chat_both, air_choice, air_foundation, air_pair
from covo_rl.evaluate.speech.fields import MalformedRow
from covo_rl.evaluate.speech.judged import (
    mmau_pro_rating,
    read_rating,
    read_yes_no,
    rubric_points,
    rubric_score,
    uro_judgement,
    voicebench_letter,
    voicebench_majority,
    voicebench_refused,
    vstyle_score,
    vstyle_score_text,
)
from covo_rl.evaluate.speech.likelihood import pair_credit, pair_report, sequence_score
from covo_rl.evaluate.speech.texts import asr_text, spoken_numbers
from covo_rl.evaluate.speech.timing import (
    backchannel_figures,
    merged,
    mtr_verdict,
    overlap_intervals,
    took_turn,
    turn_latency,
)
from covo_rl.evaluate.speech.wer import (
    Edits,
    asr_edits,
    asr_report,
    count_edits,
    emotion_score,
    repeat_figures,
    seed_tts_wer,
    uro_wer,
)

FIXTURES = Path(__file__).parent / "fixtures" / "speech"
DERIVED = {"wer", "took_turn", "latency", "response_intervals", "stop_intervals"}


def same(a, b):
    """Verdicts exactly, rates to 1e-6."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (bool, str)) or a is None:
        return type(a) is type(b) and a == b
    return isinstance(b, (int, float)) and abs(a - b) <= 1e-6


def decided_without_lists(row):
    """VoiceBench's phrase lists are the user's: what its rules say without them."""
    if row["kind"] == "mcq":
        return voicebench_letter(row["response"], []) is not None
    text = row.get("response", "").lower()
    return row["kind"] != "harm" or not row["official_refused"] or "as an" in text or "sorry" in text


@pytest.mark.parametrize("name", SCORERS)
def test_every_official_verdict_is_matched(name):
    data = json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))
    outputs = DERIVED if name.endswith("_derived") else set()
    wrong = []
    for row in data["rows"]:
        asked = {key: value for key, value in row.items() if not key.startswith("official") and key not in outputs}
        wanted = {key: value for key, value in row.items() if key not in asked}
        if name == "voicebench" and not decided_without_lists(row):
            continue
        if not same(wanted, SCORERS[name](asked)):
            wrong.append(row)
    assert len(data["rows"]) == data["n"]
    assert wrong == []


def test_the_examples_in_the_docstrings_hold():
    tried = 0
    for module in pkgutil.iter_modules(speech.__path__, "covo_rl.evaluate.speech."):
        result = doctest.testmod(importlib.import_module(module.name))
        assert result.failed == 0, module.name
        tried += result.attempted
    assert tried > 20


# -- error rates -----------------------------------------------------------------------------------------------------

TEXTS = st.text(st.sampled_from(["a", "b", " ", "我", "3", ".", "１", "\n", "é", "-"]), max_size=12)


@given(TEXTS, TEXTS)
@settings(max_examples=60, deadline=None)
def test_equal_texts_have_no_errors_and_edits_make_lengths_meet(a, b):
    for characters in (False, True):
        assert count_edits(a, a, characters=characters).rate == 0
        one, other = count_edits(a, b, characters=characters), count_edits(b, a, characters=characters)
        assert one.errors == other.errors == one.substitutions + one.deletions + one.insertions
        assert one.units - one.deletions + one.insertions == other.units
    assert uro_wer("zh", a, a) == seed_tts_wer("en", a, a) == 0


@pytest.mark.parametrize(
    ("language", "first", "second", "rate"),
    [
        ("en", "", "", 0), ("en", "", "one two", 1), ("en", "", "cat dog", 2), ("en", " ", "", 0),
        ("en", "cat", "", 1), ("en", "um", "cat", 1), ("en", "Colour!", "color", 0), ("en", "$5", "five dollars", 0),
        ("en", "你好", "你好", 0), ("en", "[noise] hi", "hi", 0), ("en", "café", "cafe", 0),
        ("zh", "", "", 0), ("zh", "", "你好", 2), ("zh", "。", "好", 1), ("zh", "你好", "", 1),
        ("zh", "聽", "听", 1), ("zh", "ABC", "abc", 0), ("zh", "１２", "十二", 0), ("zh", "2020年", "二零二零年", 0),
        ("zh", "你 好", "你好", 1 / 3), ("zh", "hello 世界", "世界", 6 / 8), ("zh", "105", "一百零五", 0),
    ],
)  # fmt: skip
def test_uro_wer_levels_text_as_the_script_does(language, first, second, rate):
    assert uro_wer(language, first, second) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("digits", "said"),  # as cn2an 0.5.24 writes them
    [
        ("10", "十"), ("110", "一百一十"), ("1001", "一千零一"), ("100010001", "一亿零一万零一"), ("007", "七"),
        ("12345年", "一二三四五年"), ("2020年03月08日", "二零二零年三月八日"), ("1/4", "四分之一"),
        ("50%", "百分之五十"),
        ("3-5个", "三到五个"), ("-3.50", "负三点五零"), ("5℃", "五摄氏度"), ("0", "零"), ("0.5", "零点五"),
        ("12345678901234567", "12345678901234567"), ("٣", "٣"), ("２", "二"), ("1000000000000000", "一千万亿"),
    ],
)  # fmt: skip
def test_digits_become_the_numerals_of_cn2an(digits, said):
    assert spoken_numbers(digits) == said


def test_seed_tts_keeps_apostrophes_and_the_case_of_chinese():
    assert seed_tts_wer("en", "Don't stop!", "don't stop") == 0
    assert seed_tts_wer("zh", "aB", "ab") == 0.5
    assert seed_tts_wer("zh", "。", "你好") == 2  # an empty reference: the number of insertions
    assert seed_tts_wer("en", "a  b", "a b") == 0


def test_repeat_counts_the_good_ones_alone():
    assert repeat_figures([]) == {"ok_rate": 0, "final_WER_for_ok_case": 0, "score": 0}
    assert repeat_figures([0.6, 2.0])["score"] == 0
    assert repeat_figures([0.0, 0.5, 0.51, 1.0]) == {"ok_rate": 0.5, "final_WER_for_ok_case": 0.25, "score": 37.5}
    assert emotion_score(0.8, 0.25) == pytest.approx(60) and emotion_score(0.8, 3.0) == 0
    with pytest.raises(ValueError, match=r"probability 1\.5"):
        emotion_score(1.5, 0)


def test_a_corpus_rate_sums_edits_and_units():
    # 1 substitution of 2; 2 deletions of 2 (nothing heard); 3 insertions over 1 word: 6 errors by 5 words
    report = asr_report("en", ["red cat", "blue dog", "hi"], ["red dog", None, "oh hi my lad"])
    counts = {name: report[name] for name in ("substitutions", "deletions", "insertions", "units", "n", "missing")}
    assert counts == {"substitutions": 1, "deletions": 2, "insertions": 3, "units": 5, "n": 3, "missing": 1}
    assert report["score"] == pytest.approx(120) and report["hallucinated"] == 1
    assert report["ci95"][0] <= 120 <= report["ci95"][1]


def test_a_corpus_without_a_word_has_no_rate():
    report = asr_report("en", ["um", ""], ["well", None])
    assert report["score"] is None and report["insertions"] == 1 and report["missing"] == 1


def test_chinese_transcripts_are_levelled_but_for_their_numbers():
    assert asr_text("zh", "聽， ＡＢＣ！3聲。「好」") == "听abc3声好"
    assert asr_edits("zh", "三声", "3聲") == Edits(substitutions=1, units=2)
    assert asr_edits("zh", "三声", "3聲", numbers="words").errors == 0


def test_a_number_that_python_cannot_read_ends_nothing():
    assert uro_wer("en", f"It is {'9' * 5000}", f"it is {'9' * 5000}!") == 0
    assert uro_wer("zh", "9" * 5000, "9" * 5000) == 0 and vstyle_score(f"[[{'9' * 5000}]]") is None


@pytest.mark.parametrize("score", [uro_wer, seed_tts_wer, asr_edits])
def test_other_languages_are_refused(score):
    with pytest.raises(ValueError, match="language 'fr'"):
        score("fr", "a", "b")


# -- turns -----------------------------------------------------------------------------------------------------------


def words(*times):
    return [{"text": "w", "timestamp": list(pair)} for pair in times]


def test_a_turn_is_taken_by_a_second_or_by_four_words():
    assert not took_turn([])
    assert not took_turn(words((0, 0.2), (0.3, 0.5), (0.6, 0.99)))
    assert took_turn(words((0, 0.2), (0.3, 0.5), (0.6, 1.0)))
    assert took_turn(words((0, 0.1), (0.1, 0.2), (0.2, 0.3), (0.3, 0.4)))
    assert took_turn(words((0, None), (1.0, None)), open_end=True)
    with pytest.raises(MalformedRow, match="the end of word 1 is None"):
        took_turn(words((0, 0.1), (1.0, None)))


def test_latency_is_clamped_and_only_of_turns_that_were_taken():
    said = words((2.0, 2.5), (2.5, 3.5))
    assert turn_latency(said, 1.5) == 0.5 and turn_latency(said, 2.9) == 0
    assert turn_latency(words((2.0, 2.1)), 1.5) is None
    with pytest.raises(MalformedRow, match="nan"):
        turn_latency(said, math.nan)


def test_backchannels_by_hand():
    people = [1.0] * 50
    # .5 s with one word, then 3.5 s: the second takes the turn and ends the reading
    figures = backchannel_figures([[1.0, 1.5], [4.0, 7.5], [8.0, 8.2]], words((1.0, 1.4)), 10.0, people)
    assert figures["took_turn"] and figures["frequency"] == 0.1
    assert 0 < figures["jsd"] < math.sqrt(math.log(2))
    assert backchannel_figures([[1.0, 1.5]], words((1.0, 1.4)), 10.0)["took_turn"] is False
    many = words((1.0, 1.1), (1.1, 1.2), (1.2, 1.3))
    # three words take it, and a later segment without words does not give it back
    assert backchannel_figures([[1.0, 1.5], [5.0, 5.2]], many, 10.0)["took_turn"] is True
    assert backchannel_figures([], [], 10.0, people) == {"took_turn": False, "frequency": 0.0, "jsd": 1.0}
    everywhere = [[t, t + 2.0] for t in range(0, 10, 2)]
    assert backchannel_figures(everywhere, [], 10.0, people)["jsd"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(MalformedRow, match="above 0"):
        backchannel_figures([], [], 0.0)


def test_overlaps_and_responses_by_hand():
    found = overlap_intervals([[0.0, 2.0], [2.5, 3.0], [6.0, 7.0]], [[2.5, 4.0], [4.6, 5.0], [9.0, 10.0]])
    assert found["stop_intervals"] == [[2.5, 3.0]]  # the user's first two are one, 0.5 s apart
    assert found["response_intervals"] == [[3.0, 4.6], [7.0, 9.0]]
    # both ends of the user lead to the start at 5.0: the later one is answered
    assert overlap_intervals([[0, 1], [2, 3]], [[5, 6]])["response_intervals"] == [[3, 5]]
    assert overlap_intervals([[0, 1]], [[1, 2]]) == {"stop_intervals": [], "response_intervals": []}  # not after
    assert overlap_intervals([], []) == {"stop_intervals": [], "response_intervals": []}
    with pytest.raises(MalformedRow, match="ends at 1 s before it starts at 2 s"):
        overlap_intervals([[2, 1]], [])
    with pytest.raises(MalformedRow, match=r"must be \[start, end\]"):
        overlap_intervals([[2]], [])


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), max_size=6), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_merged_segments_are_apart_and_cover_the_same(parts, gap):
    segments = [[start, start + length] for start, length in parts]
    joined = merged(segments, gap)
    assert all(b[0] - a[1] > gap for a, b in pairwise(joined))
    assert all(any(a <= start and end <= b for a, b in joined) for start, end in segments)
    assert merged(joined, gap) == joined


TIMES = {"user_start": 0.0, "user_end": 2.0, "model_start": 2.5, "model_end": 6.0}


def segment(start, end, count=4, text=None):
    step = (end - start) / count
    spoken = [{"word": "w", "start": start + i * step, "end": start + (i + 1) * step} for i in range(count)]
    return {"timestamp": [start, end], "text": text or " w" * count, "words": spoken}


def test_mtr_success_by_hand():
    answer = [segment(3.0, 5.0)]
    assert mtr_verdict("turn", answer, TIMES) == {"success": 1, "latency": 1.0, "frequency": 0}
    assert mtr_verdict("turn", [segment(0.5, 1.9), *answer], TIMES)["success"] == 0
    assert mtr_verdict("turn", [], TIMES) == {"success": 0, "latency": 0, "frequency": 0}
    noise = {**TIMES, "background_start": 3.0, "background_end": 4.5}
    assert mtr_verdict("background", answer, noise)["success"] == 1
    assert mtr_verdict("background", [segment(3.4, 5.0)], noise)["success"] == 0
    cut_in = {**TIMES, "interruption_start": 1.0, "interruption_end": 2.2}
    assert mtr_verdict("interruption", answer, cut_in) == {"success": 1, "latency": pytest.approx(0.8), "frequency": 0}
    assert mtr_verdict("pause", answer, {**TIMES, "pause_start": 0.5, "pause_end": 1.0})["success"] == 1
    assert mtr_verdict("pause", answer, {**TIMES, "pause_start": 0.5, "pause_end": 3.9})["success"] == 0
    # a back-channel of 1 word in 0.5 s, and 2 s of answer
    heard = mtr_verdict("turn", [segment(1.0, 1.5, 1, "mm-hm!"), *answer], TIMES)
    assert heard == {"success": 1, "latency": 1.0, "frequency": pytest.approx(1 / 2.5)}


@pytest.mark.parametrize("change", [{"user_end": 0}, {"model_start": 0}, {"model_end": None}, {"user_end": None}])
def test_mtr_turns_without_their_times_are_all_zero(change):
    assert mtr_verdict("turn", [segment(3.0, 5.0)], {**TIMES, **change}) == dict.fromkeys(
        ("success", "latency", "frequency"), 0
    )


@pytest.mark.parametrize("pause", [{}, {"pause_start": 0, "pause_end": 0.0}, {"pause_start": None, "pause_end": None}])
def test_an_mtr_pause_that_is_not_given_is_the_users_turn(pause):
    assert mtr_verdict("pause", [segment(0.5, 1.9)], {**TIMES, **pause})["success"] == 0
    assert mtr_verdict("pause", [segment(2.1, 2.9)], {**TIMES, **pause})["success"] == 1


def test_a_second_of_words_is_exactly_enough_and_three_words_are_not():
    assert mtr_verdict("pause", [segment(0.0, 1.0, 2)], TIMES)["success"] == 0
    assert mtr_verdict("pause", [segment(0.0, 0.9, 3)], TIMES)["success"] == 1
    assert mtr_verdict("pause", [segment(0.0, 0.9, 4)], TIMES)["success"] == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"kind": "turn", "segments": [{"timestamp": [0, 1], "words": []}], "timestamps": TIMES}, "no 'text'"),
        ({"kind": "turn", "segments": [3], "timestamps": TIMES}, "item 0 of segments is 3"),
        ({"kind": "turn", "segments": [segment(1, 5)], "timestamps": {**TIMES, "user_start": None}}, "'user_start' is"),
        ({"kind": "turn", "segments": [{**segment(3, 5), "words": [None]}], "timestamps": TIMES}, "'start' is None"),
        ({"kind": "nap", "segments": [], "timestamps": TIMES}, "kind 'nap'; MTR-DuplexBench has turn"),
        ({"kind": "turn", "segments": [], "timestamps": None}, "'timestamps' is None"),
        ({"kind": "background", "segments": [], "timestamps": {"background_end": 3}}, "no 'background_start'"),
        ({"kind": "turn", "segments": [segment(3, math.inf)], "timestamps": TIMES}, "inf"),
    ],
)
def test_a_malformed_row_of_turns_is_named(row, message):
    with pytest.raises(MalformedRow, match=message):
        SCORERS["mtr_duplex"](row)


# -- judges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "official", "ours"),
    [
        ("[[3]]", "3", 3.0), ("[[1]] [[5]]", "5", 5.0), ("[[4]] [[x]]", "4", 4.0), ("4", "4", 4.0), (" 2 ", "2", 2.0),
        ("[[\n4\n]]", "4", 4.0), ("[[nan]]", "nan", None), ("[[inf]]", "inf", None), ("[[6]]", "6", None),
        ("[[0]]", "0", None), ("[[3_0]]", "3_0", None), ("[[３]]", "３", 3.0), ("[[1e0]]", "1e0", 1.0),
        ("[[4][5]]", "", None), ("", "", None), ("score 4", "", None), ("[[]]", "", None), ("nan", "nan", None),
    ],
)  # fmt: skip
def test_vstyle_reads_what_python_reads_and_ours_keeps_to_the_scale(reply, official, ours):
    assert vstyle_score_text(reply) == official
    assert vstyle_score(reply) == ours


def test_ratings_and_verdicts_are_read_strictly():
    assert [read_rating(text) for text in ("1", "5", "0", "6", "4/5", "", "+4", "４")] == [1, 5] + [None] * 6
    assert read_rating("0", low=0) == 0
    assert [read_yes_no(text) for text in ("Yes", "No", "yes", "Yes.", "")] == [True, False, None, None, None]


def test_uro_judgements():
    assert uro_judgement("rating", ["4", "5", "3"], "hi") == (4.0, 4.0)
    assert uro_judgement("rating", ["4", "7", "4"], "hi") == (5.0, None)  # the script takes any whole number
    assert uro_judgement("rating", ["good"] * 3, "hi") == (None, None)  # the script ends
    assert uro_judgement("yes_no", ["Yes", "Yes.", "No"], "B") == (pytest.approx(1 / 3), None)
    assert uro_judgement("yes_no", ["yes"] * 3, "B") == (0.0, None)
    assert uro_judgement("yes_no", ["Yes"] * 3, " ") == uro_judgement("rating", None, "") == (0.0, 0.0)
    assert uro_judgement("rating", None, "hi") == (0.0, None)
    assert uro_judgement("srt", ["a lively voice"], "hi") == (0.0, None)
    with pytest.raises(MalformedRow, match="no reply of the judge"):
        uro_judgement("rating", [], "hi")


def test_voicebench_with_a_list_of_the_users():
    patterns = ["answer is [CHOICE]", "[CHOICE] fits", " [CHOICE]."]
    assert voicebench_letter("B fits, the answer is C", patterns) == "C"  # the first pattern wins, not the first place
    assert voicebench_letter("b fits and a fits", patterns) == "A"  # of one pattern a comes before b
    assert voicebench_letter("<1> D", patterns) == "D" and voicebench_letter("d", patterns) == "D"
    assert voicebench_letter(" d", patterns) is None and voicebench_letter("E.", patterns) is None
    assert voicebench_letter("", patterns) is None and voicebench_letter("", None) is None
    assert voicebench_letter("it's D", patterns) is None and voicebench_letter("it's D") == "D"
    assert voicebench_refused("") and voicebench_refused(" \n") and voicebench_refused("SORRY!")
    assert not voicebench_refused("Here you are.") and voicebench_refused("It is Unethical", ["unethical"])


def test_voicebench_majorities():
    assert voicebench_majority(["Yes", "YES", "no"]) is True and voicebench_majority(["no", "No", "yes"]) is False
    assert voicebench_majority(["yes.", "yes.", "yes"]) is False
    assert voicebench_majority(["yes", "no", "maybe"]) is None  # where the script goes by the order of a set
    assert SCORERS["voicebench"]({"kind": "qa", "scores": ["Yes", "yes", "No"]}) == {"official_majority": True}


def test_mmau_pro_and_rubrics():
    assert mmau_pro_rating("4") == (0.8, 0.8) and mmau_pro_rating("so: [[2]]") == (0.4, 0.4)
    assert mmau_pro_rating("well done") == mmau_pro_rating("[[7]]") == (0.6, None)
    assert rubric_score([0, 2, 2, 5, 5], 5, True) == (pytest.approx(0.6), pytest.approx(0.6))  # mean of 2, 2, 5
    assert rubric_score([0, 2, None, 5, None], 5, True) == (None, 0.4)
    rubric = [{"name": "drops", "choices": [0, 1]}, {"name": "rain", "choices": [0, 2.5]}]
    scores = [
        '"score": 1}, {"name": "rain", "score": 2.5}]',
        '"score": 1}]',
        '"score": 2}, {"name": "rain", "score": 0}]',
    ]
    replies = [f'My grades: [{{"name": "drops", {rest} as asked.' for rest in scores]
    assert [rubric_points(reply, rubric) for reply in replies] == [3.5, None, None]
    assert rubric_points("[" * 100_000, rubric) is None is rubric_points('{"score": 1}', rubric[:1])
    assert rubric_score([5] * 5, 5, False) == (0.0, 0.0)
    with pytest.raises(MalformedRow, match="6 points of a rubric worth 5"):
        rubric_score([6] * 5, 5, True)


# -- AIR-Bench -------------------------------------------------------------------------------------------------------


def air(response, answer="dog", **options):
    return {"choice_a": "cat", "choice_b": "dog", "answer_gt": answer, "response": response, **options}


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (air("B"), True), (air("A"), False), (air("C"), False), (air(""), None), (air("None"), None),
        (air("b"), None), (air("\nB"), True), (air("xB."), True), (air("(B"), None), (air("N.B"), None),
        (air("B", choice_d="dog"), True), (air("D", choice_d="dog"), False), (air("(b)", "bird"), None),
    ],
)  # fmt: skip
def test_air_choices(row, verdict):
    assert air_choice(row) is verdict


def test_where_air_bench_ends_ours_goes_on():
    rows = [{**air(reply), "task_name": task, "dataset_name": "x"} for task, reply in
            [("age", "B"), ("age", "A"), ("age", "?"), ("sex", "?")]]  # fmt: skip
    assert SCORERS["air_bench"]({"kind": "foundation_file", "rows": rows}) == {"official": "stops: KeyError"}
    ours = air_foundation([*rows, {**rows[0], "answer_gt": "owl"}], strict=False)
    assert ours == {"tasks": {"age_x": {"n": 2, "correct": 1}, "sex_x": {"n": 0, "correct": 0}}, "fail_num": 2,
                    "bad_rows": 1}  # fmt: skip
    assert air_foundation([{**rows[0], "task_name": None}]) == {"tasks": {}, "fail_num": 0}
    with pytest.raises(OfficialStop, match="exit 1"):
        air_choice(air("A", "owl"))
    assert SCORERS["air_bench"]({"kind": "foundation", "row": air(None)}) == {"official": "stops: AttributeError"}


def test_air_pairs():
    replies = ("8 7", " 8 7\n", "8\n7", "8  7", "8, 7", "11 7", "8.5 7", "", "0 10", "8 7 6", "-1 3")
    assert [air_pair(reply) for reply in replies] == [
        (8, 7), (8, 7), None, None, None, None, None, None, (0, 10), None, (-1, 3)
    ]  # fmt: skip


def test_air_chat_both_orders():
    tasks = ["speech_QA", "sound_QA", "music_QA", "speech_and_sound_QA", "speech_and_music_QA"]
    plain = air_chat([{"task_name": task, "gpt-score": "6 8"} for task in tasks], swapped=False)
    swapped = air_chat([{"task_name": task, "gpt-score": f"{4 + i} 5"} for i, task in enumerate(tasks)], swapped=True)
    assert plain["tasks"]["speech"] == {"n": 1, "win_rate": 1.0, "first_mean": 6.0, "second_mean": 8.0}
    assert [swapped["tasks"][group]["win_rate"] for group in ("speech", "sound", "music")] == [0, 0, 1]
    # the model's mean of 8 and 4, 5, 6, 7, 8
    assert air_chat_both(plain, swapped) == {"speech": 6, "sound": 6.5, "music": 7, "speech_and_sound": 7.5,
                                             "speech_and_music": 8, "mixed": 7.75, "average": 6.8125}  # fmt: skip
    lacking = air_chat([{"task_name": "speech_QA", "gpt-score": "x"}], swapped=False, strict=False)
    assert lacking == {"tasks": {}, "fail_num": 1, "success_num": 0} and air_chat_both(lacking, swapped) == {}
    with pytest.raises(MalformedRow, match="task_name cooking; AIR-Bench chat has speech_QA"):
        air_chat([{"task_name": "cooking", "gpt-score": "1 2"}], swapped=False)


# -- likelihood ------------------------------------------------------------------------------------------------------


def test_pairs_by_hand():
    rows = [
        {"pair": 1, "voice": "a", "right": [-1.0], "wrong": [-2.0], "in_vocabulary": True},  # 1
        {"pair": 1, "voice": "b", "right": [-2.0], "wrong": [-1.0], "in_vocabulary": True},  # 0
        {"pair": 2, "voice": "a", "right": [-1.0, -1.0], "wrong": [-1.0], "in_vocabulary": False},  # a tie; summed 0
    ]
    report = pair_report(rows)
    assert report["score"] == 50 and report["n"] == 2 and report["rows"] == 3
    assert report["sum"]["score"] == 25 and report["mean"]["score"] == 50
    assert report["in_vocabulary"]["score"] == 50 and report["in_vocabulary"]["n"] == 1
    assert pair_report([])["score"] is None


def test_endings_are_reported_by_modality():
    rows = [{"pair": i, "modality": kind, "right": [-1.0], "wrong": [wrong]}
            for i, kind, wrong in [(1, "A2A", -2.0), (1, "T2T", -0.5), (2, "A2A", -2.0)]]  # fmt: skip
    by = pair_report(rows)["by_modality"]
    assert (by["A2A"]["score"], by["A2A"]["n"], by["T2T"]["score"]) == (100, 2, 0)


@pytest.mark.parametrize("bad", [[], [math.nan], [-math.inf], ["-1"], [0.5], [True]])
def test_a_likelihood_that_is_none_is_refused(bad):
    with pytest.raises(MalformedRow):
        sequence_score(bad)


@given(st.lists(st.floats(-9, 0), min_size=1, max_size=5), st.lists(st.floats(-9, 0), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_credits_of_a_pair_and_its_reverse_are_one(right, wrong):
    assert pair_credit(right, wrong) + pair_credit(wrong, right) == 1
    shuffled = random.Random(0).sample(right, len(right))
    assert sequence_score(shuffled) == pytest.approx(sequence_score(right))
