import json
import os
import pickle

import numpy as np
import pytest
import soundfile

from covo_rl.data import DataError, load_examples
from covo_rl.types import Clip

RATE = 16_000


def make_clip(path, seed=0, seconds=0.1):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).uniform(-0.5, 0.5, int(RATE * seconds)).astype(np.float32)
    soundfile.write(path, values, RATE)
    return path


def write(path, rows):
    lines = path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n" if lines else json.dumps(rows), encoding="utf-8")
    return path


def mmau(name="r0", **more):
    return {
        "id": name, "audio_id": "./audios/a.wav", "question": "Which animal?", "choices": ["dog", "cat"],
        "answer": "cat", "task": "sound", "sub-category": "Animals", "odd": {"nested": [1, None]}, **more,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    make_clip(tmp_path / "audios" / "a.wav")
    make_clip(tmp_path / "audios" / "b.wav", seed=1)
    return tmp_path


def messages(source, *arguments, **options):
    with pytest.raises(DataError) as caught:
        load_examples(source, *arguments, **options)
    return [str(problem) for problem in caught.value.problems]


# -- one row in each layout ------------------------------------------------------------------------------------------

ROWS = {
    "mmau": (mmau(), ("dog", "cat"), "cat", {"task": "sound", "sub-category": "Animals", "odd": {"nested": [1, None]}}),
    "mmar": (
        {"id": "r0", "audio_path": "./audios/a.wav", "question": "Which animal?", "choices": ["dog", "cat"],
         "answer": "cat", "modality": "sound", "rubric": ["x"]},
        ("dog", "cat"), "cat", {"modality": "sound", "rubric": ["x"]},
    ),
    "mmsu": (
        {"id": "r0", "audio": "audios/a.wav", "question": "Which animal?", "choice_a": "dog", "choice_b": "cat",
         "choice_c": None, "choice_d": None, "answer_gt": "cat", "task_name": "animals"},
        ("dog", "cat"), "cat", {"task_name": "animals"},
    ),
    "avqa": (
        {"id": 183, "video_name": "v_000030", "video_id": 341, "question_text": "Which animal?",
         "multi_choice": ["dog", "cat", "1"], "answer": 1, "question_type": "Which", "audio_path": "audios/a.wav"},
        ("dog", "cat", "1"), "cat", {"video_name": "v_000030", "video_id": 341, "question_type": "Which"},
    ),
    "audiomcq": (
        {"source_dataset": "Clotho", "id": "r0", "audio_path": "audios/a.wav", "question": "Which animal?",
         "choices": ["dog", "cat"], "answer": "cat", "question_type": "sound"},
        ("dog", "cat"), "cat", {"source_dataset": "Clotho", "question_type": "sound"},
    ),
    "covo": (
        {"id": "r0", "audio": "audios/a.wav", "question": "Which animal?", "choices": {"A": "dog", "B": "cat"},
         "answer": "(B)", "evidence": "It meows."},
        ("dog", "cat"), "cat", {"evidence": "It meows."},
    ),
}  # fmt: skip


@pytest.mark.parametrize("format", ["auto", "named"])
@pytest.mark.parametrize("name", ROWS)
def test_every_layout(folder, name, format):
    row, choices, answer, columns = ROWS[name]
    (example,) = load_examples(write(folder / "q.json", [row]), format="auto" if format == "auto" else name)
    assert example.id == str(row["id"])
    assert example.clips == (Clip(path=str(folder / "audios" / "a.wav")),)
    assert (example.question, example.choices, example.answer) == ("Which animal?", choices, answer)
    assert example.columns == columns


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ".data", "list in object", "BOM"])
def test_every_container(folder, suffix):
    rows = [{k: v for k, v in mmau(f"r{i}").items() if k != "odd"} for i in range(3)]
    path = folder / f"q{suffix if suffix.startswith('.') else '.json'}"
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == "list in object":
        path.write_text(json.dumps({"version": 1, "data": rows}))
    elif suffix == "BOM":
        path.write_bytes(b"\xef\xbb\xbf" + json.dumps(rows).encode())
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n" if suffix != ".json" else json.dumps(rows))
    examples = load_examples(path)
    assert [example.id for example in examples] == ["r0", "r1", "r2"]
    assert examples[2].columns == {"task": "sound", "sub-category": "Animals"}


