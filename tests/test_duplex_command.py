"""`covo-rl duplex run`: a sound file in; both channels, the turns and the session out."""

import json

import numpy as np
import pytest
import soundfile
import torch
from duplex_cases import SAMPLED, FixedFeatures, duplex_family
from speaking_cases import small_decoder

from covo_rl.audio import AudioError
from covo_rl.cli import main
from covo_rl.duplex.grid import CHUNK_SAMPLES, LOOK_AHEAD_SAMPLES
from covo_rl.duplex.ids import DuplexIds, DuplexIdsError
from covo_rl.duplex.layout import ChunkDecision, DuplexHistory, build
from covo_rl.duplex.recording import read_session
from covo_rl.duplex.session import DuplexSession
from covo_rl.duplex.stream_files import read_stream
from covo_rl.models.covo_audio.voice import Voice
from covo_rl.run.commands import duplex


@pytest.fixture
def opened(monkeypatch):
    """The session that the command opens: two chunks of listening, then a reply."""
    sessions = []

    def open_session(model, adapter, device, temperature, **options):
        family, ids = duplex_family()
        live = DuplexSession(family, FixedFeatures(), text=SAMPLED, codes=SAMPLED, **options)
        live.follow([ChunkDecision(ids.think)] * 2 + [ChunkDecision(ids.shift), ChunkDecision(40)])
        sessions.append(live)
        return live

    monkeypatch.setattr(duplex, "open_session", open_session)
    monkeypatch.setattr("covo_rl.speech.voices.open_voice", lambda *_, **__: Voice(small_decoder()))
    return sessions


