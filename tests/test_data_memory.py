"""Rows that a program holds: lists of mappings and `datasets.Dataset`."""

import copy
import io
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from covo_rl.audio import decode
from covo_rl.data import DataError, load_examples

RATE = 16_000


def tone(seed, seconds=0.1):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, int(RATE * seconds)).astype(np.float32)


def wav(seed):
    file = io.BytesIO()
    soundfile.write(file, tone(seed), RATE, format="WAV", subtype="FLOAT")
    return file.getvalue()


def row(name="r0", **more):
    return {"id": name, "audio": wav(0), "question": "Which?", "choices": ["dog", "cat"], "answer": "cat", **more}


def messages(source, *arguments, **options):
    with pytest.raises(DataError) as caught:
        load_examples(source, *arguments, **options)
    assert caught.value.source == "rows in memory"
    return [str(problem) for problem in caught.value.problems]


def torch_tensor(value):
    import torch

    return torch.as_tensor(value)


AUDIO = {
    "bytes": lambda path: wav(0),
    "mapping of bytes": lambda path: {"bytes": wav(0), "path": "elsewhere.wav"},
    "array": lambda path: {"array": tone(0), "sampling_rate": RATE},
    "array of one channel": lambda path: {"array": tone(0)[None], "sampling_rate": RATE},
    "double": lambda path: {"array": tone(0).astype(np.float64), "sampling_rate": np.int64(RATE)},
    "list": lambda path: {"array": tone(0).tolist(), "sampling_rate": RATE},
    "two channels first": lambda path: {"array": np.stack([tone(0), tone(0)]), "sampling_rate": RATE},
    "two channels last": lambda path: {"array": np.stack([tone(0), tone(0)], axis=1), "sampling_rate": RATE},
    "tensor": lambda path: {"array": torch_tensor(tone(0)), "sampling_rate": torch_tensor(np.int64(RATE))},
    "path": lambda path: path,
    "text of a path": str,
    "mapping of a path": lambda path: {"bytes": None, "path": str(path)},
    "list of one": lambda path: [path],
    "decoder": lambda path: SimpleNamespace(
        get_all_samples=lambda: SimpleNamespace(data=tone(0)[None], sample_rate=RATE)
    ),
}


@pytest.mark.parametrize("kind", AUDIO)
def test_every_kind_of_audio_is_the_same_sound(tmp_path, kind):
    path = tmp_path / "a.wav"
    path.write_bytes(wav(0))
    (example,) = load_examples([row(audio=AUDIO[kind](path))])
    waveform, rate = decode(example.clips[0])
    assert rate == RATE and np.array_equal(waveform, tone(0))


def test_whole_numbers_are_scaled_and_arrays_are_copied():
    array = np.full(1_600, 2**14, np.int16)
    rows = [row(audio={"array": array, "sampling_rate": RATE})]
    (example,) = load_examples(rows)
    array[:] = 0
    assert decode(example.clips[0])[0][0] == 0.5


@pytest.mark.parametrize("shape", [(2, 2), (1, 2), (2, 1), (3, 1_600), (1_600, 4), (6, 3)])
def test_an_array_whose_channels_are_unclear_is_refused(shape):
    (problem,) = messages([row(audio={"array": np.zeros(shape, np.float32), "sampling_rate": RATE})])
    assert problem.startswith("row 1 (id 'r0'): its audio is an array of shape") and str(shape) in problem


def test_the_rows_of_the_caller_are_not_changed():
    rows = [row(f"r{n}", note={"deep": [n]}) for n in range(3)]
    before = copy.deepcopy(rows)
    examples = load_examples(tuple(rows))
    assert rows == before
    assert [example.id for example in examples] == ["r0", "r1", "r2"]
    assert examples[2].columns == {"note": {"deep": [2]}}
    assert load_examples([row(answer=np.str_("cat"), score=np.float32(0.5))])[0].columns == {"score": 0.5}


def test_mistakes_name_the_place_and_the_id():
    rows = [row(), row("r1", answer="cow"), row("r2", audio={"array": [0.0]}), row("r2", question="")]
    problems = messages(rows)
    assert [problem.partition(":")[0] for problem in problems] == [
        "r2", "row 2 (id 'r1')", "row 3 (id 'r2')", "row 4 (id 'r2')",
    ]  # fmt: skip
    assert problems[0] == "r2: rows 3, 4 have the same id"
    (problem,) = messages([{k: v for k, v in row(answer="cow").items() if k != "id"}])
    assert problem.startswith("row 1: its answer 'cow'")
    assert messages([row(), 7, {3: "x"}]) == [
        "row 2: is 7, not a mapping of field: value", "row 3: its field 3 has no text as name",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ([], "it holds no rows"),
        ({"question": ["a"]}, "a dict is no list of rows"),
        (iter([row()]), "hand in a list of rows"),
        (b"rows", "a bytes is no list of rows"),
        (None, "a NoneType is no list of rows"),
        (type("DataFrame", (), {})(), "frame.to_dict('records')"),
    ],
)
def test_what_is_no_list_of_rows(source, says):
    assert says in messages(source)[0]


