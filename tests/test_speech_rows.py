"""Rows of speech: what they hold, and every problem of every row in one message."""

import json

import numpy as np
import pytest

from covo_rl.data.read import DataError
from covo_rl.speech.rows import load_waves, read_speech_rows, write_speech_rows
from covo_rl.synth.speech import utterance, write_speech


@pytest.fixture
def rows(tmp_path):
    path = write_speech(tmp_path, split="test", count=2)
    return path, [json.loads(line) for line in path.read_text().splitlines()]


def _problems(path, rows, **options):
    write_speech_rows(path, rows)
    with pytest.raises(DataError) as caught:
        read_speech_rows(path, **options)
    return [str(problem) for problem in caught.value.problems]


def test_a_row_keeps_all_that_it_says(rows, tmp_path):
    path, written = rows
    np.save(tmp_path / "codes.npy", np.arange(3, dtype=np.int32))
    written[0] |= {"codes": "codes.npy", "tokenizer": "abc", "document": "d", "position": 4, "words": None}
    written[1] |= {"codes": [2, 0]}
    written[1]["words"] = None
    write_speech_rows(path, written)
    first, second = read_speech_rows(path, needs=("audio", "text", "codes"), codebook=3)
    assert first.codes is not None and second.codes is not None
    assert first.codes.tolist() == [0, 1, 2] and first.codes.dtype == np.int64 and second.codes.tolist() == [2, 0]
    assert (first.document, first.position, first.source["tones"]) == ("d", 4, written[0]["tones"])
    assert first.speaker == utterance("test", 0).speaker.name and first.words is None
    assert np.abs(load_waves([first])[first.id] - utterance("test", 0).wave).max() < 1e-4


def test_all_problems_are_said_at_once(rows, tmp_path):
    path, (row, _) = rows
    np.save(tmp_path / "square.npy", np.zeros((2, 2), dtype=np.int64))
    np.save(tmp_path / "float.npy", np.zeros(2))
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "square.npy").read_bytes()[:-8])
    wrong = {
        "range": ({"codes": [0, 256, 300], "words": None}, "its code 256 at position 1: there are 0 to 255"),
        "negative": ({"codes": [-1]}, "its code -1 at position 0"),
        "bool": ({"codes": [True]}, "its codes hold True, not a whole number"),
        "hash": ({"codes": [1] * 200, "tokenizer": "old"}, "of another tokenizer ('old', not 'new'): encode the rows"),
        "nobody": ({"codes": [1] * 200, "tokenizer": None}, "of another tokenizer (an unnamed one, not 'new')"),
        "silent": ({"codes": [1] * 200, "text": " ", "tokenizer": "new"}, "it has codes and no text"),
        "order": ({"words": [["one", 0.5, 0.9], ["two", 0.1, 0.2]]}, "words follow one another in time"),
        "late": ({"codes": [1], "tokenizer": "new"}, "the clip at 0.04 s"),
        "times": ({"words": [["one", 0, float("inf")]]}, "it holds Infinity, which is no JSON"),
        "file": ({"audio": "none.wav"}, "there is no file"),
        "outside": ({"audio": "../x.wav"}, "leaves the audio folder"),
        "empty": ({"codes": []}, "its codes are empty"),
        "square": ({"codes": "square.npy"}, "int64 (2, 2), not one row of whole numbers"),
        "float": ({"codes": "float.npy"}, "float64 (2,), not one row of whole numbers"),
        "object": ({"codes": "object.npy"}, "no .npy file"),
        "cut": ({"codes": "cut.npy"}, "no .npy file"),
        "place": ({"position": 1.5}, "its position is 1.5, not a whole number"),
        "language": ({"language": 7}, "its language is 7, not a text"),
    }
    infinite = wrong.pop("times")
    problems = _problems(path, [row | change | {"id": name} for name, (change, _) in wrong.items()],
                         codebook=256, tokenizer="new")  # fmt: skip
    for name, (_, message) in wrong.items():
        assert any(problem.startswith(f"{name}: ") and message in problem for problem in problems), (name, problems)
    path.write_text(json.dumps(row | infinite[0]) + "\n")
    with pytest.raises(DataError, match=infinite[1]):
        read_speech_rows(path)


def test_what_is_needed_and_missing_is_named_with_the_command_that_adds_it(rows):
    path, (row, _) = rows
    bare = {"id": "bare", "text": ""}
    problems = _problems(path, [bare, row, row, {"text": "x"}], needs=("audio", "text", "words", "codes"))
    assert "bare: it has no audio" in problems and "bare: it has no text" in problems
    assert "bare: it has no words: `covo-rl speech align` adds them" in problems
    assert f"{row['id']}: it has no codes: `covo-rl speech encode` adds them" in problems
    assert f"{row['id']}: another row has this id" in problems and "row 4: it has no id" in problems


def test_words_beyond_the_recording_are_found_when_it_is_read(rows):
    path, (row, other) = rows
    row["words"], other["audio"] = [["one", 0.1, 99.0]], "rows.jsonl"
    write_speech_rows(path, [row, other])
    with pytest.raises(DataError, match=r"ends at 99\.0 s, the clip at") as caught:
        load_waves(read_speech_rows(path))
    assert [problem.row_id for problem in caught.value.problems] == [row["id"], other["id"]]
