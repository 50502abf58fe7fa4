import json

import numpy as np
import pytest
import soundfile

from covo_rl.audio import audio_fingerprint, decode
from covo_rl.data import SCHEMAS, DataError, load_examples, to_rows, write
from covo_rl.types import Clip, Example


@pytest.fixture
def examples(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full(1600, 0.1, np.float32), 16_000)
    soundfile.write(tmp_path / "b.flac", np.full(1600, 0.2, np.float32), 16_000)
    return [
        Example("r0", (Clip(path=str(tmp_path / "a.wav")),), "Which?", ("dog", "cat", "B"), "B", {"task": "sound"}),
        Example("r1", (Clip(path=str(tmp_path / "b.flac")),), "Wo?", ("ä", "2"), None, {"facts": {"n": "two"}}),
        Example("r2", (Clip(path=str(tmp_path / "a.wav")),), "Same?", ("x", "x", "y"), "x"),
    ]


def core(example):
    return example.id, example.clips, example.question, example.choices, example.answer


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("schema", SCHEMAS)
def test_what_is_written_in_any_layout_is_read_back(tmp_path, examples, schema, suffix):
    path = tmp_path / f"out{suffix}"
    write(to_rows(examples, schema, tmp_path), path)
    for format in ("auto", schema):
        again = load_examples(path, format=format)
        assert list(map(core, again)) == list(map(core, examples))
        for old, new in zip(examples, again, strict=True):
            assert {name: new.columns[name] for name in old.columns} == dict(old.columns)


@pytest.mark.parametrize("second", SCHEMAS)
@pytest.mark.parametrize("first", SCHEMAS)
def test_two_conversions_equal_one(tmp_path, examples, first, second):
    write(to_rows(examples, first, tmp_path), tmp_path / "1.json")
    write(to_rows(load_examples(tmp_path / "1.json"), second, tmp_path), tmp_path / "2.json")
    assert list(map(core, load_examples(tmp_path / "2.json"))) == list(map(core, examples))


def test_mmau_rows_are_spelled_as_published(tmp_path, examples):
    rows = to_rows(examples, "mmau", tmp_path)
    assert rows[0] == {
        "id": "r0", "audio_id": "a.wav", "question": "Which?", "choices": ["dog", "cat", "B"], "answer": "B",
        "task": "sound",
    }  # fmt: skip
    assert rows[1]["answer"] == ""


def test_avqa_answers_are_indices_and_mmsu_options_have_fields(tmp_path, examples):
    assert [r["answer"] for r in to_rows(examples, "avqa", tmp_path)] == [2, None, 0]
    row = to_rows(examples, "mmsu", tmp_path)[1]
    assert (row["choice_a"], row["choice_b"], row["choice_c"], row["choice_d"]) == ("ä", "2", None, None)


def test_parquet(tmp_path, examples):
    write(to_rows(examples[:1], "mmau", tmp_path), tmp_path / "out.parquet")
    assert core(load_examples(tmp_path / "out.parquet")[0]) == core(examples[0])
    with pytest.raises(ValueError, match="mixes types"):
        write([{"x": 1}, {"x": "a"}], tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match=r"\.json, \.jsonl or \.parquet"):
        write([], tmp_path / "out.csv")
    assert sorted(path.name for path in tmp_path.glob("*bad*")) == []


def test_clips_without_a_file_are_stored(tmp_path, examples):
    data = (tmp_path / "b.flac").read_bytes()
    wave = np.linspace(-0.5, 0.5, 1600, dtype=np.float32)
    rows = [Example("bytes", (Clip(data=data),), "?", ("a", "b"), "a"),
            Example("array", (Clip(array=wave, sampling_rate=8000),), "?", ("a", "b"), "a")]  # fmt: skip
    write(to_rows(rows, "mmau", tmp_path), tmp_path / "out.json")
    assert {row["audio_id"].split("/")[0] for row in json.loads((tmp_path / "out.json").read_text())} == {"converted"}
    again = load_examples(tmp_path / "out.json")
    assert again[0].clips[0].path.endswith(".flac")
    for old, new in zip(rows, again, strict=True):
        assert audio_fingerprint(*decode(old.clips[0])) == audio_fingerprint(*decode(new.clips[0]))


def test_paths_outside_the_folder_stay_absolute(tmp_path, examples):
    (tmp_path / "elsewhere").mkdir()
    row = to_rows(examples, "mmau", tmp_path / "elsewhere")[0]
    assert row["audio_id"] == str(tmp_path / "a.wav")


def test_a_further_column_never_takes_the_place_of_a_field(tmp_path, examples):
    extra = {"audio_id": "x", "answer_letter": "A", "choices": 1, "question_text": "?", "multi_choice": []}
    row = Example("r0", examples[0].clips, "Which?", ("dog", "cat"), "cat", extra)
    write(to_rows([row], "mmau", tmp_path), tmp_path / "out.json")
    (again,) = load_examples(tmp_path / "out.json")
    assert core(again) == core(row)
    assert again.columns == {f"original_{name}": value for name, value in extra.items()}


def test_rows_that_a_layout_cannot_hold_are_all_named(tmp_path, examples):
    clip = examples[0].clips[0]
    rows = [
        Example("two", (clip, clip), "?", ("a", "b"), "a"),
        Example("open", (clip,), "?", (), "a"),
        Example("five", (clip,), "?", tuple("abcde"), "a"),
        Example("fox", (clip,), "?", ("a", "b"), "fox"),
    ]
    with pytest.raises(DataError) as caught:
        to_rows(rows, "mmsu", tmp_path)
    assert [problem.row_id for problem in caught.value.problems] == ["two", "open", "five"]
    with pytest.raises(DataError) as caught:
        to_rows(rows, "avqa", tmp_path)
    assert [problem.row_id for problem in caught.value.problems] == ["two", "open", "fox"]
    write(to_rows(rows, "covo", tmp_path), tmp_path / "out.json")
    assert list(map(core, load_examples(tmp_path / "out.json", strict=False))) == list(map(core, rows))
    with pytest.raises(ValueError, match="'mmlu' is not known"):
        to_rows(rows, "mmlu", tmp_path)
