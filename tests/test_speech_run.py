"""Every set of speech from its official layout to a report, through engines that are files and programs."""

import json
import sys

import pytest
from speech_layouts import ROWS, edit_lines, reply_line, write_item, write_layout, write_lines, write_wav
from typer.testing import CliRunner

from covo_rl.data.files import read_record
from covo_rl.evaluate.cli import app
from covo_rl.evaluate.evaluation import run_request
from covo_rl.evaluate.runner import Request
from covo_rl.evaluate.sets import EvalInputError, load_set
from covo_rl.evaluate.speech.generate import given_replies, letter_inputs, wording
from covo_rl.evaluate.speech.groups import published_figures
from covo_rl.evaluate.speech.inputs import SpeechInputs, read_speech_inputs
from covo_rl.evaluate.speech.neutral import add_neutral_voice
from covo_rl.evaluate.speech.report import compare_speech
from covo_rl.evaluate.speech.suite import suite_markdown
from covo_rl.rewards.program import Program

JUDGE = """
import json, sys
for row in map(json.loads, sys.stdin):
    name = row["id"]
    prompt = row["prompt"]
    if "[[3]]" in prompt: text = "[[4]]"
    elif "with one space between" in prompt: text = "4 8"
    elif "RUBRIC" in prompt: text = '[{"name": "drops", "score": 0}, {"name": "rain", "score": 4}]'
    elif "respond, resume" in prompt: text = "resume" if "hm" in prompt and "so it goes" in prompt else "unknown"
    elif "Yes or No" in prompt: text = "Yes"
    elif "yes or no" in prompt: text = "yes"
    else: text = "4"
    print(json.dumps({"id": name, "text": text}))
"""


#: kinds whose judge hears: no transcript is needed
HEARD = ("vstyle", "uro_srt")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COVO_RL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def judge(tmp_path):
    (tmp_path / "judge.py").write_text(JUDGE)
    return f"command:{sys.executable} {tmp_path / 'judge.py'}"


def inputs_of(name, data):
    return read_speech_inputs(load_set(name), data)


def with_audio(inputs, folder, names=None):
    """Lines of a predictions file, each with a sound for every reply of the rows of these kinds."""
    lines = []
    for row in inputs.rows:
        line = reply_line(row)
        if names is None or row.kind in names:
            sound = str(write_wav(folder / f"{len(lines)}.wav"))
            line = {"id": row.name, "reply_audio": sound} if row.kind in HEARD else {**line, "reply_audio": sound}
        lines.append(line)
    return lines


def evaluate(tmp_path, name, data, lines, **options):
    predictions = write_lines(tmp_path / "replies.jsonl", lines)
    request = Request(set_=name, data=data, predictions=predictions, output=tmp_path / "out", **options)
    run_request(request, quiet=True)
    return read_record(tmp_path / "out/report.json")


def run_set(tmp_path, name, judge, audio=(), **options):
    data = write_layout(name, tmp_path / "data")
    inputs = inputs_of(name, data)
    lines = with_audio(inputs, tmp_path / "sounds", audio)
    report = evaluate(tmp_path, name, data, lines, judge=judge, audio_judge=judge, **options)
    assert {part: block["n"] for part, block in report["subsets"].items()} == ROWS[name]
    return report


def scores(report):
    return {name: block["score"] for name, block in report["subsets"].items()}


