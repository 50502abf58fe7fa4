"""What a whole question set says: places from 0 or 1, JSON that is none, folders, URLs, the split, its sound."""

import importlib
import json
import os
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from covo_rl.audio import AudioError, ClipStore
from covo_rl.config import ConfigError, Options
from covo_rl.data import DataError, clip_notes, load_examples
from covo_rl.run.commands.data import app
from covo_rl.run.questions import fit_clips, hold_out, read_questions
from covo_rl.train.checkpoint.identity import data_fingerprint
from covo_rl.train.ranks import Ranks
from covo_rl.types import Clip, Example

RATE = 16_000


def make_clip(path, seed=0, level=0.5, rate=RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).uniform(-level, level, rate // 10).astype(np.float32)
    soundfile.write(path, values, rate, subtype="PCM_24" if path.suffix == ".wav" else None)  # FLOAT stamps the time
    return path


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows))
    return path


def row(name, audio="a.wav", **more):
    return {"id": name, "audio": audio, "question": "?", "choices": ["dog", "cat"], "answer": "cat", **more}


def avqa(name, answer, choices=("dog", "cat", "owl", "fox")):
    return {"id": name, "audio_path": "a.wav", "question_text": "?", "multi_choice": list(choices), "answer": answer}


def messages(source, *arguments, **options):
    with pytest.raises(DataError) as caught:
        load_examples(source, *arguments, **options)
    return [str(problem) for problem in caught.value.problems]


@pytest.fixture
def folder(tmp_path):
    make_clip(tmp_path / "a.wav")
    return tmp_path


# -- the split -------------------------------------------------------------------------------------------------------


def test_the_split_does_not_depend_on_how_the_folder_is_written(tmp_path, monkeypatch):
    """finding 22: `clips`, `./clips` and `/data/clips` gave three splits."""
    rows = [row(f"r{n}", f"clips/{n}.wav") for n in range(60)]
    for n in range(60):
        make_clip(tmp_path / "data" / "clips" / f"{n}.wav", seed=n)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    path = write(tmp_path / "data" / "q.json", rows)
    monkeypatch.chdir(tmp_path)
    inner = write(tmp_path / "data" / "inner.json", [{**r, "audio": r["audio"][6:]} for r in rows])
    folders = ["data", "./data", "data/", str(tmp_path / "data"), "link", "data/../data", "data/clips"]
    splits = [hold_out(load_examples(path, folder), 0.2) for folder in folders]
    splits.append(hold_out(load_examples(inner, "data/clips"), 0.2))
    sides = {tuple(tuple(example.id for example in part) for part in split) for split in splits}
    assert len(sides) == 1
    assert 4 < len(splits[0][1]) < 22  # 12 expected


def test_rows_that_share_a_clip_in_any_order_or_copy_are_on_one_side(tmp_path):
    """finding 22: the first clip's name decided, so two orders or two copies of a clip fell apart."""
    for n in range(40):
        path = make_clip(tmp_path / f"{n}.wav", seed=n)
        (tmp_path / f"copy{n}.wav").write_bytes(path.read_bytes())
    rows = [
        Example(f"{n}{kind}", tuple(Clip(path=str(tmp_path / name)) for name in names), "?")
        for n in range(0, 40, 2)
        for kind, names in (("a", (f"{n}.wav", f"{n + 1}.wav")), ("b", (f"copy{n + 1}.wav", f"{n}.wav")))
    ]
    train, held_out = hold_out(rows, 0.4)
    assert train and held_out
    assert {e.id[:-1] for e in train}.isdisjoint(e.id[:-1] for e in held_out)


class Rank(Ranks):
    """A rank that hears from rank 0 what a list holds."""

    said: ClassVar[list] = []

    def from_main(self, value):
        self.said += [value] * self.main
        return self.said[0]


