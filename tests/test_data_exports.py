"""Question sets as spreadsheets, pandas and `datasets` write them: read as they are meant, or refused with a hint."""

import json
import warnings

import datasets
import numpy as np
import pandas as pd
import pytest
import soundfile

from covo_rl.data import DataError, load_examples
from covo_rl.data.delimited import selected_text
from covo_rl.data.read import DataNote, data_notes
from covo_rl.data.rows import option_list

HEADER = "id,audio,question,choices,answer"


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b"):
        soundfile.write(tmp_path / f"{name}.wav", np.full(1_600, 0.1), 16_000)
    return tmp_path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return path


def facts(source, **options):
    (example,) = load_examples(source, **options)
    return [clip.path.rpartition("/")[2] for clip in example.clips], example.question, example.choices, example.answer


def problem(source, **options):
    with pytest.raises(DataError) as error:
        load_examples(source, **options)
    return str(error.value)


PLAIN = (["a.wav"], "Q?", ("dog", "cat"), "cat")


@pytest.mark.parametrize(
    "text",
    [
        "sep=;\r\nid;audio;question;choices;answer\r\nr1;a.wav;Q?;dog|cat;cat\r\n",
        '"sep=,"\r\n' + f"{HEADER}\r\nr1,a.wav,Q?,dog;cat,cat\r\n",
        f"{HEADER},,\r\nr1,a.wav,Q?,dog|cat,cat,,\r\n,,,,,,\r\n",  # cells that were once used
        f"{', '.join(HEADER.split(','))}\nr1, a.wav, Q?, dog|cat, cat\n",
        f'{HEADER}\nr1, a.wav, "Q?", "dog|cat", cat\n',
        f"{HEADER}\nr1,a.wav,Q?,\"['dog', 'cat']\",cat\n",
    ],
)
def test_tables_of_spreadsheets(folder, text):
    assert facts(write(folder / "q.csv", text)) == PLAIN


def test_the_line_of_excel_moves_no_line_number_and_is_no_header(folder):
    path = write(folder / "q.csv", f"sep=,\r\n{HEADER}\r\nr1,a.wav,Q?,dog|cat,cat\r\nr2,a.wav\r\n")
    assert "line 4: has 2 cells, the header 5" in problem(path)
    path = write(folder / "q.csv", f"sep=,\r\n{HEADER}\r\nr1,a.wav,Q?,dog|cat,cat\r\nr2,b.wav,Q?,dog|cat,dog\r\n")
    assert selected_text(path, [1]) == f"{HEADER}\r\nr2,b.wav,Q?,dog|cat,dog\r\n"


def test_a_column_without_a_name_but_with_content_is_refused(folder):
    text = f"{HEADER},\nr1,a.wav,Q?,dog|cat,cat,\nr2,a.wav,Q?,dog|cat,cat,maybe\n"
    assert "column 6 has no name in the header" in problem(write(folder / "q.csv", text))


@pytest.mark.parametrize(
    ("cell", "options"),
    [
        ("['dog', 'cat']", ["dog", "cat"]),
        ("""["it's", 'say "x"']""", ["it's", 'say "x"']),
        ("""['say "a" "b"', "c"]""", ['say "a" "b"', "c"]),
        ("['dog' 'cat']", None),  # numpy's, which Python would read as one text
        ("['dog'\n 'cat']", None),
        ("""["it's" 'b']""", None),
    ],
)
def test_lists_as_python_and_numpy_write_them(cell, options):
    assert option_list(cell) == (options or cell)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_place_is_a_place_where_pandas_made_it_a_decimal(folder, suffix):
    row = {"audio": "a.wav", "question": "Q?", "A": "dog", "B": "cat"}
    frame = pd.DataFrame([{**row, "answer_index": 1}, {**row, "answer_index": None}])
    path = folder / f"q.{suffix}"
    if suffix == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.assign(choices=[["dog", "cat"]] * 2).to_parquet(path)
    assert [example.answer for example in load_examples(path)] == ["cat", None]
    text = "audio,question,A,B,answer_index\na.wav,Q?,dog,cat,0.5\n"
    assert "'0.5' is not among the choices" in problem(write(folder / "half.csv", text))