def test_uro_bench_from_its_folder_to_its_means(tmp_path, judge):
    results = [{"id": "GenEmotion-en/e1", "score": {"生气/angry": 0.1, "开心/happy": 0.9}}]
    emotion = write_lines(tmp_path / "emotion.jsonl", results)
    utmos = write_lines(tmp_path / "utmos.jsonl", [{"id": "GenEmotion-en/e1", "score": 4.5}])
    report = run_set(
        tmp_path, "uro-bench", judge, ("uro_ge", "uro_srt"),
        scorer_model=[f"emotion=file:{emotion}", f"utmos=file:{utmos}"],
    )  # fmt: skip
    assert scores(report) == {
        "Repeat": 100, "GaokaoEval": 100, "TruthfulEval": 80, "AlpacaEval": 80, "Repeat-zh": 100,
        "GenEmotion-en": pytest.approx(90), "SRT-en": 80, "Multilingual": 80, "MtBenchEval-en": 80,
    }  # fmt: skip
    gaokao = report["subsets"]["GaokaoEval"]
    assert gaokao["missing"] == 0 and gaokao["official"] == gaokao["answered_only"] == 100
    assert gaokao["judge_prompts"]["uro-qa"]["label"] == "own-judge"
    assert report["subsets"]["GenEmotion-en"]["utmos"]["score"] == 4.5
    assert report["subsets"]["SRT-en"]["utmos"]["missing"] == 1, "the file has no line for it"
    group = report["groups"]["basic_en"]
    assert group["score"] == (100 + 100 + 80 + 80) / 4 and group["partial"] and "Summary" in group["missing"]
    assert report["official_means"]["basic_en"] == group["score"]
    assert report["official_means"]["final_UTMOS_en"] == 4.5
    row = next(row for row in report["published"] if row["name"] == "GaokaoEval")
    assert row["published"]["Covo-Audio-Chat-FD"] == 73.82 and row["not_comparable"] == "own-judge"
    assert report["engines"]["judge"]["asked"] == 3 + 1 + 1 + 1 + 2, "a dialogue is judged in each of its rounds"
    text = (tmp_path / "out/report.md").read_text()
    assert "own-judge" in text and "73.82" in text


@pytest.mark.parametrize(
    ("name", "audio", "expected"),
    [
        ("vcb-bench", (), {"TIF": 80, "GK": 100, "MTD": 80}),
        ("voicebench", (), {"alpacaeval": 4, "sd-qa": 100, "openbookqa": 100, "advbench": 0}),
        ("mmau-pro", (), {"speech": 100, "sound": 100, "open": 80, "instruction following": 100}),
        ("mmar-rubrics", (), {"mmar-rubrics": 80}),
        ("asr", (), {"librispeech-test-clean": 0, "aishell-1": 0, "kitchen": 0}),
        ("air-bench", (), {"Sound_AQA_avqa": None, "Audio_Grounding_audiogrounding": None,
                           "speech_dialogue_QA_fisher": 6}),
        ("spoken-lm", (), {"swuggy": 100, "sblimp": 100, "tsc-a2a": 100, "tsc-a2t": 100, "tsc-t2t": 100}),
        ("mtr-duplexbench", (), {"smooth": 100, "interruption": 100, "pause": 100, "background": 100}),
        ("seed-tts", (), {"en": 0, "zh": 0, "zh-hard": 0}),
    ],
)  # fmt: skip
def test_a_set_from_its_folder_to_its_scores(tmp_path, judge, name, audio, expected):
    report = run_set(tmp_path, name, judge, audio)
    assert scores(report) == {
        part: score if score is None else pytest.approx(score) for part, score in expected.items()
    }


def test_vstyle_is_heard_by_its_judge_and_weighed_by_language(tmp_path, judge):
    (tmp_path / "empathy.txt").write_text("Is {input_instruction} followed? [[3]]")
    report = run_set(tmp_path, "vstyle", judge, ("vstyle",), judge_prompt=[f"vstyle-empathy.zh={tmp_path}/empathy.txt"])
    text = (tmp_path / "out/report.md").read_text()
    assert "| vstyle-empathy | own-judge |" in text and "| vstyle-empathy | not the official wording |" in text
    assert set(scores(report).values()) == {4.0}
    english = report["groups"]["en"]
    assert english["score"] == 4 and english["partial"] and "role_play/character" in english["missing"]
    assert report["groups"]["en/empathy"]["sets"] == 1
    assert next(row for row in report["published"] if row["name"] == "zh")["ours"] == 4


NEUTRAL = """
import json, sys, wave
for row in map(json.loads, sys.stdin):
    with wave.open(row["path"], "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", "")), file.writeframes(bytes(8000) if row["text"] != "mute" else b"")
    print(json.dumps({"id": row["id"]}), open("said.txt", "a").write(row["text"] + chr(10)) and "")
"""
EAR = """
import json, sys
for row in map(json.loads, sys.stdin):
    print(json.dumps({"id": row["id"], "text": "[[2]]" if "neutral" in row["paths"][-1] else "[[4]]"}))
"""


