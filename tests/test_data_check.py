import io

import numpy as np
import soundfile

from covo_rl.audio import resample
from covo_rl.data import duplicate_rows, overlap, row_problems
from covo_rl.types import Clip, Example

RATE = 16_000


def noise(seed, seconds=0.5, rate=RATE):
    return np.random.default_rng(seed).normal(0, 0.1, int(rate * seconds)).astype(np.float32)


def speech_like(seed, seconds=1.0):
    """A few gliding partials and a little noise: most energy under 3 kHz."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(RATE * seconds)) / RATE
    partials = sum(np.sin(2 * np.pi * (rng.uniform(200, 2500) * t + rng.uniform(-300, 300) * t**2)) for _ in range(5))
    return (0.08 * partials * (1 + np.sin(2 * np.pi * rng.uniform(2, 6) * t)) + noise(seed, seconds) / 50).astype("f4")


def clip(values, rate=RATE):
    return Clip(array=values, sampling_rate=rate)


def encoded(values, container, rate=RATE, subtype=None):
    buffer = io.BytesIO()
    soundfile.write(buffer, values, rate, format=container, subtype=subtype)
    return Clip(data=buffer.getvalue())


def row(name, sound, question="Which?", choices=("dog", "cat"), answer="cat"):
    clips = sound if isinstance(sound, tuple) else (clip(noise(sound)),)
    return Example(name, clips, question, choices, answer)


def test_check_names_every_kind_of_problem(tmp_path):
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF half a file")
    rows = [
        row("fine", 0),
        row("same", 1),
        row("same", 2),
        row("answer", 3, answer="fox"),
        row("case", 4, answer="Cat"),
        row("open", 5, choices=(), answer="anything"),
        row("none", 6, answer=None),
        row("missing", (Clip(path=str(tmp_path / "gone.wav")),)),
        row("broken", (clip(noise(7)), Clip(path=str(broken)))),
        row("long", (clip(noise(8, seconds=2.5)),)),
        row("nan", (clip(np.full(RATE, np.nan, np.float32)),)),
    ]
    found = [(problem.row_id, problem.what) for problem in row_problems(rows, max_clip_seconds=2)]
    assert [name for name, _ in found] == ["same", "answer", "missing", "broken", "long", "nan"]
    for (_, what), part in zip(
        found,
        [
            "2 rows have this id",
            "'fox'",
            "gone.wav",
            "broken.wav",
            "2.50 s long, at most 2 s can be taken: shorten",
            "NaN",
        ],
        strict=True,
    ):
        assert part in what
    assert [problem.row_id for problem in row_problems(rows)] == ["same", "answer", "missing", "broken", "nan"]


def test_a_file_is_looked_at_again_when_it_changes(tmp_path):
    path = tmp_path / "a.wav"
    rows = [row("r0", (Clip(path=str(path)),))]
    assert len(row_problems(rows)) == 1
    soundfile.write(path, noise(0), RATE)
    assert row_problems(rows) == []
    path.write_bytes(path.read_bytes()[:-2000])
    assert "truncated" in row_problems(rows)[0].what


def test_duplicates_share_sound_question_and_choices():
    rows = [
        row("first", 0),
        row("other sound", 1),
        row("other question", 0, question="What?"),
        row("other choices", 0, choices=("dog", "cat", "owl")),
        row("same", (encoded(noise(0), "WAV", subtype="FLOAT"),), question=" which? ", choices=("Cat", "Dog")),
        row("contradiction", 0, answer="dog"),
    ]
    found = duplicate_rows(rows)
    assert [problem.row_id for problem in found] == ["same", "contradiction"]
    assert found[0].what == "asks the same about the same sound as row first"
    assert "answers 'dog' where that answers 'cat'" in found[1].what


def test_overlap_tells_leaks_from_templates():
    pcm = (noise(0) * 32_767).astype(np.int16)
    train = [
        row("t0", (clip(pcm),)),
        row("t1", (clip(pcm),), question="How loud?"),
        row("t2", 1),
        row("t3", 2, question="Where?"),
        row("t4", (), question="Capital of France?", choices=("Paris", "Rome"), answer="Paris"),
    ]
    held_out = [
        row("same row", (encoded(pcm, "FLAC"),), choices=("cat", "dog")),
        row("same sound", (encoded(pcm, "WAV"),), question="Never asked?"),
        row("other answer", (encoded(pcm, "WAV"),), answer="dog"),
        row("template", 9),
        row("new", 10, question="Brand new?"),
        row("text", (), question="capital of  France", choices=("Rome", "Paris"), answer="paris"),
        row("broken", (clip(np.zeros(3, np.float32)),), question="Unrelated?"),
    ]
    found = overlap(train, held_out)
    assert [(item.kind, item.held_out_id, item.train_id, item.count, item.serious) for item in found] == [
        ("row", "same row", "t0", 1, True),
        ("audio", "same sound", "t0", 2, True),
        ("audio", "other answer", "t0", 2, True),
        ("question", "template", "t0", 2, False),
        ("row", "text", "t4", 1, True),
    ]
    assert str(found[1]) == "held-out row same sound has the same sound as training row t0 and 1 more"


def test_a_shared_clip_in_a_row_of_several_is_found():
    train = [row("t0", (clip(noise(0)), clip(noise(1))))]
    held_out = [row("h0", (clip(noise(2)), clip(noise(1))), question="Else?")]
    assert [(item.kind, item.train_id) for item in overlap(train, held_out)] == [("audio", "t0")]


def test_near_copies_are_found_and_other_takes_are_not():
    sounds = [speech_like(seed) for seed in range(6)]
    train = [row(f"t{i}", (clip(sound),), question=f"Q{i}") for i, sound in enumerate(sounds)]
    copies = {
        "mp3": encoded(sounds[0], "MP3"), "vorbis": encoded(sounds[1], "OGG"),
        "rate": clip(resample(sounds[2], RATE, 22_050), 22_050),
        "louder": clip(sounds[3] * 1.7), "late": clip(np.concatenate([noise(77, 0.05) / 100, sounds[4]])),
        "other": clip(speech_like(99)), "unlike": clip(noise(3, 1.0)),
    }  # fmt: skip
    held_out = [row(name, (copy,), question=name) for name, copy in copies.items()]
    assert overlap(train, held_out) == []
    found = overlap(train, held_out, near=True)
    assert [(item.kind, item.held_out_id, item.train_id) for item in found] == [
        ("near", name, f"t{i}") for i, name in enumerate(("mp3", "vorbis", "rate", "louder", "late"))
    ]
    assert not any(item.serious for item in found)
    assert overlap([], held_out, near=True) == [] == overlap(train, [], near=True)


def test_near_copies_of_the_built_in_set_do_not_exist():
    from covo_rl import synth

    def rows(split, count):
        return [
            row(
                r["id"],
                (clip(s.astype(np.float32) / 32_768, synth.RATE),),
                r["question"],
                tuple(r["choices"]),
                r["answer"],
            )
            for r, s in synth.samples(split, count)
        ]

    assert {item.kind for item in overlap(rows("train", 33), rows("test", 22), near=True)} <= {"question"}