def test_line_separators_inside_strings_do_not_split_lines(folder):
    path = folder / "q.jsonl"
    path.write_text(json.dumps(mmau(question="a\u2028b\u0085c"), ensure_ascii=False), encoding="utf-8")
    assert load_examples(path)[0].question == "a\u2028b\u0085c"


def test_datasets_folder_is_read_without_torchcodec(folder):
    import datasets
    import pyarrow

    data = (folder / "audios" / "a.wav").read_bytes()
    row = {
        "id": "r0", "audio": {"path": "a.wav", "bytes": data}, "audios": [{"path": "a.wav", "bytes": data}],
        "question": "Which animal?", "choices": ["dog", "cat"], "answer": "cat",
    }  # fmt: skip
    dataset = datasets.Dataset(pyarrow.Table.from_pylist([row])).cast_column("audio", datasets.Audio())
    dataset = dataset.cast_column("audios", datasets.List(datasets.Audio()))
    dataset.save_to_disk(folder / "saved")
    dataset.to_parquet(folder / "shards" / "train-0.parquet")
    for source in (folder / "saved", folder / "shards"):
        (example,) = load_examples(source)
        assert example.clips[0].data == data == example.columns["audios"][0]["bytes"]
        assert example.answer == "cat"
    datasets.DatasetDict(train=dataset).save_to_disk(folder / "splits")
    assert "saved" not in messages(folder / "splits")[0]
    assert os.path.join("splits", "train") in messages(folder / "splits")[0]


def test_metadata_folder(folder):
    write(folder / "metadata.jsonl", [{"id": "x", "file_name": "audios/a.wav", "question": "Open?", "answer": "yes"}])
    (example,) = load_examples(folder)
    assert (example.clips[0].path, example.choices, example.answer) == (str(folder / "audios" / "a.wav"), (), "yes")


# -- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "format", "expected"),
    [
        ({"answer": "cat"}, "covo", "cat"),
        ({"answer": " Cat. "}, "covo", "cat"),
        ({"answer": "B"}, "covo", "cat"),
        ({"answer": "b)"}, "covo", "cat"),
        ({"answer": "B. cat"}, "covo", "cat"),
        ({"answer_letter": "A"}, "covo", "dog"),
        ({"answer_index": 1}, "covo", "cat"),
        ({"answer_index": "1"}, "covo", "cat"),
        ({"answer": None, "answer_index": 0}, "covo", "dog"),
        ({"answer": ""}, "covo", None),
        ({"answer": "B", "choices": ["A", "B"][::-1]}, "covo", "B"),
        ({"answer": 2, "choices": [1, 2, 3]}, "covo", "2"),
        ({"answer": "b", "choices": "['x', \"it's\"]"}, "covo", "it's"),
    ],
)
def test_answers_are_resolved_by_stated_rules(folder, fields, format, expected):
    row = {"id": "r0", "audio": "audios/a.wav", "question": "?", "choices": ["dog", "cat"], **fields}
    assert load_examples(write(folder / "q.json", [row]), format=format)[0].answer == expected


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (mmau(answer="B"), "'B' is not among the choices (['dog', 'cat']), read as text; if it is a letter, read"),
        (mmau(answer="A. cat"), "'A. cat' is not among"),
        ({**ROWS["covo"][0], "answer": "C"}, "'C' is not among the choices (['dog', 'cat']), read as text or letter"),
        ({**ROWS["covo"][0], "answer": "A. cat"}, "'A. cat' is not among"),
        ({**ROWS["covo"][0], "answer": 1}, "1 is not among"),
        ({**ROWS["covo"][0], "answer": 1}, "call the field answer_index"),
        ({**ROWS["covo"][0], "answer": True}, "its answer is True"),
        ({**ROWS["covo"][0], "answer": ["cat"]}, "its answer is ['cat']"),
        ({**ROWS["avqa"][0], "answer": 3}, "3 is not among the choices (['dog', 'cat', '1']), read as index or text"),
        ({**ROWS["avqa"][0], "answer": -1}, "-1 is not among"),
        (mmau(choices=["cat", "Cat "], answer="CAT"), "'CAT' is not among"),
    ],
)
def test_answers_are_never_guessed(folder, row, said):
    (message,) = messages(write(folder / "q.json", [row]))
    assert said in message


def test_avqa_numbers_are_indices_and_texts_are_texts(folder):
    row = {**ROWS["avqa"][0], "answer": "1"}
    assert load_examples(write(folder / "q.json", [row]))[0].answer == "1"


