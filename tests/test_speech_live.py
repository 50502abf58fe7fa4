"""Sets of full duplex with `--model`: a session over each recording, its turns, its sound, what is heard of it."""

import json

import numpy as np
import pytest
import soundfile
from duplex_cases import FixedFeatures, duplex_family
from speech_layouts import edit_lines, write_layout, write_lines, write_wav

from covo_rl.data.files import read_record
from covo_rl.duplex.grid import CHUNK_SECONDS, sound_start
from covo_rl.duplex.layout import ChunkDecision
from covo_rl.duplex.session import DuplexSession
from covo_rl.evaluate.evaluation import run_request
from covo_rl.evaluate.runner import Request
from covo_rl.evaluate.sets import EvalInputError
from covo_rl.evaluate.speech import live
from covo_rl.speech.grid import RATE


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COVO_RL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with the small model that listens while it speaks."""
    folder = tmp_path_factory.mktemp("model")
    family, _ = duplex_family()
    family.model.save_pretrained(folder)
    family.processor.save_pretrained(folder)
    return folder


class Scripted(DuplexSession):
    """Says "no" for six chunks in each session, from the chunk `shift` on, and counts its sessions."""

    sessions = 0

    def __init__(self, family, shift, **options):
        self.shift = shift
        super().__init__(family, FixedFeatures(), system="Hi", **options)

    def reset(self):
        super().reset()
        Scripted.sessions += 1
        (no,) = self.family.tokenize("n", [])
        script = [self.ids.think] * self.shift + [self.ids.shift] + [no] * 6 + [self.ids.break_]
        self.follow([ChunkDecision(token) for token in [*script, *[self.ids.think] * 40]])


@pytest.fixture
def scripted(monkeypatch):
    Scripted.sessions = 0
    monkeypatch.setattr(DuplexSession, "of", lambda family, **options: Scripted(family, 16, **options))


def evaluate(tmp_path, name, data, model, **options):
    request = Request(set_=name, data=data, model=str(model), device="cpu", output=tmp_path / "out", **options)
    run_request(request, quiet=True)
    return read_record(tmp_path / "out/report.json")


#: SHIFT in chunk 16, at 2.72 s; it sounds a chunk later
START = sound_start(17) / RATE


def fdb(folder):
    data = write_layout("full-duplex-bench", folder)
    for path in data.glob("*/*/*.wav"):
        write_wav(path, 5.0)
    return data


def test_a_session_takes_turns_in_full_duplex_bench_and_needs_no_transcriber(tmp_path, model, scripted):
    report = evaluate(tmp_path, "full-duplex-bench", fdb(tmp_path / "data"), model)
    turn = report["subsets"]["candor_turn_taking"]
    assert (turn["score"], turn["from"], turn["missing"]) == (0, ["events"], 0), "0.96 s of one word take no turn"
    assert report["subsets"]["icc_backchannel"]["frequency"] == pytest.approx(1 / 5), "it is a back-channel"
    assert "--scorer-model vad" in report["subsets"]["user_backchannel"]["absent"], "it does not know the user's turns"
    assert report["prompt"]["name"] == "a live session"
    record = json.loads((tmp_path / "out/rows.jsonl").read_text("utf-8").splitlines()[0])
    (said,) = record["turns"]
    assert said["start"] == pytest.approx(START) and said["end"] - said["start"] == pytest.approx(6 * CHUNK_SECONDS)
    assert (said["text"], len(said["codes"]), record["samples"]) == ("nnnnnn", 24, 5 * RATE)


def test_what_is_heard_of_a_session_stands_beside_its_own_turns(tmp_path, model, scripted, monkeypatch):
    data = fdb(tmp_path / "data")

    def loud(codes, voice):
        return {name: np.full(960 * len(own), 0.5, np.float32) for name, own in codes.items()}

    monkeypatch.setattr(live, "voiced_codes", loud)
    words = [{"text": word, "start": 2.9 + i / 4, "end": 3.1 + i / 4} for i, word in enumerate("abcd")]
    heard = [{"id": f"candor_turn_taking/{item}", "text": "a b c d", "words": words} for item in "12"]
    asr, vad = write_lines(tmp_path / "asr.jsonl", heard), tmp_path / "vad.jsonl"
    overlap = "user_backchannel/1"
    write_lines(vad, [{"id": f"{overlap}~input", "segments": [{"start": 0.0, "end": 2.4}, {"start": 3.1, "end": 3.5}]}])
    report = evaluate(
        tmp_path, "full-duplex-bench", data, model, voice="builtin:speech_decoder", transcriber=[f"file:{asr}"],
        scorer_model=[f"vad=file:{vad}"], subset=["candor_turn_taking", "user_backchannel"],
    )  # fmt: skip
    turn, user = report["subsets"]["candor_turn_taking"], report["subsets"]["user_backchannel"]
    assert (turn["score"], turn["from_asr"]["score"], turn["from_asr"]["from"]) == (0, 100, ["asr"])
    assert turn["from_asr"]["latency"] == pytest.approx(0.4), "the user's turn is over at 2.5 s"
    assert user["response_latency"] == pytest.approx(START - 2.4) and user["stop_latency"] == pytest.approx(0.4)
    sounds = list((tmp_path / "out/audio").glob("*.wav"))
    assert len(sounds) == 3
    wave_T, rate = soundfile.read(sounds[0])
    begun, ended = np.flatnonzero(wave_T)[[0, -1]]
    assert (len(wave_T), rate, begun, ended - begun + 1) == (5 * RATE, RATE, sound_start(17), 24 * 960)
    assert "from_asr 100" in (tmp_path / "out/report.md").read_text("utf-8")


def test_the_turns_of_one_recording_are_of_one_session(tmp_path, model, scripted):
    data = write_layout("mtr-duplexbench", tmp_path / "data")
    write_wav(data / "1.wav", 4.0)
    for name in ("smooth", "pause"):
        edit_lines(data / f"{name}.jsonl", lambda rows: [row.update(audio="1.wav") for row in rows])
    report = evaluate(tmp_path, "mtr-duplexbench", data, model, subset=["smooth", "pause"])
    assert report["subsets"]["pause"]["score"] == 100 and report["subsets"]["smooth"]["from"] == ["events"]
    assert Scripted.sessions == 1
    row = next(row for row in report["published"] if row["ours"] is not None)
    assert row["not_comparable"] == "by its own turns", "published figures are of what a transcriber heard"


def test_a_model_that_cannot_take_turns_is_said_before_anything(tmp_path, model):
    data = write_layout("mtr-duplexbench", tmp_path / "data")
    for name, part in (("builtin:tiny", "cannot take turns"), ("cascade:nowhere.yaml", "nowhere.yaml")):
        with pytest.raises(EvalInputError, match=part):
            evaluate(tmp_path, "mtr-duplexbench", data, name)
    with pytest.raises(EvalInputError) as caught:
        evaluate(tmp_path, "mtr-duplexbench", data, model, num_generations=2, greedy=False)
    for part in ("none in 8 rows: smooth/1/1", "no use for --num-generations"):
        assert part in str(caught.value)
    assert not (tmp_path / "out").exists()
