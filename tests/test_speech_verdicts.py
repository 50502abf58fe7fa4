"""Verdicts of the official scripts on rows that the fixtures of speech hint at: each rule at its edge, worked out by
hand, and what holds for every row: it is left as it was, what else it carries does not matter, types are the script's.
"""

import copy
import json
from pathlib import Path

import pytest

from covo_rl.evaluate.speech import SCORERS
from covo_rl.evaluate.speech.choices import air_chat, air_choice
from covo_rl.evaluate.speech.fields import MalformedRow
from covo_rl.evaluate.speech.judged import voicebench_majority, vstyle_score_text
from covo_rl.evaluate.speech.timing import mtr_verdict

FIXTURES = Path(__file__).parent / "fixtures" / "speech"
DERIVED = {"wer", "took_turn", "latency", "response_intervals", "stop_intervals"}
TIMES = {"user_start": 0.0, "user_end": 2.0, "model_start": 2.5, "model_end": 6.0}


def kinds(value):
    """The shape of a verdict: a type for each number, text or null."""
    if isinstance(value, dict):
        return {key: kinds(item) for key, item in value.items()}
    return [kinds(item) for item in value] if isinstance(value, list) else type(value)


@pytest.mark.parametrize("name", SCORERS)
def test_a_row_stays_as_it_was_and_gives_the_scripts_types_whatever_else_it_carries(name):
    outputs = DERIVED if name.endswith("_derived") else set()
    for row in json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))["rows"]:
        asked = {key: value for key, value in row.items() if not key.startswith("official") and key not in outputs}
        before = copy.deepcopy(asked)
        verdict = SCORERS[name](asked)
        assert asked == before
        assert verdict == SCORERS[name](row) == SCORERS[name]({**asked, "note": None, "id": 7})
        wanted = {key: value for key, value in row.items() if key not in asked}
        if row.get("kind") == "mcq":  # without the user's list a letter may be read or not
            assert verdict.keys() == wanted.keys()
        else:
            assert kinds(verdict) == kinds(wanted)


# -- turns -----------------------------------------------------------------------------------------------------------


def segment(start, end, **change):
    words = [{"word": "w", "start": start, "end": end}]
    return {"timestamp": [start, end], "text": "w", "words": words, **change}


def test_the_start_of_a_window_is_not_asked_for_where_nothing_is_said_before_its_end():
    late, times = [segment(6.0, 7.0)], {**TIMES, "interruption_start": 1.0, "interruption_end": 2.2}
    assert mtr_verdict("turn", late, {**TIMES, "user_start": None, "model_end": 7.0})["success"] == 1
    del times["model_start"]
    assert mtr_verdict("interruption", late, times) == {"success": 0, "latency": 0, "frequency": 1}
    with pytest.raises(MalformedRow, match="model_start"):
        mtr_verdict("interruption", [segment(3.0, 5.0)], times)
    with pytest.raises(MalformedRow, match="user_start"):
        mtr_verdict("turn", [segment(1.0, 5.0)], {**TIMES, "user_start": None})


@pytest.mark.parametrize("words", [{}, {"words": None}, {"words": []}])
def test_a_segment_without_words_covers_no_noise(words):
    silent = {"timestamp": [2.5, 5.0], "text": "mm", **words}
    row = {"kind": "background", "timestamps": {**TIMES, "background_start": 3.0, "background_end": 4.5},
           "segments": [silent]}  # fmt: skip
    assert SCORERS["mtr_duplex"](row) == {"official": {"success": 0, "latency": 0.5, "frequency": 0.4}}
    row["segments"] = [silent, segment(3.0, 5.0)]
    assert SCORERS["mtr_duplex"](row)["official"]["success"] == 1
    if not words:  # elsewhere the words are needed
        with pytest.raises(MalformedRow, match="no 'words'"):
            SCORERS["mtr_duplex"]({**row, "kind": "turn"})


# -- judges ----------------------------------------------------------------------------------------------------------