def test_a_clip_is_read_once_for_its_name_by_one_rank(tmp_path, monkeypatch):
    """finding 22, 35: the split, the resume fingerprint and the first use hashed every clip, on every rank."""
    rows = [row(f"r{n}", f"{n}.wav") for n in range(30)]
    for n in range(30):
        make_clip(tmp_path / f"{n}.wav", seed=n)
    options = Options()
    options.data.data, options.data.eval_fraction = str(write(tmp_path / "q.json", rows)), 0.3
    reads, store_module = [], importlib.import_module("covo_rl.audio.store")
    original = store_module.content_key
    monkeypatch.setattr(store_module, "content_key", lambda clip: reads.append(clip.name) or original(clip))
    stores, Rank.said = [ClipStore(), ClipStore()], []
    first, second = (read_questions(options, store, Rank(n, 2)) for n, store in enumerate(stores))
    assert first.train == second.train and first.held_out == second.held_out != []
    clips = [clip for example in first.train for clip in example.clips]
    expected = data_fingerprint(first.train)
    reads.clear()
    assert data_fingerprint(first.train, stores[1].key) == expected
    assert [stores[0].key(clip) for clip in clips] == [stores[1].key(clip) for clip in clips]
    assert reads == []
    make_clip(Path(clips[0].path), seed=99)
    for store in stores:
        with pytest.raises(AudioError, match="changed since"):
            store.key(clips[0])
    assert len(reads) == 2


def test_a_split_that_leaves_no_row_is_refused(tmp_path):
    """finding 22: a set of one clip was held out as a whole, and the self-check ended in a traceback."""
    seed = next(s for s in range(99) if not hold_out([Example("r", (Clip(data=bytes([s])),), "?")], 0.1)[0])
    (tmp_path / "a.wav").write_bytes(bytes([seed]))
    options = Options()
    options.data.data = str(write(tmp_path / "q.json", [row("r0"), row("r1")]))
    with pytest.raises(ConfigError, match=r"eval_fraction 0.1 holds out all 2 rows.*--eval_fraction 0"):
        read_questions(options)


def test_a_rank_whose_files_are_others_is_told(tmp_path):
    """finding 35: two machines, each with its own copy of the folder."""
    clip = Clip(path=str(make_clip(tmp_path / "a.wav", seed=1)))
    keys = ClipStore().watch([clip])
    make_clip(tmp_path / "a.wav", seed=2)
    other = ClipStore()
    other.watch([clip], keys)
    with pytest.raises(AudioError, match="changed since"):
        other.waveform(other.key(clip))


def test_the_audio_of_a_folder_of_data_is_in_it(tmp_path):
    """Audio of a data folder started from its parent."""
    make_clip(tmp_path / "set" / "x.wav")
    write(tmp_path / "set" / "metadata.jsonl", [{"id": "r0", "file_name": "x.wav", "question": "?", "answer": "yes"}])
    options = Options()
    options.data.data, options.eval.evaluate = str(tmp_path / "set"), False
    assert read_questions(options).train[0].clips[0].path == str(tmp_path / "set" / "x.wav")


@pytest.mark.parametrize(
    ("seconds", "rate", "samples"), [(0.29, 10_000, 2_900), (0.57, 8_000, 4_560), (1.1, 9_000, 9_900)]
)
@pytest.mark.parametrize("mode", ["crop", "chunk"])
def test_a_clip_of_exactly_the_limit_is_not_cut(seconds, rate, samples, mode):
    """0.29 s at 100 Hz were cut to 28 samples: 0.29 * 100 is 28.999999999999996."""
    example = Example("a", (Clip(array=np.full(samples, 0.1, np.float32), sampling_rate=rate),), "?")
    assert fit_clips([example], seconds, mode) == ([example], [])
    longer = Example("a", (Clip(array=np.full(samples + 1, 0.1, np.float32), sampling_rate=rate),), "?")
    (fitted,), notes = fit_clips([longer], seconds, mode)
    assert max(len(clip.array) for clip in fitted.clips) <= samples and len(notes) == 1


# -- folders and URLs ------------------------------------------------------------------------------------------------


def speakers(tmp_path, *names):
    """Rows of `spk1/0001.wav` and the like, and their files in clips/."""
    for name in ("spk1/1", "spk1/2", "spk2/1", "spk2/2"):
        make_clip(tmp_path / "clips" / f"{name}.wav", seed=hash(name) % 1_000)
    return write(tmp_path / "q.json", [row(name, f"{name}.wav") for name in names])


def paths(source, audio_dir):
    return [os.path.relpath(example.clips[0].path, audio_dir) for example in load_examples(source, audio_dir)]


