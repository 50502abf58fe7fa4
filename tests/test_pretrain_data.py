"""Rows of pre-training from disk, and the mixture by tokens: what is read is what was checked."""

import json
import os
from collections import Counter

import numpy as np
import pytest
import soundfile as sf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from covo_rl.audio import AudioError
from covo_rl.data.read import DataError
from covo_rl.data.shards import ShardedRows, shard_files
from covo_rl.models.covo_audio.processing import IGNORE
from covo_rl.resolve import ConfigError
from covo_rl.speech.grid import count_codes
from covo_rl.speech.rows import SpeechRow
from covo_rl.supervised.pretrain.document import Document, DocumentTask, SkippedError, Vocabulary
from covo_rl.supervised.pretrain.mixture import Mixture, MixtureTask
from covo_rl.supervised.pretrain.rows import RowStore, TextRow
from covo_rl.types import Clip

#: a shared machine can be ten times slower than an idle one
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
VOCABULARY = Vocabulary(lambda text: [11] * len(text), 0, 1, 2, 3, 4, 5, 100, 256)
#: the report's weights
WEIGHTS = {"asr": 80, "tts": 160, "audio": 240, "continuation": 160, "one": 360, "two": 180, "text": 800}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lengths_task(unit="row"):
    """A task whose units are rows that say how long their document is; below 0: skipped."""

    def build(row, vocabulary, rng, options):
        length = int(row.text)
        if length < 0:
            raise SkippedError("negative" if length > -9 else "very negative")
        return Document([7] * length, [IGNORE] * (length - 1) + [rng.randrange(10**6)])

    return DocumentTask(unit, build)


def mixture_of(weights, lengths, length=64, seed=0, **options):
    """`lengths`: task -> what its rows say."""
    rows = {name: [TextRow(f"{name}{i}", str(n)) for i, n in enumerate(lengths[name])] for name in weights}
    unit = options.pop("unit", "row")
    tasks = [MixtureTask(name, weight, lengths_task(unit), rows[name]) for name, weight in weights.items()]
    return Mixture(tasks, VOCABULARY, seed=seed, length=length, **options)


# -- the mixture -------------------------------------------------------------------------------------------------------


def test_the_task_furthest_below_its_share_is_next_and_of_equals_the_heavier():
    mixture = mixture_of({"a": 1, "b": 3, "c": 0}, {"a": [4], "b": [4], "c": [4]})
    # all level: b. a is 1 below: a. b is 2 below (a -2): b; both level again: b
    assert "".join(mixture.draw().draw.task for _ in range(9)) == "babbbabbb"
    equal = mixture_of({"x": 2, "a": 2}, {"a": [4], "x": [4]})
    assert "".join(equal.draw().draw.task for _ in range(4)) == "xaxa"  # as the configuration has them


def test_weights_that_floats_cannot_hold_are_compared_exactly():
    mixture = mixture_of({"a": 0.1, "b": 0.2, "c": 0.7}, {name: [1] for name in "abc"})
    drawn = Counter(mixture.draw().draw.task for _ in range(100))
    assert drawn == {"a": 10, "b": 20, "c": 70}


_lists = st.lists(st.integers(1, 60), min_size=1, max_size=5)


@settings(UNHURRIED, max_examples=15)
@given(st.tuples(*[_lists] * len(WEIGHTS)), st.integers(0, 9))
def test_token_shares_stay_within_the_longest_document_of_the_weights(lengths, seed):
    mixture = mixture_of(WEIGHTS, dict(zip(WEIGHTS, lengths, strict=True)), seed=seed)
    longest, drawn = max(map(max, lengths)), Counter()
    for _ in range(100):
        item = mixture.draw()
        drawn[item.draw.task] += len(item)
        for name, weight in WEIGHTS.items():  # of 1980 together
            assert abs(weight * drawn.total() - 1980 * drawn[name]) < 1980 * longest


@settings(UNHURRIED, max_examples=15)
@given(st.lists(st.tuples(st.integers(1, 1000), _lists), min_size=1, max_size=9))
def test_with_any_weights_no_task_is_a_document_above_its_share_and_few_are_below(tasks):
    weights = {f"t{i}": weight for i, (weight, _) in enumerate(tasks)}
    mixture = mixture_of(weights, {f"t{i}": lengths for i, (_, lengths) in enumerate(tasks)})
    longest = max(max(lengths) for _, lengths in tasks)
    behind = sum(1 / n for n in range(1, max(len(tasks), 2)))  # 1 + 1/2 + ...: very unequal weights can need it
    total = sum(weights.values())
    for _ in range(100):
        mixture.draw()
        for name in weights:
            assert -longest * total < mixture.lag(name) <= behind * longest * total


