"""Formant speech: exact times and fundamentals, voices that no two splits share, rows that depend on their number."""

import json
import wave as wav

import numpy as np
import pytest

from covo_rl.synth.speech import DIGITS, SPEECH_SPLITS, TONES, say_digits, speakers, utterance, write_speech


def test_an_utterance_depends_on_its_number_only(tmp_path):
    for name, count in (("one", 3), ("two", 2)):
        write_speech(tmp_path / name, split="test", count=count, seed=7)
    rows = [json.loads(line) for line in (tmp_path / "one/rows.jsonl").read_text().splitlines()]
    assert (tmp_path / "one/rows.jsonl").read_text().startswith((tmp_path / "two/rows.jsonl").read_text())
    again = utterance("test", 2, 7)
    assert rows[2]["text"] == again.text and [tuple(word) for word in rows[2]["words"]] == list(again.words)
    with wav.open(str(tmp_path / "one" / rows[2]["audio"])) as file:
        assert (file.getframerate(), file.getnchannels()) == (24_000, 1)
        pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    assert np.abs(pcm / 32_767 - again.wave).max() < 2e-5
    assert not np.array_equal(utterance("test", 2, 8).wave[:960], again.wave[:960])


def test_no_voice_is_in_two_splits():
    voices = {split: speakers(count, 0, split) for split, count in SPEECH_SPLITS.items()}
    everyone = [speaker for split in voices.values() for speaker in split]
    assert len({speaker.name for speaker in everyone}) == len({speaker.f0_hz for speaker in everyone}) == 96
    for split, there in voices.items():
        assert utterance(split, 5).speaker in there
        assert [speaker.sex for speaker in there[:3]] == ["female", "male", "female"]
    assert min(s.f0_hz for s in everyone if s.sex == "female") > max(s.f0_hz for s in everyone if s.sex == "male")


def test_words_stand_where_their_times_say():
    spoken = say_digits(["one", "nine"], speakers(1)[0], np.random.default_rng(0), ["level", "level"])
    energy = [np.mean(spoken.wave[round(24_000 * a) : round(24_000 * b)] ** 2) for _, a, b in spoken.words]
    between = spoken.wave[round(24_000 * spoken.words[0][2]) + 360 : round(24_000 * spoken.words[1][1]) - 360]
    assert min(energy) > 300 * np.mean(between**2)
    ends = [second for _, start, end in spoken.words for second in (start, end)]
    assert ends[0] > 0 and ends == sorted(ends) and ends[-1] < len(spoken.wave) / 24_000
    assert len(spoken.wave) == 960 * (len(spoken.wave) // 960) == 240 * len(spoken.f0_Z)


@pytest.mark.parametrize("tone", TONES)
def test_the_wave_repeats_with_the_fundamental_that_it_names(tone):
    for speaker in speakers(2):
        spoken = say_digits(["one"], speaker, np.random.default_rng(3), [tone])
        voiced = np.flatnonzero(spoken.f0_Z)
        rise = 12 * np.log2(spoken.f0_Z[voiced[-4]] / spoken.f0_Z[voiced[3]])
        assert rise == pytest.approx(TONES[tone][1] - TONES[tone][0], abs=2)
        distances = []
        for frame in voiced[4:-4]:
            at, period = 240 * frame + 120, 24_000 / spoken.f0_Z[frame]
            lags = np.arange(int(0.7 * period), int(1.4 * period))
            here = spoken.wave[at - 480 : at + 480]
            similar = [here[:-lag] @ here[lag:] / np.sqrt((here[:-lag] @ here[:-lag]) * (here[lag:] @ here[lag:]))
                       for lag in lags]  # fmt: skip
            distances.append(12 * np.log2(lags[np.argmax(similar)] / period))
        assert abs(np.median(distances)) < 0.3 and np.mean(np.abs(distances)) < 0.5


def test_what_cannot_be_said_is_refused():
    speaker, rng = speakers(1)[0], np.random.default_rng(0)
    for words, tones, message in (
        (["ten"], None, "no word is called 'ten'; there are zero"), ([], None, "at least one word"),
        (["one"], ["high"], "no tone is called 'high'; there are level"), (["one"], [], "1 words and 0 tones"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            say_digits(words, speaker, rng, tones)
    with pytest.raises(ValueError, match="no split is called 'dev'; there are train, validation, test"):
        utterance("dev", 0)
    assert set(say_digits(DIGITS, speaker, rng).tones) <= set(TONES)