def test_the_same_words_in_a_neutral_voice_stand_beside_a_style(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "voice.py").write_text(NEUTRAL), (tmp_path / "ear.py").write_text(EAR)
    data = write_layout("vstyle", tmp_path / "data")
    inputs = inputs_of("vstyle", data)
    lines = with_audio(inputs, tmp_path / "sounds")
    for line, text in zip(lines, ("one", "one", "two", "mute", "three", ""), strict=True):
        line["reply_text"] = text
    options = {"audio_judge": f"command:{sys.executable} ear.py", "neutral_voice": f"command:{sys.executable} voice.py"}
    report = evaluate(tmp_path, "vstyle", data, lines, **options)
    angry = report["subsets"]["en/empathy/anger"]
    assert angry["score"] == 4 and angry["neutral_voice"]["score"] == 2
    missing = [block.get("neutral_voice", {}).get("missing") for block in report["subsets"].values()]
    assert missing == [0, 0, None, 1], "what has no text, or no sound, is missing: nothing is guessed"
    assert report["groups"]["en"]["neutral_voice"]["score"] == 2 and report["groups"]["en"]["score"] == 4
    assert "neutral_voice 2.00" in (tmp_path / "out/report.md").read_text()
    assert (tmp_path / "said.txt").read_text().split() == ["two", "one", "mute", "three", "mute"], (
        "once, a failure twice"
    )
    again = evaluate(tmp_path, "vstyle", data, lines, **options)
    assert again["subsets"] == report["subsets"]
    assert (tmp_path / "said.txt").read_text().split()[5:] == ["mute", "mute"], "what was said is kept"
    with pytest.raises(EvalInputError, match="no row of MMAR-Rubrics is judged by an audio judge"):
        run_set(tmp_path, "mmar-rubrics", None, neutral_voice="command:python")


def test_full_duplex_bench_by_words_and_by_the_turns_of_a_session(tmp_path, judge):
    data = write_layout("full-duplex-bench", tmp_path / "data")
    inputs = inputs_of("full-duplex-bench", data)
    turns = [
        {"channel": "user", "start": 0.0, "end": 2.0},
        {"channel": "model", "start": 2.6, "end": 5.6, "text": "so it goes"},
        {"channel": "user", "start": 4.0, "end": 4.3, "text": "hm"},
    ]
    lines = [{"id": row.name, "events": turns} for row in inputs.rows]
    report = evaluate(tmp_path, "full-duplex-bench", data, lines, judge=judge)
    turn = report["subsets"]["candor_turn_taking"]
    assert turn["score"] == 100 and turn["latency"] == pytest.approx(0.1) and turn["from"] == ["events"]
    overlap = report["subsets"]["user_backchannel"]
    assert overlap["response_latency"] == pytest.approx(0.6) and overlap["stop_latency"] == pytest.approx(0.3)
    assert overlap["behaviour"]["unknown"] == 100, "the judge is told before, between and after, not one text"
    assert report["subsets"]["synthetic_user_interruption"]["relevance"]["score"] == 4
    by_words = Request(set_="full-duplex-bench", data=data, predictions=data, output=tmp_path / "words")
    run_request(by_words, quiet=True)
    report = read_record(tmp_path / "words/report.json")
    turn = report["subsets"]["candor_turn_taking"]
    assert turn["score"] == 100 and turn["latency"] == pytest.approx(0.5) and turn["from"] == ["asr"]
    assert "--scorer-model vad" in report["subsets"]["user_backchannel"]["absent"]


def test_a_row_without_a_reply_asks_for_no_engine_that_the_others_do_without(tmp_path):
    data = write_layout("full-duplex-bench", tmp_path / "data")
    write_item(data / "icc_backchannel/2")
    lines = [{"id": "icc_backchannel/1", "events": [{"channel": "model", "start": 0.1, "end": 0.4, "text": "hm"}]}]
    report = evaluate(tmp_path, "full-duplex-bench", data, lines, subset=["icc_backchannel"])
    block = report["subsets"]["icc_backchannel"]
    assert (block["score"], block["n"], block["missing"]) == (0, 2, 1) and "absent" not in block


