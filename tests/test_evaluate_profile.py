"""Profiling: pass rates with audio and with silence decide which rows are kept; the kept rows are untouched."""

import json
import wave

import numpy as np
import pytest

from covo_rl.evaluate.profile import Rule, run_profile
from covo_rl.evaluate.records import group_from_text
from covo_rl.evaluate.sets import EvalInputError

PETS = ["dog", "cat", "cow", "hen"]
#: row -> right replies of 4, with audio and with silence.
RIGHT = {"never": (0, 0), "always": (4, 4), "sometimes": (2, 1), "silent": (3, 3), "both": (1, 2)}


class Store:
    def key(self, clip):
        return clip

    def waveform(self, clip):
        return (np.ones(80, dtype=np.float32) if clip.path else clip.array), 8000


class Fake:
    clips = Store()

    def answer(self, examples, *, greedy, num_generations, seed):
        assert (greedy, num_generations) == (False, 4)
        groups = []
        for example in examples:
            silent = example.clips[0].array is not None
            right = RIGHT[example.id][int(silent)]
            answers = ["dog"] * right + ["cat"] * (4 - right)
            groups.append(group_from_text(example, [f"<think>Hm.</think><answer>{a}</answer>" for a in answers]))
        return groups


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setattr("covo_rl.evaluate.runner.load_answerer", lambda *_, **__: Fake())
    rows = []
    for name in RIGHT:
        with wave.open(str(tmp_path / f"{name}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(b"\0\1" * 80)
        rows.append(
            {"id": name, "audio_id": f"{name}.wav", "question": f"{name}?", "choices": PETS, "answer": "dog", "x": [1]}
        )
    return rows


def profile(tmp_path, data, **options):
    return run_profile(data, tmp_path, tmp_path / "out", **{"num_generations": 4, **options})


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_rows_solved_sometimes_and_not_from_silence_are_kept(tmp_path, rows, suffix):
    data = tmp_path / f"train.{suffix}"
    data.write_text(json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows)))
    result = profile(tmp_path, data)
    assert result["verdicts"] == {"never solved": 1, "always solved": 1, "kept": 2, "solved from silence": 1}
    # Pass rates 0, 1, 1/2, 3/4, 1/4; from silence 0, 1, 1/4, 3/4, 1/2.
    assert result["mean_pass_rate"] == pytest.approx(0.5)
    assert result["mean_silent_pass_rate"] == pytest.approx(0.5)
    text = (tmp_path / "out" / f"filtered.{suffix}").read_text()
    kept = json.loads(text) if suffix == "json" else list(map(json.loads, text.splitlines()))
    assert kept == [rows[2], rows[4]]
    lines = [json.loads(line) for line in (tmp_path / "out" / "profile.jsonl").read_text().splitlines()]
    assert lines[2]["pass_at_k"] == {"1": 0.5, "2": pytest.approx(5 / 6), "4": 1.0}


def test_bounds_of_the_rule():
    rule = Rule(min_rate=0.2, max_rate=0.8, max_silent_rate=0.25)
    verdicts = [rule.verdict(*rates) for rates in ((0.1, 0), (0.9, 0), (0.5, 0.25), (0.5, 0.3), (0.5, None))]
    assert verdicts == ["too hard", "too easy", "kept", "solved from silence", "kept"]


def test_another_profile_in_the_same_folder_is_refused(tmp_path, rows):
    data = tmp_path / "train.json"
    data.write_text(json.dumps(rows))
    profile(tmp_path, data)
    with pytest.raises(EvalInputError, match="holds another evaluation"):
        profile(tmp_path, data, seed=1)