def test_folders_are_not_dropped_where_another_speaker_would_answer(tmp_path):
    """finding 31: four rows played two clips of the folder that --audio-dir names, with "no problems"."""
    source, clips = speakers(tmp_path, "spk1/1", "spk1/2", "spk2/1", "spk2/2"), tmp_path / "clips"
    assert paths(source, clips) == ["spk1/1.wav", "spk1/2.wav", "spk2/1.wav", "spk2/2.wav"]
    found = messages(source, clips / "spk1")
    assert [message.split(":")[0] for message in found] == ["spk2/1", "spk2/2"]
    assert "first folders are not those of the audio folder" in found[0]
    result = CliRunner().invoke(app, ["check", str(source), "--audio-dir", str(clips / "spk1")])
    assert result.exit_code == 1
    # names that do not collide, and the rows of one speaker with the folder of the other
    assert len(messages(speakers(tmp_path, "spk1/1", "spk2/2"), clips / "spk1")) == 1
    assert f"it exists from {clips}" in messages(speakers(tmp_path, "spk1/1"), clips / "spk2")[0]


def test_folders_are_dropped_where_nothing_else_can_be_meant(tmp_path):
    """finding 31: the folder itself under its own or another name; colliding names are told."""
    make_clip(tmp_path / "flat" / "1.wav")
    make_clip(tmp_path / "flat" / "2.wav", seed=2)
    assert paths(write(tmp_path / "q.json", [row("a", "./set/1.wav"), row("b", "set/2.wav")]), tmp_path / "flat") == [
        "1.wav", "2.wav",
    ]  # fmt: skip
    assert paths(write(tmp_path / "q.json", [row("a", "x/1.wav"), row("b", "y/2.wav")]), tmp_path / "flat") == [
        "1.wav", "2.wav",
    ]  # fmt: skip
    found = messages(write(tmp_path / "q.json", [row("a", "x/1.wav"), row("b", "y/1.wav")]), tmp_path / "flat")
    assert len(found) == 2 and "x/1.wav and y/1.wav would be one file" in found[0]


def test_a_recording_that_two_files_may_be_is_refused(tmp_path):
    """finding 31: AVQA's `v_000030` is v_30.wav, or v_000030.flac: not the first of them."""
    make_clip(tmp_path / "v_30.wav")
    source = write(tmp_path / "q.json", [avqa("a", 0) | {"video_name": "v_000030", "audio_path": None}])
    assert load_examples(source)[0].clips[0].path == str(tmp_path / "v_30.wav")
    make_clip(tmp_path / "v_000030.flac")
    assert "v_000030.flac or " in messages(source)[0]


@pytest.mark.parametrize(
    "url",
    ["https://host/a.wav", "HTTPS://host/a.wav", " http://host/x/a.wav", "http:/host/a.wav", "s3://bucket/a.wav",
     "www.host.com/a.wav", "x/https://host/a.wav", "hf://datasets/x/a.wav", "file:///tmp/a.wav", "gs://b/a.wav",
     "data:audio/wav;base64,UklGRg=="],
)  # fmt: skip
@pytest.mark.parametrize(
    "form", [lambda url: url, lambda url: {"path": url, "bytes": None}, lambda url: ["a.wav", url]]
)
def test_a_url_is_never_read_from_a_local_file(folder, url, form):
    """finding 32: https://host/a.wav was read from a.wav."""
    for strict in (True, False):
        (message,) = messages(write(folder / "q.json", [row("r0", form(url))]), strict=strict)
        assert message.startswith("r0: its audio ") and "is a URL" in message and "download it" in message
    assert "nothing is fetched from a URL" in messages("https://host/q.json")[0]


# -- answers ---------------------------------------------------------------------------------------------------------


def answers(path, rows):
    return [example.answer for example in load_examples(write(path, rows))]


