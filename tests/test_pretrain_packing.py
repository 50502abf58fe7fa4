"""Documents into rows, rows into batches, batches to ranks: full, whole, exact, the same for everyone."""

import itertools
import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pretrain_data import UNHURRIED, VOCABULARY, WEIGHTS, mixture_of, write

from covo_rl.audio import AudioError
from covo_rl.data.read import DataError
from covo_rl.models.covo_audio.features import CovoAudioFeatureExtractor
from covo_rl.models.covo_audio.processing import IGNORE
from covo_rl.resolve import ConfigError
from covo_rl.speech.rows import SpeechRow
from covo_rl.supervised.pretrain.document import Document, DocumentTask
from covo_rl.supervised.pretrain.mixture import Draw, Drawn
from covo_rl.supervised.pretrain.packing import WINDOW, PackedRow, Packer, best_fill, collate_rows
from covo_rl.supervised.pretrain.stream import PackedStream, TaskData
from covo_rl.synth.speech import write_wav
from covo_rl.types import Clip

# -- packing -----------------------------------------------------------------------------------------------------------


@settings(UNHURRIED, max_examples=30)
@given(st.lists(st.integers(1, 30), max_size=8), st.integers(0, 60))
def test_the_best_fill_is_the_best_of_all_choices(lengths, room):
    chosen = best_fill(lengths, room)
    sums = [sum(c) for n in range(len(lengths) + 1) for c in itertools.combinations(lengths, n)]
    assert sum(lengths[i] for i in chosen) == max(s for s in sums if s <= room)
    assert chosen == sorted(set(chosen))


def test_of_equally_good_choices_the_earliest_documents_go():
    assert best_fill([4, 4, 4], 8) == [0, 1] and best_fill([5, 3, 2, 3], 5) == [0]


def _packer(weights=WEIGHTS, longest=700, length=1024, seed=0):
    """Lengths as a mixture has them: many short, some nearly a row long."""
    rng = random.Random(3)
    lengths = {name: [min(longest, int(rng.lognormvariate(4.5, 0.9)) + 1) for _ in range(40)] for name in weights}
    return Packer(mixture_of(weights, lengths, length=length, seed=seed))


def test_every_document_is_packed_whole_and_once_and_none_waits_for_ever():
    packer, reference = _packer(), _packer().mixture
    order = {reference.draw().draw: n for n in range(1500)}
    packed, since = [], {}
    for number in range(50):
        row = packer.next_row()
        assert row.tokens == sum(len(document.ids) for document in row.documents) <= 1024
        places = [order[item.draw] for item in row.drawn]
        assert places == sorted(places)  # in the order of drawing
        assert all(number - since.get(place, number) < WINDOW for place in places)
        for item in packer.waiting:
            since.setdefault(order[item.draw], number)
        assert len(packer.waiting) <= WINDOW
        packed += places
    everything = sorted(packed + [order[item.draw] for item in packer.waiting])
    assert everything == list(range(len(everything))) and len(everything) > 200


def test_less_than_three_percent_of_a_mixed_stream_is_padding():
    packer = _packer()
    for _ in range(60):
        packer.next_row()
    assert packer.tokens / (packer.rows * 1024) > 0.97
    short = Packer(mixture_of({"a": 1}, {"a": [3, 5, 6]}, length=1024))  # a window of them is a third of a row
    assert all(short.next_row().tokens > 1020 for _ in range(3))


def test_a_packer_goes_on_from_any_row():
    reference = _packer()
    rows = [reference.next_row() for _ in range(12)]
    first = _packer()
    for stop in range(11):
        second = _packer()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert second.next_row() == rows[stop] and second.next_row() == rows[stop + 1]
        first.next_row()
    assert first.state_dict()["rows"] == 11


# -- batches -----------------------------------------------------------------------------------------------------------


def _wave(seed, codes, cut=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, codes * 960 - cut).astype(np.float32)


def _drawn(ids, labels, clips=(), task="asr", rows=()):
    return Drawn(Document(ids, labels, clips, task), Draw(task, 0, 0), tuple(rows))