def test_every_row_comes_once_an_epoch_and_depends_on_its_place_alone():
    mixture = mixture_of({"a": 1, "b": 1}, {"a": range(1, 8), "b": [3]}, seed=5)
    drawn = [mixture.draw() for _ in range(60)]
    epochs = {}
    for item in drawn:
        if item.draw.task == "a":
            epochs.setdefault(item.draw.epoch, []).append(item.unit.id)
    assert len(epochs) > 3 and all(sorted(epochs[n]) == [f"a{i}" for i in range(7)] for n in range(3))
    assert epochs[0] != epochs[1]
    other = mixture_of({"b": 3, "a": 1, "c": 9}, {"a": range(1, 8), "b": [3], "c": [1]}, seed=5)
    assert all(other.rebuild(item.draw).document == item.document for item in drawn)  # whatever else is drawn


def test_skipped_rows_are_counted_by_reason_with_the_first_ids():
    mixture = mixture_of({"a": 1}, {"a": [-1] * 7 + [-9, 65, 5]})
    for _ in range(2):
        assert len(mixture.draw()) == 5
    state = mixture.state_dict()["tasks"]["a"]
    skipped = state["skipped"]
    assert len(set(skipped["negative"]["first"])) == 5 and state["documents"] == 2 and state["tokens"] == 10
    while mixture.states["a"].epoch < 3:  # of whole epochs: every row three times, and named once
        mixture.draw()
    counts = {reason: (entry["rows"], entry["times"]) for reason, entry in skipped_of(mixture).items()}
    assert {reason: rows for reason, (rows, _) in counts.items()} == {
        "negative": 7, "very negative": 1, "longer than 64 positions": 1,
    }  # fmt: skip
    assert counts["longer than 64 positions"][1] in (3, 4) and 21 <= counts["negative"][1] <= 28
    assert skipped_of(mixture)["very negative"]["first"] == ["a7"]


def skipped_of(mixture):
    return mixture.state_dict()["tasks"]["a"]["skipped"]


def test_an_epoch_without_a_document_is_an_error_that_says_why():
    mixture = mixture_of({"a": 1}, {"a": [-1, -1, -9, 99]})
    with pytest.raises(DataError) as caught:
        mixture.draw()
    text = str(caught.value)
    assert "task a" in text and "2 rows: negative (a" in text and "1 rows: longer than 64 positions (a3)" in text


def test_a_long_text_is_drawn_in_parts_and_the_state_knows_which():
    from covo_rl.supervised.pretrain.builder import cut_text

    def make():
        return mixture_of({"a": 1, "b": 1}, {"a": [150], "b": [60]}, cut=cut_text, unit="text")

    mixture = make()
    drawn = [mixture.draw() for _ in range(9)]
    parts = [(item.draw.part, len(item), item.document.complete) for item in drawn if item.draw.task == "a"]
    assert parts[:4] == [(0, 64, False), (1, 64, False), (2, 22, True), (0, 64, False)]
    for stop in range(8):
        first, second = make(), make()
        for _ in range(stop):
            first.draw()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert [second.draw() for _ in range(9 - stop)] == drawn[stop:]


def test_a_state_of_another_mixture_is_refused_by_name():
    state = mixture_of({"a": 1, "b": 2}, {"a": [1], "b": [2]}).state_dict()
    other = mixture_of({"a": 1, "c": 2}, {"a": [1, 1], "c": [2]}, seed=1)
    with pytest.raises(ConfigError) as caught:
        other.load_state_dict(state)
    assert all(word in str(caught.value) for word in ("seed 0 there, 1 now", "task a", "task b", "task c: none"))


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"a": -1, "b": float("nan")}, "a: its weight is -1"), ({"a": 0}, "no task has a weight"), ({"a": 1}, "no rows")],
)
def test_mixtures_that_cannot_be(weights, message):
    with pytest.raises(ConfigError, match=message):
        mixture_of(weights, {name: [] for name in weights})


# -- rows from disk ----------------------------------------------------------------------------------------------------


def _text_rows(count, start=0):
    return [{"id": f"r{i}", "text": f"text {i} é\u2028 more"} for i in range(start, start + count)]


