"""The engine with a fake answerer: order, batches, audio conditions, several samples, ranks."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from covo_rl.audio import ClipStore, content_key
from covo_rl.config import PromptConfig, RolloutConfig
from covo_rl.engines.base import EngineLost
from covo_rl.evaluate import evaluate
from covo_rl.evaluate.answer import derangement, plan_batches, with_audio
from covo_rl.evaluate.inputs import Inputs
from covo_rl.evaluate.records import RecordLog, group_from_text
from covo_rl.evaluate.runner import Request, run_model
from covo_rl.evaluate.sets import load_set
from covo_rl.evaluate.summary import length_class, summarize
from covo_rl.records.console import time_left
from covo_rl.train.ranks import Ranks
from covo_rl.types import Clip, Example

PETS = ("dog", "cat", "cow", "hen")
RATE = 1000


class Waveforms:
    """A ClipStore over arrays."""

    def __init__(self):
        self.known = {}

    def key(self, clip):
        self.known[id(clip)] = clip
        return id(clip)

    def waveform(self, key):
        return self.known[key].array, self.known[key].sampling_rate


def tone(index, samples=50):
    """A clip whose first sample says which pet it is."""
    return Clip(array=np.full(samples, 1.0 + index, dtype=np.float32), sampling_rate=RATE)


def reply(answer):
    return f"<think>I hear it well.</think><answer>{answer}</answer>"


class Listener:
    """Answers from the sound: the pet of the first sample; without sound the first option."""

    def __init__(self):
        self.batches, self.clips = [], Waveforms()

    def answer(self, examples, *, greedy, num_generations, seed):
        self.batches.append([e.id for e in examples])
        groups = []
        for example in examples:
            first = float(example.clips[0].array[0]) if example.clips else 0.0
            heard = PETS[int(first) - 1] if first else PETS[0]
            groups.append(group_from_text(example, [reply(heard)] * num_generations))
        return groups


def pet_rows(count=8):
    columns = {"task": "sound", "difficulty": "easy"}
    return [
        Example(f"r{i}", (tone(i % 4, samples=50 + i),), f"Which? {i}", PETS, PETS[i % 4], columns)
        for i in range(count)
    ]


def run(answerer, rows, **changes):
    settings = {"prompt_config": PromptConfig(), "rollout_config": RolloutConfig(), "reward_config": None,
                "clips": Waveforms(), "batch_size": 3}  # fmt: skip
    return evaluate(answerer, rows, **{**settings, **changes})


def test_a_listener_is_right_with_its_audio_and_at_chance_without():
    rows = pet_rows(8)
    accuracy = {
        audio: run(Listener(), rows, audio=audio).summary()["accuracy"]
        for audio in ("real", "silent", "swapped", "none")
    }
    # Without sound it says "dog", right in 2 of 8 rows; swapped, every row hears another pet.
    assert accuracy == {"real": 1.0, "silent": 0.25, "swapped": 0.0, "none": 0.25}


def test_records_keep_the_order_of_the_data_and_batches_do_not():
    answerer = Listener()
    rows = pet_rows(8)
    result = run(answerer, rows)
    assert [record["id"] for record in result.records] == [f"r{i}" for i in range(8)]
    assert answerer.batches == [["r7", "r6", "r5"], ["r4", "r3", "r2"], ["r1", "r0"]], "longest first"


def test_summary_figures_by_hand():
    rows = pet_rows(4)

    class Mixed(Listener):
        def answer(self, examples, **options):
            texts = {"r0": reply("dog"), "r1": "cat", "r2": reply("hen"), "r3": "<think>one two three</think>"}
            return [group_from_text(e, [texts[e.id]]) for e in examples]

    summary = run(Mixed(), rows).summary()
    assert summary["n"] == 4
    assert summary["accuracy"] == 0.25, "only r0 has a readable, right answer"
    assert summary["strict_raw"]["accuracy"] == 0.25, "as a whole reply only the bare word cat matches"
    assert summary["official"]["accuracy"] == 0.5, "the official rule takes the bare word cat"
    assert summary["official_extracted"]["accuracy"] == 0.25
    assert (summary["n_unparseable"], summary["share_unparseable"]) == (2, 0.5)
    assert summary["mean_thinking_words"] == pytest.approx((4 + 4 + 3) / 3)
    assert summary["breakdown"]["task"]["sound"]["n"] == 4
    assert summary["breakdown"]["audio length"] == {"0-5 s": summary["breakdown"]["task"]["sound"]}


def test_several_samples():
    row = pet_rows(1)

    class Sampler(Listener):
        def answer(self, examples, **options):
            return [group_from_text(e, [reply(a) for a in ("dog", "cat", "Dog", "cow")]) for e in examples]

    summary = run(Sampler(), row, greedy=False, num_generations=4).summary()
    assert summary["accuracy"] == 0.5, "mean@4"
    sampled = summary["sampled"]
    assert sampled["mean_at_n"] == 0.5
    assert sampled["pass_at_k"] == {"1": 0.5, "2": pytest.approx(1 - 1 / 6), "4": 1.0}
    assert sampled["majority_at_n"]["accuracy"] == 1.0, "dog and Dog are one answer"


def test_several_greedy_samples_and_duplicate_ids_are_refused():
    with pytest.raises(ValueError, match="greedy"):
        run(Listener(), pet_rows(2), num_generations=2)
    with pytest.raises(ValueError, match="r0"):
        run(Listener(), [*pet_rows(2), *pet_rows(1)])


def test_progress_is_told_after_every_batch():
    seen = []
    run(Listener(), pet_rows(7), progress=lambda *state: seen.append(state))
    assert seen == [(3, 7, 1.0), (6, 7, 1.0), (7, 7, 1.0)]


def test_rows_of_one_clip_stay_together():
    shared = Clip(path="a.wav")
    rows = [Example("0", (shared,), "x" * 10), Example("1", (Clip(path="b.wav"),), "x" * 200),
            Example("2", (shared,), "x" * 400), Example("3", (), "x")]  # fmt: skip
    assert plan_batches(rows, [1, 1, 1, 0], 2) == [[2, 0], [1, 3]]
    assert plan_batches(rows, [1, 1, 1, 0], 3, bucket=False) == [[0, 1, 2], [3]]


def swap_cost(partner, items):
    return sum(3 * (items[i][0] == items[j][0]) + (items[i][1] == items[j][1]) for i, j in enumerate(partner))


@pytest.mark.parametrize("seed", range(12))
def test_derangement_is_as_good_as_trying_all_permutations(seed):
    rng = np.random.default_rng(seed)
    items = [(f"clip{rng.integers(4)}", f"answer{rng.integers(3)}") for _ in range(6)]
    if len({clip for clip, _ in items}) < 2:
        items[0] = ("clip9", items[0][1])
    partner = derangement(items, seed)
    assert sorted(partner) == list(range(6))
    best = min(swap_cost(p, items) for p in permutations(range(6)))
    assert swap_cost(partner, items) <= best + 1, "at most one equal answer more than the best permutation has"
    assert partner == derangement(items, seed)


def test_derangement_of_a_large_set_keeps_no_clip_and_no_answer():
    items = [(f"clip{i}", PETS[i % 4]) for i in range(400)]
    partner = derangement(items, 0)
    assert swap_cost(partner, items) == 0
    assert derangement(items, 1) != partner


def test_nothing_to_swap_with_is_said():
    with pytest.raises(ValueError, match="at least two different clips"):
        derangement([("a", "x"), ("a", "y")], 0)


def test_a_copy_under_another_name_is_no_other_sound(tmp_path):
    """finding 31: swapped rows heard their own sound where a set has copies of it."""
    for n in range(6):
        (tmp_path / f"{n}.wav").write_bytes(b"RIFF" + bytes([n // 2]))
    rows = [Example(f"r{n}", (Clip(path=str(tmp_path / f"{n}.wav")),), "?", PETS, PETS[0]) for n in range(6)]
    for clips in (None, ClipStore()):
        pairs = zip(rows, with_audio(rows, "swapped", clips), strict=True)
        assert all(content_key(a.clips[0]) != content_key(b.clips[0]) for a, b in pairs)
    with pytest.raises(ValueError, match="at least two different clips"):
        with_audio(rows[:2], "swapped", None)


def test_silence_has_the_length_of_the_clip():
    row = pet_rows(1)[0]
    silent = with_audio([row], "silent", Waveforms())[0]
    assert silent.clips[0].array.shape == row.clips[0].array.shape
    assert not silent.clips[0].array.any()
    with pytest.raises(ValueError, match="real, silent, swapped, none"):
        with_audio([row], "noise", Waveforms())


def test_length_classes():
    assert [length_class(s) for s in (0.5, 5.0, 9.99, 30.1, 61, None)] == [
        "0-5 s", "0-5 s", "5-10 s", "30-60 s", "> 60 s", "unknown",
    ]  # fmt: skip


def test_record_log_cuts_a_half_line_and_an_unfinished_batch(tmp_path):
    log = RecordLog(tmp_path / "rows.jsonl")
    log.append([{"id": "a"}, {"id": "b"}], batch=0)
    log.append([{"id": "c"}, {"id": "d"}], batch=1)
    whole = log.path.read_bytes()
    for cut in (*range(len(whole.split(b"\n")[0]) + 1, len(whole), 9), len(whole) - 1):
        log.path.write_bytes(whole[:cut])
        kept = [record["id"] for record in log.repair()]
        assert kept in ([], ["a", "b"], ["a", "b", "c", "d"])
        assert [record["id"] for record in log.read()] == kept
        log.append([{"id": "e"}], batch=2)
        assert [record["id"] for record in log.read()] == [*kept, "e"], "the next line starts on its own"
        log.path.write_bytes(whole)


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    log = RecordLog(tmp_path / "rows.jsonl")
    log.append([{"id": "a"}], batch=0)
    log.path.write_bytes(log.path.read_bytes() + b'{"id": \n' + b'{"id": "c"}\n')
    with pytest.raises(ValueError, match="line 2"):
        log.read()


def test_a_set_without_a_key_has_no_accuracy():
    records = run(Listener(), [replace(row, answer=None) for row in pet_rows(3)]).records
    summary = summarize(records)
    assert summary["accuracy"] is None
    assert summary["strict"]["n_scored"] == 0


class OneByOne(Ranks):
    """Ranks that run one after the other: nobody waits, and `others` are the values of those that ran before."""

    others = ()

    def wait(self):
        pass

    def gathered(self, value):
        return [value]

    def joined(self, values):
        return [*values, *self.others]


def test_ranks_share_the_batches_and_join_them(tmp_path):
    """Two ranks one after the other write what one rank writes; each row is answered once."""
    rows = pet_rows(10)
    inputs = Inputs(load_set("builtin"), tmp_path / "data.json", tuple(rows))

    def records(folder, ranks):
        (tmp_path / folder).mkdir(exist_ok=True)
        answerer = Listener()
        request = Request(output=tmp_path / folder, batch_size=3, rewards="none")
        found = run_model(inputs, answerer, request, audio="real", ranks=ranks)
        return found, [name for batch in answerer.batches for name in batch]

    single, _ = records("one", Ranks())
    second, answered_1 = records("two", OneByOne(1, 2))
    first, answered_0 = records("two", OneByOne(0, 2))
    assert second is None
    assert first == single
    assert sorted(answered_0 + answered_1) == sorted(row.id for row in rows)
    assert len(answered_1) == 4, "batches 1 and 3 of 3 + 3 + 3 + 1 rows"
    assert (tmp_path / "one" / "rows.jsonl").read_bytes() == (tmp_path / "two" / "rows.jsonl").read_bytes()
    assert not list((tmp_path / "two").glob("*rank*"))


def test_in_process_ranks_gather_all_records():
    rows = pet_rows(7)
    shares = [[], []]
    for rank in (0, 1):
        ranks = OneByOne(rank, 2)
        object.__setattr__(ranks, "joined", lambda part, rank=rank: shares[rank].extend(part) or part)
        with pytest.raises(KeyError):
            run(Listener(), rows, ranks=ranks)
    ranks = OneByOne(0, 2)
    object.__setattr__(ranks, "others", shares[1])
    joined = run(Listener(), rows, ranks=ranks)
    assert joined.records == run(Listener(), rows).records


def test_an_engine_that_is_lost_on_one_rank_is_lost_on_all(monkeypatch):
    """Each rank samples batches of its own: the others would wait at the end for the records of one that raised."""
    other_rank = iter(["nobody answers", EngineLost])
    monkeypatch.setattr(Ranks, "gathered", lambda self, value: [value, next(other_rank)])
    with pytest.raises(EngineLost, match=r"^rank 1: nobody answers$"):
        run(Listener(), pet_rows(7), ranks=Ranks(0, 2))


def test_odd_characters_leave_the_lines_intact(tmp_path):
    log = RecordLog(tmp_path / "rows.jsonl")
    log.append([{"id": "a", "reply": "\ud800 \u2028 \x85 快乐"}], batch=0)
    assert len(log.path.read_text().splitlines()) == 1
    assert log.repair()[0]["reply"] == "\ud800 \u2028 \x85 快乐"


def test_time_left_counts_this_run_only():
    assert time_left((20, 0.0), 40, 100, 10.0) == "30 s left"
    assert time_left((100, 0.0), 100, 100, 1.0) == "done"
