"""The built-in question set: schema, determinism, disjoint splits, clips that carry their facts."""

import hashlib
import json
import wave
from collections import Counter

import numpy as np
import pytest

from covo_rl import synth
from covo_rl.synth.scenes import SCENES, SECONDS, TASKS
from covo_rl.synth.sounds import RATE, event, note, vowel

MMAU_FIELDS = {
    "id", "audio_id", "question", "choices", "answer", "dataset", "task", "split", "category", "sub-category",
    "difficulty",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows_and_clips():
    return list(synth.samples("train", 220))


def test_rows_have_the_mmau_fields_and_one_right_answer_among_four_distinct_options(rows_and_clips):
    for row, _ in rows_and_clips:
        assert row.keys() >= MMAU_FIELDS
        assert len(set(row["choices"])) == 4
        assert row["answer"] in row["choices"]
        assert row["task"] in {"sound", "music", "speech"}


def test_eleven_tasks_over_three_modalities_come_equally_often(rows_and_clips):
    assert Counter(row["sub-category"] for row, _ in rows_and_clips) == {task.name: 20 for task in TASKS}
    assert len(TASKS) == 11
    assert {task.modality for task in TASKS} == {"sound", "music", "speech"}


def test_evidence_names_the_true_value_of_every_fact_and_no_other(rows_and_clips):
    for row, _ in rows_and_clips:
        words = row["evidence"].rstrip(".").replace(",", "").split()
        for fact, values in row["fact_lexicon"].items():
            named = [value for value in values if f" {value} " in f" {' '.join(words)} "]
            assert named == [row["facts"][fact]]


def test_the_answer_follows_from_the_facts(rows_and_clips):
    for row, _ in rows_and_clips:
        facts = row["facts"]
        if row["sub-category"] == "order, last":
            assert facts["order"].endswith(f"then {row['answer']}")
        elif row["sub-category"] == "order, first":
            assert facts["order"].startswith(f"{row['answer']} then")
        else:
            assert facts[row["sub-category"]] == row["answer"]


def test_a_row_depends_on_seed_split_and_index_alone():
    late = list(synth.samples("validation", 8))[7]
    alone = synth.render_sample("validation", 7)
    assert late[0] == alone[0]
    assert np.array_equal(late[1], alone[1])
    assert not np.array_equal(alone[1], synth.render_sample("validation", 7, seed=1)[1])
    assert not np.array_equal(alone[1], synth.render_sample("test", 7)[1])


def test_the_position_of_the_answer_and_a_fixed_guess_are_worth_a_quarter():
    rows = [synth.render_sample("train", i)[0] for i in range(1, 4400, 11)]  # one task, 400 rows
    position = Counter(row["choices"].index(row["answer"]) for row in rows)
    assert all(abs(position[i] / 400 - 0.25) < 0.08 for i in range(4))
    chosen = [row for row in rows if "bell" in row["choices"]]
    assert abs(sum(row["answer"] == "bell" for row in chosen) / len(chosen) - 0.25) < 0.08


def test_clips_are_at_most_three_seconds_of_varied_length_and_not_silent(rows_and_clips):
    lengths = {len(clip) for _, clip in rows_and_clips}
    assert max(lengths) <= SECONDS * RATE
    assert min(lengths) >= 0.9 * RATE
    assert len(lengths) > 100
    for _, clip in rows_and_clips:
        assert clip.dtype == np.int16
        assert 0.25 < np.abs(clip).max() / 32_767 <= 1


def test_render_writes_readable_wavs_and_splits_share_no_clip(tmp_path):
    paths = synth.render_set(tmp_path, seed=3, train=22, validation=11, test=11)
    hashes = {}
    for split, path in paths.items():
        rows = json.loads(path.read_text())
        clips = [tmp_path / row["audio_id"] for row in rows]
        hashes[split] = {hashlib.sha256(clip.read_bytes()).hexdigest() for clip in clips}
        with wave.open(str(clips[0])) as file:
            assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (24_000, 1, 2)
            content = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
        assert np.array_equal(content, synth.render_sample(split, 0, seed=3)[1])
    assert [len(hashes[split]) for split in synth.SPLITS] == [22, 11, 11]
    assert not hashes["train"] & hashes["test"]
    assert not hashes["train"] & hashes["validation"]
    assert not hashes["validation"] & hashes["test"]


def test_render_leaves_a_finished_set_alone_and_replaces_another(tmp_path):
    path = synth.render_set(tmp_path, train=2, validation=1, test=1)["train"]
    path.write_text("touched")
    synth.render_set(tmp_path, train=2, validation=1, test=1)
    assert path.read_text() == "touched"
    synth.render_set(tmp_path, train=3, validation=1, test=1)
    assert len(json.loads(path.read_text())) == 3


def test_what_this_version_renders():
    """Where this fails, rows or clips have changed: give synth.VERSION another value and put the new figures here."""
    rows, clips = zip(*synth.samples("test", 44), strict=True)
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    power = sum(float(np.square(clip / 32_768.0).mean()) for clip in clips)
    assert (synth.VERSION, digest[:16], sum(map(len, clips))) == ("c5869656", "c8f6f2e0c392135a", 2096200)
    assert power == pytest.approx(1.45735, rel=1e-4)


def test_render_refuses_splits_that_share_a_clip(tmp_path, monkeypatch):
    monkeypatch.setattr(
        synth, "render_sample", lambda split, index, seed: ({"id": split, "audio_id": "a.wav"}, np.ones(9))
    )
    with pytest.raises(ValueError, match="the clip of validation is also in split train; choose another seed"):
        synth.render_set(tmp_path, train=1, validation=1, test=1)


def onsets(clip):
    """Rises of the 10 ms energy over a quarter of its maximum after at least 60 ms below it."""
    frames = np.sqrt((clip[: len(clip) // 240 * 240].astype(float).reshape(-1, 240) ** 2).mean(1))
    loud = frames > 0.25 * frames.max()
    return sum(loud[i] and not loud[max(0, i - 6) : i].any() for i in range(len(loud)))


def test_the_number_of_onsets_is_the_count():
    for i in range(30):
        for source in ("buzzer", "hiss", "whistle"):
            facts = {"source": source, "count": ("one", "two", "three", "four", "five")[i % 5]}
            clip = SCENES["repeats"].render(facts, np.random.default_rng(i))
            assert onsets(clip) == i % 5 + 1


def test_a_rising_melody_rises():
    def pitch(part):
        return np.argmax(np.abs(np.fft.rfft(part, 2**16))) * RATE / 2**16

    for melody, sign in (("rising", 1), ("falling", -1)):
        clip = SCENES["melody"].render({"instrument": "flute", "melody": melody}, np.random.default_rng(0))
        quarter = len(clip) // 4
        assert sign * (pitch(clip[-quarter:]) - pitch(clip[:quarter])) > 50


def test_sounds_are_finite_and_unknown_names_say_what_exists():
    rng = np.random.default_rng(0)
    for wave_ in (event("bell", 0.3, rng), note("flute", 440, 0.3, rng), vowel("ah", "whisper", 0.3, rng)):
        assert wave_.dtype == np.float32
        assert np.isfinite(wave_).all()
    with pytest.raises(ValueError, match="bell, buzzer, hiss, knock, whistle"):
        event("dog", 0.3, rng)
    with pytest.raises(ValueError, match="flute, organ, guitar, trumpet"):
        note("tuba", 440, 0.3, rng)
    with pytest.raises(ValueError, match="train, validation, test"):
        synth.render_sample("dev", 0)