def test_not_strict_keeps_what_an_evaluation_reports_itself(folder):
    rows = [
        mmau("same"),
        mmau("same"),
        mmau("r2", answer="fox"),
        mmau("r3", audio_id="gone.wav"),
        mmau("r4", answer="Cat"),
    ]
    path = write(folder / "q.json", rows)
    examples = load_examples(path, strict=False)
    assert [example.answer for example in examples] == ["cat", "cat", "fox", "cat", "Cat"]
    assert len(messages(path)) == 3
    assert load_examples(write(folder / "q.json", rows[4:]))[0].answer == "cat"


# -- everything that is wrong, at once -------------------------------------------------------------------------------


def test_all_problems_of_all_rows_in_one_error(folder):
    rows = [
        mmau("fine"),
        mmau("question", question="  "),
        mmau("choices", choices="dog, cat"),
        mmau("choice", choices=["dog", None]),
        mmau("answer", answer="fox"),
        mmau("file", audio_id="audios/gone.wav"),
        mmau("two", question=7, audio_id="../outside.wav"),
        mmau("fine"),
        {"id": "fields", "text": "?"},
        mmau(True),
        mmau("surrogate", question="\ud800"),
        mmau("nul", audio_id="a\0b.wav"),
        mmau("kind", audio_id=3.5),
    ]
    found = messages(write(folder / "q.json", rows))
    expected = [
        "row 9 (id 'fields'): unknown fields ['id', 'text']", "row 10: its id is True",
        "fine: rows 1, 8 have the same id",
        "question: its question (question) is '  '", "choices: its choices are 'dog, cat'",
        "choice: its choices ['dog', None] hold None", "answer: its answer 'fox' is not among",
        "audios/gone.wav does not",
        "two: its question (question) is 7", "two: its audio path '../outside.wav' leaves", "lone surrogate",
        "'a\\x00b.wav' is not a path", "kind: its audio (audio_id) is 3.5",
    ]  # fmt: skip
    assert len(found) == len(expected)
    for message, part in zip(found, expected, strict=True):
        assert part in message


def test_the_error_keeps_the_readable_rows_and_can_be_pickled(folder):
    with pytest.raises(DataError) as caught:
        load_examples(write(folder / "q.json", [mmau("a"), mmau("b", question="")]))
    assert [example.id for example in caught.value.examples] == ["a"]
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and again.problems == caught.value.problems


