"""Measures of speech, by numbers that can be checked by hand, and the independent digit probe on real speech."""

import importlib.util

import numpy as np
import pytest

from covo_rl.speech.measures import (
    LinearProbe,
    MissingMeasure,
    code_use,
    corpus_error_rate,
    mel_features,
    pesq,
    pitch_errors,
    stoi,
    word_features,
)
from covo_rl.synth.speech import utterance


def test_codes_and_words_are_counted():
    assert code_use([[0, 1, 1], [3]], 8) == 3 / 8
    # 1 of 3 words wrong, then 1 word too many beside 2: 2 errors for 5 words
    assert corpus_error_rate(["one two three", "four five"], ["one six three", "four five five"]) == pytest.approx(0.4)


def test_features_of_a_word_are_means_of_its_parts():
    frames = np.arange(10.0)[:, None]
    features = word_features(frames, [("a", 0.0, 0.4), ("b", 0.4, 1.0), ("tiny", 0.95, 0.96)], 10, parts=2)
    assert features.tolist() == [[0.5, 2.5], [5.0, 8.0], [9.0, 9.0]]


def test_a_probe_reads_what_is_linear_and_nothing_else():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 3))
    linear = np.where(x[:, 0] + x[:, 1] > 0, "up", "down").tolist()
    parity = np.where(x[:, 0] * x[:, 1] > 0, "same", "other").tolist()
    assert LinearProbe(x[:200], linear[:200]).accuracy(x[200:], linear[200:]) > 0.95
    assert LinearProbe(x[:200], parity[:200]).accuracy(x[200:], parity[200:]) < 0.65


def test_pitch_errors_by_hand():
    true = np.array([0.0] + [100 * 2 ** (i / 12) for i in range(12)])
    octave = pitch_errors([true], [true * 2])
    assert octave.semitones == pytest.approx(12) and octave.correlation == pytest.approx(1) and octave.voicing == 1
    assert octave.contour == pytest.approx(0)  # an octave off throughout
    backwards = pitch_errors([true], [np.append(0, true[:0:-1])])
    assert backwards.correlation == pytest.approx(-1) and backwards.semitones == pytest.approx(6)
    silent = pitch_errors([true, true], [true, 0 * true])
    assert (silent.semitones, silent.correlation) == (0, pytest.approx(0.5)) and silent.voicing == pytest.approx(
        (13 + 1) / 26
    )
    assert pitch_errors([true], [0 * true]).semitones == float("inf")
    with pytest.raises(ValueError, match="13 and 12 frames"):
        pitch_errors([true], [true[1:]])


def test_the_independent_probe_names_digits_of_unseen_voices_and_no_noise():
    spoken = {split: [utterance(split, i) for i in range(count)] for split, count in (("train", 30), ("test", 8))}
    words = {split: [word for u in there for word, _, _ in u.words] for split, there in spoken.items()}
    real = {split: np.vstack([mel_features(u.wave, u.words) for u in there]) for split, there in spoken.items()}
    probe = LinearProbe(real["train"], words["train"])
    assert probe.accuracy(real["test"], words["test"]) > 0.9
    rng = np.random.default_rng(0)
    noise = [mel_features(0.1 * rng.standard_normal(len(u.wave)), u.words) for u in spoken["test"]]
    assert probe.accuracy(np.vstack(noise), words["test"]) < 0.3


def test_intelligibility_falls_with_noise():
    clean, noise = utterance("test", 0).wave, np.random.default_rng(0).standard_normal(len(utterance("test", 0).wave))
    scores = [stoi(clean, clean + level * noise) for level in (0, 0.05, 1)]
    assert scores[0] == pytest.approx(1) and scores == sorted(scores, reverse=True) and scores[2] < 0.6
    with pytest.raises(ValueError, match="both must be of the same clip"):
        stoi(clean, clean[1:])


def test_pesq_is_measured_or_says_what_it_needs():
    clean = utterance("test", 0).wave
    if importlib.util.find_spec("pesq"):
        assert pesq(clean, clean) > 4
    else:
        with pytest.raises(MissingMeasure, match="pip install pesq"):
            pesq(clean, clean)
