"""`columns` wherever rows are read: the commands, a run, a resumed run."""

import json
import warnings

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from covo_rl.config import Options, parse_options
from covo_rl.data import DataError, load_examples
from covo_rl.resolve import ConfigError
from covo_rl.run.commands.data import app as data_app
from covo_rl.run.questions import read_questions
from covo_rl.train.checkpoint.identity import data_fingerprint, differences

RATE = 16_000
MAPPING = "id=uid,question=prompt,answer=label,audio=wav,choices=options"


def table(folder, name, count=6, seed=0):
    """A CSV of `count` rows with sounds of their own, in names that nothing knows."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["uid,wav,prompt,options,label,other"]
    for n in range(count):
        values = np.random.default_rng([seed, n]).uniform(-0.5, 0.5, RATE // 10)
        soundfile.write(folder / f"{name}{n}.wav", values, RATE)
        lines.append(f"{name}{n},{name}{n}.wav,Which {n}?,dog|cat,cat,dog")
    (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return folder / f"{name}.csv"


def run(app, *words):
    return CliRunner().invoke(app, [str(word) for word in words], terminal_width=200)


def test_check_and_convert(tmp_path):
    train, held_out = table(tmp_path, "t"), table(tmp_path, "h", seed=1)
    assert "unknown fields" in run(data_app, "check", train).output
    result = run(data_app, "check", train, "--columns", MAPPING, "--against", held_out)
    assert result.exit_code == 0, result.output
    refused = run(data_app, "check", train, "--columns", MAPPING, "--against", held_out, "--against-columns", "auto")
    assert refused.exit_code == 1 and "unknown fields" in refused.output
    for columns, says in (("questoin=prompt", "did you mean question?"), ("question=promt", "did you mean prompt?")):
        assert says in run(data_app, "check", train, "--columns", f"{columns},audio=wav", "--json").output
    result = run(data_app, "convert", train, tmp_path / "new.json", "--to", "mmau", "--columns", MAPPING)
    assert result.exit_code == 0, result.output
    row = json.loads((tmp_path / "new.json").read_text())[0]
    assert {**row, "prompt": "Which 0?", "label": "cat", "other": "dog"} == row
    assert (row["id"], row["audio_id"], row["question"], row["answer"]) == ("t0", "t0.wav", "Which 0?", "cat")
    assert load_examples(tmp_path / "new.json")[0].choices == ("dog", "cat")


def test_a_system_message_is_converted_or_refused(tmp_path):
    rows = [{"id": "a", "audio": None, "question": "What is 1 + 1?", "answer": "2", "system_prompt": "Be brief."}]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    assert run(data_app, "convert", tmp_path / "q.json", tmp_path / "n.json", "--to", "covo").exit_code == 0
    assert load_examples(tmp_path / "n.json")[0].system == "Be brief."
    result = run(data_app, "convert", tmp_path / "q.json", tmp_path / "m.json", "--to", "mmau")
    assert "it has a system message of its own, mmau rows have none" in result.output


def test_evaluation_of_a_table(tmp_path):
    from covo_rl.evaluate.cli import app

    path = table(tmp_path, "t")
    replies = [{"id": f"t{n}", "response": "<think>It meows.</think><answer>cat</answer>"} for n in range(6)]
    (tmp_path / "replies.json").write_text(json.dumps(replies))
    words = ("--set", "mmau-test-mini", "--data", path, "--predictions", tmp_path / "replies.json", "--no-plots")
    result = run(app, *words, "--output", tmp_path / "a", "--columns", MAPPING)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["strict"]["accuracy"] == 1.0 and report["columns"]["answer"] == "label"
    other = MAPPING.replace("label", "other")
    assert run(app, *words, "--output", tmp_path / "b", "--columns", other).exit_code == 0
    assert json.loads((tmp_path / "b" / "report.json").read_text())["strict"]["accuracy"] == 0.0
    result = run(app, *words, "--output", tmp_path / "c", "--columns", "answers=label")
    assert result.exit_code == 2 and "did you mean answer?" in result.output


def test_evaluation_of_a_folder_and_a_profile_that_needs_a_file(tmp_path):
    from covo_rl.evaluate.cli import app

    path = table(tmp_path / "set", "t")
    path.rename(tmp_path / "set" / "metadata.csv")
    replies = [{"id": f"t{n}", "response": "<think>It meows.</think><answer>cat</answer>"} for n in range(6)]
    (tmp_path / "replies.json").write_text(json.dumps(replies))
    words = ["--set", "own", "--data", path.parent, "--predictions", tmp_path / "replies.json", "--no-plots"]
    result = run(app, *words, "--output", tmp_path / "a", "--columns", MAPPING)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["strict"]["accuracy"] == 1.0 and len(report["data_sha256"]) == 64
    result = run(data_app, "profile", path.parent, "--output", tmp_path / "p", "--columns", MAPPING)
    assert result.exit_code == 2 and "name one (metadata.csv of a folder)" in result.output
    assert not (tmp_path / "p").exists()


def test_profile_of_a_table_keeps_lines_as_they_are(tmp_path, monkeypatch):
    from covo_rl.evaluate.profile import run_profile
    from covo_rl.evaluate.records import group_from_text

    class Answerer:
        class clips:
            key = staticmethod(lambda clip: clip)
            waveform = staticmethod(lambda clip: (np.ones(800, np.float32), RATE))

        def answer(self, examples, **_):
            def replies(row):
                right = row.clips[0].array is None and row.id in ("t1", "t4")
                return [f"<think>Hm.</think><answer>{answer}</answer>" for answer in ("cat" if right else "dog", "dog")]

            return [group_from_text(row, replies(row)) for row in examples]

    monkeypatch.setattr("covo_rl.evaluate.runner.load_answerer", lambda *_, **__: Answerer())
    path = table(tmp_path, "t")
    path.write_bytes(path.read_bytes().replace(b"Which 4?", b'"Which\r\n4?"'))
    run_profile(path, tmp_path, tmp_path / "out", num_generations=2, columns=MAPPING)
    lines, kept = path.read_bytes().split(b"\n"), tmp_path / "out" / "filtered.csv"
    assert kept.read_bytes() == b"\n".join([lines[0], lines[2], lines[5], lines[6]]) + b"\n"
    assert [row.id for row in load_examples(kept, tmp_path, columns=MAPPING)] == ["t1", "t4"]


# -- a run -----------------------------------------------------------------------------------------------------------


def options(tmp_path, *words):
    return parse_options(["--data", str(tmp_path / "t.csv"), *words])


def test_training_and_held_out_rows(tmp_path):
    table(tmp_path, "t")
    table(tmp_path, "h", seed=1)
    both = read_questions(options(tmp_path, "--eval_data", str(tmp_path / "h.csv"), "--columns", MAPPING))
    assert [row.id for row in both.train] == [f"t{n}" for n in range(6)]
    assert both.held_out[0].answer == "cat" and both.train[0].columns["other"] == "dog"
    rows = [{"id": "x", "audio": None, "question": "What?", "answer": "that"}]
    (tmp_path / "plain.json").write_text(json.dumps(rows))
    words = ("--eval_data", str(tmp_path / "plain.json"), "--columns", MAPPING)
    with pytest.raises(DataError, match="it has no column 'uid'"):
        read_questions(options(tmp_path, *words))
    assert read_questions(options(tmp_path, *words, "--eval_columns", "auto")).held_out[0].answer == "that"
    # the built-in held-out rows are not read with the names of the user's
    assert len(read_questions(options(tmp_path, "--columns", MAPPING)).train) >= 4


def test_the_option_is_checked_before_anything_is_read(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(f"data: {tmp_path}/t.csv\ncolumns:\n  question: prompt\n  audio: wav\n  answer: label\n")
    assert parse_options(["--config", str(config)]).data.columns == {
        "question": "prompt", "audio": "wav", "answer": "label",
    }  # fmt: skip
    config.write_text("columns:\n  questoin: prompt\n")
    for words in (["--config", str(config)], ["--columns", "questoin=prompt"], ["--eval_columns", "questoin=x"]):
        with pytest.raises(ConfigError, match="did you mean question"):
            parse_options(words)
    assert parse_options([]).data.columns is None


def test_what_is_worth_knowing_is_a_note_of_the_run_and_of_the_check(tmp_path):
    message = [{"role": "user", "content": "Which? A. dog B. cat"}]
    (tmp_path / "q.jsonl").write_text(json.dumps({"id": "a", "messages": message, "solution": "B"}) + "\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        words = ["--data", str(tmp_path / "q.jsonl"), "--eval_fraction", "0"]
        (note,) = [note for note in read_questions(parse_options(words)).notes if "options" in note]
        assert note.startswith("data: rows a: their questions list options in the text")
        report = json.loads(run(data_app, "check", tmp_path / "q.jsonl", "--json").stdout)
    assert note == f"data: {report['notes']['data'][0]}"


def test_a_changed_mapping_is_noticed_by_a_resume(tmp_path):
    path = table(tmp_path, "t")

    def contents(columns):
        config = Options().flat() | {"columns": columns}
        return {"config": config, "data": data_fingerprint(load_examples(path, columns=columns))}

    first, same = contents(MAPPING), contents(MAPPING)
    assert differences(first, same) == ([], [])
    serious, _ = differences(first, contents(MAPPING.replace("label", "other")))
    assert any(line.startswith("columns: ") for line in serious)
    assert any(line.startswith("training data: ") and "text" in line for line in serious)
    rows = [
        {"audio": None, "question": "a?", "answer": "b", "system_prompt": text} for text in ("Be brief.", "Be kind.")
    ]
    one, two = (data_fingerprint(load_examples([row])) for row in rows)
    assert one["sha256"]["text"] != two["sha256"]["text"]


def test_rows_with_system_messages_are_noted_where_the_option_is_set(tmp_path):
    rows = [{"id": "a", "audio": None, "question": "What?", "answer": "that", "system_prompt": "Be brief."}]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    words = ["--data", str(tmp_path / "q.json"), "--eval_fraction", "0"]
    assert not any("system" in note for note in read_questions(parse_options(words)).notes)
    notes = read_questions(parse_options([*words, "--system_prompt", "Be long."])).notes
    assert notes[-1] == "1 rows (a) have a system message of their own, which takes the place of system_prompt"