def test_places_are_counted_from_1_only_when_that_is_certain(folder):
    """finding 33: three of four rows were read by index from 0, the fourth by its text."""
    path, count = folder / "q.json", ("1", "2", "3", "4")
    with pytest.warns(UserWarning, match="1 to 4 occur and 0 does not"):
        assert answers(path, [avqa(n, n) for n in (1, 2, 3, 4)]) == ["dog", "cat", "owl", "fox"]
    assert answers(path, [avqa(n, n, count) for n in (1, 2, 3, 4)]) == ["1", "2", "3", "4"]  # by place and by text
    assert answers(path, [avqa(n, n) for n in (0, 1, 2, 3)]) == ["dog", "cat", "owl", "fox"]
    assert answers(path, [avqa(n, n, (10, 20, 30)) for n in (10, 30)]) == ["10", "30"]  # texts alone fit
    rows = [{**row(str(n), choices=["x", "y"]), "answer": None, "answer_index": n} for n in (1, 2)]
    with pytest.warns(UserWarning, match="answer_index: 1 to 2"):
        assert answers(path, rows) == ["x", "y"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([avqa("a", 1), avqa("b", 4)], ["b: its answer 4 is not among"]),  # 2 and 3 do not occur
        ([avqa("a", 0), avqa("b", 4)], ["b: its answer 4 is not among"]),
        ([avqa("a", 1, "1234"), avqa("b", 2, "1234")], ["differ (a, b)"]),
        ([avqa("a", 1, "2468"), avqa("b", 4, "2468"), avqa("c", 2)], ["b: its answer 4 is not among"]),
        ([avqa("a", 1), avqa("b", "cat"), avqa("c", 2)], ["numbers (a, c) and texts (b) are mixed"]),
        ([avqa("a", 1), avqa("b", -1)], ["b: its answer -1 is not among"]),
        ([avqa("a", 1), avqa("b", True)], ["b: its answer is True"]),
    ],
)
def test_uncertain_or_mixed_places_are_refused_with_their_rows(folder, rows, said):
    """finding 33: a number is never a place in one row and a text in the next."""
    found = messages(write(folder / "q.json", [{**r, "multi_choice": list(r["multi_choice"])} for r in rows]))
    assert len(found) == len(said)
    assert all(part in message for part, message in zip(said, found, strict=True))


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('"answer": NaN', "'answer': it holds NaN"),
        ('"answer": -Infinity', "'answer': it holds -Infinity"),
        ('"choices": ["x", NaN]', "'choices': it holds NaN"),
        ('"further": {"deep": [1.5, NaN]}', "'further': 'deep': it holds NaN"),
        ('"further": ' + "[" * 800 + "NaN" + "]" * 800, "'further': it holds NaN"),
        ('"answer": "dog", "answer": "cat"', "the key 'answer' occurs twice"),
        ('"choices": {"A": "x", "A": "y"}', "'choices': the key 'A' occurs twice"),
        ('"more": [{"path": "a.wav", "path": "b.wav"}]', "'more': the key 'path' occurs twice"),
    ],
)
def test_what_is_no_json_is_named_with_its_row(folder, suffix, text, said):
    """finding 33: NaN became the answer "nan", of two equal keys the last was taken."""
    lines = [json.dumps(row("r0")), '{"id": "r1", "audio": "a.wav", "question": "?", ' + text + "}"]
    path = folder / f"q{suffix}"
    path.write_text("\n".join(lines) if suffix == ".jsonl" else f"[{', '.join(lines)}]")
    (message,) = messages(path)
    assert message.startswith("line 2: " if suffix == ".jsonl" else "row 2 (id 'r1'): ")
    assert said in message


def test_equal_keys_around_the_rows(folder):
    """finding 33: an object with two lists `data` gave the second."""
    (folder / "q.json").write_text('{"data": [{"id": 1}], "data": [{"id": 2}]}')
    assert messages(folder / "q.json") == ["file: the key 'data' occurs twice"]


