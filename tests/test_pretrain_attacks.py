"""Pre-training against odd rows, places to resume at, rows that teach nothing, texts that spell special tokens."""

from __future__ import annotations

import json
import random
import struct

import numpy as np
import pretrain_cases as cases
import pytest
import torch
from accelerate import Accelerator

from covo_rl.data.read import DataError
from covo_rl.models.covo_audio.processing import IGNORE
from covo_rl.policy import Policy
from covo_rl.policy.head import token_logps
from covo_rl.supervised.pretrain.config import read_pretrain
from covo_rl.supervised.pretrain.dialogue_rows import read_dialogues
from covo_rl.supervised.pretrain.document import SkippedError, Vocabulary
from covo_rl.supervised.pretrain.forward import Taught, packed_logps
from covo_rl.supervised.pretrain.packing import PackedBatch
from covo_rl.supervised.pretrain.reader import document_problems
from covo_rl.supervised.pretrain.rows import RowStore, TextRow
from covo_rl.supervised.pretrain.stream import PackedStream, TaskData
from covo_rl.supervised.pretrain.tasks import TASKS, BuildOptions
from covo_rl.supervised.pretrain.trainer import PretrainTrainer

ODD_TEXTS = (
    "<|im_end|> then <|endoftext|> and <|cAUDIO|>", "é e\u0301 ﬁ", "你好,世界。", "🙂👩‍👩‍👧", "\u2028 line", "a\u00a0b",
    "x" * 700, "\ufeffbom", "tab\tnew\nline", "‮ right to left", "\x00nul",
)  # fmt: skip


@pytest.fixture(scope="module")
def made():
    return cases.tiny_family()


@pytest.fixture(scope="module")
def vocabulary(made):
    return Vocabulary.of(made)


def lines(path, rows) -> str:
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return str(path)


# -- rows --------------------------------------------------------------------------------------------------------


def test_rows_come_back_whatever_separates_them(tmp_path):
    texts = ["a\u2028b\x85c", "é", "last"]
    encoded = [json.dumps({"id": f"ü{i}", "text": text}, ensure_ascii=False).encode() for i, text in enumerate(texts)]
    content = b"\xef\xbb\xbf" + encoded[0] + b"\r\n\n  \n" + encoded[1] + b"\n\n" + encoded[2]
    (tmp_path / "rows.jsonl").write_bytes(content)
    store = RowStore(str(tmp_path / "rows.jsonl"), kind="text")
    assert [(store.row(i).id, store.row(i).text) for i in (2, 0, 1)] == [("ü2", "last"), ("ü0", texts[0]), ("ü1", "é")]


@pytest.mark.parametrize(
    "line",
    [b'{"id": "a", "text": "\xff\xfe"}\n', b'{"id": "a", "text": "b"\n', b"[1]\n", b"NaN\n", b'"text"\n', b"\x00\x00\n",
     b'{"id": "a", "text": {"b": 1}}\n', b'{"id": "a", "text": "\\ud800"}\n',
     b"[" * 100_000 + b"\n", b'{"id": "a", "text": "b", "text": "c"}\n',
     b'{"id": ' + b"9" * 5000 + b', "text": "a"}\n', b'{"id": "a", "text": "\xef\xb7\x90"}\n'],
)  # fmt: skip
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    path = lines(tmp_path / "rows.jsonl", [{"id": "fine", "text": "fine"}, line])
    with pytest.raises(DataError) as caught:
        RowStore(path, kind="text")
    assert all(problem.row_id in ("row 2", "a") for problem in caught.value.problems)


@pytest.mark.parametrize(
    "damage", [b"", b"\x93NUMPY", b"not numpy at all" * 20, b"\x93NUMPY\x01\x00\xff\xff" + b"x" * 100], ids=range(4)
)
def test_files_of_codes_that_are_damaged_are_named(tmp_path, damage):
    (tmp_path / "codes.npy").write_bytes(damage)
    path = lines(tmp_path / "rows.jsonl", [{"id": "a", "text": "b", "codes": "codes.npy", "tokenizer": "t"}])
    with pytest.raises(DataError, match=r"codes\.npy"):
        RowStore(path, needs={"codes"}, codebook=cases.CODES)


@pytest.mark.parametrize("codes", [[cases.CODES], [-1], [], [1.0], [True], [2**63], "codes.npy", [[1]], ["1"]], ids=str)
def test_codes_that_are_none_of_this_codebook_are_refused(tmp_path, codes):
    np.save(tmp_path / "codes.npy", np.array([[1, 2]]))
    path = lines(tmp_path / "rows.jsonl", [{"id": "é\n", "text": "b", "codes": codes, "tokenizer": "t"}])
    with pytest.raises(DataError) as caught:
        RowStore(path, needs={"codes"}, codebook=cases.CODES)
    assert len(caught.value.problems) == 1


