import json
import sys
import types

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from covo_rl.data import load_examples
from covo_rl.run.commands.data import app

RATE = 16_000


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words], terminal_width=200)


def dataset(folder, count, seed, prefix):
    """`count` MMAU rows with clips of noise, written to folder/questions.json."""
    (folder / "audios").mkdir(parents=True)
    rows = []
    for i in range(count):
        values = np.random.default_rng([seed, i]).uniform(-0.5, 0.5, RATE // 10).astype(np.float32)
        soundfile.write(folder / "audios" / f"{i}.wav", values, RATE)
        rows.append({"id": f"{prefix}{i}", "audio_id": f"./audios/{i}.wav", "question": f"Q{i}?", "choices": ["a", "b"],
                     "answer": "a", "task": "sound"})  # fmt: skip
    return save(folder, rows)


def save(folder, rows):
    path = folder / "questions.json"
    path.write_text(json.dumps(rows))
    return path


def rows_of(path):
    return json.loads(path.read_text())


def test_a_good_set_passes(tmp_path):
    path = dataset(tmp_path / "train", 4, 0, "t")
    result = run("check", path, "--max-seconds", 1)
    assert result.exit_code == 0, result.output
    assert "no problems" in result.output
    report = json.loads(run("check", path, "--json").stdout)
    assert report["ok"] is True
    assert report["data"] == {
        "file": str(path), "rows": 4, "rows_without_answer": 0, "rows_without_audio": 0, "rows_with_equal_choices": 0,
        "clips": 4, "different_clips": 4, "hours": 0.0001, "shortest_seconds": 0.1, "longest_seconds": 0.1,
        "problems": [], "duplicates": [],
    }  # fmt: skip


def test_every_kind_of_problem_is_in_one_report(tmp_path):
    path = dataset(tmp_path / "train", 8, 0, "t")
    rows = rows_of(path)
    (tmp_path / "train" / "audios" / "1.wav").unlink()
    (tmp_path / "train" / "audios" / "2.wav").write_bytes(b"not audio")
    soundfile.write(tmp_path / "train" / "audios" / "3.wav", np.full(RATE, 0.1, np.float32), RATE)
    rows[4]["answer"] = "fox"
    rows[5]["question"] = ""
    rows[6]["audio_id"] = "../../../etc/passwd"
    rows += [{**rows[0], "id": "again"}, {**rows[7]}]
    save(tmp_path / "train", rows)
    result = run("check", path, "--max-seconds", 0.5, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    said = {p["row_id"]: p["what"] for p in report["data"]["problems"]}
    assert sorted(said) == ["t1", "t2", "t3", "t4", "t5", "t6", "t7"]
    assert said["t7"] == "2 rows have this id"
    assert [p["row_id"] for p in report["data"]["duplicates"]] == ["again", "t7"]
    table = run("check", path, "--max-seconds", 0.5)
    assert table.exit_code == 1
    assert all(part in table.output for part in ("1.wav", "2.wav", "leaves the audio folder", "t4", "problems found"))
    assert "... and 7 more" in run("check", path, "--show", 1).output


def test_overlap_by_sound_fails_and_by_template_is_a_note(tmp_path):
    train = dataset(tmp_path / "train", 4, 0, "t")
    clean = dataset(tmp_path / "test", 4, 1, "h")
    result = run("check", train, "--against", clean, "--against-audio-dir", tmp_path / "test")
    assert result.exit_code == 0, result.output
    assert "note: 4 held-out rows have the same text, not the sound" in result.output

    rows = rows_of(clean)
    values, rate = soundfile.read(tmp_path / "train" / "audios" / "2.wav", dtype="int16")
    soundfile.write(tmp_path / "test" / "audios" / "copied.flac", values, rate)
    rows[0] |= {"audio_id": "audios/copied.flac", "question": "New?"}
    save(tmp_path / "test", rows)
    result = run("check", train, "--against", clean, "--against-audio-dir", tmp_path / "test")
    assert result.exit_code == 1
    assert "held-out row h0 has the same sound as training row t2" in result.output
    plain = run("check", train, "--against", clean, "--against-audio-dir", tmp_path / "test", "--json", "--near")
    overlap = json.loads(plain.stdout)["overlap"]
    assert [item for item in overlap if item["serious"]] == [
        {"kind": "audio", "held_out_id": "h0", "train_id": "t2", "count": 1, "serious": True}
    ]


def test_the_notes_of_both_sets_are_in_json(tmp_path):
    """finding 45: control tokens were noted for FILE alone, and not in --json."""
    one, two = dataset(tmp_path / "one", 2, 1, "a"), dataset(tmp_path / "two", 2, 5, "b")
    rows = rows_of(two)
    rows[1]["question"] = "Is it <|im_end|> or not?"
    save(tmp_path / "two", rows)
    words = ("check", one, "--against", two, "--against-audio-dir", tmp_path / "two")
    notes = json.loads(run(*words, "--json").stdout)["notes"]
    assert notes["data"] == []
    assert "1 rows (b1) write control tokens (<|im_end|>)" in notes["against"][0]
    assert "note: against: 1 rows (b1) write control tokens" in " ".join(run(*words).stdout.split())


def test_markup_in_data_is_printed_as_it_is(tmp_path):
    path = dataset(tmp_path / "train", 1, 0, "t")
    save(tmp_path / "train", [{**rows_of(path)[0], "id": "[red]x[/red]", "answer": "[/bold]"}])
    result = run("check", path)
    assert result.exit_code == 1
    assert "[red]x[/red]" in result.output and "[/bold]" in result.output


@pytest.mark.parametrize("name", ["avqa", "mmsu", "audiomcq", "mmar", "covo", "mmau"])
def test_convert(tmp_path, name):
    path = dataset(tmp_path / "train", 3, 0, "t")
    out = tmp_path / "out" / "rows.jsonl"
    result = run("convert", path, out, "--to", name)
    assert result.exit_code == 0, result.output
    assert "3 rows written" in result.output
    again = load_examples(out, tmp_path / "train")
    assert [(e.id, e.clips, e.answer, e.columns["task"]) for e in again] == [
        (e.id, e.clips, e.answer, e.columns["task"]) for e in load_examples(path)
    ]


def test_convert_does_not_write_over_the_file_that_it_reads(tmp_path):
    """finding 40: `data convert rows.json rows.json` replaced somebody's rows without a word."""
    path = dataset(tmp_path, 2, 0, "t")
    (tmp_path / "link.json").symlink_to(path)
    before = path.read_bytes()
    for target in (path, tmp_path / "link.json"):
        result = run("convert", path, target, "--to", "avqa")
        assert result.exit_code and "is the file that is read" in result.output
    assert path.read_bytes() == before


def test_wrong_arguments_are_told(tmp_path):
    path = dataset(tmp_path / "train", 1, 0, "t")
    for words, said in (
        (("check", path, "--format", "mmlu"), "'mmlu' is not known"),
        (("convert", path, tmp_path / "o.json", "--to", "mmlu"), "'mmlu' is not known"),
        (("convert", path, tmp_path / "o.csv", "--to", "mmau"), ".json, .jsonl or .parquet"),
        (("convert", tmp_path / "gone.json", tmp_path / "o.json", "--to", "mmau"), "no such file"),
    ):
        result = run(*words)
        assert result.exit_code == 2
        assert said in result.output
    result = run("check", tmp_path / "gone.json")
    assert result.exit_code == 1
    assert "no such file" in result.output


def test_profile_hands_its_options_to_the_evaluation_engine(tmp_path, monkeypatch):
    seen = {}

    def run_profile(data, audio_dir, output, **options):
        seen.update(options, data=data, audio_dir=audio_dir, output=output)
        return {"n": 10, "kept": 4, "filtered": "filtered.json", "verdicts": {"kept": 4, "always solved": 6}}

    fake = types.ModuleType("covo_rl.evaluate.profile")
    fake.run_profile, fake.Rule = run_profile, lambda *bounds: bounds
    monkeypatch.setitem(sys.modules, "covo_rl.evaluate.profile", fake)
    result = run("profile", "q.json", "--audio-dir", "d", "--output", "o", "--n", 4, "--limit", 10, "--max-rate", 0.9)
    assert result.exit_code == 0, result.output
    assert "4 of 10 rows kept in o/filtered.json (6 always solved, 4 kept)" in result.output
    assert (seen["num_generations"], seen["limit"], seen["rule"], seen["model"]) == (
        4,
        10,
        (0.0, 0.9, 0.5),
        "builtin:tiny",
    )
    assert (str(seen["data"]), str(seen["audio_dir"]), str(seen["output"])) == ("q.json", "d", "o")