def test_paths_of_a_list_may_be_absolute_and_leave_no_folder_that_is_named(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    path = tmp_path / "a.wav"
    path.write_bytes(wav(0))
    monkeypatch.chdir(tmp_path / "in")
    assert load_examples([row(audio=str(path))])[0].clips[0].path == str(path)
    for reference, folder in (("../a.wav", None), (str(path), "."), ("https://x/a.wav", None)):
        (problem,) = messages([row(audio=reference)], folder)
        assert "leaves the audio folder" in problem or "is a URL" in problem
    assert load_examples([row(audio="../a.wav")], allow_outside=True)
    assert "does not exist" in messages([row(audio="b.wav")])[0]


# -- datasets.Dataset ------------------------------------------------------------------------------------------------


def dataset(count=6):
    datasets = pytest.importorskip("datasets")
    rows = [row(f"r{n}", audio={"bytes": wav(n), "path": f"{n}.wav"}, note=n) for n in range(count)]
    return datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio())


def sounds(examples):
    return {example.id: decode(example.clips[0])[0] for example in examples}


def test_a_data_set_keeps_rows_and_clips_together():
    whole = dataset()
    changed = {
        "whole": whole,
        "shuffled": whole.shuffle(seed=1),
        "filtered": whole.filter(lambda note: note % 2 == 1, input_columns="note"),
        "selected": whole.select([5, 0, 3]),
        "sorted": whole.sort("note", reverse=True),
        "torch": whole.with_format("torch"),
        "numpy": whole.shuffle(seed=2).with_format("numpy"),
    }
    for name, part in changed.items():
        examples = load_examples(part)
        assert [example.columns["note"] for example in examples] == part.to_dict()["note"], name
        for example_id, waveform in sounds(examples).items():
            assert np.array_equal(waveform, tone(int(example_id[1:]))), name
    assert [example.id for example in load_examples(changed["selected"])] == ["r5", "r0", "r3"]


def test_lists_of_audio_arrays_and_files_of_a_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "a.wav").write_bytes(wav(0))
    two = [{"bytes": wav(n), "path": None} for n in (1, 2)]
    several = datasets.Dataset.from_list([row(audio=two)]).cast_column("audio", datasets.List(datasets.Audio()))
    assert [np.array_equal(decode(c)[0], tone(n)) for n, c in enumerate(load_examples(several)[0].clips, 1)] == [
        True
    ] * 2
    files = datasets.Dataset.from_list([row(audio=str(tmp_path / "a.wav"))]).cast_column("audio", datasets.Audio())
    assert np.array_equal(sounds(load_examples(files))["r0"], tone(0))
    arrays = datasets.Dataset.from_list([row(audio={"array": tone(3).tolist(), "sampling_rate": RATE})])
    assert np.array_equal(sounds(load_examples(arrays.with_format("torch")))["r0"], tone(3))


def test_labels_are_their_names():
    datasets = pytest.importorskip("datasets")
    labels = datasets.ClassLabel(names=["dog", "cat"])
    rows = [row(f"r{n}", answer=answer) for n, answer in enumerate((1, 0, None))]
    features = datasets.Features(**{**datasets.Dataset.from_list(rows).features, "answer": labels})
    examples = load_examples(datasets.Dataset.from_list(rows, features=features))
    assert [example.answer for example in examples] == ["cat", "dog", None]


def test_several_splits_streams_and_transforms_are_refused():
    datasets = pytest.importorskip("datasets")
    whole = dataset(2)
    (problem,) = messages(datasets.DatasetDict(train=whole, test=whole))
    assert "'train', 'test'" in problem
    assert "list(dataset.take(N))" in messages(whole.to_iterable_dataset())[0]
    assert "transform" in messages(whole.with_transform(lambda rows: rows))[0]


def test_rows_in_memory_need_neither_torch_nor_datasets():
    code = (
        "import sys; from covo_rl.data import load_examples; "
        "load_examples([{'audio': None, 'question': 'a?', 'answer': 'b'}]); "
        "print([name for name in ('torch', 'datasets', 'av', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
