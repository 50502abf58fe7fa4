"""The demo's judges: what they say of recordings themselves, of silence, and where a target is missed."""

import json

import numpy as np
import pytest

from covo_rl.cli import main
from covo_rl.speech import demo
from covo_rl.synth.speech import utterance


def test_recordings_themselves_pass_every_judge_and_silence_none():
    told, said = [utterance("train", i, 1000) for i in range(30)], [utterance("test", i) for i in range(4)]
    silence = [np.zeros_like(u.wave) for u in said]
    figures = demo.judge_waves(told, said, [u.wave for u in said], silence)
    assert figures["wave_digits"] > 0.9 and figures["shuffled_digits"] < 0.35
    assert figures["wave_f0"] < 0.2 and figures["wave_contour"] < 0.2
    assert figures["wave_f0_correlation"] > 0.9 and figures["wave_voicing"] > 0.8
    assert figures["griffin_lim_f0"] <= 0.3 and figures["wave_stoi"] == pytest.approx(1, abs=1e-4)
    figures = demo.judge_waves(told, said, silence, silence)
    assert figures["wave_f0"] == float("inf") and figures["wave_f0_correlation"] == 0 and figures["wave_digits"] < 0.35


def test_a_target_is_missed_by_one_seed_or_by_the_mean():
    fine = {name: target if target is not None else 0.5 for name, (_, _, target) in demo.FIGURES.items()}
    fine |= {"code_digits": 0.9, "wave_digits": 0.8}

    def missed(*seeds):
        return [name for name in demo.FIGURES if demo.misses(name, [fine | seed for seed in seeds])]

    assert missed({}, {}) == []
    assert missed({}, {"wave_f0": 1.1}) == ["wave_f0"] and missed({"wave_f0": float("inf")}, {}) == ["wave_f0"]
    assert missed({"wave_digits": 0.76}, {"wave_digits": 0.85}) == []
    assert missed({"wave_digits": 0.76}, {"wave_digits": 0.80}) == ["wave_digits"]
    assert missed({"wave_digits": 0.74}, {"wave_digits": 0.95}) == ["wave_digits"]
    assert missed({"code_sex": 0.9}) == ["code_sex"] and missed({"wer": float("nan")}) == ["wer"]


@pytest.mark.slow
def test_the_shipped_models_speak(tmp_path):
    """covo-rl speech demo: half of its utterances, on one seed."""
    with pytest.raises(SystemExit) as exit:
        main(["speech", "demo", str(tmp_path), "--seed", "0", "--count", "20"])
    assert exit.value.code == 0
    content = json.loads((tmp_path / "figures.json").read_text())
    assert content["missed"] == []
    assert len(list((tmp_path / "seed0").glob("*_synthesised.wav"))) == 5