def _parquet(path, rows, group=7):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def test_rows_of_jsonl_and_parquet_shards_are_found_by_number(tmp_path):
    first, second, third = _text_rows(5), _text_rows(30, 5), _text_rows(4, 35)
    lines = [json.dumps(row, ensure_ascii=False) for row in first]
    text = "\ufeff{}\n\n{}\n  \n{}".format(lines[0], lines[1], "\n".join(lines[2:]))  # without a newline at its end
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    _parquet(tmp_path / "b.parquet", second)
    write(tmp_path / "c.jsonl", third)
    (tmp_path / "notes.txt").write_text("not a shard")
    for data in (tmp_path, str(tmp_path / "[abc].*"), sorted(tmp_path.glob("?.*"))):
        store = RowStore(data, kind="text")
        rows = [TextRow(row["id"], row["text"]) for row in first + second + third]
        assert len(store) == 39 and [store.row(i) for i in reversed(range(39))] == rows[::-1]
    assert store.rows.where(38) == "4 of c.jsonl"


def test_all_problems_of_all_shards_are_said_at_once(tmp_path):
    write(tmp_path / "a.jsonl", [{"id": "x", "text": "fine"}, {"text": "nameless"}, {"id": "y", "text": "  "}])
    (tmp_path / "b.jsonl").write_text('{"id": "x", "text": "again"}\n{"id": \n[1]\n{"id": "n", "text": NaN}\n')
    write(tmp_path / "c.jsonl", [{"id": True, "text": "fine"}, {"id": 1.5, "text": "fine"}, {"id": 7, "text": "fine"}])
    with pytest.raises(DataError) as caught:
        RowStore(tmp_path, kind="text")
    problems = [str(problem) for problem in caught.value.problems]
    wanted = (
        "row 2 of a.jsonl: it has no id", "y: its text is '  ', which says nothing", "row 2 of b.jsonl: not valid JSON",
        "row 3 of b.jsonl: is [1], not an object", "row 4 of b.jsonl: 'text'",
        "x: another row has this id (it is row 1 of b", "row 1 of c.jsonl: its id is True, not a text or whole number",
        "row 2 of c.jsonl: its id is 1.5",
    )  # fmt: skip
    for want in wanted:
        assert any(want in problem or problem.startswith(want) for problem in problems), (want, problems)
    assert len(problems) == len(wanted)


def test_speech_rows_are_checked_as_elsewhere(tmp_path):
    row = {"id": "a", "text": "one", "codes": [1, 2, 300], "tokenizer": "old"}
    with pytest.raises(DataError) as caught:
        RowStore(write(tmp_path / "a.jsonl", [row]), needs=("audio", "codes"), codebook=256, tokenizer="new")
    text = str(caught.value)
    assert "its code 300 at position 2" in text and "it has no audio" in text
    row["codes"][2] = 3
    with pytest.raises(DataError, match="of another tokenizer"):
        RowStore(write(tmp_path / "a.jsonl", [row]), codebook=256, tokenizer="new")


@pytest.mark.parametrize("kind", ["a.jsonl", "a.parquet"])
def test_a_file_that_changes_is_an_error_and_never_another_row(tmp_path, kind):
    make = _parquet if kind.endswith("parquet") else write
    path = make(tmp_path / kind, _text_rows(9))
    store, times = RowStore(path, kind="text"), os.stat(path)
    assert store.row(8).id == "r8"
    rows = _text_rows(9)
    rows[8]["text"] = rows[8]["text"].replace("8", "9")
    make(path, rows)
    with pytest.raises(DataError, match=rf"{kind}.*\n.*changed since"):
        store.row(0)
    if kind == "a.jsonl":  # even where size and time are the same
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert store.row(0).id == "r0"
        with pytest.raises(DataError, match="row 9: it has changed"):
            store.row(8)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        store.row(0)


def test_what_a_row_names_may_not_vanish_either(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    store = RowStore(write(tmp_path / "a.jsonl", [{"id": "a", "audio": "a.wav"}]))
    assert store.row(0).id == "a"
    (tmp_path / "a.wav").unlink()
    with pytest.raises(DataError, match="a: there is no file"):
        store.row(0)


def test_unknown_names_and_kinds_of_files(tmp_path):
    with pytest.raises(DataError, match=r"no such file, folder or pattern .*did you mean"):
        shard_files(write(tmp_path / "rows.jsonl", []).with_name("row.jsonl"))
    (tmp_path / "rows.csv").write_text("id,text\n")
    with pytest.raises(DataError, match="JSON lines"):
        shard_files(tmp_path / "rows.csv")
    with pytest.raises(DataError, match="it holds no rows"):
        RowStore(tmp_path / "rows.jsonl")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="not a readable parquet"):
        RowStore(tmp_path / "x.parquet")


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.aiff"])
def test_without_codes_a_row_is_as_long_as_its_samples_and_a_wav_is_not_decoded_for_it(tmp_path, monkeypatch, name):
    for rate, samples in ((24_000, 960 * 3 + 1), (16_000, 640 * 3), (48_000, 1920 * 3 + 1), (44_100, 5293)):
        path = str(tmp_path / f"{rate}{name}")
        sf.write(path, np.full((samples, 2), 0.1), rate)
        row = SpeechRow("a", "one", Clip(path=path))
        length = count_codes(len(row.wave()))
        with monkeypatch.context() as patched:
            if name in ("a.wav", "a.flac"):
                patched.setattr("covo_rl.speech.rows.decode", None)
            assert row.code_count() == length
        with pytest.raises(AudioError, match="its word 'one' ends at 9"):
            SpeechRow("a", "one", Clip(path=path), words=(("one", 0.0, 9.0),)).code_count()


