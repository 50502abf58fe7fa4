"""Spoken replies in a report: played by the run's decoder as far as there is room, and said where they are not."""

import base64
import io

import numpy as np
import pytest
import soundfile
from test_report_payload import made_run, notes_of, payload_of, rollout_row
from token2wav_cases import FOLDER, decoder
from typer.testing import CliRunner

from covo_rl.audio import resample
from covo_rl.config import ConfigError, Options
from covo_rl.models.covo_audio.voice import Voice
from covo_rl.models.weights import WeightsError
from covo_rl.run.checks import check_code_options
from covo_rl.run.report import replies
from covo_rl.run.report.page import app, report_page
from covo_rl.run.report.replies import decoder_codes

SIZE = decoder_codes(str(FOLDER))
CODES = [1, 5, 2, 0, SIZE - 1]


def spoken_run(folder, codes=CODES, steps=1, **config):
    rows = [rollout_row(0, 0, completion_codes=codes), rollout_row(0, 1, completion_codes=[])]
    return made_run(folder, steps=steps, rows=rows, **config)


def replies_of(payload):
    return [rollout for group in payload["groups"] for rollout in group["rollouts"] if "codes" in rollout]


def test_a_reply_sounds_as_the_decoder_says_its_codes(tmp_path):
    payload = payload_of(spoken_run(tmp_path, speech_decoder=str(FOLDER)))
    (reply,) = replies_of(payload)
    clip = payload["clips"][reply["reply"]]
    assert reply["codes"] == CODES and payload["counts"]["sounds_embedded"] == 1
    wave_T = Voice(decoder()).say(CODES).numpy()
    assert clip["seconds"] == len(CODES) / 25 == len(wave_T) / 24_000
    heard, rate = soundfile.read(io.BytesIO(base64.b64decode(clip["src"].partition(",")[2])))
    own = resample(wave_T, 24_000, rate)  # an mp3 begins some samples late
    likeness = np.correlate(heard, own, "full") / (np.linalg.norm(own) * np.linalg.norm(heard))
    assert likeness.max() > 0.9


def test_the_speaker_that_lies_in_the_decoder_s_folder_speaks(tmp_path):
    folder = tmp_path / "decoder"
    decoder().save_pretrained(folder)
    np.save(folder / "speaker_embed.npy", np.ones(decoder().config.flow.spkr_embed_dim, np.float32))
    said = [
        payload_of(spoken_run(tmp_path / f"run{n}", speech_decoder=str(where)))["clips"]
        for n, where in enumerate((FOLDER, folder))
    ]
    plain, voiced = (next(iter(clips.values()))["src"] for clips in said)
    assert plain != voiced


def test_what_was_heard_stands_beside_its_component_whatever_its_arguments(tmp_path):
    one, other = "spoken(part='answer')", "spoken(recogniser='wave')"
    alone = {"rewards": {one: 0.5}, "spoken_reason": "heard 'a'", "codes_reason": "of none"}
    both = {
        "rewards": {one: 0.5, other: 1.0},
        f"{one}/spoken_reason": "heard 'a'",
        f"{other}/spoken_reason": "heard 'b'",
    }
    groups = payload_of(made_run(tmp_path, 1, rows=[rollout_row(0, **alone), rollout_row(1, **both)]))["groups"]
    assert [group["rollouts"][0]["reasons"] for group in groups] == [
        {one: "heard 'a'"}, {one: "heard 'a'", other: "heard 'b'"}
    ]  # fmt: skip
    assert groups[0]["columns"] == {"task": "sound", "codes_reason": "of none"}


def test_without_a_decoder_the_codes_are_there_and_a_note(tmp_path):
    payload = payload_of(spoken_run(tmp_path))
    assert replies_of(payload)[0]["reply"] is None and payload["clips"] == {}
    assert "1 replies hold audio codes that nothing plays" in notes_of(payload)
    played = payload_of(tmp_path, speech_decoder=str(FOLDER))
    assert replies_of(played)[0]["reply"] in played["clips"]