def _speech(id, wave):
    return SpeechRow(id, "one", Clip(array=wave, sampling_rate=24_000))


def test_a_batch_has_documents_side_by_side_and_padding_as_one_more():
    first = PackedRow((_drawn([7, 8], [IGNORE, 8], task="text"), _drawn([9, 9, 9], [IGNORE, 9, 9], task="tts")), 8)
    second = PackedRow((_drawn([1] * 8, [1] * 8, task="tts"),), 8)
    batch = collate_rows([first, second], VOCABULARY, pad_id=99, tasks=("asr", "text", "tts"))
    assert batch.input_ids.tolist() == [[7, 8, 9, 9, 9, 99, 99, 99], [1] * 8]
    assert batch.labels.tolist() == [[IGNORE, 8, IGNORE, 9, 9, IGNORE, IGNORE, IGNORE], [1] * 8]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 0, 1, 2], list(range(8))]
    assert batch.task.tolist() == [[1, 1, 2, 2, 2, -1, -1, -1], [2] * 8] and batch.task.dtype == torch.int8
    assert batch.tasks == ("asr", "text", "tts") and batch.supervised == 11
    assert not batch.clips and not batch.waves and not batch.audio and not len(batch.clip_order)
    for value in (batch.input_ids, batch.labels, batch.position_ids):
        assert value.dtype == torch.int64


def _heard(*slots):
    ids = [i for n in slots for i in (3, *[4] * n, 5)]
    return ids, [IGNORE] * len(ids)


def test_clips_are_cut_on_the_grid_and_equal_ones_are_encoded_once():
    x, y = _speech("x", _wave(0, 10, cut=500)), _speech("y", _wave(1, 6))
    row = PackedRow((
        _drawn(*_heard(2, 1), clips=(("x", 0, 8), ("x", 8, 10)), rows=[x]),
        _drawn(*_heard(2), clips=(("y", 1, 6),), rows=[y]),
    ), 32)  # fmt: skip
    other = PackedRow((_drawn(*_heard(2), clips=(("x", 0, 8),), task="tts", rows=[x]),), 32)
    extractor = CovoAudioFeatureExtractor(feature_size=8, segment_frames=32)
    batch = collate_rows([row, other], VOCABULARY, 0, extractor)
    assert batch.clips == [("x", 0, 8), ("x", 8, 10), ("y", 1, 6), ("x", 0, 8)]
    assert batch.clip_order.tolist() == [0, 1, 2, 0] and [len(wave) for wave in batch.waves] == [7680, 1920, 4800]
    assert np.array_equal(batch.waves[0], _wave(0, 10)[:7680])
    assert np.array_equal(batch.waves[1][:1420], _wave(0, 10)[7680:9100]) and not batch.waves[1][1420:].any()
    assert np.array_equal(batch.waves[2], _wave(1, 6)[960:])
    # the fields are those that the processor makes of the same clips; 48 frames are two segments of 32
    expected = extractor(batch.waves, sampling_rate=24_000)
    for name, value in expected.items():
        assert torch.equal(batch.audio[name], value)
    assert batch.audio["clip_order"].tolist() == [0, 1, 2, 0]
    assert int(batch.audio["input_features_mask"].sum()) == 2 + 1 + 2


def test_an_id_belongs_to_the_data_of_its_task():
    row = PackedRow((
        _drawn(*_heard(1), clips=(("x", 0, 4),), task="asr", rows=[_speech("x", _wave(0, 4))]),
        _drawn(*_heard(1), clips=(("x", 0, 4),), task="audio_only", rows=[_speech("x", _wave(1, 4))]),
    ), 8)  # fmt: skip
    batch = collate_rows([row], VOCABULARY, 0)
    assert batch.clip_order.tolist() == [0, 1] and np.array_equal(batch.waves[1], _wave(1, 4))


