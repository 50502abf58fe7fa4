"""Official layouts of the speech sets: what is read, what is refused and where it stands; predictions files."""

import json
from pathlib import Path

import pytest
from speech_layouts import (
    LAYOUTS,
    MMAU_PRO,
    ROWS,
    SEGMENTS,
    edit_lines,
    reply_line,
    write_layout,
    write_lines,
    write_replies,
)

from covo_rl.evaluate.sets import EvalInputError, load_set
from covo_rl.evaluate.speech.inputs import read_speech_inputs
from covo_rl.evaluate.speech.rows import Word


def read(name, data, **options):
    return read_speech_inputs(load_set(name), data, **options)


def refusal(name, data, **options) -> str:
    with pytest.raises(EvalInputError) as error:
        read(name, data, **options)
    return str(error.value)


# -- every layout ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_read_and_a_right_reply_to_every_row_is_found(name, tmp_path):
    data = write_layout(name, tmp_path / "data")
    inputs = read(name, data)
    assert {part: len(rows) for part, rows in inputs.by_subset().items()} == ROWS[name]
    assert len(inputs.meta["data_sha256"]) == 64
    replied = read(name, data, predictions=write_replies(inputs, tmp_path / "replies.jsonl"))
    assert replied.missing() == {}
    first = write_lines(tmp_path / "one.jsonl", [reply_line(inputs.rows[0])])
    one = read(name, data, predictions=first)
    assert sum(map(len, one.missing().values())) == len(inputs.rows) - 1
    assert sum("counted as missing" in note for note in one.meta["problems"]) == len(one.missing())


def test_a_published_count_that_is_not_met_is_said(tmp_path):
    notes = read("uro-bench", write_layout("uro-bench", tmp_path), subsets=["GaokaoEval"]).meta["problems"]
    assert notes == ["GaokaoEval has 3 rows, 303 are published"]


def test_missing_parts_are_said_and_a_missing_part_asked_for_is_refused(tmp_path):
    data = write_layout("uro-bench", tmp_path)
    assert any("basic/MLC/test.jsonl (MLC)" in note for note in read("uro-bench", data).meta["problems"])
    assert "no basic/MLC/test.jsonl" in refusal("uro-bench", data, subsets=["MLC", "Repeat"])
    assert "GaokaoEval" in refusal("uro-bench", data, subsets=["Gaokao"]), "the names are listed"
    assert {row.subset for row in read("uro-bench", data, subsets=["pro", "Repeat"]).rows} == {
        "Repeat", "GenEmotion-en", "SRT-en", "Multilingual", "MtBenchEval-en"}  # fmt: skip


def test_the_limit_is_of_each_part(tmp_path):
    inputs = read("uro-bench", write_layout("uro-bench", tmp_path), limit=1, subsets=["Repeat", "GaokaoEval"])
    assert [row.id for row in inputs.rows] == ["r1", "g0"]


def test_data_may_be_given_from_any_of_its_folders(tmp_path):
    data = write_layout("uro-bench", tmp_path)
    for place in (data / "basic", data / "basic/GaokaoEval", data / "basic/GaokaoEval/test.jsonl"):
        assert len(read("uro-bench", place, subsets=["GaokaoEval"]).rows) == 3
    assert "--subset says of which part" in refusal("uro-bench", data / "basic/GaokaoEval/test.jsonl")


# -- what each row says ----------------------------------------------------------------------------------------------


def test_uro_rows(tmp_path):
    rows = {row.name: row for row in read("uro-bench", write_layout("uro-bench", tmp_path)).rows}
    assert rows["TruthfulEval/t1"].reference == "a fish / a trout"
    assert rows["AlpacaEval/a1"].reference == "tell me of bees", "without a target, the source"
    assert rows["Repeat-zh/z1"].language == "zh"
    assert rows["Multilingual/m1"].language == "fr"
    assert rows["GaokaoEval/g2"].key == "0002"
    assert rows["GenEmotion-en/e1"].columns["emotion"] == "happy"
    dialogue = rows["MtBenchEval-en/d1"]
    assert [(turn.text, turn.reference) for turn in dialogue.rounds] == [("one", "first"), ("two", "second")]
    assert len(dialogue.clips) == 2


