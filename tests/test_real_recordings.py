"""recipes/real_recordings on sounds that the test makes: what is split, refused, balanced; nothing is fetched."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from covo_rl.audio import AudioError
from covo_rl.config import parse_options
from covo_rl.data import load_examples
from covo_rl.rewards import score
from covo_rl.rewards.columns import group_from_completions
from covo_rl.supervised import load_config

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "real_recordings"
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def recipe():
    """The modules of the recipe, which finds them in its own folder."""
    sys.path.insert(0, str(RECIPE))
    try:
        import build
        import debian_packages
        import recordings
        import scenes

        yield type("Recipe", (), {"build": build, "packages": debian_packages, "recordings": recordings,
                                  "scenes": scenes})  # fmt: skip
    finally:
        sys.path.remove(str(RECIPE))


@pytest.fixture(scope="module")
def sounds(recipe):
    """Every group and label in every split: tones of half a second, one source each, as `load_sounds` gives them."""
    result, number = {}, 0
    labels = [("voices", v) for v in recipe.recordings.VOICES] + [("numbers", n) for n in recipe.recordings.NUMBERS]
    labels += [("drums", d) for d in recipe.recordings.DRUMS] + [("animal", "animal"), ("guitar", "guitar")]
    labels += [("speech", "voice")] * 6
    t = np.arange(4000) / 8000
    for split in SPLITS:
        for i, (group, label) in enumerate(labels):
            path = Path(f"{split}-{i}.wav")
            recording = recipe.recordings.Recording(group, label, f"{split} {group}", split, path)
            number += 1
            result[recording] = np.sin(2 * np.pi * (200 + 30 * number) * t).astype(np.float32)
    return result


@pytest.fixture(scope="module")
def questions(recipe, sounds, tmp_path_factory):
    """A set, the beginning of it made again, and that of another seed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe.build, "load_sounds", lambda recordings: (sounds, ["x.ogg: cut"]))
        folders = [tmp_path_factory.mktemp(name) for name in ("a", "b", "other")]
        for folder, seed, rows in zip(folders, (0, 0, 1), (420, 35, 35), strict=True):
            recipe.build.build(list(sounds), folder, {"train": rows, "validation": 14, "test": 14}, seed)
    return folders


def test_the_rows_are_read_as_mmau_with_facts_and_evidence(questions):
    rows = load_examples(str(questions[0] / "train.json"), str(questions[0]))
    assert len(rows) == 420 and {row.columns["task"] for row in rows} == {"speech", "music", "sound"}
    for row in rows[:50]:
        assert row.answer in row.choices and len(set(row.choices)) == 4
        facts, lexicon = row.columns["facts"], row.columns["fact_lexicon"]
        assert all(facts[name] in lexicon[name] for name in facts)
        assert all(str(value) in row.columns["evidence"] for value in facts.values())
        assert "language" not in facts


def test_the_evidence_of_every_task_earns_full_marks(questions):
    """What the cold start teaches must be what the rewards of GRPO ask for."""
    groups = []
    for row in load_examples(str(questions[0] / "train.json"), str(questions[0]))[:70]:
        text = f"<think>{row.columns['evidence']} So the answer is {row.answer}.</think><answer>{row.answer}</answer>"
        groups.append(group_from_completions(row, [text]))
    assert (score(groups, rewards="accuracy,format,consistency,thinking").rewards_PGR == 1.0).all()


def test_answers_and_their_places_are_equally_frequent(questions):
    rows = json.loads((questions[0] / "train.json").read_text())
    for task in {row["sub-category"] for row in rows}:
        own = [row for row in rows if row["sub-category"] == task]
        answers = collections.Counter(row["answer"] for row in own)
        assert max(answers.values()) - min(answers.values()) <= 1, (task, answers)
        places = collections.Counter(row["choices"].index(row["answer"]) for row in own)
        assert set(places) == {0, 1, 2, 3} and max(places.values()) <= 0.3 * len(own), (task, places)