def test_a_mean_of_parts_has_the_caveats_of_its_parts():
    found = load_set("uro-bench")
    parts = [part for part in found.subsets if {"basic", "en"} <= set(part.groups)]
    group = {"basic_en": {"score": 80.0, "partial": False, "of": [part.name for part in parts]}}

    def caveats(sources, n=None):
        blocks = {part.name: {"score": 80.0, "kind": part.kind, "n": n or part.rows, "missing": 0, "replies": sources}
                  for part in parts}  # fmt: skip
        rows = {row["name"]: row["not_comparable"] for row in published_figures(found, blocks, group)}
        return rows["Repeat"], rows["basic_en"]

    assert caveats({"text": 9}) == ("text, not speech", "text, not speech")
    assert caveats({"asr": 9}, n=10) == ("10 of 252 rows", "10 of 252 rows")
    assert caveats({"asr": 9}) == ("", "")


def test_a_neutral_voice_stands_beside_no_mean_of_more_parts_than_are_judged_by_ear(tmp_path):
    inputs = SpeechInputs(load_set("uro-bench"), tmp_path, {}, ())
    report = {
        "subsets": {},
        "groups": {"oral": {"score": 50, "sets": 4}, "srt": {"score": 60, "sets": 1}},
        "engines": {},
    }
    neutral = {"subsets": {}, "groups": {"oral": {"score": 20, "sets": 1}, "srt": {"score": 20, "sets": 1}}}
    add_neutral_voice(report, [], inputs, Program(sys.executable), tmp_path / "neutral", lambda own: (neutral, []))
    assert "neutral_voice" not in report["groups"]["oral"]
    assert report["groups"]["srt"]["neutral_voice"] == {"score": 20}


def test_a_cascade_is_told_no_language_that_its_row_is_not_in(tmp_path):
    covost = letter_inputs(inputs_of("covost2", write_layout("covost2", tmp_path / "covost")))
    assert {row.columns["language"] for row in covost.examples} == {""}, "a row's language is its translation's"
    data = write_layout("uro-bench", tmp_path / "uro")
    edit_lines(data / "pro/Multilingual/test.jsonl", lambda rows: rows[0].pop("language"))
    told = {row.id: row.columns["language"] for row in letter_inputs(inputs_of("uro-bench", data)).examples}
    assert (told["Multilingual/m1"], told["Repeat-zh/z1"]) == ("", "zh")


def test_replies_are_heard_and_their_rows_are_missing_where_they_are_not(tmp_path, judge):
    data = write_layout("uro-bench", tmp_path / "data")
    rows = [row for row in inputs_of("uro-bench", data).rows if row.subset == "GaokaoEval"]
    lines = [{"id": row.id, "reply_audio": str(write_wav(tmp_path / f"{row.id}.wav", pitch=300 + 50 * i))}
             for i, row in enumerate(rows[:2])]  # fmt: skip
    options = {"subset": ["GaokaoEval"]}
    report = evaluate(tmp_path, "uro-bench", data, lines, **options)
    block = report["subsets"]["GaokaoEval"]
    assert block["score"] is None and block["n"] == 3 and block["missing"] == 1
    assert "--transcriber" in block["absent"] and "--judge" in block["absent"]
    heard = write_lines(tmp_path / "asr.jsonl", [{"id": "GaokaoEval/g0", "text": "A"}])
    report = evaluate(tmp_path, "uro-bench", data, lines, judge=judge, transcriber=[f"file:{heard}"], **options)
    block = report["subsets"]["GaokaoEval"]
    assert block["official"] == pytest.approx(100 / 3) and block["answered_only"] == 100 and block["missing"] == 2
    assert set(block["missing_why"]) == {"no reply", f"file:{heard} has no line for GaokaoEval/g1"}
    assert block["replies"] == {"asr": 1}