def test_clips_that_do_not_fit_are_all_named():
    short = _speech("short", _wave(0, 4))
    rows = PackedRow((
        _drawn(*_heard(2), clips=(("short", 0, 8),), rows=[short]),
        _drawn(*_heard(3), clips=(("x", 0, 8),), rows=[_speech("x", _wave(0, 8))]),
    ), 16)  # fmt: skip
    with pytest.raises(DataError) as caught:
        collate_rows([rows], VOCABULARY, 0)
    text = str(caught.value)
    assert "short: codes 0 to 8 are not in its recording, which has 4: encode it again" in text
    assert "x: 3 audio slots in a document of asr, its clips fill 2" in text
    with pytest.raises(DataError, match="z: a document of asr has a clip of it, and it has no recording"):
        collate_rows([PackedRow((_drawn(*_heard(1), clips=(("z", 0, 4),)),), 8)], VOCABULARY, 0)
    coarse = CovoAudioFeatureExtractor(feature_size=8, segment_frames=32, slot_frames=8)
    with pytest.raises(DataError, match="x, codes 0 to 8: the encoder fills 4 slots, its codes 2"):
        collate_rows([PackedRow((_drawn(*_heard(2), clips=(("x", 0, 8),), rows=[_speech("x", _wave(0, 8))]),), 16)],
                     VOCABULARY, 0, coarse)  # fmt: skip


# -- the stream --------------------------------------------------------------------------------------------------------


def _build_text(row, vocabulary, rng, options):
    ids = [*vocabulary.text(row.text), vocabulary.text_end]
    return Document(ids, [IGNORE, *ids[1:]])