def test_a_set_is_made_again_bit_for_bit_and_another_seed_is_another(questions):
    def hashes(folder):
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*.wav"))}

    first, second, other = map(hashes, questions)
    assert len(first) == 448 and len(second) == 63 and second.items() <= first.items()
    rows, again = (json.loads((folder / "train.json").read_text()) for folder in questions[:2])
    assert rows[:35] == again, "a row depends on how many there are"
    assert set(first.values()).isdisjoint(other.values())


def test_every_clip_has_the_same_length_and_rate_and_none_is_clipped(questions):
    for path in sorted((questions[0] / "train-audios").glob("*.wav"))[::20]:
        wave, rate = soundfile.read(path)
        assert (len(wave), rate) == (24_000, 8000) and 0.001 < np.abs(wave).max() < 0.999


def test_a_split_plays_its_own_sources_alone(recipe, sounds):
    for split in SPLITS:
        library = recipe.scenes.Library(sounds, split)
        held = {r.split for recordings in library.by_label.values() for r in recordings}
        assert held == {split}


def test_a_source_in_two_splits_is_refused(recipe):
    def recording(split, path):
        return recipe.recordings.Recording("drums", "kick", "Kit", split, Path(path))

    recipe.build.check_split([recording("train", "a"), recording("train", "b")])
    with pytest.raises(ValueError, match="in two splits"):
        recipe.build.check_split([recording("train", "a"), recording("test", "b")])


def test_no_kit_voice_or_speaker_is_listed_in_two_splits(recipe):
    for table in (recipe.recordings.KITS, recipe.recordings.SPOKEN):
        names = [name for split in SPLITS for name in table[split]]
        assert len(names) == len(set(names))
    shares = collections.Counter(recipe.recordings.split_of(f"source {i}") for i in range(2000))
    assert 1300 < shares["train"] < 1500 and 120 < shares["validation"] < 280


def test_a_level_that_tells_the_answer_is_found(recipe):
    """The check that the builder prints: here every kick is loud and every snare soft, and lengths are equal."""
    rows, features = {}, {}
    for split in ("train", "test"):
        rows[split] = [{"sub-category": "drum", "choices": ["kick", "snare", "tom", "clap"],
                        "answer": ("kick", "snare")[i % 2]} for i in range(60)]  # fmt: skip
        features[split] = [(24_000, (0.1, 0.001)[i % 2] * (1 + i / 100)) for i in range(60)]
    assert recipe.build.shortcuts(rows, features) == ["length and level alone, drum: 60/60 right, chance 1 of 4"]


def test_another_hash_is_refused_and_the_right_one_is_not_fetched_again(recipe, tmp_path, monkeypatch):
    content = b"a package"
    package = recipe.packages.Package("x-sounds", "1:2.0-1", hashlib.sha256(content).hexdigest())
    path = tmp_path / "x-sounds_1%3a2.0-1_all.deb"
    path.write_bytes(content)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("apt was asked"))
    assert recipe.packages.fetch(package, tmp_path) == path
    path.write_bytes(b"another package")
    with pytest.raises(recipe.packages.PackageError, match=r"its SHA-256 is .*packages\.yaml says .*do not unpack"):
        recipe.packages.fetch(package, tmp_path)


def test_a_system_without_apt_is_told_what_is_needed(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    package = recipe.packages.Package("x-sounds", "1", "0" * 64)
    with pytest.raises(recipe.packages.PackageError, match=r"no apt-get on this system.*snapshot\.debian\.org"):
        recipe.packages.fetch(package, tmp_path)
    with pytest.raises(recipe.packages.PackageError, match="no dpkg-deb"):
        recipe.packages.unpack(package, tmp_path / "x.deb", tmp_path)


def test_a_version_that_apt_does_not_have_says_where_it_is(recipe, tmp_path, monkeypatch):
    apt = tmp_path / "apt-get"
    apt.write_text("#!/bin/sh\necho \"E: Version '9' for 'x-sounds' was not found\" >&2\nexit 100\n")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + "/bin")
    with pytest.raises(recipe.packages.PackageError, match=r"was not found.*apt-get update.*put it into"):
        recipe.packages.fetch(recipe.packages.Package("x-sounds", "9", "0" * 64), tmp_path / "deb")