@pytest.mark.parametrize(
    ("column", "value"),
    [("answer", float("nan")), ("answer", True), ("answer", b"cat"), ("answer", np.datetime64("2020-01-01").item()),
     ("choices", [1.0, float("nan")]), ("choices", [True, False]), ("question", None), ("id", 1.5)],
)  # fmt: skip
def test_tables_hold_values_that_are_no_texts(folder, column, value):
    """finding 33: the same values from parquet and datasets folders."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{**row("r0"), column: value}])
    pyarrow.parquet.write_table(table, folder / "q.parquet")
    datasets.Dataset(table).save_to_disk(folder / "saved")
    for source in (folder / "q.parquet", folder / "saved"):
        (message,) = messages(source, folder)
        assert (column.rstrip("s") in message and "not a" in message) or "is nan" in message


def test_a_missing_audio_folder_is_told_once(folder):
    """finding 40: one line for all rows, not one a row."""
    path = write(folder / "q.json", [row(f"r{n}") for n in range(90)])
    (message,) = messages(path, folder / "gone")
    assert "gone does not exist; check --audio-dir (rows r0, r1, r2, r3, r4 and 85 more)" in message


def test_a_constant_is_silence(tmp_path):
    """finding 45: half of full scale, and nothing to hear."""
    soundfile.write(tmp_path / "dc.wav", np.full(RATE, 0.5), RATE)
    make_clip(tmp_path / "a.wav")
    (note,) = clip_notes(load_examples(write(tmp_path / "q.json", [row("r0"), row("r1", "dc.wav")])))
    assert note.startswith("1 of 2 clips: silent") and "dc.wav" in note


def test_half_a_data_folder_is_not_a_smaller_set(tmp_path):
    """An Arrow stream that ends between two batches and a missing shard gave the other rows without a word."""
    import datasets

    rows = [{**row(f"r{n}"), "audio": None, "question": "Q" * 500} for n in range(2_500)]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "saved")
    (stream,) = (tmp_path / "saved").glob("*.arrow")
    whole = stream.read_bytes()
    second = whole.index(b"\xff\xff\xff\xff", whole.index(b"r999"))  # the message of the next batch
    assert len(load_examples(tmp_path / "saved")) == 2_500
    for end in (second, len(whole) - 8, len(whole) // 2):
        stream.write_bytes(whole[:end])
        (message,) = messages(tmp_path / "saved")
        assert "is cut" in message or "not a readable datasets folder" in message
    for n in (0, 2):
        (tmp_path / "shards").mkdir(exist_ok=True)
        data.select(range(n, n + 1)).to_parquet(tmp_path / "shards" / f"train-{n:05}-of-00003.parquet")
    assert messages(tmp_path / "shards") == ["file: of the 3 shards of train these are missing: 1"]


def test_wrong_columns_are_told_once(folder):
    """finding 40: the same 300 characters were printed once per row."""
    rows = [{"id": n, "text": "?", "sound": "a.wav"} for n in range(400)]
    (message,) = messages(write(folder / "q.jsonl", rows))
    assert message.startswith("row 1 (id 0): unknown fields ['id', 'sound', 'text']")
    assert "; so have 399 further rows (row 2 (id 1), row 3 (id 2)," in message and message.endswith(" and 394 more)")


# -- its sound -------------------------------------------------------------------------------------------------------


def test_silent_clipped_copied_and_mixed_clips_are_mentioned_once(tmp_path):
    """finding 45: `data check` did not mention silent clips (peak 6e-5), nor the mix of rates and levels."""
    for n in range(8):
        make_clip(tmp_path / f"{n}.wav", seed=n)
        make_clip(tmp_path / f"silent{n}.wav", seed=n, level=6e-5)
    make_clip(tmp_path / "soft.wav", level=0.01)
    make_clip(tmp_path / "other.wav", rate=44_100)
    (tmp_path / "copy.wav").write_bytes((tmp_path / "0.wav").read_bytes())
    loud = np.clip(np.random.default_rng(0).normal(0, 0.8, RATE), -1, 1)
    soundfile.write(tmp_path / "loud.wav", loud, RATE)
    names = sorted(path.name for path in tmp_path.glob("*.wav"))
    source = write(tmp_path / "q.json", [row(name, name) for name in names])
    notes = clip_notes(load_examples(source))
    assert [note.split(": ")[:2] for note in notes[:3]] == [
        ["8 of 20 clips", "silent, no sample over 0.0001"],
        ["1 of 20 clips", "clipped, over 0.1% of the samples at full scale"],
        ["1 of 20 clips", "the sound of another file"],
    ]
    assert "silent4.wav and 3 more" in notes[0] and "loud.wav" in notes[1] and "copy.wav" in notes[2]
    assert notes[3:] == [
        "mixed sampling rates: 16000 Hz (19), 44100 Hz (1)",
        "mixed levels: from -45 to -4 dB of full scale (root mean square)",
    ]
    result = CliRunner().invoke(app, ["check", str(source)], terminal_width=200)
    assert "note: data: 8 of 20 clips: silent" in result.output.replace("\n", " ")
    assert json.loads(CliRunner().invoke(app, ["check", str(source), "--json"]).stdout)["notes"]["data"] == notes
    assert clip_notes(load_examples(write(tmp_path / "q.json", [row("a", "1.wav"), row("b", "2.wav")]))) == []