def test_a_file_becomes_both_channels_and_a_session_that_can_be_built_again(tmp_path, opened, capsys):
    rate = 16_000
    sound = 0.1 * np.sin(np.arange(rate) / 9)
    soundfile.write(tmp_path / "both.wav", np.stack([sound, 0 * sound], 1), rate)
    words = ["duplex", "run", "--model", "m", "--audio", str(tmp_path / "both.wav"), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2 and "two channels" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--channel", "left", "--tail", "0.6", "--max-turn-seconds", "0.32"])
    assert not stopped.value.code
    said = capsys.readouterr().out
    assert "0.48 s  begins to speak" in said and "is silent (max_turn_seconds)" in said
    both_T2, rate = soundfile.read(tmp_path / "out" / "stereo.wav")
    assert rate == 24_000 and abs(both_T2[2000:20000, 0]).max() == pytest.approx(0.1, abs=0.01)
    start = 4 * CHUNK_SAMPLES + 308  # SHIFT in chunk 2, the first codes in chunk 3
    assert not both_T2[:start, 1].any() and both_T2[start : start + 960, 1].any()
    events = json.loads((tmp_path / "out" / "events.json").read_text())
    assert list(events) == ["id", "seconds", "language", "turns", "events", "source", "seed"]
    turn = events["turns"][0]
    assert turn["channel"] == "model" and turn["start"] == pytest.approx(start / 24_000)
    assert events["seconds"] == pytest.approx(len(both_T2) / 24_000) and events["source"] == ["both.wav"]
    (live,) = opened
    system_ids, decisions = read_session(tmp_path / "out" / "session.json", DuplexIds.of(live.family))
    features_CD = FixedFeatures().features_CD[: len(decisions)]
    assert build(DuplexHistory(system_ids, tuple(decisions), features_CD), live.ids, ended=True).ids == live.context.ids
    latency = json.loads((tmp_path / "out" / "session.json").read_text())["latency"]
    assert latency["starts"][0]["algorithmic"] == pytest.approx(start / 24_000)
    assert set(latency["real_time_factors"]) == {"listening", "speaking"} and "late" not in latency
    assert turn["interrupted_at"] == turn["end"]  # by the limit
    stream, _ = read_stream(tmp_path / "out")
    assert stream.turns_of("user") == [] and stream.source == ("both.wav",)
    tail_T = both_T2[24_500:38_000, 0]
    assert 0 < np.abs(tail_T).max() < 0.01 and (np.diff(tail_T) != 0).mean() > 0.5  # a room, not zeros


def test_a_file_of_two_channels_that_was_cut_is_refused_and_channels_that_cancel_out_are_not(tmp_path):
    path = tmp_path / "both.wav"
    sound = 0.1 * np.sin(np.arange(16_000) / 9)
    soundfile.write(path, np.stack([sound, -sound], 1), 16_000)
    left_T, right_T = (duplex._user_channel(path, channel, 0.0, 0) for channel in duplex.CHANNELS)
    assert np.allclose(left_T, -right_T, atol=2e-4) and left_T.max() > 0.09
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(AudioError, match=r"both\.wav: truncated"):
        duplex._user_channel(path, "left", 0.0, 0)


def test_all_that_is_wrong_with_the_options_is_said_before_a_model_loads(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(SystemExit):
        main(["duplex", "run", "--model", "m", "--audio", "no.wav", "--output", str(tmp_path / "full"),
              "--channel", "both", "--voice", "nobody"])  # fmt: skip
    said = capsys.readouterr().err
    for part in ("--audio no.wav: no such file", "is not an empty folder", "--channel 'both'", "--voice nobody"):
        assert part in said


def test_a_name_and_a_place_that_cannot_be_written_are_said_before_a_model_loads(tmp_path, capsys):
    audio = tmp_path / "caf\udce9.wav"  # bytes of a name that are no UTF-8
    soundfile.write(tmp_path / "a.wav", np.zeros(2400), 24_000)
    (tmp_path / "a.wav").rename(audio)
    with pytest.raises(SystemExit):
        main(["duplex", "run", "--model", "m", "--audio", str(audio), "--output", str(audio / "out")])
    said = capsys.readouterr().err
    assert "cannot be written" in said and "holds the lone surrogate" in said


def test_a_machine_that_is_too_slow_for_real_time_is_told_by_how_much(tmp_path, opened, capsys, monkeypatch):
    from covo_rl.duplex.latency import ChunkCost

    soundfile.write(tmp_path / "a.wav", 0.1 * np.ones(24_000), 24_000)
    costs = [ChunkCost(k, True, 0.0, 0.4) for k in range(20)]
    monkeypatch.setattr("covo_rl.duplex.realtime.rehearse", lambda *_: costs)
    with pytest.raises(SystemExit) as stopped:
        main(["duplex", "run", "--model", "m", "--audio", str(tmp_path / "a.wav"), "--output", str(tmp_path / "out"),
              "--realtime"])  # fmt: skip
    assert stopped.value.code == 2 and "2.50 times as long as the sound" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and opened[0].decisions == []


def test_a_model_hears_with_its_own_streaming_encoder(tmp_path):
    """From a folder: what the session holds is built of its decisions and the features of the whole file."""
    family, ids = duplex_family()
    family.model.save_pretrained(tmp_path)
    family.processor.save_pretrained(tmp_path)
    live = duplex.open_session(str(tmp_path), None, "cpu", 1.0, max_turn_seconds=0.32, max_positions=200)
    live.follow([ChunkDecision(ids.think), ChunkDecision(ids.shift), ChunkDecision(40), ChunkDecision(ids.break_)])
    samples = np.random.default_rng(0).normal(size=5 * CHUNK_SAMPLES + 7).astype(np.float32) / 10
    for start in range(0, len(samples), 2500):
        live.push(samples[start : start + 2500])
    live.end()
    features_CD = live.encoder.offline_features(samples)
    context = build(DuplexHistory(live.system_ids, tuple(live.decisions), features_CD), live.ids, ended=True)
    assert live.ids == ids and len(live.decisions) == 6 and context.ids == live.context.ids
    assert (context.features_SD - live.context.features_SD).abs().max() < 1e-5
    assert live.encoder.mel.look_ahead == LOOK_AHEAD_SAMPLES


def test_a_model_that_was_not_made_for_it_is_made_ready_once(tmp_path, capsys):
    """Refused, prepared with ids that are named, and then a session of the copy opens."""
    family, ids = duplex_family()
    family.model.config.duplex = None
    family.model.save_pretrained(tmp_path / "plain")
    family.processor.save_pretrained(tmp_path / "plain")
    with pytest.raises(DuplexIdsError, match="not made to listen while it speaks"):
        duplex.open_session(str(tmp_path / "plain"), None, "cpu")

    def prepare(*more, source="plain", target="ready"):
        words = ["--model", str(tmp_path / source), "--output", str(tmp_path / target), *more]
        with pytest.raises(SystemExit) as stopped:
            main(["duplex", "prepare", *words])
        return stopped.value.code, " ".join("".join(capsys.readouterr()).split())

    for words, message in (
        ([], "their rows look trained"), (["--use-ids", "20,21"], "give 3 ids"),
        (["--use-ids", "20;21;22"], "is no whole number"), (["--use-ids", "20,21,9999"], "is no id of the text"),
        (["--use-ids", "20,21,22", "--silence-codes", "99"], "codes, not ids"),
    ):  # fmt: skip
        code, said = prepare(*words)
        assert code == 2 and message in said and not (tmp_path / "ready").exists()
    code, said = prepare("--use-ids", "20,21,22", "--silence-codes", "1,2")
    named = family.tokenizer.convert_ids_to_tokens(20)
    assert not code and f"think, shift, break are the tokens {named!r} (20)" in said
    live = duplex.open_session(str(tmp_path / "ready"), None, "cpu")
    assert (live.ids.shift, live.ids.silence_codes) == (ids.shift, (1, 2))
    before, after = (f.model.state_dict() for f in (family, live.family))
    changed = {name: (after[name] != before[name]).any(-1).nonzero().flatten().tolist()
               for name in before if not torch.equal(after[name], before[name])}  # fmt: skip
    assert changed == {"llm.model.embed_tokens.weight": [20, 21, 22], "llm.lm_head.weight": [20, 21, 22]}
    assert "has a duplex section already" in prepare(source="ready", target="again")[1]
    assert "exists" in prepare("--use-ids", "20,21,22")[1]