def test_a_text_alone_is_scored_and_said_on_the_command_line_too(tmp_path, judge):
    data = write_layout("uro-bench", tmp_path / "data")
    replies = write_lines(tmp_path / "replies.jsonl", [{"id": "g0", "reply_text": "A"}])
    votes = write_lines(tmp_path / "votes.jsonl", [{"id": "GaokaoEval/g0", "text": ["Yes", "No", "Yes"]}])
    words = [
        "--set", "uro-bench", "--subset", "GaokaoEval", "--data", str(data), "--predictions", str(replies),
        "--judge", f"file:{votes}", "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0 and "Worth knowing" in shown.output
    block = read_record(tmp_path / "out/report.json")["subsets"]["GaokaoEval"]
    assert block["replies"] == {"text": 1} and block["answered_only"] == pytest.approx(200 / 3)
    assert block["official"] == pytest.approx(200 / 9) and (block["n"], block["missing"]) == (3, 2)


def test_the_option_nearest_by_embedding_is_the_official_rule(tmp_path, judge):
    vectors = {"speech/c1": [1, 0], "speech/c1~choice1": [0.9, 0.1], "speech/c1~choice2": [0, 1],
               "sound/c2": [0, 1], "sound/c2~choice1": [1, 0], "sound/c2~choice2": [0, 1]}  # fmt: skip
    file = write_lines(tmp_path / "embed.jsonl", [{"id": name, "vector": vector} for name, vector in vectors.items()])
    report = run_set(tmp_path, "mmau-pro", judge, scorer_model=[f"embed=file:{file}"])
    assert (scores(report)["speech"], scores(report)["sound"]) == (100, 0)
    assert report["subsets"]["sound"]["strict"]["score"] == 100
    assert report["groups"]["overall"]["score"] == pytest.approx((100 + 0 + 80 + 100) / 4)


def test_bleu_is_sacrebleus(tmp_path, judge):
    pytest.importorskip("sacrebleu")
    report = run_set(tmp_path, "covost2", judge)
    assert "tok:zh" in report["subsets"]["en_zh-CN"]["signature"]
    assert scores(report)["en_zh-CN"] >= 0


def test_everything_wrong_is_said_at_once_and_nothing_is_written(tmp_path):
    data = write_layout("uro-bench", tmp_path / "data")
    predictions = write_lines(tmp_path / "replies.jsonl", [{"id": "GaokaoEval/g9", "reply_text": "A"}])
    request = Request(
        set_="uro-bench", data=data, predictions=predictions, output=tmp_path / "out", judge="gpt",
        scorer_model=["loud=file:x"], judge_prompt=["uro-qa=nowhere.txt"], phrases=["mcq=nowhere.txt"], listen=True,
        voice="decoder",
    )  # fmt: skip
    with pytest.raises(EvalInputError) as caught:
        run_request(request)
    text = str(caught.value)
    for part in (
        "--judge gpt",
        "loud",
        "uro-qa=nowhere.txt",
        "mcq=nowhere.txt",
        "--listen",
        "--voice",
        "GaokaoEval/g9",
    ):
        assert part in text
    assert not (tmp_path / "out").exists()
    letters = Request(set_="mmar", data=data, predictions=predictions, output=tmp_path / "out", subset=["x"])
    with pytest.raises(EvalInputError, match="--subset: only for a set of speech"):
        run_request(letters)


def test_a_row_that_no_rule_takes_is_missing_and_named(tmp_path, judge):
    data = write_layout("mtr-duplexbench", tmp_path / "data")
    edit_lines(data / "interruption.jsonl", lambda rows: rows[0]["timestamps"].pop("model_start"))
    request = Request(set_="mtr-duplexbench", data=data, predictions=data, output=tmp_path / "out")
    run_request(request, quiet=True)
    block = read_record(tmp_path / "out/report.json")["subsets"]["interruption"]
    assert block["n"] == 2 and block["missing"] == 1 and "model_start" in next(iter(block["missing_why"]))


def test_two_reports_are_compared_and_stand_in_the_tables_of_a_suite(tmp_path, judge):
    data = write_layout("asr", tmp_path / "data")
    inputs = inputs_of("asr", data)
    for name, said in (("a", "two words"), ("b", "two birds")):
        lines = [{**reply_line(row), **({"reply_text": said} if row.language == "en" else {})} for row in inputs.rows]
        predictions = write_lines(tmp_path / f"{name}.jsonl", lines)
        run_request(
            Request(set_="asr", data=data, predictions=predictions, output=tmp_path / "runs" / name), quiet=True
        )
    result = compare_speech(tmp_path / "runs/a", tmp_path / "runs/b")
    clean = result["subsets"]["librispeech-test-clean"]
    assert (clean["a"], clean["b"], clean["mean"], clean["n"]) == (0, 50, 50, 2)
    shown = CliRunner().invoke(app, ["compare", str(tmp_path / "runs/a"), str(tmp_path / "runs/b")])
    assert shown.exit_code == 0 and "+50.00" in shown.output
    text = suite_markdown("covo-audio", [tmp_path / "runs"])
    assert "| librispeech-test-clean | - | 50.00 (2 of 2620 rows) | 1.45 |" in text
    assert "| GaokaoEval | - |  | 89.11 |" in text
    alone = CliRunner().invoke(app, ["--set", "asr", "--runs", str(tmp_path / "runs/a")])
    assert alone.exit_code == 2 and "--runs" in alone.output and "--suite" in alone.output
    shown = CliRunner().invoke(app, ["--suite", "covo-audio", "--runs", str(tmp_path / "runs/a")])
    assert "| librispeech-test-clean | - | 0.00 (2 of" in shown.output


def test_a_list_of_phrases_is_the_users(tmp_path, judge):
    (tmp_path / "no.txt").write_text("a rightful no\n")
    report = run_set(tmp_path, "voicebench", judge, phrases=[f"refusal={tmp_path / 'no.txt'}"])
    assert report["phrases"]["refusal"][0].endswith("no.txt")
    assert report["subsets"]["advbench"]["official"] == 0


def test_reasoning_counts_where_the_answer_is_right_and_a_missing_reply_nowhere(tmp_path, judge):
    data = write_layout("mmar-rubrics", tmp_path / "data")
    wrong = {"id": "q0", "reply_text": "wind", "thinking_prediction": "drops fall, so rain"}
    block = evaluate(tmp_path, "mmar-rubrics", data, [wrong], judge=judge)["subsets"]["mmar-rubrics"]
    assert (block["score"], block["accuracy"]["score"], block["n"], block["missing"]) == (0, 0, 2, 1)
    right = {"id": "q1", "answer_prediction": "It is rain.", "thinking_prediction": "drops fall"}
    block = evaluate(tmp_path, "mmar-rubrics", data, [right], judge=judge, overwrite=True)["subsets"]["mmar-rubrics"]
    assert (block["score"], block["accuracy"]["score"], block["missing"]) == (pytest.approx(80), 100, 1)


def test_the_report_is_the_same_when_run_again_and_asks_nothing(tmp_path, judge):
    first = run_set(tmp_path, "mmar-rubrics", judge)
    (tmp_path / "judge.py").touch()
    data = tmp_path / "data/MMAR-meta.jsonl"
    lines = [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
    again = evaluate(tmp_path, "mmar-rubrics", data, lines, judge=judge, audio_judge=judge)
    assert again["subsets"] == first["subsets"]


VOICE = """
import json, shutil, sys
for row in map(json.loads, sys.stdin):
    shutil.copy(sys.argv[1], row["path"])
    print(json.dumps({"id": row["id"]}))
"""
REPEATS = """
import json, sys
for row in map(json.loads, sys.stdin):
    asked, text = row["prompt"].split("\\n", 1)
    print(json.dumps({"id": row["id"], "text": text if asked == "Say the text aloud." else "what?"}))
"""


def test_a_given_text_is_said_and_heard(tmp_path):
    data = write_layout("seed-tts", tmp_path / "data")
    for name, program in (("voice", VOICE), ("llm", REPEATS)):
        (tmp_path / f"{name}.py").write_text(program)
    heard = [{"id": "en/u1", "text": "good day"}, {"id": "en/u2", "text": "good knight"}]
    asr = write_lines(tmp_path / "asr.jsonl", heard)
    (tmp_path / "cascade.yaml").write_text(
        f"transcriber: file:{asr}\nllm: 'command:{sys.executable} {tmp_path}/llm.py'\n"
        f"voice: 'command:{sys.executable} {tmp_path}/voice.py {write_wav(tmp_path / 'said.wav')}'\n"
    )
    options = {"set_": "seed-tts", "data": data, "subset": ["en"], "transcriber": [f"file:{asr}"]}
    run_request(Request(model=f"cascade:{tmp_path / 'cascade.yaml'}", output=tmp_path / "out", **options), quiet=True)
    report = read_record(tmp_path / "out/report.json")
    block = report["subsets"]["en"]
    assert (block["score"], block["missing"], block["replies"]) == (25, 0, {"asr": 2}), "one of four words, by rows"
    rows = [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()]
    assert [row["replies"] for row in rows] == [["good day"], ["good night"]]
    assert any("voice" in problem and "not imitated" in problem for problem in report["problems"])
    with pytest.raises(EvalInputError, match="its sound alone is scored: give --voice"):
        run_request(Request(model="builtin:tiny_spoken", output=tmp_path / "mute", **options))


@pytest.mark.slow
def test_a_model_speaks_and_is_heard(tmp_path, judge):
    data = write_layout("uro-bench", tmp_path / "data")
    options = {"set_": "uro-bench", "data": data, "model": "builtin:tiny_spoken", "voice": "builtin:speech_decoder",
               "subset": ["AlpacaEval", "MtBenchEval-en"], "max_completion_length": 24}  # fmt: skip
    run_request(Request(output=tmp_path / "out", **options), quiet=True)
    report = read_record(tmp_path / "out/report.json")
    assert "--transcriber" in report["subsets"]["AlpacaEval"]["absent"], "its sound is what is scored"
    rows = {row["id"]: row for row in map(json.loads, (tmp_path / "out/rows.jsonl").read_text().splitlines())}
    (later,) = rows["MtBenchEval-en/d1"]["later"]
    assert later["id"] == "MtBenchEval-en/d1#2" and later["replies"][0], "the second round was asked"
    sounds = list((tmp_path / "out/audio").glob("*.wav"))
    assert len(sounds) == 3 and all(sound.stat().st_size > 1000 for sound in sounds)
    heard = write_lines(tmp_path / "asr.jsonl", [{"id": "AlpacaEval/a1", "text": "eight seven"}])
    again = Request(output=tmp_path / "out", judge=judge, transcriber=[f"file:{heard}"], **options)
    run_request(again, quiet=True)  # the replies are there; an engine more is no other evaluation
    block = read_record(tmp_path / "out/report.json")["subsets"]["AlpacaEval"]
    assert block["score"] == 80 and block["replies"] == {"asr": 1} and "asr_wer" in block


def test_where_reasoning_is_scored_a_model_is_asked_to_reason(tmp_path):
    inputs = inputs_of("mmar-rubrics", write_layout("mmar-rubrics", tmp_path / "data"))
    assert wording(inputs) is None and letter_inputs(inputs).examples[0].choices == ("rain", "wind")
    record = {"id": inputs.rows[0].name, "replies": ["<think>drops fall</think><answer>rain</answer>"],
              "answers": ["rain"]}  # fmt: skip
    reply = given_replies([record], tmp_path)[inputs.rows[0].name]
    assert (reply.thinking, reply.text) == ("drops fall", "rain")


@pytest.mark.slow
def test_a_model_answers_a_spoken_set(tmp_path):
    data = write_layout("voicebench", tmp_path / "data")
    request = Request(set_="voicebench", data=data, model="builtin:tiny", output=tmp_path / "out", subset=["advbench"],
                      max_completion_length=8)  # fmt: skip
    run_request(request, quiet=True)
    report = read_record(tmp_path / "out/report.json")
    assert report["subsets"]["advbench"]["n"] == 1 and report["model"] == "builtin:tiny"