def test_a_tie_without_a_yes_is_no_whichever_answer_the_script_takes():
    assert voicebench_majority(["Yes.", "no", "maybe"]) is voicebench_majority(["no", "Yes."]) is False
    assert voicebench_majority(["yes", "no", "maybe"]) is voicebench_majority(["yes", "no", "No", "YES"]) is None
    assert voicebench_majority(["maybe", "YES", "no", "yes"]) is True


@pytest.mark.parametrize(
    ("scores", "mean"),
    [
        (["4", "[[2]] or [[5]]"], 3.0), ([4, True], 2.5), (["1e0"], 1.0), (["[[3.5]]"], "raises NotImplementedError"),
        ([None], "raises TypeError"), (["5", "", None], "raises NotImplementedError"),
        (["5", {}, "x"], "raises TypeError"),
    ],
)  # fmt: skip
def test_open_ratings_end_as_the_script_does(scores, mean):
    assert SCORERS["voicebench"]({"kind": "open", "scores": scores}) == {"official_mean": mean}


def test_a_whole_reply_is_stripped_as_text_is():
    assert vstyle_score_text("\x1c4\n") == "4" and vstyle_score_text("[[\x1c4]]") == ""  # float() alone keeps \x1c


@pytest.mark.parametrize(
    ("scores", "mean"),
    [([3, 3.6, 1.005], "2.54"), (["inf", 3, "2"], "inf"), (["inf", "-inf", 1], "nan"), (["nan", 4], "4.00")],
)
def test_means_of_vstyle_are_printed_as_pandas_makes_them(scores, mean):
    """(3 + 3.6 + 1.005) / 3 = 2.535: its last digit is decided by how the sum was rounded."""
    records = [{"model_name": "m", "ability": "empathy/anger", "gemini_score": score} for score in scores]
    verdict = SCORERS["vstyle"]({"kind": "aggregate", "records": records})["official"]["m"]
    assert verdict["overall"] == mean and verdict["ability"]["empathy/anger"] == {"mean": mean, "n": len(scores)}


def test_repeat_is_scored_by_its_own_rule_whatever_else_its_last_line_holds():
    lines = {"Repeat": {"final_score": 99.0, "ok_rate": 0.5, "final_WER_for_ok_case": 0.2}, "MLC": {"final_score": 99}}
    means = SCORERS["uro_aggregate"]({"last_lines": lines, "utmos": {}, "wer": {}})["official"]
    assert means["set:Repeat"] == 40 and means["set:MLC"] == 99 and means["final_score"] == 69.5


# -- choices ---------------------------------------------------------------------------------------------------------


def test_options_are_compared_with_the_key_in_order():
    cat = {"choice_a": "cat", "answer_gt": "cat", "response": "B"}
    assert air_choice(cat) is False and air_choice({**cat, "response": "?", "answer_gt": "dog"}) is None
    for lacking in ({**cat, "answer_gt": "dog"}, {"choice_b": "cat", "answer_gt": "cat", "response": "B"}):
        assert SCORERS["air_bench"]({"kind": "foundation", "row": lacking}) == {"official": "stops: KeyError"}
    no_key = {"choice_a": "cat", "choice_b": "dog", "choice_d": "owl", "answer_gt": None}
    assert air_choice({**no_key, "response": "C"}) is True and air_choice({**no_key, "response": "D"}) is False
    with pytest.raises(MalformedRow, match="no 'answer_gt'"):
        air_choice({"choice_a": "cat", "choice_b": "dog", "response": "A"})


def test_a_judges_reply_that_is_no_text_ends_the_script():
    rows = [{"task_name": "speech_QA", "gpt-score": None}]
    assert SCORERS["air_bench"]({"kind": "chat_file", "swapped": False, "rows": rows}) == {
        "official": "stops: AttributeError"
    }
    with pytest.raises(MalformedRow, match="gpt-score"):
        air_chat(rows, swapped=False, strict=False)
