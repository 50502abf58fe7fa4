"""What a step does at the same time: the next clips in a thread, rewards beside log-probs; and what it does once."""

import _thread
import contextlib
import sys
import threading
import time
from pathlib import Path

import pytest
import soundfile
import torch
import train_cases as cases

from covo_rl.policy.features import FeatureStore
from covo_rl.policy.prefetch import Prefetch
from covo_rl.rewards import RewardError, Scoring
from covo_rl.train.learner import Learner
from covo_rl.train.sampler import PromptSampler
from covo_rl.types import Clip, Example

ENCODER = {"lora": False, "train_parts": ["encoder", "audio_adapter", "llm"]}


def trained(tmp_path, examples, *, prefetch, watch=True, on_step=lambda made: None, **changes):
    """A run of four steps: metrics without times, weights, and the name of the thread that processed each clip."""
    made = cases.trainer(cases.options(tmp_path, **changes), examples)
    made.clips.watch([clip for row in examples for clip in row.clips] if watch else [])
    made.prefetch.active = prefetch
    lines, threads, process = [], [], made.policy.store.process

    def noted(key):
        result = process(key)
        threads.append((made.step, threading.current_thread().name))
        return result

    made.policy.store.process = noted

    def after(metrics, batch):
        lines.append({name: value for name, value in metrics.items() if name != "seconds"} | dict(made.rows.skipped))
        on_step(made)

    made.run(after)
    return lines, dict(made.policy.named_parameters()), threads


def prefetching():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


# -- the next step's clips ---------------------------------------------------------------------------------------


def test_peeking_takes_nothing():
    sampler, twin = (PromptSampler(cases.rows(5), seed=1) for _ in range(2))
    for count in (3, 4, 7):  # over the ends of epochs
        state = sampler.state_dict()
        peeked = sampler.peek(count)
        assert sampler.state_dict() == state
        assert (
            [row.id for row in peeked]
            == [row.id for row in sampler.take(count)]
            == [row.id for row in twin.take(count)]
        )


@pytest.mark.parametrize("changes", [{}, ENCODER, {"dynamic_sampling": 1, "rewards": {lambda completions, **_: [
    float(len(c) % 2) for c in completions]: 1.0}}], ids=["frozen", "encoder trains", "dynamic sampling"])  # fmt: skip
def test_prefetched_clips_give_the_same_bits(tmp_path, changes):
    examples = cases.rows(24)
    lines, weights, threads = trained(tmp_path / "a", examples, prefetch=False, **changes)
    ours, our_weights, our_threads = trained(tmp_path / "b", examples, prefetch=True, **changes)
    assert ours == lines
    assert all(torch.equal(our_weights[name], value) for name, value in weights.items())
    assert {name for _, name in threads} == {"MainThread"}
    assert {name for step, name in our_threads if step} - {"prefetch"} <= (
        {"MainThread"} if len(changes) == 2 else set()
    )
    assert sum(name == "prefetch" for _, name in our_threads) >= 6
    assert not prefetching(), "no thread outlives the run"


def files(folder, count=16):
    """Rows over wav files of half a second."""
    folder.mkdir(parents=True)
    examples = []
    for i in range(count):
        path = folder / f"{i}.wav"
        soundfile.write(path, cases.cases.clip(i, 0.5).array, 16000)
        examples.append(Example(f"row{i}", (Clip(path=str(path)),), "What do you hear?", ("bell", "dog"), "bell"))
    return examples


@pytest.mark.parametrize("damage", ["broken from the start", "changed", "changed, never named before", "gone"])
def test_a_file_that_cannot_be_used_is_skipped_at_its_step(tmp_path, damage):
    """finding 35: the thread may meet the error first, or have read the file in time; the step says the same."""
    results = []
    for prefetch in (False, True):
        here = tmp_path / str(prefetch)
        examples = files(here)
        sampler = PromptSampler(examples, cases.options(here).train.seed)
        victim = Path(sampler.take(12)[-1].clips[0].path)  # of the third step

        def hurt(victim=victim):
            victim.unlink() if damage == "gone" else victim.write_bytes(b"RIFF of something else")

        def on_step(made, hurt=hurt, prefetch=prefetch):
            if made.step == 2 and damage != "broken from the start":
                if prefetch:
                    made.prefetch._thread.join()  # it has read the file by now
                hurt()

        if damage == "broken from the start":
            hurt()
        lines, weights, threads = trained(
            here / "run", examples, prefetch=prefetch, watch="never" not in damage, on_step=on_step,
            skipped_rows_limit=0.2,
        )  # fmt: skip
        assert [line["skipped_rows"] for line in lines] == [0, 0, 1, 1]
        ahead = sum(name == "prefetch" for _, name in threads)
        assert ahead <= 1 if "never" in damage or not prefetch else ahead > 6  # the trainer names the clips of one row
        skipped = [{name: str(value).replace(str(here), "") for name, value in line.items()} for line in lines]
        results.append((skipped, weights))
    (plain, plain_weights), (ours, our_weights) = results
    assert ours == plain
    assert all(torch.equal(our_weights[name], value) for name, value in plain_weights.items())