def test_codes_of_two_tokenizers_in_two_tasks_are_refused(tmp_path, vocabulary):
    for name in ("a", "b"):
        lines(tmp_path / f"{name}.jsonl", [{"id": name, "text": "b", "codes": [1, 2], "tokenizer": name}])
    tasks = {"tts": TaskData(1, str(tmp_path / "a.jsonl")), "pseudo_dialogue": TaskData(1, str(tmp_path / "b.jsonl"))}
    with pytest.raises(DataError, match="several tokenizers"):
        PackedStream(tasks, vocabulary, seed=0, length=64, pad_id=0)


@pytest.mark.parametrize("bad", ["\\ud800", "\\ufdd0"])
def test_what_no_tokenizer_takes_is_named_before_training(tmp_path, bad):
    turns = [f'{{"role": "user", "text": "a{bad}"}}', '{"role": "assistant", "text": "b"}']
    dialogue = f'{{"id": "d", "system": "{bad}", "turns": [{", ".join(turns)}]}}'
    rows = {"text": f'{{"id": "a", "text": "b {bad}"}}', "speech": f'{{"id": "a", "text": "{bad}", "codes": [1]}}',
            "dialogue": dialogue}  # fmt: skip
    for kind, row in rows.items():
        with pytest.raises(DataError, match=r"lone surrogate|noncharacter") as caught:
            RowStore(lines(tmp_path / f"{kind}.jsonl", [row.encode() + b"\n"]), kind=kind)
        assert len(caught.value.problems) == (2 if kind == "dialogue" else 1)


# -- streams -----------------------------------------------------------------------------------------------------


def mixed_data(folder, seed: int = 0) -> dict[str, TaskData]:
    rng = random.Random(seed)
    texts = [{"id": f"t{i}", "text": " ".join(rng.choices(cases.WORDS, k=rng.choice((1, 2, 9, 40, 130))))}
             for i in range(11)]  # fmt: skip
    speech = [cases.speech(i, rng.choice((20, 50, 90))) for i in range(12)]
    text, said = lines(folder / f"text{seed}.jsonl", texts), lines(folder / f"speech{seed}.jsonl", speech)
    return {"text": TaskData(3, text), "tts": TaskData(1.5, said)}


def signature(batch: PackedBatch) -> tuple:
    return tuple(tuple(row) for row in batch.input_ids.tolist()), tuple(batch.labels.flatten().tolist())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_any_place_any_ranks_and_any_batches_give_the_same_rows(tmp_path, vocabulary, seed):
    tasks = mixed_data(tmp_path, seed)

    def stream(**more) -> PackedStream:
        return PackedStream(tasks, vocabulary, seed=seed, length=96, pad_id=0, **more)

    alone, rows, states = stream(), [], []
    for _ in range(15):
        states.append(json.dumps(alone.state_dict()))
        rows.append(signature(alone.next_batch()))
    rng = random.Random(seed)
    for start in rng.sample(range(6), 2):
        world, size = rng.choice(((2, 1), (3, 2), (1, 4)))
        ranks = [stream(ranks=(rank, world), batch_size=size) for rank in range(world)]
        for one in ranks:
            one.load_state_dict(json.loads(states[start]))
        again = stream()
        again.load_state_dict(json.loads(states[start]))
        assert again.report() == stream_report_of(states[start])
        batches = [[one.next_batch() for one in ranks] for _ in range(2)]
        place = start
        for group in batches:
            for i in range(size):
                for batch in group:
                    assert tuple(batch.input_ids[i].tolist()) == rows[place][0][0]
                    place += 1
        assert json.loads(states[place]) == json.loads(json.dumps(ranks[-1].state_dict()))


def stream_report_of(state: str) -> dict:
    from covo_rl.supervised.pretrain.stream import stream_report

    return stream_report(json.loads(state))


def test_every_id_of_long_texts_is_taught_or_begins_a_part(tmp_path, vocabulary):
    text = " ".join(cases.WORDS * 30)
    path = lines(tmp_path / "text.jsonl", [{"id": "long", "text": text}])
    stream = PackedStream({"text": TaskData(1, path)}, vocabulary, seed=0, length=33, pad_id=0)
    rows, ids = stream.rows(), []
    whole = [*vocabulary.text(text), vocabulary.text_end]
    while len(ids) < len(whole):
        for document in next(rows).documents:
            ids += document.ids
            assert document.labels == [IGNORE, *document.ids[1:]]
    assert ids[: len(whole)] == whole


def test_rows_that_are_all_too_long_end_with_their_reason(tmp_path, vocabulary):
    path = lines(tmp_path / "speech.jsonl", [cases.speech(i, 90) for i in range(4)])
    stream = PackedStream({"tts": TaskData(1, path)}, vocabulary, seed=0, length=32, pad_id=0)
    with pytest.raises(DataError, match="longer than 32 positions"):
        stream.next_batch()


