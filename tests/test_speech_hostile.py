"""What a set of speech says of damaged, hostile and half-finished inputs: `covo-rl eval` as it is typed."""

import os
import subprocess
import sys

import pytest
from speech_layouts import edit_lines, write_layout, write_lines, write_wav
from typer.testing import CliRunner

from covo_rl.data.files import read_record
from covo_rl.evaluate.cli import app
from covo_rl.evaluate.sets import load_set
from covo_rl.evaluate.speech.inputs import read_speech_inputs

GOOD = [{"id": f"g{i}", "reply_text": "ABC"[i]} for i in range(3)]
VOTES = [{"id": f"GaokaoEval/g{i}", "text": ["Yes"] * 3} for i in range(3)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COVO_RL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def place(tmp_path):
    write_layout("uro-bench", tmp_path / "data")
    write_lines(tmp_path / "replies.jsonl", GOOD)
    write_lines(tmp_path / "votes.jsonl", VOTES)
    return tmp_path


def command(place, *more, name="uro-bench", out="out"):
    """The words of an evaluation of GaokaoEval."""
    paths = {"data": place / "data", "predictions": place / "replies.jsonl", "output": place / out}
    words = ["--set", name, "--subset", "GaokaoEval", "--judge", f"file:{place / 'votes.jsonl'}"]
    return [*map(str, [*words, *(word for key, path in paths.items() for word in (f"--{key}", path)), *more])]


def shown(place, *more, **options):
    """(exit code, what is printed) of it."""
    result = CliRunner().invoke(app, command(place, *more, **options))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def refused(place, *parts, **options):
    code, text = shown(place, **options)
    assert code == 2 and not (place / "out").exists(), "nothing is written"
    for part in parts:
        assert part in text


def report_of(place, out="out"):
    return read_record(place / out / "report.json")


def test_a_byte_order_mark_is_no_fault(place):
    for path in ("replies.jsonl", "votes.jsonl", "data/basic/GaokaoEval/test.jsonl"):
        (place / path).write_bytes(b"\xef\xbb\xbf" + (place / path).read_bytes().replace(b"\n", b"\r\n"))
    assert shown(place)[0] == 0 and report_of(place)["subsets"]["GaokaoEval"]["score"] == 100


@pytest.mark.parametrize("path", ["replies.jsonl", "votes.jsonl", "data/basic/GaokaoEval/test.jsonl"])
def test_a_key_that_stands_twice_is_named(place, path):
    first, _, rest = (place / path).read_text().partition("\n")
    (place / path).write_text(f'{first[:-1]}, "id": "g0"}}\n{rest}')
    refused(place, f"{place / path}, line 1", "the key 'id' occurs twice")


def test_a_folder_in_place_of_a_file_is_one_problem_among_others(place):
    (place / "data/basic/GaokaoEval/test.jsonl").unlink()
    (place / "data/basic/GaokaoEval/test.jsonl").mkdir()
    (place / "votes.jsonl").unlink()
    refused(place, "test.jsonl is a folder", "votes.jsonl: no such file")


def test_two_replies_under_two_keys_are_not_chosen_between(place):
    write_lines(place / "replies.jsonl", [{**GOOD[0], "model_output": "B"}, {**GOOD[1], "response": "B"}])
    refused(place, "replies.jsonl, line 1: reply_text and model_output hold different replies; write one of them")
    write_lines(place / "replies.jsonl", [{**GOOD[0], "model_output": "A"}])
    assert shown(place)[0] == 0


@pytest.mark.parametrize("path", ["/etc/hostname", "../private.wav", "link.wav"])
def test_the_sound_of_a_reply_stays_in_the_folder_of_its_file(place, path):
    write_wav(place / "private.wav")
    inner = place / "inner"
    inner.mkdir()
    os.symlink(place / "private.wav", inner / "link.wav")
    write_lines(inner / "replies.jsonl", [{"id": "g0", "reply_audio": path}])
    code, text = shown(place, "--predictions", inner / "replies.jsonl")
    assert code == 2 and "line 1: reply_audio: its audio path" in text and "--allow-outside-audio" in text
    assert shown(place, "--predictions", inner / "replies.jsonl", "--allow-outside-audio")[0] == 0


def test_the_sounds_of_full_duplex_bench_stay_in_its_folder(place):
    write_wav(place / "private.wav")
    data = write_layout("full-duplex-bench", place / "fdb")
    links = [data / "candor_turn_taking" / name for name in ("1/input.wav", "2/output.wav")]
    for link in links:
        link.unlink()
        os.symlink(place / "private.wav", link)
    words = ["--set", "full-duplex-bench", "--data", data, "--predictions", data, "--output", place / "out"]
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == 2 and not (place / "out").exists()
    for link in links:
        assert f"{link.parent}: {link.name}: its audio path" in result.output


def test_no_row_may_have_the_id_of_another_rows_second_round(place):
    path = place / "data/pro/MtBenchEval-en/test.jsonl"
    edit_lines(path, lambda rows: rows.append({**rows[0], "id": "d1#2"}))
    words = ["--set", "uro-bench", "--subset", "MtBenchEval-en", "--data", place / "data", "--predictions",
             place / "replies.jsonl", "--output", place / "out"]  # fmt: skip
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == 2
    assert "line 2: id 'd1#2': engines are asked by it about a part of MtBenchEval-en/d1" in result.output


def test_rows_that_a_judge_left_out_are_said_where_one_reads(place):
    write_lines(place / "votes.jsonl", [{"id": "other", "text": "Yes"}])
    code, text = shown(place)
    assert code == 0 and "GaokaoEval: 3 of 3 rows are missing; file:" in text and "has no line for" in text
    assert "every row is missing" in (place / "out/report.md").read_text()
    (place / "votes.jsonl").write_text("")
    code, text = shown(place, out="other")
    assert code == 2 and "no results in it" in text and not (place / "other").exists()


def test_an_unknown_name_is_said_before_what_goes_with_it(place):
    refused(place, "--set uro: no such set; did you mean uro-bench?", name="uro")
    code, text = shown(place, "--subset", "GaokaEval")
    assert code == 2 and "did you mean GaokaoEval?" in text
    (place / "out").write_text("")
    code, text = shown(place)
    assert code == 2 and f"{place / 'out'} is no folder that you may write to" in text


def test_replies_that_change_while_they_are_read_are_not_scored(place, monkeypatch):
    from covo_rl.evaluate.speech import inputs

    read = inputs.read_spoken_predictions

    def changing(path, reader):
        replies = read(path, reader)
        write_lines(path, GOOD[:1])
        return replies

    monkeypatch.setattr(inputs, "read_spoken_predictions", changing)
    refused(place, "replies.jsonl: it changed while it was read")


def test_replies_of_a_folder_have_a_hash(place):
    (place / "replies").mkdir()
    hashes = set()
    for said in "AB":
        write_lines(place / "replies/GaokaoEval.jsonl", [{"id": "g0", "reply_text": said}])
        inputs = read_speech_inputs(load_set("uro-bench"), place / "data", subsets=["GaokaoEval"],
                                    predictions=place / "replies")  # fmt: skip
        hashes.add(inputs.meta["predictions_sha256"])
    assert len(hashes) == 2 and None not in hashes


LISTENER = """
import json, os, sys
for number, row in enumerate(map(json.loads, sys.stdin)):
    if number == 2 and not os.path.exists(STOP):
        open(STOP, "w").close()
        os.kill(os.getppid(), 9)
    print(json.dumps({"id": row["id"], "text": "A"}), flush=True)
"""


@pytest.mark.slow
def test_an_evaluation_that_was_killed_ends_in_the_same_bytes(place, monkeypatch):
    lines = [{"id": f"g{i}", "reply_audio": f"{i}.wav"} for i in range(3)]
    for i in range(3):
        write_wav(place / f"{i}.wav", pitch=300 + 50 * i)
    write_lines(place / "replies.jsonl", lines)
    (place / "asr.py").write_text(f"STOP = {str(place / 'stopped')!r}\n" + LISTENER)
    more = ["--transcriber", f"command:{sys.executable} {place / 'asr.py'}"]
    words = [sys.executable, "-m", "covo_rl.evaluate.cli", *command(place, *more)]
    killed = subprocess.run(words, capture_output=True)
    assert killed.returncode == -9 and not (place / "out/report.json").exists()
    assert shown(place, *more)[0] == 0
    monkeypatch.setenv("COVO_RL_CACHE", str(place / "another"))
    assert shown(place, *more, out="undisturbed")[0] == 0
    for name in ("report.json", "report.md", "scores.jsonl"):
        assert (place / "out" / name).read_bytes() == (place / "undisturbed" / name).read_bytes()


def test_times_before_the_beginning_are_refused(tmp_path):
    for name, file in (("mtr-duplexbench", "pause.jsonl"), ("full-duplex-bench", "turn_taking.json")):
        data = write_layout(name, tmp_path / name)
        path = next(iter(sorted(data.rglob(file))))
        path.write_text(path.read_text().replace("0.8", "-0.8").replace("2.5", "-2.5"))
        words = ["--set", name, "--data", data, "--predictions", data, "--output", tmp_path / "out"]
        result = CliRunner().invoke(app, [*map(str, words)])
        assert result.exit_code == 2 and str(path.parent) in result.output
        assert "from 0 on" in result.output or "not [start, end] in seconds" in result.output


def test_evaluations_of_other_parts_are_told_apart_before_their_hashes(place):
    assert shown(place, out="a")[0] == 0 and shown(place, "--subset", "AlpacaEval", out="b")[0] == 0
    result = CliRunner().invoke(app, ["compare", str(place / "a"), str(place / "b")])
    assert result.exit_code == 2
    assert "--subset differs" in result.output and "b has GaokaoEval, AlpacaEval" in result.output
    assert shown(place, "--subset", "GaokaoEval", out="c")[0] == 0, "the same parts, named otherwise"
    assert CliRunner().invoke(app, ["compare", str(place / "a"), str(place / "c")]).exit_code == 0


def test_the_interval_of_a_mean_stays_where_scores_are(place):
    write_lines(place / "votes.jsonl", [{**vote, "text": ["No"] * 3} if i else vote for i, vote in enumerate(VOTES)])
    assert shown(place)[0] == 0
    low, high = report_of(place)["groups"]["basic_en"]["ci95"]
    assert 0 <= low < 100 / 3 < high <= 100


def scored(place, name, lines, **engines):
    """The blocks of a set's parts; engines: flag -> lines of its file."""
    data = write_layout(name, place / name)
    files = {flag: write_lines(place / f"{flag}.jsonl", rows) for flag, rows in engines.items()}
    specs = {"embed": "--scorer-model embed=", "emotion": "--scorer-model emotion=", "vad": "--scorer-model vad="}
    flags = [f"{specs.get(flag, f'--{flag} ')}file:{file}".split(" ", 1) for flag, file in files.items()]
    predictions = write_lines(place / f"{name}.jsonl", lines) if lines else data
    paths = {"data": data, "predictions": predictions, "output": place / "out"}
    words = ["--set", name, *(str(word) for key, path in paths.items() for word in (f"--{key}", path)), "--overwrite"]
    result = CliRunner().invoke(app, [*words, *(word for flag in flags for word in flag)])
    assert result.exception is None, result.output
    return report_of(place)["subsets"]


@pytest.mark.parametrize("score", [5, -1, 1e308, {"happy": 7}])
def test_what_is_no_probability_leaves_its_row_missing(tmp_path, score):
    write_wav(tmp_path / "e.wav")
    lines = [{"id": "GenEmotion-en/e1", "asr_text": "hello", "reply_audio": "e.wav"}]
    blocks = scored(tmp_path, "uro-bench", lines, emotion=[{"id": "GenEmotion-en/e1", "score": score}])
    assert blocks["GenEmotion-en"]["missing"] == 1
    assert "which is no probability" in next(iter(blocks["GenEmotion-en"]["missing_why"]))


@pytest.mark.parametrize("length", [1e-320, 1e308, 1.0])
def test_the_nearest_option_is_that_of_the_direction_alone(tmp_path, length):
    lines = [{"id": "speech/c1", "reply_text": "aye"}]
    vectors = {"speech/c1": [1, 0.2], "speech/c1~choice1": [length, 0.0], "speech/c1~choice2": [0.0, length]}
    blocks = scored(tmp_path, "mmau-pro", lines, embed=[{"id": name, "vector": v} for name, v in vectors.items()])
    assert blocks["speech"]["score"] == 100


@pytest.mark.parametrize("said", ["[[nan]]", "[[9]]", "good"])
def test_a_judge_of_style_who_says_nothing_readable_makes_no_mean(tmp_path, said):
    write_wav(tmp_path / "v.wav")
    lines = [{"id": "en/empathy/anger/0", "reply_audio": "v.wav"}]
    blocks = scored(tmp_path, "vstyle", lines, **{"audio-judge": [{"id": "en/empathy/anger/0", "text": said}]})
    assert blocks["en/empathy/anger"]["score"] is None and report_of(tmp_path)["groups"] == {}


@pytest.mark.parametrize(
    "turn", [{"start": 1e308, "end": 1e308}, {"start": -3, "end": 1}, {"start": 1, "end": 2, "text": ["a"]}]
)
def test_times_that_no_sound_has_are_refused(tmp_path, turn):
    data = write_layout("full-duplex-bench", tmp_path / "data")
    line = {"id": "candor_turn_taking/1", "events": [{"channel": "model", **turn}]}
    if "text" not in turn:
        line = {**line, "words": [{"text": "a", **turn}]}
    predictions = write_lines(tmp_path / "replies.jsonl", [line])
    words = ["--set", "full-duplex-bench", "--data", data, "--predictions", predictions, "--output", tmp_path / "out"]
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == 2 and "line 1" in result.output and "events[0]: " in result.output
    assert ("words[0]: its times are" in result.output) == ("text" not in turn)


def test_a_key_that_is_none_of_the_options_is_said(tmp_path):
    data = write_layout("voicebench", tmp_path / "data")
    edit_lines(data / "openbookqa.jsonl", lambda rows: rows[0].update(reference="a whale", response="A"))
    words = ["--set", "voicebench", "--data", data, "--predictions", data, "--output", tmp_path / "out"]
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == 2 and "line 1: reference is 'a whale'; it is the letter" in result.output
    rows = [{"task_name": "Sound_AQA", "dataset_name": "avqa", "path": "a.wav", "question": "?", "choice_a": "dog",
             "choice_b": "cat", "answer_gt": key, "response": "A"} for key in ("dog", "cow")]  # fmt: skip
    results = write_lines(tmp_path / "Foundation_meta.jsonl", rows)
    words = ["--set", "air-bench", "--data", results, "--predictions", results, "--subset", "foundation"]
    result = CliRunner().invoke(app, [*map(str, words), "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    block = report_of(tmp_path)["subsets"]["Sound_AQA_avqa"]
    assert (block["n"], block["missing"], block["score"]) == (2, 1, 100)
    assert block["missing_why"] == {"its answer_gt is none of its options": 1}
