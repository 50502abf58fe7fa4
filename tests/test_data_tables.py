"""CSV and TSV files, audiofolders, splits, and columns under other names."""

import json

import numpy as np
import pytest
import soundfile

from covo_rl.data import DataError, load_examples
from covo_rl.resolve import ConfigError, column_map

RATE = 16_000


@pytest.fixture
def folder(tmp_path):
    for seed, name in enumerate(("a.wav", "b.wav")):
        values = np.random.default_rng(seed).uniform(-0.5, 0.5, RATE // 10)
        soundfile.write(tmp_path / name, values, RATE)
    return tmp_path


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def messages(source, *arguments, **options):
    with pytest.raises(DataError) as caught:
        load_examples(source, *arguments, **options)
    return [str(problem) for problem in caught.value.problems]


# -- CSV and TSV -----------------------------------------------------------------------------------------------------

COMMAS = (
    'id,audio,question,choices,answer,note\n007,a.wav,"Dog, or\ncat?",dog|cat,cat,true\n008,b.wav,Which?,cat|dog,dog,\n'
)
TABLES = {
    "q.csv": COMMAS,
    "bom.csv": "\ufeff" + COMMAS,
    "windows.csv": COMMAS.replace("\n", "\r\n"),
    "UPPER.CSV": COMMAS,
    "europe.csv": COMMAS.replace(",", ";").replace("Dog;", "Dog,"),
    "q.tsv": COMMAS.replace(",", "\t").replace("Dog\t", "Dog,"),
    "json.csv": COMMAS.replace("dog|cat", '"[""dog"", ""cat""]"').replace("cat|dog", '"[""cat"", ""dog""]"'),
    "python.csv": COMMAS.replace("dog|cat", "\"['dog', 'cat']\"").replace("cat|dog", "\"['cat', 'dog']\""),
    "letters.csv": COMMAS.replace("choices", "A,B").replace("|", ","),
    "numbers.csv": COMMAS.replace("choices", "option_1,option_2").replace("|", ","),
    "words.csv": COMMAS.replace("choices", "choice_a,choice_b,choice_c").replace("dog|cat", "dog,cat,").replace(
        "cat|dog", "cat,dog,"
    ),
    "mmsu.csv": COMMAS.replace("choices,answer", "choice_a,choice_b,answer_gt").replace("|", ","),
    "semicolons.csv": COMMAS.replace("|", ";"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_every_way_to_write_a_table(folder, name):
    first, second = load_examples(write(folder / name, TABLES[name]))
    assert first.question.split() == ["Dog,", "or", "cat?"]
    assert (first.id, first.choices, first.answer, first.clips[0].path) == (
        "007", ("dog", "cat"), "cat", str(folder / "a.wav"),
    )  # fmt: skip
    assert (second.choices, second.answer) == (("cat", "dog"), "dog")
    assert (first.columns, second.columns) == ({"note": "true"}, {"note": None})


def test_cells_are_text_and_empty_ones_are_missing(folder):
    text = "id,audio,question,answer,x,y\n1,a.wav,What?,007,NaN,1e3\n2,,No sound?,,TRUE,null\n"
    first, second = load_examples(write(folder / "q.csv", text))
    assert (first.answer, first.columns) == ("007", {"x": "NaN", "y": "1e3"})
    assert (second.clips, second.answer, second.columns) == ((), None, {"x": "TRUE", "y": "null"})


def test_several_clips_in_a_cell_are_a_json_list(folder):
    text = 'audio,question,answer\n"[""a.wav"", ""b.wav""]",Same?,no\n'
    (example,) = load_examples(write(folder / "q.csv", text))
    assert [clip.path for clip in example.clips] == [str(folder / name) for name in ("a.wav", "b.wav")]


HEAD = "id,audio,question,choices,answer\n"
WRONG = {
    "latin": (HEAD.encode() + "1,a.wav,Café?,a|b,a\n".encode("latin-1"), "not UTF-8 text"),
    "utf-16": (HEAD.encode("utf-16"), "UTF-16: save it as UTF-8"),
    "empty": (b"", "its header '' is one column"),
    "header alone": (HEAD, "no rows"),
    "no header": ("1,a.wav,Which?,a|b,a\n2,b.wav,Which?,a|b,a\n", "unknown fields"),
    "same names": ("id,audio,question,audio\n1,a.wav,Which?,b.wav\n", "line 1: the column 'audio' occurs twice"),
    "nameless": (",audio,question\n1,a.wav,Which?\n", "line 1: column 1 has no name"),
    "short row": (HEAD + "1,a.wav,Which?,a|b\n", "line 2: has 4 cells, the header 5"),
    "long row": (HEAD + "1,a.wav,Which, then?,a|b,a\n", "line 2: has 6 cells, the header 5; a cell that holds one"),
    "later row": (HEAD + '1,a.wav,"Which\none?",a|b,a\n2,a.wav\n', "line 4: has 2 cells"),
    "open quote": (HEAD + '1,a.wav,"Which?,a|b,a\n2,a.wav,Which?,a|b,a\n', "line 2: cannot be read"),
    "text behind a quote": (HEAD + '1,a.wav,"Which"one?,a|b,a\n', "line 2: cannot be read"),
    "NUL": (HEAD + "1,a.wav,Wh\0ch?,a|b,a\n", "line 2: holds a NUL byte"),
    "huge": (HEAD + f"1,a.wav,{'x' * 100_001},a|b,a\n", "line 2: has a cell of 100001 characters"),
    "tabs": (HEAD.replace(",", "\t"), "separated by tabs: name it .tsv"),
    "bars": (HEAD.replace(",", "|"), "separated by vertical bars"),
    "two separators": ("id;audio,question;answer\n", "may be separated by commas or semicolons"),
    "a path outside": (HEAD + "1,../a.wav,Which?,a|b,a\n", "leaves the audio folder"),
    "a URL": (HEAD + "1,https://x.org/a.wav,Which?,a|b,a\n", "is a URL"),
    "ids": (HEAD + "1,a.wav,Which?,a|b,a\n1,b.wav,Which?,a|b,a\n", "rows 1, 2 have the same id"),
    "commas in cells": (HEAD + '1,a.wav,Which?,"a, b",a\n', "are not all written in one way (none of these: rows 1)"),
    "two ways": (HEAD + "1,a.wav,Which?,a|b,a\n2,b.wav,Which?,a;b,a\n", "by |: rows 1; separated by ;: rows 2"),
    "both signs": (HEAD + "1,a.wav,Which?,a|b;c|d,a\n", "separated by |: rows 1; separated by ;: rows 1"),
    "lists and signs": (
        HEAD + '1,a.wav,Which?,"[""a"", ""b""]",a\n2,b.wav,Which?,a|b,a\n', "a JSON list: rows 1; separated by |",
    ),
    "numpy": (HEAD + "1,a.wav,Which?,['a' 'b'],a\n", "none of these: rows 1"),
    "one option": (HEAD + "1,a.wav,Which?,a|b,a\n2,b.wav,Which?,a,a\n", "none of these: rows 2"),
    "an empty option": (HEAD + "1,a.wav,Which?,a||b,a\n", "none of these: rows 1"),
    "two places": ("audio,question,choices,A,B,answer\na.wav,Which?,a|b,a,b,a\n", "may be in choices or in A, B"),
    "two groups": ("audio,question,opt1,opt2,A,B,answer\na.wav,Which?,a,b,a,b,a\n", "may be in opt1, opt2 or in A, B"),
    "a gap": ("audio,question,A,B,D,answer\na.wav,Which?,a,b,d,a\n", "not in order, without a gap"),
    "a hole": ("id,audio,question,A,B,C,answer\nx,a.wav,Which?,a,,c,a\n", "row 1 (id 'x'): its option B is empty"),
    "another answer": (HEAD + "1,a.wav,Which?,a|b,c\n", "its answer 'c' is not among the choices"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_table_is_named(folder, name):
    content, says = WRONG[name]
    problems = messages(write(folder / "q.csv", content))
    assert any(says in problem for problem in problems), problems


def test_all_lines_are_named_at_once_and_a_tsv_of_commas_is_refused(folder):
    text = HEAD + "1\n2,a.wav,Which?,a|b,a\n3,a\0.wav\n"
    assert messages(write(folder / "q.csv", text)) == [
        "line 2: has 1 cells, the header 5", "line 4: has 2 cells, the header 5",
        "line 4: holds a NUL byte: was the file damaged, or is it UTF-16?",
    ]  # fmt: skip
    assert "name it .csv" in messages(write(folder / "q.tsv", HEAD))[0]


def test_a_semicolon_inside_options_is_theirs_where_bars_part_every_cell(folder):
    (first, second) = load_examples(write(folder / "q.csv", HEAD + "1,a.wav,A?,a|b; c,a\n2,b.wav,B?,d|e,e\n"))
    assert first.choices == ("a", "b; c") and second.choices == ("d", "e")


# -- audiofolders and splits -----------------------------------------------------------------------------------------

ROW = {"file_name": "a.wav", "question": "Which?", "choices": ["dog", "cat"], "answer": "cat"}


def parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("name", ["file_name", "audio_file_name"])
def test_an_audio_folder(folder, suffix, name):
    row = {name: ROW["file_name"], **{field: value for field, value in ROW.items() if field != "file_name"}}
    path = folder / f"metadata.{suffix}"
    if suffix == "parquet":
        parquet(path, [row])
    elif suffix == "jsonl":
        write(path, json.dumps(row))
    else:
        cells = [list(row), ["|".join(cell) if isinstance(cell, list) else cell for cell in row.values()]]
        write(path, "\n".join(("," if suffix == "csv" else "\t").join(line) for line in cells))
    (example,) = load_examples(folder)
    assert (example.clips[0].path, example.choices) == (str(folder / "a.wav"), ("dog", "cat"))
    write(folder / "train" / "metadata.csv", "file_name,question\n../a.wav,Which?\n")
    assert "several files of metadata" in messages(folder)[0]


def test_splits_of_an_audio_folder_are_named_and_one_of_them_is_read(folder):
    for split in ("train", "test"):
        write(folder / "set" / split / "metadata.csv", f"file_name,question,answer\n{split}.wav,Which?,dog\n")
        (folder / "set" / split / f"{split}.wav").write_bytes((folder / "a.wav").read_bytes())
    (problem,) = messages(folder / "set")
    assert str(folder / "set" / "test") in problem and str(folder / "set" / "train") in problem
    (example,) = load_examples(folder / "set" / "test")
    assert example.clips[0].path == str(folder / "set" / "test" / "test.wav")


def test_rows_of_an_audio_folder_have_a_file(folder):
    write(folder / "metadata.csv", "file_name,question\n,Which?\na.wav,Which?\n")
    assert messages(folder) == ["row 1: its file_name is empty"]
    write(folder / "metadata.csv", "one_file_name,two_file_name,question\na.wav,b.wav,Which?\n")
    assert "--columns audio=one_file_name" in messages(folder)[0]
    assert load_examples(folder, columns="audio=two_file_name")[0].clips[0].path == str(folder / "b.wav")
    write(folder / "metadata.csv", "question\nWhich?\n")
    assert "is one column" in messages(folder)[0]
    write(folder / "metadata.csv", "file_name,question\n../../a.wav,Which?\n")
    assert "leaves the audio folder" in messages(folder)[0]


def test_tables_of_several_splits_are_not_one_set(folder):
    rows = [{"id": "r0", "audio": None, "question": "a?", "answer": "b"}]
    for names, splits in (
        (("train-0.parquet", "test-0.parquet"), "test, train"),
        (("train/0.parquet", "data/val.parquet"), "train, validation"),
    ):
        place = folder / splits
        for name in names:
            parquet(place / name, rows)
        (problem,) = messages(place)
        assert f"several splits ({splits})" in problem and "hf:" in problem
        assert len(load_examples(place / names[0])) == 1
    parquet(folder / "one" / "training.parquet", rows)
    assert len(load_examples(folder / "one")) == 1


def test_a_set_of_the_hub_has_a_split_and_perhaps_a_configuration(folder, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        return datasets.Dataset.from_list([{"audio": None, "question": "a?", "answer": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("hf:me/set:train", "hf:me/set:small:test", "hf:me/set:train[:100]", "hf:me/set:big:train[1%:2%]"):
        assert len(load_examples(name)) == 1
    assert asked == [
        ("me/set", "train"), ("me/set", "small", "test"), ("me/set", "train[:100]"), ("me/set", "big", "train[1%:2%]"),
    ]  # fmt: skip
    for name in ("hf:me/set", "hf:me/set:", "hf:me/set:a:b:c", "hf:"):
        assert "hf:OWNER/NAME:CONFIG:SPLIT" in messages(name)[0]


# -- columns ---------------------------------------------------------------------------------------------------------

OTHER = {"wav": "a.wav", "prompt": "Which?", "options": ["dog", "cat"], "label": "cat", "answer": "not this", "uid": 7}
MAPPING = "question=prompt,answer=label,audio=wav,choices=options,id=uid"


@pytest.mark.parametrize("columns", [MAPPING, column_map(MAPPING)])
def test_columns_under_other_names(folder, columns):
    path = write(folder / "q.json", json.dumps([OTHER]))
    (example,) = load_examples(path, columns=columns)
    assert (example.id, example.question, example.choices, example.answer) == ("7", "Which?", ("dog", "cat"), "cat")
    assert example.clips[0].path == str(folder / "a.wav")
    # the originals stay readable under their own names, but for the sound
    assert example.columns == {k: v for k, v in OTHER.items() if k != "wav"}
    assert load_examples([{**OTHER, "wav": str(folder / "a.wav")}], columns=columns)[0].answer == "cat"


def test_a_mapped_field_is_read_from_its_column_alone(folder):
    rows = [{"audio": "a.wav", "question": "Which?", "gold": None, "answer_letter": "A", "choices": ["a", "b"]}]
    path = write(folder / "q.json", json.dumps(rows))
    assert load_examples(path, columns="answer=gold")[0].answer is None
    assert load_examples(path)[0].answer == "a"
    rows = [{"sound": None, "path": "a.wav", "question": "No sound?"}]
    assert load_examples(write(folder / "q.json", json.dumps(rows)), columns="audio=sound")[0].clips == ()


def test_answers_by_place_or_letter_and_two_fields_of_one_column(folder):
    table = "wav,text,opts,place,sign\na.wav,dog,dog|cat,1,A\nb.wav,cat,dog|cat,0,B\n"
    path = write(folder / "q.csv", table)
    base = "audio=wav,question=text,choices=opts"
    for more, answers in (("answer_index=place", ["cat", "dog"]), ("answer_letter=sign", ["dog", "cat"]),
                          ("answer=text", ["dog", "cat"])):  # fmt: skip
        examples = load_examples(path, columns=f"{base},{more}")
        assert [example.answer for example in examples] == answers
    assert examples[0].columns["place"] == "1" and examples[0].question == "dog"


def test_a_mapping_goes_with_every_known_layout(folder):
    row = {
        "audio": "a.wav",
        "question": "Which?",
        "choice_a": "dog",
        "choice_b": "cat",
        "answer_gt": "dog",
        "mine": "cat",
    }
    path = write(folder / "q.json", json.dumps([row]))
    (example,) = load_examples(path, columns={"answer": "mine"})
    assert (example.choices, example.answer) == (("dog", "cat"), "cat")
    assert load_examples(path)[0].answer == "dog"
    del row["answer_gt"]
    path = write(folder / "q.json", json.dumps([{**row, "answer": "B"}]))
    assert load_examples(path)[0].answer == "cat"


def test_what_a_mapping_cannot_name(folder):
    path = write(folder / "q.json", json.dumps([OTHER, OTHER]))
    (problem,) = messages(path, columns="question=prompts,answer=label,audio=wav")
    assert "it has no column 'prompts' (question=prompts)" in problem and "'prompt'" in problem
    assert "did you mean prompt?" in problem and "so have 1 further rows" in problem
    part = [{**OTHER, "uid": 1}, {k: v for k, v in OTHER.items() if k != "label"}]
    (problem,) = messages(write(folder / "q.json", json.dumps(part)), columns=MAPPING)
    assert problem.startswith("row 2: it has no column 'label' (answer=label)")
    for columns, says in (
        ("questoin=prompt", "did you mean question?"),
        ("question", "cannot read 'question='"),
        ("question=", "cannot read"),
        ("question=a,question=b", "question occurs twice"),
        ("answer=a,answer_index=b", "answer and answer_index are ways to say one thing"),
        ({"question": 3}, "cannot read 'question=3'"),
        (["question"], "cannot read"),
        ({"reward": "x"}, "there are id, audio, question"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_examples(path, columns=columns)
        assert says in str(caught.value)
    assert column_map("auto") == column_map(None) == {}


def test_a_system_message_of_a_row(folder):
    from covo_rl.config import PromptConfig
    from covo_rl.prompt import messages as chat

    rows = [{"audio": "a.wav", "question": "Which?", "system_prompt": "Be brief."}, {**OTHER, "role": "Be kind."}]
    plain = load_examples(write(folder / "q.json", json.dumps(rows[:1])))[0]
    mapped = load_examples(write(folder / "q.json", json.dumps(rows[1:])), columns=f"{MAPPING},system_prompt=role")[0]
    assert (plain.system, mapped.system, mapped.columns["role"]) == ("Be brief.", "Be kind.", "Be kind.")
    for config in (PromptConfig(), PromptConfig(system_prompt="Be long.")):
        assert chat(plain, config)[0] == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