def _build_heard(rows, vocabulary, rng, options):
    (row,) = rows
    ids, labels = _heard(-(-len(row.codes) // 4))
    text = [*vocabulary.text(row.text), rng.randrange(20, 90)]
    return Document(ids + text, labels + text, ((row.id, 0, len(row.codes)),))


KNOWN = {
    "heard": DocumentTask("row", _build_heard, ("audio", "text", "codes")),
    "text": DocumentTask("text", _build_text, ("text",)),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rows = []
    for i in range(7):
        write_wav(folder / f"{i}.wav", _wave(i, 5 + i))
        rows.append({"id": f"h{i}", "audio": f"{i}.wav", "text": "abc"[: i % 3 + 1], "codes": [i] * (5 + i),
                     "tokenizer": "t"})  # fmt: skip
    write(folder / "h-0.jsonl", rows[:3])
    write(folder / "h-1.jsonl", rows[3:])
    write(folder / "text.jsonl", [{"id": f"t{i}", "text": "x" * (1 + i * 5 % 23)} for i in range(20)])
    return {"heard": TaskData(1, str(folder / "h-*.jsonl")), "text": TaskData(2, str(folder / "text.jsonl"))}


def _stream(corpus, **options):
    return PackedStream(corpus, VOCABULARY, **{"seed": 4, "length": 96, "pad_id": 0, "known": KNOWN} | options)


def _same(one, other):
    assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.labels, other.labels)
    assert one.clips == other.clips and torch.equal(one.clip_order, other.clip_order)
    assert all(np.array_equal(a, b) for a, b in zip(one.waves, other.waves, strict=True))


def _rows_of(batch):
    return [ids.tolist() for ids in batch.input_ids]


def test_ranks_share_the_rows_of_one_order(corpus):
    alone = _stream(corpus)
    rows = [_rows_of(alone.next_batch())[0] for _ in range(12)]
    assert len({tuple(row) for row in rows}) == 12
    for world, size in ((2, 1), (3, 2)):
        got = {}
        for rank in range(world):
            stream = _stream(corpus, ranks=(rank, world), batch_size=size)
            for i in range(12 // (world * size)):
                for j, row in enumerate(_rows_of(stream.next_batch())):
                    got[i * world * size + j * world + rank] = row
            assert stream.state_dict() == alone.state_dict()  # the same on every rank
        assert [got[n] for n in range(12)] == rows


def test_a_stream_goes_on_with_other_ranks_and_workers(corpus):
    reference = _stream(corpus)
    batches = [reference.next_batch() for _ in range(14)]
    ahead = _stream(corpus, workers=2)  # reads four batches ahead: the state is that of the batch handed out
    for n in range(3):
        _same(ahead.next_batch(), batches[n])
    state = json.loads(json.dumps(ahead.state_dict()))
    ahead.close()
    second = _stream(corpus, ranks=(1, 2), batch_size=2)
    second.load_state_dict(state)
    assert _rows_of(second.next_batch()) == [_rows_of(batches[n])[0] for n in (4, 6)]
    third = _stream(corpus)
    third.load_state_dict(second.state_dict())
    _same(third.next_batch(), batches[7])
    assert [row.tokens for row in itertools.islice(third.rows(), 2)] == [
        int((batches[n].task >= 0).sum()) for n in (8, 9)
    ]
    _same(third.next_batch(), batches[8])  # looking at rows takes none


def test_a_worker_hands_on_what_is_wrong_with_its_type(corpus, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"id": "a", "text": "abc"}])
    stream = _stream({"text": TaskData(1, str(path))}, workers=1)
    path.write_text('{"id": "b", "text": "abc"}\n')
    with pytest.raises(DataError, match="it has changed"):
        stream.next_batch()


def test_the_report_counts_tokens_padding_and_skipped_rows(corpus):
    stream = _stream(corpus, length=24)
    for _ in range(5):
        stream.next_batch()
    report = stream.report()
    tokens = {name: task["tokens"] for name, task in report["tasks"].items()}
    assert report["rows"] == 5 and 0 <= report["padding"] < 0.2
    assert abs(tokens["text"] - 2 / 3 * sum(tokens.values())) < 24
    # in 24 positions fit 21 letters and the end; a longer text is cut, and nothing is left out
    assert report["tasks"]["heard"]["epochs"] > 1 and report["tasks"]["heard"]["skipped"] == {}
    short = _stream(corpus, length=7)
    short.next_batch()
    skipped = short.report()["tasks"]["heard"]["skipped"]["longer than 7 positions"]
    assert 0 < skipped["rows"] <= 7 <= skipped["times"] and all(id[0] == "h" for id in skipped["first"])


def test_tasks_and_data_that_cannot_be_are_named_before_anything_is_read(corpus, tmp_path):
    with pytest.raises(ConfigError) as caught:
        _stream({"herd": TaskData(1, "x"), "text": TaskData(1)})
    assert "no task 'herd'; did you mean heard?" in str(caught.value) and "text: the task has a weight" in str(
        caught.value
    )
    _stream({**corpus, "text": TaskData(0)}).next_batch()  # without a weight it needs none
    write(tmp_path / "a.jsonl", [{"id": "a"}])
    write(tmp_path / "b.jsonl", [{"id": "b"}])
    both = {"heard": TaskData(1, str(tmp_path / "a.jsonl")), "text": TaskData(1, str(tmp_path / "b.jsonl"))}
    with pytest.raises(DataError) as caught:
        _stream(both)
    assert "a.jsonl: a: it has no audio" in str(caught.value) and "b.jsonl: b: it has no text" in str(caught.value)


def test_codes_of_two_tokenizers_are_refused(tmp_path):
    rows = [{"id": f"r{n}", "text": "a", "codes": [1], "tokenizer": n} for n in "ab"]
    known = {"tts": DocumentTask("row", _build_heard, ("codes",))}
    with pytest.raises(DataError, match="codes of several tokenizers") as caught:
        _stream({"tts": TaskData(1, str(write(tmp_path / "a.jsonl", rows)))}, known=known)
    assert "r0: " in str(caught.value).replace("ra: ", "r0: ") and "tokenizer 'b'" in str(caught.value)


def test_recordings_are_heard_before_training_where_one_asks(corpus, tmp_path):
    stream = _stream(corpus)
    assert stream.heard_problems() == []
    write_wav(tmp_path / "0.wav", _wave(0, 3))
    row = {"id": "a", "audio": "0.wav", "text": "a", "codes": [1] * 9}
    bad = _stream({"heard": TaskData(1, str(write(tmp_path / "a.jsonl", [row])))})
    assert [str(problem) for problem in bad.heard_problems()] == ["a: 9 codes, its audio has 3: encode it again"]
    with pytest.raises((DataError, AudioError), match="codes 0 to 9 are not in its recording"):
        bad.next_batch()