def test_the_thread_ends_when_the_run_is_interrupted(tmp_path, monkeypatch):
    started = threading.Event()

    def slow(self, key):
        started.set()
        time.sleep(0.05)
        return process(self, key)

    process = FeatureStore.process
    monkeypatch.setattr(FeatureStore, "process", slow)
    made = cases.trainer(cases.options(tmp_path), cases.rows(24))

    def interrupt(metrics, batch):
        assert started.wait(20)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made.run(interrupt)
    assert not prefetching()


def test_what_is_ahead_is_bounded_and_what_is_known_is_not_made_again():
    made = cases.cases.policy()
    examples = [row for row in cases.rows(12) if row.clips]
    clips = [clip for row in examples for clip in row.clips]
    store = FeatureStore(
        made.family, made.clips, memory_mb=1.5 * 16 * 100 * 4 / 2**20
    )  # one and a half segments of 1 s
    ahead = Prefetch(store)
    ahead.turn(examples)
    ahead.turn([])
    assert 1 <= len(store._mel) <= 2 < len(clips)
    roomy = FeatureStore(made.family, made.clips)
    ahead, keys = Prefetch(roomy), [made.clips.key(clip) for clip in clips]
    ahead.turn(examples)
    ahead.turn([])
    assert set(roomy._mel) == set(keys)
    roomy.embeddings(keys)
    assert not roomy._mel, "the encoder has had them"
    ahead.turn(examples)
    ahead.turn([])
    ahead.close()
    assert not roomy._mel and roomy.encoded_clips == len(set(keys))
    without = Prefetch(FeatureStore(made.family, None))
    without.turn(examples)
    assert not prefetching()