def test_many_problems_are_counted_and_the_first_are_shown(folder):
    path = write(folder / "q.json", [mmau(f"r{i}", answer="fox") for i in range(60)])
    with pytest.raises(DataError, match=r"60 problems\n(.*\n)*  \.\.\. and 10 more$"):
        load_examples(path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("q.json", b'[{"id": "r0", "question": ', "half-written"),
        ("q.jsonl", b'{"a": 1}\n{"b": \n{"c": 2}\n{"d"', "line 2"),
        ("q.jsonl", b'{"a": 1}\n{"b": \n{"c": 2}\n{"d"', "line 4"),
        ("q.json", b"[]", "no rows"),
        ("q.json", b"", "not valid JSON"),
        ("q.json", b"3", "a list of rows is expected"),
        ("q.json", b'[{"id": 1}, 7, "x"]', "row 2: is 7"),
        ("q.json", b"[" * 5_000, "not valid JSON"),
        ("q.json", b"\xff\xfe{}", "not UTF-8"),
        ("q.parquet", b"PAR1 nothing", "not a readable parquet"),
        ("q.csv", b"id,question\n1,2\n", "unknown fields"),
    ],
)
def test_broken_files(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    assert any(said in message for message in messages(tmp_path / name))


def test_missing_files_and_folders(tmp_path):
    assert "no such file" in messages(tmp_path / "gone.json")[0]
    assert "no such file" in messages("a\0b")[0]
    assert "metadata.jsonl" in messages(tmp_path)[0]
    assert "hf:OWNER/NAME:SPLIT" in messages("hf:owner/name")[0]
    with pytest.raises(ValueError, match="use auto, avqa, mmsu, mmau, audiomcq, mmar, covo"):
        load_examples(tmp_path, format="MMAU")


def test_a_named_layout_says_what_is_missing(folder):
    path = write(folder / "q.json", [mmau()])
    assert (
        "schema avqa needs question_text, audio_path or audio or video_name, multi_choice"
        in messages(path, format="avqa")[0]
    )
    assert "schema mmsu needs audio or audio_path, choice_a, choice_b" in messages(path, format="mmsu")[0]


# -- ids and audio ---------------------------------------------------------------------------------------------------


def test_rows_without_any_id_are_named_by_position(folder):
    rows = [{k: v for k, v in mmau().items() if k != "id"} for _ in range(2)]
    path = write(folder / "q.json", rows)
    assert [example.id for example in load_examples(path)] == ["row-000001", "row-000002"]
    write(path, [*rows, mmau("r3")])
    assert messages(path) == ["row 1: it has no id, other rows do", "row 2: it has no id, other rows do"]


def test_no_clip_one_clip_several_clips(folder):
    row = ROWS["covo"][0]
    rows = [
        {**row, "id": "none", "audio": None},
        {**row, "id": "empty", "audio": []},
        {**row, "id": "two", "audio": ["audios/a.wav", {"path": "audios/b.wav"}]},
    ]
    assert [len(example.clips) for example in load_examples(write(folder / "q.json", rows))] == [0, 0, 2]


@pytest.mark.parametrize(
    "audio",
    [{"bytes": 10**12}, {"array": 3}, {"array": [10**400], "sampling_rate": 8000}, {"array": [0.0]}, {"x": 1}, 7],
)
def test_audio_that_is_none(folder, audio):
    assert len(messages(write(folder / "q.json", [{**ROWS["covo"][0], "audio": audio}]))) == 1


def test_samples_in_the_row(folder):
    row = {**ROWS["covo"][0], "audio": {"array": [0.0, 0.5], "sampling_rate": 8000}}
    (clip,) = load_examples(write(folder / "q.json", [row]))[0].clips
    assert (clip.array.tolist(), clip.sampling_rate) == ([0.0, 0.5], 8000)


def test_a_mistyped_audio_field_is_not_a_text_only_row(folder):
    row = {k: v for k, v in ROWS["covo"][0].items() if k != "audio"} | {"adio": "audios/a.wav"}
    assert "unknown fields" in messages(write(folder / "q.json", [row]))[0]


def test_audio_dir_may_already_be_the_inner_folder(folder):
    (example,) = load_examples(write(folder / "q.json", [mmau()]), folder / "audios")
    assert example.clips[0].path == str(folder / "audios" / "a.wav")
    # Not for single rows: where some paths are right, the others are missing.
    make_clip(folder / "gone.wav")
    rows = [mmau("r0"), mmau("r1", audio_id="audios/gone.wav")]
    assert len(messages(write(folder / "q.json", rows), folder)) == 1


def test_avqa_recordings_are_found_by_video_name(folder):
    row = {k: v for k, v in ROWS["avqa"][0].items() if k != "audio_path"}
    path = write(folder / "q.json", [row])
    assert "v_000030.wav does not exist" in messages(path, folder / "audios")[0]
    make_clip(folder / "audios" / "v_30.flac")
    assert load_examples(path, folder / "audios")[0].clips[0].path == str(folder / "audios" / "v_30.flac")


@pytest.mark.parametrize(
    "reference", ["../a.wav", "audios/../../a.wav", "ABSOLUTE", "link.wav", "linked/a.wav", "..", "."]
)
def test_audio_outside_the_folder_is_refused_unless_allowed(folder, reference):
    outside = make_clip(folder / "a.wav")
    inside = folder / "inside"
    (inside / "audios").mkdir(parents=True)
    (inside / "link.wav").symlink_to(outside)
    (inside / "linked").symlink_to(folder)
    reference = str(outside) if reference == "ABSOLUTE" else reference
    path = write(folder / "q.json", [mmau(audio_id=reference)])
    found = messages(path, inside)
    assert len(found) == 1
    assert "leaves the audio folder" in found[0] or "does not exist" in found[0]
    if reference not in ("..", "."):
        assert os.path.samefile(load_examples(path, inside, allow_outside=True)[0].clips[0].path, outside)


def test_links_inside_the_folder_are_fine(folder):
    (folder / "audios" / "link.wav").symlink_to(folder / "audios" / "a.wav")
    assert load_examples(write(folder / "q.json", [mmau(audio_id="audios/link.wav")]))
    assert load_examples(write(folder / "q.json", [mmau(audio_id=str(folder / "audios" / "a.wav"))]))


def test_loading_imports_no_torch():
    import subprocess
    import sys

    code = (
        "import covo_rl.data, covo_rl.audio, sys; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