def test_licences_are_listed_with_the_whole_copyright_file(recipe, tmp_path):
    package = recipe.packages.Package("x-sounds", "1", "ab" * 32)
    doc = tmp_path / "x-sounds" / "usr" / "share" / "doc" / "x-sounds"
    doc.mkdir(parents=True)
    (doc / "copyright").write_text("Files: *\nLicense: CC-BY-SA-3.0\n\nFiles: b\nLicense: CC-BY-SA-3.0\nby Somebody\n")
    recipe.packages.write_sources([package], tmp_path, tmp_path / "SOURCES.md")
    text = (tmp_path / "SOURCES.md").read_text()
    assert "| x-sounds | 1 | CC-BY-SA-3.0 |" in text and "by Somebody" in text


def test_recordings_that_cannot_be_read_are_named_and_many_of_them_end_it(recipe, tmp_path):
    t = np.arange(8000) / 8000
    files = []
    for i in range(41):
        soundfile.write(tmp_path / f"{i}.wav", np.zeros(8000) if i == 0 else np.sin((900 + 9 * i) * t), 8000)
        files.append(recipe.recordings.Recording("animal", "animal", str(i), "train", tmp_path / f"{i}.wav"))
    sounds, problems = recipe.scenes.load_sounds(files)
    assert len(sounds) == 40 and len(problems) == 1 and "0.wav" in problems[0]
    for i in range(1, 4):
        (tmp_path / f"{i}.wav").write_bytes(b"RIFF")
    with pytest.raises(AudioError, match="4 of 41 recordings cannot be used"):
        recipe.scenes.load_sounds(files)


def test_one_sound_under_two_names_is_not_in_two_splits(recipe, tmp_path):
    """Debian's ram and mountain goat are one recording, in two files of different bytes."""
    t = np.arange(8000) / 8000
    files = []
    for name, split in (("goat.wav", "test"), ("ram.wav", "train"), ("cow.wav", "test")):
        wave = 0.5 * np.sin((3000 if name == "cow.wav" else 2000) * t)
        wave = np.append(wave, np.zeros(800)) if name == "goat.wav" else wave
        soundfile.write(tmp_path / name, wave, 8000, subtype="PCM_16")
        files.append(recipe.recordings.Recording("animal", "animal", name, split, tmp_path / name))
    files += [recipe.recordings.Recording("animal", "animal", f"ram {i}", "train", files[1].path) for i in range(20)]
    sounds, problems = recipe.scenes.load_sounds(files)
    assert {r.source for r in sounds if r.split == "test"} == {"cow.wav"} and len(sounds) == 22
    assert problems == [f"{tmp_path / 'goat.wav'}: the same sound as ram.wav of the train split"]


def test_instruments_of_a_kit_are_read_without_empty_ones(recipe, tmp_path):
    (tmp_path / "drumkit.xml").write_text(
        "<drumkit_info><instrumentList>"
        "<instrument><name>Kick</name><layer><filename>k1.wav</filename></layer></instrument>"
        "<instrument><name>17</name><filename>emptySample.flac</filename></instrument>"
        "</instrumentList></drumkit_info>"
    )
    assert list(recipe.recordings.instruments(tmp_path / "drumkit.xml")) == [("Kick", ["k1.wav"])]


def test_both_configurations_are_read_and_belong_together():
    cold_start = load_config(RECIPE / "cold_start.yaml")
    grpo = parse_options(["--config", str(RECIPE / "grpo.yaml")])
    assert [stage.kind for stage in cold_start.stages] == ["tagging"] + ["sft"] * 4
    assert grpo.model.model == cold_start.output and grpo.data.data == cold_start.data
    assert {cold_start.data, cold_start.eval_data, grpo.data.eval_data} == {
        f"data/real/{split}.json" for split in SPLITS
    }, "the test split is for the end"