# -- features stay where they are used ---------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {**ENCODER, "train_parts": ["audio_adapter", "llm"], "max_steps": 3}])
def test_each_clip_goes_to_the_device_once_per_step(tmp_path, monkeypatch, changes):
    """A hook stands for the copy to a device: sampling, old and reference pass, every micro-batch and iteration."""
    many = {"num_iterations": 2, "micro_batch_prompts": 1, "beta": 0.1, **changes}
    copies, place = [], FeatureStore.place

    def counted(self, value):
        copies.append(value.shape)
        return place(self, value).clone()

    monkeypatch.setattr(FeatureStore, "place", counted)
    examples = cases.rows(8)  # epochs end with steps, so no row comes twice in one
    made = cases.trainer(cases.options(tmp_path / "a", **many), examples)
    lines, counts, clips = [], [], []

    def after(metrics, batch):
        keys = {key for group in batch.groups for key in group.prompt.clip_keys}
        clips.append(len(keys))
        counts.append(len(copies))
        copies.clear()
        lines.append({name: value for name, value in metrics.items() if name != "seconds"})
        assert made.policy.store._placed is None and made.policy.embedder.reference_store._placed is None

    made.run(after)
    assert counts == clips and all(clips)
    counts, plain = [], lines
    lines = []
    monkeypatch.setattr(FeatureStore, "placed", lambda self: contextlib.nullcontext())
    made = cases.trainer(cases.options(tmp_path / "b", **many), examples)
    made.run(after)
    assert lines == plain
    frozen = not changes
    # frozen: sampling, the reference pass, two iterations; else the reference alone
    assert counts == [n * (4 if frozen else 1) for n in clips[len(plain) :]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_placed_features_are_those_of_the_store_and_cost_no_copy_on_a_cpu(dtype):
    made = cases.cases.policy()
    made.family.model.to(dtype)
    keys = [key for prompt in cases.cases.prompts(made) for key in prompt.clip_keys]
    plain = made.store.embeddings(keys)
    with made.embedder.placed():
        first = made.store.embeddings(keys)
        made.release()  # what an engine does after sampling
        again = made.store.embeddings(keys[::-1])
        made.store._kept.clear()  # out of memory and not on disk
        made.store._on_disk.clear()
        last = made.store.embeddings(keys)
    assert all(first[key] is again[key] is last[key] is plain[key] for key in keys)
    assert made.store.encoded_clips == len(set(keys))
    made.store.embeddings(keys)
    assert made.store.encoded_clips == 2 * len(set(keys)), "nothing stays behind"


# -- rewards beside the log-probs --------------------------------------------------------------------------------


def watched(monkeypatch, name):
    """Begin and end of every such pass, and an event that is set while one runs."""
    spans, under_way, original = [], threading.Event(), getattr(Learner, name)

    def timed(self, *args, **kwargs):
        start = time.monotonic()
        under_way.set()
        try:
            return original(self, *args, **kwargs)
        finally:
            spans.append((start, time.monotonic()))

    monkeypatch.setattr(Learner, name, timed)
    return spans, under_way


def slow_reward(under_way, calls, seconds=0.3):
    """A score that needs 0.3 s, and the reference pass to have begun."""

    def slow(completions, **columns):
        start = time.monotonic()
        under_way.wait(20)
        under_way.clear()
        time.sleep(seconds)
        calls.append((start, time.monotonic()))
        return cases.vowels([], completions)

    slow.isolation = "thread"
    return slow


def test_rewards_are_at_work_during_the_reference_pass(tmp_path, monkeypatch):
    spans, under_way = watched(monkeypatch, "ref_logps")
    calls = []
    made = cases.trainer(cases.options(tmp_path, beta=0.1, rewards={slow_reward(under_way, calls): 1.0}))
    lines = []
    made.run(lambda metrics, batch: lines.append(metrics))
    assert len(calls) == len(spans) == 4
    for (reward_start, reward_end), (start, end), line in zip(calls, spans, lines, strict=True):
        assert reward_start < end and start + 0.3 <= reward_end, "the pass began while the reward was at work"
        # waited for: at most what was left after the pass; taken: all of it
        assert line["seconds"]["reward_slow"] >= 0.3
        assert line["seconds"]["reward"] <= line["seconds"]["reward_slow"] + 0.5
    same = cases.trainer(cases.options(tmp_path / "b", beta=0.1))
    expected = []
    same.run(lambda metrics, batch: expected.append(metrics))
    for ours, theirs in zip(lines, expected, strict=True):
        names = [name for name in theirs if "vowels" not in name and name != "seconds"]
        assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}


def test_dynamic_sampling_waits_for_the_rewards_first(tmp_path, monkeypatch):
    spans, under_way = watched(monkeypatch, "ref_logps")
    under_way.wait = lambda seconds: True
    calls = []
    reward = slow_reward(under_way, calls, 0.05)
    made = cases.trainer(cases.options(tmp_path, beta=0.1, dynamic_sampling=1, rewards={reward: 1.0}, max_steps=2))
    made.run()
    assert len(spans) == 2 <= len(calls)
    assert all(not start < end_of_pass or end <= start_of_pass
               for start, end in calls for start_of_pass, end_of_pass in spans)  # fmt: skip


def test_a_broken_reward_stops_the_run_in_its_own_words(tmp_path):
    def broken(completions, **columns):
        raise ConnectionError("the judge is away")

    made = cases.trainer(cases.options(tmp_path, rewards={broken: 1.0}, reward_failure="stop", beta=0.1))
    with pytest.raises(RewardError, match=r"broken raised ConnectionError: the judge is away.*reward_failure is stop"):
        made.train_step()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_reaches_a_trainer_that_waits_for_a_reward(tmp_path):
    release = threading.Event()

    def hangs(completions, **columns):
        _thread.interrupt_main()
        release.wait(20)
        return [0.0] * len(completions)

    hangs.isolation = "thread"
    made = cases.trainer(cases.options(tmp_path, rewards={hangs: 1.0}))
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        made.train_step()
    release.set()
    assert time.monotonic() - start < 15


def test_a_local_judge_is_waited_for_at_once(monkeypatch):
    """It shares the memory of the device."""
    made = cases.cases.policy()
    groups = cases.cases.ragged_groups(made)[2:3]
    config = cases.options(Path("unused")).reward
    done = []

    def late(completions, **columns):
        time.sleep(0.1)
        done.append(True)
        return [0.0] * len(completions)

    late.isolation = "thread"
    config.judge = "transformers:somewhere"
    Scoring(groups, config, rewards={late: 1.0})
    assert done
    config.judge = None
    scoring = Scoring(groups, config, rewards={late: 1.0})
    assert len(done) == 1 and scoring.table().rewards_PG.tolist() == [[0.0, 0.0]]