def test_a_frame_of_pandas_with_missing_cells(folder):
    frame = pd.DataFrame([{"id": "1", "audio": str(folder / "a.wav"), "question": "Q?", "choices": ["x", "y"],
                           "answer": "x", "snr": 3.0}, {"id": "2", "question": "Q?"}])  # fmt: skip
    one, two = load_examples(frame)
    assert (one.answer, one.choices, one.columns) == ("x", ("x", "y"), {"snr": 3.0})
    assert (two.answer, two.choices, two.clips, two.columns) == (None, (), (), {"snr": None})
    assert "hand in pandas' frame itself" in problem([{**frame.iloc[0].to_dict(), "answer": float("nan")}])


def test_what_seems_to_be_missing_is_noted(folder):
    def notes(text):
        with data_notes() as said:
            load_examples(write(folder / "q.csv", text))
        return said

    (note,) = notes("audio,question,A,B,Correct Answer\na.wav,Q?,dog,cat,B\n")
    assert "no row has an answer; if one of Correct Answer is it" in note
    (note,) = notes("audio,question,a,b,answer\na.wav,Q?,dog,cat,b\n")
    assert "no row has choices; if a, b are options" in note
    (note,) = notes("audio,question,Choices,answer\na.wav,Q?,dog|cat,cat\n")
    assert "no row has choices; if Choices are options" in note
    assert notes("audio,question,answer,x,y\na.wav,Q?,dog,1,2\n") == []
    assert notes("audio,question\na.wav,Q?\n") == []


def test_options_in_columns_of_a_file_that_is_no_table_are_noted_and_none_is_dropped(folder):
    row = {"audio": "a.wav", "question": "Q?", "answer": "v"}
    for names in (("A", "B"), ("option_1", "option_2")):
        path = write(folder / "q.jsonl", json.dumps({**row, **dict(zip(names, "vw", strict=True))}))
        with pytest.warns(DataNote, match=f"if {', '.join(names)} are options, write them as a list"):
            load_examples(path)
    five = {f"choice_{letter}": option for letter, option in zip("abcde", "vwxyz", strict=True)}
    said = problem(write(path, json.dumps({**row, **five, "answer_gt": "v"})))
    assert "the options choice_a, choice_b, choice_c, choice_d, and the row choice_e as well" in said


def test_conversations_as_pandas_writes_them(folder):
    messages = [{"role": "user", "content": '<audio>What\'s "up"?'}, {"role": "assistant", "content": "x"}]
    pd.DataFrame([{"messages": messages, "audios": ["a.wav"]}]).to_csv(folder / "q.csv", index=False)
    assert facts(folder / "q.csv") == (["a.wav"], 'What\'s "up"?', (), "x")


def test_the_mapping_of_a_header_in_other_letters_is_named(folder):
    path = write(folder / "q.csv", "ID,Audio,Question,Choices,Answer\nr1,a.wav,Q?,dog|cat,cat\n")
    said = problem(path)
    mapping = said.rpartition("--columns ")[2]
    assert mapping == "id=ID,audio=Audio,question=Question,choices=Choices,answer=Answer"
    assert facts(path, columns=mapping) == PLAIN
    said = problem(write(folder / "q.csv", "wav,prompt,options,label\na.wav,Q?,dog|cat,cat\n"))
    assert said.endswith("--columns question=NAME,answer=NAME")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("q.xlsx", "PK\3\4", "a file that ends in '.xlsx' is read as JSON, which it is not"),
        ("q.txt", f"{HEADER}\nr1,a.wav,Q?,dog|cat,cat\n", ".csv, .tsv and .parquet are read"),
        ("q.json", "[{", "is it half-written?"),
        ("q.csv", f"{HEADER}\nr1,sounds\\a.wav,Q?,dog|cat,cat\n", "write / instead of backslashes"),
        ("q.csv", "audio,question,A,B,answer\na.wav,Q?,dog,cat,2\n", "call the field answer_index"),
    ],
)
def test_what_a_mistake_means(folder, name, text, says):
    assert says in problem(write(folder / name, text))


