"""`judge_audio`: the clips go to an endpoint beside the text of `thinking`, nowhere else, and never twice."""

import base64
import io
import json
import wave

import numpy as np
import pytest
import soundfile
from test_rewards_judge import Endpoint, judge, says, verdict

from covo_rl.config import RewardConfig
from covo_rl.rewards import score
from covo_rl.rewards.columns import group_from_completions
from covo_rl.rewards.judge import LocalJudge
from covo_rl.rewards.judging import load_template, template_hashes
from covo_rl.rewards.transport import AUDIO_RATE, audio_parts
from covo_rl.types import Clip, Example

GOOD = "<think>It rings on, so it is a bell.</think><answer>bell</answer>"
TONE = np.sin(2 * np.pi * 440 * np.arange(24_000) / 48_000).astype(np.float32) * 0.5  # half a second at 48 kHz


def reply(content):
    text = content if isinstance(content, str) else content[-1]["text"]
    return says(verdict(text))


@pytest.fixture
def endpoint():
    server = Endpoint(reply)
    yield server
    server.server.shutdown()
    server.server.server_close()


def example(*clips, **columns):
    return Example("r", clips, "What rings?", ("bell", "knock"), "bell", columns)


def table(the_judge, *examples, completion=GOOD):
    groups = [group_from_completions(one, [completion]) for one in examples]
    return score(groups, RewardConfig(rewards="consistency,thinking"), judge=the_judge)


def clip(scale=1.0):
    return Clip(array=TONE * scale, sampling_rate=48_000)


def asked(server):
    return [body["messages"][0]["content"] for _, body in server.requests]


def test_clips_are_sent_as_input_audio_before_the_text_of_thinking(endpoint, tmp_path):
    stereo = tmp_path / "two.flac"
    soundfile.write(stereo, np.stack([TONE, TONE], axis=1), 48_000)
    found = table(judge(endpoint.url, hears=True), example(clip(), Clip(path=str(stereo))))
    assert found.rewards_PGR.tolist() == [[[1.0, 1.0]]] and found.extras["thinking_reason"] == ["because"]
    text = next(content for content in asked(endpoint) if isinstance(content, str))
    assert "You cannot hear the clip" in text and '"consistent"' in text  # whose verdict is about words alone
    *sounds, last = next(content for content in asked(endpoint) if not isinstance(content, str))
    assert last["type"] == "text" and "The audio is attached" in last["text"] and "It rings on" in last["text"]
    assert [part["type"] for part in sounds] == ["input_audio"] * 2
    for part in sounds:
        assert part["input_audio"]["format"] == "wav"
        with wave.open(io.BytesIO(base64.b64decode(part["input_audio"]["data"]))) as file:
            assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16_000)
            samples = np.frombuffer(file.readframes(9_999), "<i2") / 32_768
        assert len(samples) == 8_000
        middle = np.arange(2_000, 6_000)
        assert np.abs(samples[middle] - 0.5 * np.sin(2 * np.pi * 440 * middle / 16_000)).max() < 1e-3


def test_a_judge_that_does_not_hear_is_sent_text_alone(endpoint):
    table(judge(endpoint.url), example(clip()))
    assert len(endpoint.requests) == 2 and all(isinstance(content, str) for content in asked(endpoint))
    local = LocalJudge("tiny", generate=lambda prompts: [verdict(prompt) for prompt in prompts])
    assert table(local, example(clip())).rewards_PG.tolist() == [[2.0]]


def test_replies_are_kept_by_the_content_of_the_clips(endpoint, tmp_path):
    options = {"hears": True, "cache": tmp_path / "cache"}
    path = tmp_path / "a.wav"
    soundfile.write(path, TONE, 48_000)
    same = Clip(data=path.read_bytes())
    table(judge(endpoint.url, **options), example(Clip(path=str(path))), example(same))
    assert len(endpoint.requests) == 2  # consistency once, thinking once: one content
    table(judge(endpoint.url, **options), example(same))
    assert len(endpoint.requests) == 2
    table(judge(endpoint.url, **options), example(clip(0.5)))
    assert len(endpoint.requests) == 3, "another sound is another question, the text alone is not"
    soundfile.write(path, TONE / 4, 48_000)
    table(judge(endpoint.url, **options), example(Clip(path=str(path))))
    assert len(endpoint.requests) == 4
    table(judge(endpoint.url, cache=tmp_path / "cache"), example(same))
    assert len(endpoint.requests) == 5, "a verdict with the sound is none without it"


def test_a_clip_that_cannot_be_sent_is_a_failure_with_its_name(endpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("covo_rl.rewards.transport.MAX_AUDIO", 30_000)  # 16 kB of samples are 21 kB of base64
    gone = Clip(path=str(tmp_path / "gone.wav"))
    found = table(judge(endpoint.url, hears=True), example(clip(), clip(0.5)), example(gone), example(clip()))
    assert np.isnan(found.rewards_PGR[:, 0, 1]).tolist() == [True, True, False]
    assert (
        "<array>, <array>: 0.0 MB as base64 of a 16000 Hz wav; a judge is sent at most"
        in found.missing[0, 0, "thinking"]
    )
    assert "shorten the clips, or leave judge_audio out" in found.missing[0, 0, "thinking"]
    assert "gone.wav" in found.missing[1, 0, "thinking"]
    assert all(why.startswith("failed: judge: ") for why in found.missing.values())
    assert len(endpoint.requests) == 2  # consistency, equal in all three, and the one clip that fits


def test_rows_without_clips_are_asked_about_their_text(endpoint):
    table(judge(endpoint.url, hears=True), example())
    assert all(isinstance(content, str) and "You cannot hear the clip" in content for content in asked(endpoint))


def test_a_minute_is_two_and_a_half_megabytes():
    (part,) = audio_parts([Clip(array=np.zeros(60 * AUDIO_RATE, np.float32), sampling_rate=AUDIO_RATE)])
    assert len(part["input_audio"]["data"]) == pytest.approx(60 * AUDIO_RATE * 2 * 4 / 3, abs=100)


def test_the_record_names_the_prompt_that_was_used():
    assert set(template_hashes(True)) == {"consistency.v1", "content.v1", "thinking_audio.v1", "emotion_audio.v1"}
    blind, hearing = (load_template(name).partition("QUESTION")[2] for name in ("thinking.v1", "thinking_audio.v1"))
    assert blind == hearing


def test_rollouts_of_a_run_are_judged_with_their_clips(endpoint, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from covo_rl.rewards.cli import app

    monkeypatch.setenv("COVO_RL_CACHE", str(tmp_path))
    soundfile.write(tmp_path / "a.wav", TONE, 48_000)
    row = {"id": "r", "question": "What rings?", "choices": ["bell"], "answer": "bell", "completion": GOOD}
    (tmp_path / "rows.jsonl").write_text(json.dumps({**row, "clips": [str(tmp_path / "a.wav")]}))
    words = ["--rewards", "thinking", "--judge", f"openai:m@{endpoint.url}", "--judge-audio"]
    files = ["--input", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    result = CliRunner().invoke(app, ["score", *words, *files])
    assert result.exit_code == 0, result.output
    assert asked(endpoint)[0][0]["type"] == "input_audio"
    wrong = CliRunner().invoke(app, ["score", *words[:2], "--judge", "transformers:x", "--judge-audio", *files])
    assert wrong.exit_code == 2 and "reads text only" in wrong.stderr