def test_duplex_rows(tmp_path):
    data = write_layout("full-duplex-bench", tmp_path)
    inputs = read("full-duplex-bench", data, predictions=data)
    rows = {row.name: row for row in inputs.rows}
    assert rows["candor_turn_taking/1"].times == {"start": 2.5, "end": 2.6}
    interruption = rows["synthetic_user_interruption/1"]
    assert (interruption.text, interruption.reference) == ("but wait", "before")
    assert interruption.times == {"start": 1.0, "end": 2.0}
    assert rows["icc_backchannel/1"].times["distribution"] == [0.25, 0.5, 0.25]
    reply = inputs.reply(rows["candor_turn_taking/2"])
    assert reply.words == ((Word("hello", 3.0, 3.4), Word("there", 3.5, 4.2)),)
    assert reply.audio[0] == str(data / "candor_turn_taking/2/output.wav")


def test_outputs_are_paired_by_the_folder_of_the_item(tmp_path):
    """The official script zips two listings, so that one missing output shifts all that follow."""
    data = write_layout("full-duplex-bench", tmp_path / "data")
    outputs = tmp_path / "outputs" / "candor_turn_taking" / "2"
    outputs.mkdir(parents=True)
    (outputs / "output.json").write_text(
        json.dumps({"text": "mine", "chunks": [{"text": "mine", "timestamp": [1, None]}]})
    )
    inputs = read("full-duplex-bench", data, subsets=["candor_turn_taking"], predictions=tmp_path / "outputs")
    assert inputs.missing() == {"candor_turn_taking": ["1"]}
    assert inputs.replies["candor_turn_taking/2"].words == ((Word("mine", 1.0, None),),)


def test_pairs_and_stories(tmp_path):
    rows = {row.name: row for row in read("spoken-lm", write_layout("spoken-lm", tmp_path)).rows}
    first, second = rows["swuggy/1/A"], rows["swuggy/1/B"]
    assert [turn.text for turn in first.rounds] == ["brick", "blick"], "the right one first"
    assert (first.columns["pair"], first.columns["in_vocabulary"], second.columns["in_vocabulary"]) == (
        "1",
        False,
        True,
    )
    assert [turn.text for turn in rows["sblimp/1/A"].rounds] == ["dogs eat", "dogs eats"]
    story = rows["tsc-a2t/s1"]
    assert [len(turn.clips) for turn in story.rounds] == [1, 0, 0]
    assert [turn.text for turn in story.rounds] == [None, "right text", "wrong text"]


def test_questions(tmp_path):
    rows = {row.name: row for row in read("air-bench", write_layout("air-bench", tmp_path / "air")).rows}
    assert rows["Sound_AQA_avqa/0"].choices == ("dog", "cat")
    assert rows["Audio_Grounding_audiogrounding/2"].clips[0].path.endswith("audiogrounding/2.flac")
    assert rows["speech_dialogue_QA_fisher/3"].kind == "air_chat"
    pro = {row.id: row for row in read("mmau-pro", write_layout("mmau-pro", tmp_path / "pro")).rows}
    assert len(pro["c1"].clips) == 2
    assert pro["i1"].columns["kwargs"] == {"N": 5}, "parquet fills in the parameters of other rules"
    assert [row.subset for row in read("mmau-pro", tmp_path / "pro/test.parquet", subsets=["closed"]).rows] == [
        "speech", "sound"]  # fmt: skip


def test_closed_questions_without_options_are_left_out_as_officially_and_counted(tmp_path):
    data = write_lines(tmp_path / "test.jsonl", [{**MMAU_PRO[1], "choices": ["one"]}, MMAU_PRO[2]])
    inputs = read("mmau-pro", data, predictions=write_lines(tmp_path / "p.jsonl", [{"id": "o1", "model_output": "x"}]))
    assert [row.id for row in inputs.rows] == ["o1"]
    assert any("not scored: 1 (c2)" in note for note in inputs.meta["problems"])


def test_translations_and_sentences_to_say(tmp_path):
    inputs = read("covost2", write_layout("covost2", tmp_path / "covost"))
    first = inputs.rows[0]
    assert (first.id, first.text, first.reference, first.language) == ("1", 'he said "yes', "他说", "zh")
    assert sum("1 rows of other splits" in note for note in inputs.meta["problems"]) == 2
    said = read("seed-tts", write_layout("seed-tts", tmp_path / "tts"), subsets=["zh-hard"]).rows[1]
    assert (said.text, said.reference, said.language) == ("hello you", "good night", "zh")