def test_samples_without_a_rate_are_one_problem():
    for audio in ([0.0, 0.5] * 800, np.zeros(1_600), (16_000, np.zeros(1_600))):
        said = problem([{"audio": audio, "question": "Q?", "answer": "x"}])
        assert "samples need their rate" in said and "1 problem\n" in said


# -- audiofolder -----------------------------------------------------------------------------------------------------


def test_a_table_over_several_splits_is_refused_unless_it_is_named(folder):
    lines = ["file_name,question,answer", "train/a.wav,Q?,x", "./data/test/b.wav,Q?,y"]
    path = write(folder / "set" / "metadata.csv", "\n".join(lines))
    for split, name in (("train", "a"), ("data/test", "b")):
        (folder / "set" / split).mkdir(parents=True)
        (folder / f"{name}.wav").rename(folder / "set" / split / f"{name}.wav")
    said = problem(folder / "set")
    assert "of several splits (./data/test/b.wav, train/a.wav)" in said and str(path) in said
    assert len(load_examples(path)) == 2
    write(path, "\n".join(lines[:2]))
    assert facts(folder / "set") == (["a.wav"], "Q?", (), "x")


def test_the_file_of_an_audiofolder_is_not_taken_from_another_field(folder):
    write(folder / "metadata.csv", "file_name,audio,question,answer\na.wav,b.wav,Q?,x\n")
    assert "its sound may be in file_name, audio; say which: --columns audio=file_name" in problem(folder)
    for name in ("file_name", "audio"):
        wanted = {"file_name": "a.wav", "audio": "b.wav"}[name]
        assert facts(folder, columns=f"audio={name}")[0] == [wanted]
    write(folder / "metadata.csv", "file_name,audio,question,answer\na.wav,a.wav,Q?,x\n")
    assert facts(folder)[0] == ["a.wav"]
    write(folder / "metadata.csv", "file_name,path,question,answer\na.wav,clips/original.mp3,Q?,x\n")
    assert facts(folder)[0] == ["a.wav"]


def test_two_fields_of_clips_in_a_conversation_are_refused(folder):
    row = {"messages": [{"role": "user", "content": "<audio>Q?"}], "audio": "a.wav", "audios": ["b.wav"], "answer": "x"}
    path = write(folder / "q.jsonl", json.dumps(row))
    assert "it has audios and audio; leave one out" in problem(path)
    assert facts(path, columns="audio=audio")[0] == ["a.wav"]


# -- datasets --------------------------------------------------------------------------------------------------------


def test_labels_of_a_parquet_file_have_their_names(folder):
    table = datasets.Dataset.from_dict({"question": ["Q?"] * 3, "audio": [None] * 3, "answer": [0, 1, None]})
    table = table.cast_column("answer", datasets.ClassLabel(names=["bell", "knock"]))
    table.to_parquet(folder / "q.parquet")
    answers = [example.answer for example in load_examples(table)]
    assert [example.answer for example in load_examples(folder / "q.parquet")] == answers == ["bell", "knock", None]


NAMES = b'{"info": {"features": {"answer": {"_type": "ClassLabel", "names": 3}}}}'


@pytest.mark.parametrize("note", [b"{", b"[]", b'{"info": {"features": {"answer": 3}}}', b'{"info": null}', NAMES])
def test_damaged_notes_of_a_table_change_nothing(folder, note):
    import pyarrow.parquet

    table = pyarrow.table({"question": ["Q?"], "audio": ["a.wav"], "answer": ["x"]})
    pyarrow.parquet.write_table(table.replace_schema_metadata({b"huggingface": note}), folder / "q.parquet")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataNote)
        assert facts(folder / "q.parquet") == (["a.wav"], "Q?", (), "x")