def test_a_decoder_that_cannot_be_read_is_noted_once(tmp_path):
    payload = payload_of(spoken_run(tmp_path, steps=3, speech_decoder=str(tmp_path / "nowhere")))
    assert notes_of(payload).count("replies are not played: speech_decoder") == 1
    assert [reply["reply"] for reply in replies_of(payload)] == [None] * 3


def test_codes_of_another_model_are_missing_with_the_reason(tmp_path):
    payload = payload_of(spoken_run(tmp_path, [1, SIZE], speech_decoder=str(FOLDER)))
    clip = payload["clips"][replies_of(payload)[0]["reply"]]
    assert clip["src"] is None and str(SIZE) in clip["note"] and payload["counts"]["sounds_missing"] == 1


def test_equal_replies_are_made_once_and_there_is_an_end_to_them(tmp_path, monkeypatch):
    made = []
    say = Voice.say
    monkeypatch.setattr(Voice, "say", lambda voice, codes: made.append(codes) or say(voice, codes))
    payload_of(spoken_run(tmp_path / "a", steps=3, speech_decoder=str(FOLDER)))
    assert made == [CODES]
    rows = [rollout_row(p, 0, completion_codes=[p, p + 1]) for p in range(3)]
    made_run(tmp_path / "b", steps=1, rows=rows, speech_decoder=str(FOLDER))
    monkeypatch.setattr(replies, "_MAX_SPOKEN", 4)
    payload = payload_of(tmp_path / "b")
    assert payload["counts"]["sounds_embedded"] == 2 and "1 replies are not played" in notes_of(payload)
    assert payload_of(tmp_path / "b", sounds="all")["counts"]["sounds_embedded"] == 3
    assert payload_of(tmp_path / "b", sounds="none")["counts"]["sounds_embedded"] == 0
    small = payload_of(tmp_path / "b", max_mb=0.204)
    assert small["counts"]["sounds_embedded"] < 2 and small["counts"]["bytes"] < 0.204e6


@pytest.mark.parametrize("codes", ["12", {"a": 1}, [1, -1], [True], [0.5], [2**40]])
def test_what_is_no_list_of_codes_is_left_out(tmp_path, codes):
    payload = payload_of(spoken_run(tmp_path, codes, speech_decoder=str(FOLDER)))
    assert not replies_of(payload) and "completion_codes that are no list of codes" in notes_of(payload)


def test_a_long_reply_is_cut_and_said_to_be(tmp_path, monkeypatch):
    monkeypatch.setattr(replies, "MAX_CODES", 3)
    payload = payload_of(spoken_run(tmp_path, speech_decoder=str(FOLDER)))
    assert replies_of(payload)[0]["codes"] == CODES[:3] and "cut after 3 audio codes" in notes_of(payload)


def test_the_command_plays_them_and_refuses_what_is_no_decoder(tmp_path):
    spoken_run(tmp_path)
    result = CliRunner().invoke(app, [str(tmp_path), "--speech-decoder", str(FOLDER)])
    assert result.exit_code == 0 and "1 sounds" in result.output, result.output
    assert "audio code" in (tmp_path / "report.html").read_text()
    refused = CliRunner().invoke(app, [str(tmp_path), "--speech-decoder", str(tmp_path)])
    assert isinstance(refused.exception, WeightsError)
    assert "config.json" in str(refused.exception)
    assert report_page(tmp_path, speech_decoder=str(FOLDER))


def test_a_run_refuses_a_decoder_that_is_not_its_model_s(tmp_path):
    options = Options()
    options.train.speech_decoder = str(FOLDER)
    check_code_options(options, range(300, 300 + SIZE))
    with pytest.raises(ConfigError, match="hold no audio codes: leave it out"):
        check_code_options(options, range(0))
    with pytest.raises(ConfigError, match=f"speaks {SIZE} audio codes, and the model has {SIZE + 1}"):
        check_code_options(options, range(300, 301 + SIZE))
    options.train.speech_decoder = str(tmp_path)
    with pytest.raises(WeightsError):
        check_code_options(options, range(5))