def test_replies_that_stand_in_the_data_are_read_where_the_data_is_the_predictions(tmp_path):
    data = write_layout("voicebench", tmp_path)
    inputs = read("voicebench", data, predictions=data)
    assert inputs.replies["sd-qa/0000"].text == "Ann"
    assert inputs.missing() == {"alpacaeval": ["0001"], "openbookqa": ["0000"]}
    style = write_layout("vstyle", tmp_path / "style")
    said = read("vstyle", style, predictions=style)
    assert said.reply(said.rows[2]).audio[0] == str(style / "en/wav/reply2.wav")


def test_a_folder_of_data_is_its_own_predictions_by_whatever_path(tmp_path, monkeypatch):
    data = write_layout("voicebench", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert read("voicebench", data, predictions=Path("data")).replies["sd-qa/0000"].text == "Ann"


def test_no_reply_that_stands_in_the_data_is_taken_for_one_of_another_folder(tmp_path):
    data = write_layout("mtr-duplexbench", tmp_path / "data")
    folder = write_lines(tmp_path / "mine/smooth.jsonl", [{"id": "1/1", "segments": SEGMENTS}]).parent
    inputs = read("mtr-duplexbench", data, predictions=folder)
    assert list(inputs.replies) == ["smooth/1/1"] and inputs.missing()["smooth"] == ["1/2"]
    (tmp_path / "empty").mkdir()
    assert "neither smooth.jsonl" in refusal("mtr-duplexbench", data, predictions=tmp_path / "empty")


# -- what is refused -------------------------------------------------------------------------------------------------

#: set, file, change of its rows, what the message says besides the place
BROKEN = [
    ("uro-bench", "basic/GaokaoEval/test.jsonl", {1: {"source_wav": 3}}, "line 2: source_wav is 3, not a path"),
    ("uro-bench", "basic/GaokaoEval/test.jsonl", {2: {"source_text": None}}, "line 3: no source_text"),
    ("uro-bench", "basic/Repeat/test.jsonl", {0: {"source_wav": "https://a/b.wav"}}, "line 1: source_wav: its audio"),
    ("uro-bench", "basic/Repeat/test.jsonl", {0: {"source_wav": "../../../x.wav"}}, "leaves the audio folder"),
    ("uro-bench", "basic/Repeat/test.jsonl", {0: {"source_wav": "wav/9.wav"}}, "audio files are missing in 1 row"),
    ("uro-bench", "pro/MtBenchEval-en/test.jsonl", {0: {"num_round": 3}}, "num_round is 3, dialogue has 2 rounds"),
    ("uro-bench", "pro/MtBenchEval-en/test.jsonl", {0: {"dialogue": [{"source_wav": "wav/1.wav"}]}},
     "line 1, dialogue[0]: no source_text"),
    ("uro-bench", "basic/TruthfulEval/test.jsonl", {0: {"target_text": ["a", 1]}}, "target_text holds 1, not a text"),
    ("vstyle", "en/metadata.jsonl", {1: {"ability": "anger"}}, "line 2: ability is 'anger', not category/sub"),
    ("vstyle", "zh/metadata.jsonl", {1: {"id": 0}}, "line 2: the id of"),
    ("vcb-bench", "GK.jsonl", {0: {"reference": None}}, "no reference, which judge-yes-no compares with"),
    ("voicebench", "openbookqa.jsonl", {0: {"reference": None}}, "line 1: no reference"),
    ("mtr-duplexbench", "background.jsonl", {0: {"timestamps": {"user_start": 1}}}, "timestamps: no background_start"),
    ("mtr-duplexbench", "smooth.jsonl", {1: {"timestamps": {"user_start": "1"}}}, "user_start is '1', not a number"),
    ("mtr-duplexbench", "smooth.jsonl", {1: {"timestamps": {"users": 1}}}, "timestamps: unknown users"),
    ("mtr-duplexbench", "pause.jsonl", {0: {"segments": [{"timestamp": [2, 1], "words": []}]}},
     "segments[0]: it ends at 1"),
    ("mtr-duplexbench", "pause.jsonl", {0: {"segments": [{"timestamp": [1, 2], "words": [{"word": "a"}]}]}},
     "segments[0]: words[0]: its times are [None, None]"),
    ("mmar-rubrics", "MMAR-meta.jsonl", {1: {"rubric": None}}, "line 2: no rubric: the file of 2026-02"),
    ("mmar-rubrics", "MMAR-meta.jsonl", {1: {"rubric": [{"name": "a", "scoring_point": "b", "choices": ["1"]}]}},
     "line 2, rubric[0]: choices is ['1'], not a list of scores from 0 on"),
    ("mmar-rubrics", "MMAR-meta.jsonl", {1: {"rubric": [{"name": "a", "scoring_point": "b", "choices": [0]}]}},
     "line 2: rubric is worth 0 points"),
    ("mmar-rubrics", "MMAR-meta.jsonl", {1: {"answer": "snow"}}, "line 2: answer 'snow' is not among its choices"),
    ("asr", "zh.jsonl", {0: {"language": "fr"}}, "line 1: language is 'fr'; choose one of en, zh"),
    ("asr", "zh.jsonl", {1: {"text": None}}, "line 2: no text"),
    ("spoken-lm", "tsc.jsonl", {0: {"wrong_text": ["x"]}}, "wrong_text is ['x'], not a text"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "changes", "said"), BROKEN, ids=[f"{b[0]}: {b[3][:40]}" for b in BROKEN])
def test_a_malformed_row_is_named_with_its_place(name, file, changes, said, tmp_path):
    data = write_layout(name, tmp_path)
    path = tmp_path / file

    def change(rows):
        for number, fields in changes.items():
            rows[number] |= fields
            rows[number] = {key: value for key, value in rows[number].items() if value is not None}

    edit_lines(path, change)
    message = refusal(name, data)
    assert said in message
    assert str(path) in message or "audio files are missing" in message


#: set, file, text -> text, what the message says
BROKEN_TEXTS = [
    ("seed-tts", "en/meta.lst", ("|good day", ""), "en/meta.lst, line 1: 3 fields between |"),
    ("covost2", "covost_v2.en_zh-CN.tsv", ("\t你好", ""), "tsv, line 3: 3 cells, the header has 4"),
    ("covost2", "covost_v2.en_zh-CN.tsv", ("translation", "target"), "no column translation; its columns are path"),
    ("spoken-lm", "lexical/dev/gold.csv", ("b l,5,0\n1,c", "b l,5,1\n1,c"), "pair 1 of voice A has 2 rows, 2 of them"),
    ("spoken-lm", "syntactic/dev/gold.csv", ("dogs eat,1", "dogs eat,yes"), "row 2: correct is 'yes', not 1 or 0"),
    ("uro-bench", "basic/Repeat/test.jsonl", ('{"id": "r2"', '{"id": '), "test.jsonl, line 2: not JSON"),
    ("air-bench", "Foundation_meta.json", ('"choice_a": "dog"', '"choice_a": ["dog"]'), "row 1: choice_a is ['dog']"),
    ("air-bench", "Chat_meta.json", ('"answer_gt": "they talk", ', ""), "Chat_meta.json, row 1: no answer_gt"),
    ("vcb-bench", "manifest.yaml", ("judge-yes-no", "judge-10"), "GK: kind is 'judge-10'; choose judge-5"),
    ("vcb-bench", "manifest.yaml", ("GK.jsonl", "KG.jsonl"), "GK: no such file"),
    ("full-duplex-bench", "candor_turn_taking/2/turn_taking.json", ("[2.5, 2.6]", "2.5"),
     "timestamp of the first entry is 2.5"),
    ("full-duplex-bench", "candor_turn_taking/2/turn_taking.json", ("[{", "[["), "turn_taking.json: not JSON"),
    ("full-duplex-bench", "icc_backchannel/icc_gt_distribution.json", ("0.5", '"x"'),
     "its shares are [0.25, 'x', 0.25]"),
    ("full-duplex-bench", "candor_pause_handling/1/output.json", ("3.4", "1"), "output.json: chunks[0]: it ends at 1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "file", "change", "said"), BROKEN_TEXTS, ids=[f"{b[0]}: {b[3][:40]}" for b in BROKEN_TEXTS]
)
def test_a_malformed_file_is_named_with_its_place(name, file, change, said, tmp_path):
    data = write_layout(name, tmp_path)
    path = tmp_path / file
    text = path.read_text("utf-8")
    assert change[0] in text
    path.write_text(text.replace(*change, 1), "utf-8")
    assert said in refusal(name, data)


def test_mmau_pro_rows_that_are_malformed(tmp_path):
    rows = [
        {**MMAU_PRO[0], "audio_path": []},
        {**MMAU_PRO[3], "task_identifier": None},
        {**MMAU_PRO[3], "id": "i2", "kwargs": "{N: 5"},
        {**MMAU_PRO[2], "answer": None},
    ]
    message = refusal("mmau-pro", write_lines(tmp_path / "test.jsonl", rows))
    for said in ("line 1: audio_path is an empty list", "line 2: no task_identifier", "line 3: kwargs is '{N: 5'",
                 "line 4: no answer"):  # fmt: skip
        assert said in message, "all of them at once"


def test_many_problems_are_counted_and_not_all_shown(tmp_path):
    data = write_lines(tmp_path / "basic/Repeat/test.jsonl", [{"id": i} for i in range(60)])
    message = refusal("uro-bench", data, subsets=["Repeat"])
    assert "... and 70 more" in message, "two fields are absent in each row; fifty are shown"


def test_ids_that_stand_twice_are_refused_or_where_rows_are_numbered_passed_over(tmp_path):
    data = write_layout("uro-bench", tmp_path)
    edit_lines(tmp_path / "basic/GaokaoEval/test.jsonl", lambda rows: rows[1].update(id="g0"))
    inputs = read("uro-bench", data, subsets=["GaokaoEval"])
    assert [row.id for row in inputs.rows] == ["0000", "0001", "0002"]
    assert any("named by number" in note for note in inputs.meta["problems"])


# -- predictions -----------------------------------------------------------------------------------------------------


@pytest.fixture
def uro(tmp_path):
    return write_layout("uro-bench", tmp_path / "data")


def test_a_reply_is_named_by_id_number_or_part(uro, tmp_path):
    for names in (("g0", "g2"), ("0000", "0002"), ("GaokaoEval/g0", "GaokaoEval/g2"), ("GaokaoEval/0000", "g2")):
        file = write_lines(tmp_path / "p.jsonl", [{"id": name, "reply_text": "A"} for name in names])
        if "0000" in names[0] and "g" in names[1]:
            assert "unknown ids in 1 row" in refusal("uro-bench", uro, subsets=["GaokaoEval"], predictions=file)
        else:
            inputs = read("uro-bench", uro, subsets=["GaokaoEval"], predictions=file)
            assert set(inputs.replies) == {"GaokaoEval/g0", "GaokaoEval/g2"}, names
            assert inputs.missing() == {"GaokaoEval": ["g1"]}


def test_one_file_of_replies_serves_every_part(tmp_path):
    uro = load_set("uro-bench")
    data = write_layout("uro-bench", tmp_path / "data")
    file = write_replies(read_speech_inputs(uro, data), tmp_path / "replies.jsonl")
    inputs = read_speech_inputs(uro, data, subsets=["GaokaoEval"], predictions=file)
    assert set(inputs.replies or {}) == {f"GaokaoEval/g{i}" for i in range(3)}
    assert f"{file}: 9 replies are of parts that --subset does not name" in inputs.meta["problems"]
    lines = [*file.read_text().splitlines(), '{"id": "Repeet/r1", "reply_text": "a"}']
    file.write_text("\n".join(lines))
    with pytest.raises(EvalInputError, match="unknown ids in 1 row: Repeet/r1"):
        read_speech_inputs(uro, data, subsets=["GaokaoEval"], predictions=file)


def test_a_number_that_several_parts_have_needs_the_part(uro, tmp_path):
    file = write_lines(tmp_path / "p.jsonl", [{"id": "0000", "reply_text": "A"}])
    assert "id 0000 means 9 rows: write Repeat/r1" in refusal("uro-bench", uro, predictions=file)
    folder = tmp_path / "replies"
    write_lines(folder / "GaokaoEval.jsonl", [{"id": "0000", "reply_text": "A"}])
    write_lines(folder / "Repeat.jsonl", [{"id": "r2", "reply_text": "B"}])
    assert set(read("uro-bench", uro, predictions=folder).replies) == {"GaokaoEval/g0", "Repeat/r2"}
    assert "neither Repeat.jsonl" in refusal("uro-bench", uro, predictions=tmp_path)


def test_all_that_a_reply_may_hold(uro, tmp_path):
    (tmp_path / "r.wav").write_bytes(b"")
    words = [{"text": "blue", "start": 0.1, "end": 0.5}, {"word": "sky", "start": 0.5, "end": 0.9}]
    turn = {"channel": "model", "start": 0.1, "end": 0.9, "text": "blue sky"}
    line = {"id": "r1", "reply_text": "Blue sky.", "reply_audio": "r.wav", "asr_text": "blue sky", "words": words,
            "events": {"turns": [turn], "events": []}, "source_text": "say after me: blue sky"}  # fmt: skip
    file = write_lines(tmp_path / "p.jsonl", [line, {"id": "r2"}])
    inputs = read("uro-bench", uro, subsets=["Repeat"], predictions=file)
    reply = inputs.replies["Repeat/r1"]
    assert (reply.text, reply.asr_texts[0], reply.audio[0]) == ("Blue sky.", "blue sky", str(tmp_path / "r.wav"))
    assert reply.words == ((Word("blue", 0.1, 0.5), Word("sky", 0.5, 0.9)),)
    assert reply.turns == (turn,)
    assert inputs.missing() == {"Repeat": ["r2"]}, "a line without a reply is none"


def test_an_empty_reply_is_a_reply(uro, tmp_path):
    file = write_lines(tmp_path / "p.jsonl", [{"id": name, "reply_text": ""} for name in ("r1", "r2")])
    assert read("uro-bench", uro, subsets=["Repeat"], predictions=file).missing() == {}


def test_replies_of_several_rounds_are_lists(uro, tmp_path):
    file = write_lines(tmp_path / "p.jsonl", [{"id": "d1", "reply_text": ["one", None], "words": [[], None]}])
    reply = read("uro-bench", uro, subsets=["MtBenchEval-en"], predictions=file).replies["MtBenchEval-en/d1"]
    assert (reply.texts, reply.words, reply.audio) == (("one", None), ((), None), (None, None))
    write_lines(file, [{"id": "d1", "reply_text": "one"}])
    said = "not a list with an entry for each of the 2 rounds"
    assert said in refusal("uro-bench", uro, subsets=["MtBenchEval-en"], predictions=file)


def test_everything_wrong_with_predictions_is_told_at_once(uro, tmp_path):
    lines = [
        {"id": "g0", "reply_txt": "A"},
        {"id": "g1", "reply_text": "A"},
        {"id": "g1", "reply_text": "B"},
        {"id": "g9", "reply_text": "A"},
        {"reply_text": "A"},
        {"id": "g2", "reply_text": ["A", "B"]},
        [1],
    ]
    message = refusal("uro-bench", uro, subsets=["GaokaoEval"], predictions=write_lines(tmp_path / "p.jsonl", lines))
    for said in ("line 1: unknown key reply_txt", "line 3: the id 'g1' again, after", "unknown ids in 1 row: g9",
                 "line 5: no id", "line 6: reply_text is ['A', 'B']", "line 7: expected an object"):  # fmt: skip
        assert said in message


def test_audio_that_is_not_there_is_named_once_for_all_rows(uro, tmp_path):
    lines = [{"id": name, "reply_audio": f"{name}.wav"} for name in ("g0", "g1")]
    message = refusal("uro-bench", uro, subsets=["GaokaoEval"], predictions=write_lines(tmp_path / "p.jsonl", lines))
    assert "reply_audio does not exist in 2 rows: GaokaoEval/g0, GaokaoEval/g1" in message
    lines = [{"id": "g0", "reply_audio": "https://x/y.wav"}]
    message = refusal("uro-bench", uro, subsets=["GaokaoEval"], predictions=write_lines(tmp_path / "p.jsonl", lines))
    assert "reply_audio: its audio 'https://x/y.wav' is a URL" in message


def test_log_probs_of_pairs(tmp_path):
    data = write_layout("spoken-lm", tmp_path / "data")
    for given, said in (
        ([[-1.0]], "not two lists of log-probs"),
        ([[-1.0], []], "not two lists"),
        ("x", "not two lists"),
    ):
        file = write_lines(tmp_path / "p.jsonl", [{"id": "swuggy/1/A", "logps": given}])
        assert said in refusal("spoken-lm", data, predictions=file)
    file = write_lines(tmp_path / "p.jsonl", [{"id": "swuggy/1/A", "reply_text": "brick"}])
    assert "1/A" in read("spoken-lm", data, predictions=file).missing()["swuggy"], "a text is no log-prob"


def test_replies_need_no_audio_of_the_data_and_a_model_needs_it(uro, tmp_path):
    (uro / "basic/GaokaoEval/wav/1.wav").unlink()
    file = write_lines(tmp_path / "p.jsonl", [{"id": "g1", "reply_text": "A"}])
    assert read("uro-bench", uro, subsets=["GaokaoEval"], predictions=file).replies
    assert "audio files are missing in 1 row: GaokaoEval/g1" in refusal("uro-bench", uro, subsets=["GaokaoEval"])