@pytest.mark.parametrize("content", [b"RIFF", b"", b"fLaC" + bytes(60)], ids=["RIFF", "empty", "flac"])
def test_a_recording_that_is_none_has_no_length(tmp_path, content):
    (tmp_path / "a.wav").write_bytes(content)
    for path in (tmp_path / "a.wav", tmp_path / "none.wav", tmp_path):
        with pytest.raises(AudioError, match=path.name):
            SpeechRow("a", "one", Clip(path=str(path))).code_count()


def _spoken(id, document=None, position=None, codes=10):
    return {"id": id, "text": "one", "document": document, "position": position, "codes": [1] * codes}


def _ids(units):
    return [" ".join(row.id for row in units[i]) for i in range(len(units))]


def test_documents_are_rows_in_the_order_of_their_positions(tmp_path):
    write(tmp_path / "a.jsonl", [_spoken("b2", "b", 2), _spoken("x"), _spoken("a0", "a", 0)])
    write(tmp_path / "b.jsonl", [_spoken("b1", "b", -1), _spoken("c1", "c"), _spoken("a5", "a", 5), _spoken("c2", "c")])
    store = RowStore(tmp_path)
    assert _ids(store.units("document")) == ["b1 b2", "x", "a0 a5", "c1 c2"]
    assert _ids(store.units("row")) == ["b2", "x", "a0", "b1", "c1", "a5", "c2"]


def test_a_long_document_is_several_and_nothing_of_it_is_lost(tmp_path):
    rows = [_spoken(f"d{i}", "d", i, codes) for i, codes in enumerate([5, 5, 30, 4, 4, 4])]
    units = RowStore(write(tmp_path / "a.jsonl", [*rows, _spoken("e")])).units("document", 12)
    assert _ids(units) == ["d0 d1", "d2", "d3 d4 d5", "e"]


def test_positions_that_are_not_clear(tmp_path):
    rows = [_spoken("a", "d", 1), _spoken("b", "d", 1), _spoken("c", "e"), _spoken("d", "e", 3)]
    with pytest.raises(DataError) as caught:
        RowStore(write(tmp_path / "a.jsonl", rows)).units("document")
    assert [problem.row_id for problem in caught.value.problems] == ["b", "d"]


def test_what_is_held_of_a_row_is_a_few_numbers(tmp_path):
    """RSS says it in the slow test; here what is held is counted."""
    sizes = []
    for count in (100, 400):
        rows = ShardedRows(write(tmp_path / f"{count}.jsonl", _text_rows(count)))
        assert sum(1 for _ in rows.scan()) == count
        sizes.append(sum(a.nbytes for a in (rows._digests, rows._shards[0].offsets, rows._shards[0].lengths)))
    assert sizes[1] - sizes[0] == 300 * 24


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak of a process is read from /proc")
def test_memory_is_flat_over_100_000_rows(tmp_path):
    import subprocess
    import sys

    path = tmp_path / "rows.jsonl"
    script = (
        "import re, sys\n"
        "from covo_rl.supervised.pretrain.rows import RowStore\n"
        "store = RowStore(sys.argv[1], codebook=256)\n"
        "units = store.units('document')\n"
        "for i in range(0, len(units), 97): units[i]\n"
        # ru_maxrss would be that of the process that started this one, if it was larger
        "print(int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]) / 1024)\n"
    )
    peak = {}
    for count in (10_000, 100_000):
        with open(path, "w") as file:
            for i in range(count):
                row = {"id": f"row-{i}", "text": "one two three " * 5, "document": f"d{i // 4}", "position": i % 4,
                       "codes": [i % 256] * 100}  # fmt: skip
                file.write(json.dumps(row) + "\n")
        out = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
        peak[count] = float(out.stdout)
    print(f"peak memory {peak}, file {path.stat().st_size / 2**20:.0f} MB")
    assert peak[100_000] - peak[10_000] < 40  # as dictionaries the rows would take over 100 MB