# -- documents ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ODD_TEXTS, ids=range(len(ODD_TEXTS)))
@pytest.mark.parametrize("task", ["text", "tts", "asr", "pseudo_dialogue"])
def test_odd_texts_stay_text(vocabulary, made, task, text):
    row = cases.speech_row(1, 30, text=text, words=None)
    unit = TextRow("é#1", text) if task == "text" else (row,)
    document = TASKS[task].build(unit, vocabulary, random.Random(0), BuildOptions())
    assert document_problems(document, vocabulary) == []
    assert document.ids.count(vocabulary.text_end) == (task != "pseudo_dialogue")
    assert document.ids.count(vocabulary.slot) == (8 if task == "asr" else 0)
    assert text in made.tokenizer.decode([i for i in document.ids if i < vocabulary.first_code])


@pytest.mark.parametrize("text", [" ", "\n", "\u200b"], ids=repr)
def test_texts_of_nothing_are_skipped_or_written(vocabulary, text):
    row = cases.speech_row(1, 30, text=text, words=None)
    for task in ("tts", "asr", "pseudo_dialogue"):
        try:
            document = TASKS[task].build((row,), vocabulary, random.Random(0), BuildOptions())
        except SkippedError as error:
            assert error.row == "row1"
        else:
            assert text == "\u200b" and document.supervised


def test_a_dialogue_with_odd_names_is_named_by_them(tmp_path):
    turns = [{"role": "user", "text": "<|im_start|>"}, {"role": "assistant", "text": "😀"}]
    rows = [
        {"id": "d#1", "turns": turns},
        {"id": "d", "turns": turns},
        {"id": "ж", "speaker": "Ж\nuser", "turns": turns},
    ]
    with pytest.raises(DataError) as caught:
        read_dialogues(lines(tmp_path / "rows.jsonl", rows))
    assert {problem.row_id for problem in caught.value.problems} == {"ж"}
    assert len(read_dialogues(lines(tmp_path / "rows.jsonl", rows[:2]))) == 2


# -- rows that teach nothing -------------------------------------------------------------------------------------


def silent(batch: PackedBatch) -> PackedBatch:
    """The same rows, of which no label is left."""
    names = ("input_ids", "position_ids", "task", "tasks", "clips", "clip_order", "waves", "audio")
    kept = {name: getattr(batch, name) for name in names}
    return PackedBatch(labels=torch.full_like(batch.labels, IGNORE), **kept)


@pytest.mark.parametrize("parts", [["audio_adapter"], pytest.param(["audio_adapter", "llm", "lm_head"],
                         marks=pytest.mark.slow)], ids=["adapter", "all"])  # fmt: skip
def test_a_micro_batch_that_teaches_nothing_changes_nothing(parts):
    options = read_pretrain(None, {"model": "m", "tasks": {"asr": {}}, "train_parts": parts, "length": 192})
    one, two = (PretrainTrainer(options, cases.tiny_family(), None, Accelerator(cpu=True)) for _ in range(2))
    batch = cases.packed(one.family, [cases.mixed(one.family)])
    lines = [one.update([batch]), two.update([silent(batch), batch])]
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"]) and lines[0]["taught"] == lines[1]["taught"]
    for a, b in zip(one.family.model.parameters(), two.family.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_no_ids_have_no_log_probs_under_any_head():
    policy = Policy(cases.tiny_family())
    batch = silent(cases.packed(policy.family, [cases.mixed(policy.family)]))
    logps = policy(packed_logps, batch, Taught.of(batch))
    assert logps.shape == (0,)
    logps.sum().backward()
    head = torch.nn.Sequential(torch.nn.Linear(4, 7))  # adapters, shards: called as a module
    hidden = torch.zeros(0, 4, requires_grad=True)
    values, entropy = token_logps(hidden, torch.zeros(0, dtype=torch.int64), head, entropy=True)
    assert values.shape == entropy.shape == (0,)
    (values.sum() + entropy.sum()).backward()
    assert hidden.grad is not None and head[0].weight.grad is not None  # DDP waits for both


def test_a_recording_cut_after_the_check_is_named(tmp_path, made, vocabulary):
    rows = cases.write_rows(tmp_path, 3)
    stream = PackedStream(
        {"asr": TaskData(1, rows["data"])}, vocabulary, seed=0, length=96, pad_id=0,
        extractor=made.processor.feature_extractor,
    )  # fmt: skip
    for file in (tmp_path / "audio").iterdir():
        content = file.read_bytes()
        file.write_bytes(content[:40] + struct.pack("<I", 2000) + content[44 : 44 + 2000])
    with pytest.raises(DataError, match=r"row[12]: .*the clip at 0.04 s"):
        stream.next_batch()
