"""`covo-rl eval --set duplex` and `--through duplex`: figures from records, a small model, scripted answers."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from duplex_cases import FixedFeatures, duplex_family
from typer.testing import CliRunner

from covo_rl.config import RolloutConfig
from covo_rl.duplex.data import DuplexMark, DuplexStream, DuplexTurn
from covo_rl.duplex.figures import pause_class
from covo_rl.duplex.grid import CHUNK_SECONDS, sound_start
from covo_rl.duplex.layout import ChunkDecision
from covo_rl.duplex.rollout import TimingStream
from covo_rl.duplex.session import DuplexSession
from covo_rl.duplex.stream_files import write_stream
from covo_rl.evaluate import through_duplex
from covo_rl.evaluate.cli import app
from covo_rl.evaluate.duplex_streams import stream_figures, stream_record
from covo_rl.evaluate.sets import load_set
from covo_rl.evaluate.turn_figures import correlation, turn_figures, turn_lines
from covo_rl.run.python.calls import evaluation_options
from covo_rl.types import Clip, Example

RATE = 24_000


def cli(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def report(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with the small model that listens while it speaks."""
    folder = tmp_path_factory.mktemp("model")
    family, _ = duplex_family()
    family.model.save_pretrained(folder)
    family.processor.save_pretrained(folder)
    return folder


# -- figures ---------------------------------------------------------------------------------------------------------


def listens(name, kind, stop, *pauses, chunks=40, turn_end=4.0):
    """A record of a model that is sure to SHIFT in chunk `stop`, or never."""
    stream = TimingStream(id=name, kind=kind, first_chunk=0, decisions=chunks, turn_end=turn_end, pauses=pauses)
    return stream_record(stream, [9.0 if k == stop else -9.0 for k in range(chunks)])


def test_what_a_stream_record_says_can_be_checked_by_hand():
    early = listens("a", "pause", 15, (1.0, 3.0))  # SHIFT is said at 16 * 0.16 = 2.56 s
    assert (early["timing_correct"], early["stop_time"]) == (False, pytest.approx(2.56))
    assert early["delay"] == pytest.approx(-1.44)
    assert early["breakdown"] == {"kind": "pause", "longest pause": "1.5-2.5 s"}
    right = listens("b", "single", 27)  # 4.48 s
    assert right["timing_correct"] and right["delay"] == pytest.approx(0.48)
    never = listens("c", "single", None)
    assert (never["timing_correct"], never["stop_time"], never["delay"]) == (False, None, None)
    assert right["verdicts"] == {"timing": [True]} and json.loads(json.dumps(right)) == right | {
        "question": {**right["question"], "pauses": []}
    }


def test_figures_of_streams_come_from_records_alone():
    rows = [listens("a", "pause", 15, (1.0, 3.0)), listens("b", "pause", 27, (1.0, 2.0)), listens("c", "single", 27),
            listens("d", "single", 39, turn_end=3.9)]  # fmt: skip
    found = stream_figures(json.loads(json.dumps(rows)))
    assert (found["early_long_pause"], found["long_pause_success"], found["single_turn_success"]) == (0.5, 0.5, 0.5)
    assert found["early_by_pause"] == {"0.7-1.5 s": 0.0, "1.5-2.5 s": 1.0}
    assert found["delay_p50"] == pytest.approx(0.48) and found["delay_p90"] == pytest.approx(2.5)
    assert found["counts"]["early_long_pause"] == 2 and found["ci95"]["early_long_pause"] == pytest.approx(
        [0.0945, 0.9055], abs=1e-4
    )
    assert found["barge_in_success"] is None and "barge_in_success" not in found["ci95"]
    line = found["threshold_line"]
    assert [row["b"] for row in line] == list(range(1, 11))
    assert line[0]["early_long_pause"] == 0.5 and line[9]["single_turn_success"] == 0.0
    assert found["model_back_channels"] is None


def row(name, outcome, pause, right, ending="break", delay=None):
    turn = {"outcome": outcome, "ending": ending, "longest_pause": pause, "delay": delay, "dropped_chunks": 0}
    return {"id": name, "turns": [turn], "verdicts": {"strict": [right]}, "missing": False, "strict_correct": right}


def test_early_answers_stand_beside_pauses_and_scores():
    rows = [
        row("a", "early", 3.0, False),
        row("b", "early", 2.0, False, "limit"),
        row("c", "answered", 0.2, True, delay=0.5),
        row("d", "answered", 0.4, True, delay=0.7),
        row("e", "never", 0.4, False, "never"),
    ]
    found = turn_figures(rows)
    assert [found[name]["share"] for name in ("early_response_rate", "never_answered", "cut")] == [0.4, 0.2, 0.2]
    assert (found["delay_p50"], found["n"]) == (pytest.approx(0.6), 5)
    assert found["early_by_pause"]["0-0.7 s"]["share"] == 0 and found["early_by_pause"]["2.5-inf s"]["share"] == 1
    assert (found["score"]["early"]["accuracy"], found["score"]["not_early"]["accuracy"]) == (0, pytest.approx(2 / 3))
    # early 1 1 0 0 0 against right 0 0 1 1 0: phi = (0 * 1 - 2 * 2) / sqrt(2 * 3 * 2 * 3)
    assert found["correlation"]["early_and_score"] == pytest.approx(-4 / 6)
    assert found["correlation"]["early_and_pause"] > 0.9
    text = "\n".join(turn_lines(found))
    assert "40.0 [" in text and "-0.67" in text
    assert turn_figures([{"id": "a", "verdicts": {}}]) == {}


def test_a_correlation_needs_two_sides_that_vary():
    assert correlation([1, 0], [None, 1]) is None and correlation([1, 1], [0, 1]) is None
    assert correlation([0, 1, 2], [5, 3, 1]) == pytest.approx(-1)
    assert [pause_class(s) for s in (0.0, 0.7, 2.6)] == ["0-0.7 s", "0.7-1.5 s", "2.5-inf s"]


# -- streams ---------------------------------------------------------------------------------------------------------


def user_turn(*fragments):
    return DuplexTurn("user", fragments[0][0], fragments[-1][1], "one", fragments)


def reply(shift, chunks):
    start = sound_start(shift + 1) / RATE
    return DuplexTurn("model", start, start + chunks * CHUNK_SECONDS, "no", codes=(3,) * (4 * chunks))


def write_five(folder):
    """A stream of each kind, about three seconds long, of noise."""
    turn, said = user_turn((0.2, 0.9)), reply(8, 12)  # speaks from 1.61 to 3.53 s
    events = {
        "pause": ((user_turn((0.2, 0.6), (1.6, 2.0)),), ()),
        "single": ((turn,), ()),
        "barge_in": ((turn, said, user_turn((2.0, 2.9))), (DuplexMark("barge_in", "user", 2.0, 2.9),)),
        "back_channel": ((turn, said), (DuplexMark("back_channel", "user", 2.0, 2.3, "mm"),)),
        "hold": ((turn, said), ()),
    }
    noise = np.random.default_rng(0)
    for number, (kind, (turns, marks)) in enumerate(events.items()):
        stream = DuplexStream(kind, 25 * CHUNK_SECONDS, "en", turns, marks, ("d",), 0)
        wave_T2 = noise.normal(0, 0.02, (round(stream.seconds * RATE), 2)).clip(-0.1, 0.1)
        write_stream(folder / f"{number:06d}", stream, wave_T2)
    return folder


def test_streams_are_put_to_a_session_and_the_report_has_their_figures(tmp_path, model):
    data, out = write_five(tmp_path / "data"), tmp_path / "out"
    result = cli("--set", "duplex", "--data", data, "--model", model, "--device", "cpu", "--output", out)
    assert result.exit_code == 0, result.output
    found, rows = report(out), [json.loads(line) for line in (out / "rows.jsonl").read_text("utf-8").splitlines()]
    assert [row["breakdown"]["kind"] for row in rows] == ["pause", "single", "barge_in", "back_channel", "hold"]
    assert [len(row["stop_logits"]) for row in rows] == [25, 25, 12, 12, 12]
    assert found["n"] == 5 and found["streams"] == dict.fromkeys((row["id"] for row in rows), 1)
    assert {name: found[name] for name in ("early_long_pause", "floor_held")} == {
        name: stream_figures(rows)[name] for name in ("early_long_pause", "floor_held")
    }
    assert found["accuracy"] == np.mean([row["timing_correct"] for row in rows])
    assert 0 < found["expected"]["single_turn_success"] < 1
    assert (found["set"], found["prompt"]["name"], len(found["model_sha256"])) == ("duplex", "a live session", 64)
    text = (out / "report.md").read_text("utf-8")
    assert "back-channels of the model's own are not measured" in text and "| floor held |" in text
    compared = cli("compare", out, out)
    assert compared.exit_code == 0 and "At the right time, by kind" in compared.output, compared.output


def test_sound_that_does_not_fit_its_events_is_said_before_anything_is_loaded(tmp_path):
    data = write_five(tmp_path / "data")
    for number in (1, 3):
        path = data / f"{number:06d}" / "stereo.wav"
        path.write_bytes(path.read_bytes()[:-400])
    result = cli("--set", "duplex", "--data", data, "--model", "nowhere", "--output", tmp_path / "out")
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    for part in ("000001/stereo.wav", "000003/stereo.wav", "truncated, 95900 of 96000"):
        assert part in result.output, result.output


def test_what_a_session_has_no_use_for_is_said_before_anything_is_loaded(tmp_path):
    (tmp_path / "data").mkdir()
    result = cli("--set", "duplex", "--data", tmp_path / "data", "--model", "nowhere", "--output", tmp_path / "out",
                 "--listen", "--sample", "--rewards", "accuracy", "--through", "duplex")  # fmt: skip
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    for part in ("no use for --listen, --sample, --rewards, --through", "no stream: expected folders", "--model"):
        assert part in result.output, result.output
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"id": "mute", "question": "?", "choices": ["a", "b"], "answer": "a"}]))
    result = cli("--set", "own", "--data", rows, "--model", "nowhere", "--output", tmp_path / "out", "--through",
                 "duplex", "--instruction", "Be brief")  # fmt: skip
    assert result.exit_code == 2 and "no use for --instruction" in result.output
    asked = evaluation_options({"through": "duplex"})
    assert asked["through"] == "duplex" and "there is duplex" in cli("--through", "a tube").output
    mute = [Example("mute", (), "?"), Example("said", (Clip(path="a.wav"),), "?")]
    assert through_duplex.silent_rows(mute) == ["--through duplex: no audio in 1 row: mute"]


def test_the_built_in_streams_ask_every_kind_of_question(tmp_path, monkeypatch):
    from covo_rl.duplex.simulated_set import builtin_test_streams
    from covo_rl.evaluate.duplex_streams import stream_inputs

    monkeypatch.setenv("COVO_RL_CACHE", str(tmp_path))
    folder = builtin_test_streams(1)
    eval_set = load_set("duplex")
    inputs = stream_inputs(eval_set, folder, None)
    kinds = {example.id.rsplit("-", 1)[1] for example in inputs.examples}
    assert kinds == {"single", "pause", "back_channel", "barge_in", "hold"} and eval_set.streams
    assert len(stream_inputs(eval_set, folder, 3).examples) == 3 and inputs.meta["answer_key_sha256"]


# -- questions -------------------------------------------------------------------------------------------------------


class Scripted(DuplexSession):
    """Says of the n-th dialogue what the n-th script says."""

    def __init__(self, scripts, **options):
        self.scripts = []
        family, ids = duplex_family()
        super().__init__(family, FixedFeatures(), ids=ids, system="Hi", **options)
        self.scripts = list(scripts)

    def reset(self):
        super().reset()
        self.follow([ChunkDecision(token) for token in self.scripts.pop(0)])


@pytest.fixture
def questions(tmp_path):
    """Four spoken questions: 0.5 s of sound, a silence of 1 s, 0.5 s of sound."""
    hiss = np.random.default_rng(0).normal(0, 0.001, 2 * RATE)
    hiss[: RATE // 2] += 0.3 * np.sin(np.arange(RATE // 2) / 12)
    hiss[-RATE // 2 :] += 0.3 * np.sin(np.arange(RATE // 2) / 12)
    rows = []
    for name in "abcd":
        soundfile.write(tmp_path / f"{name}.wav", hiss, RATE)
        rows.append({"id": name, "audio": f"{name}.wav", "question": "?", "choices": ["no", "yes"], "answer": "no"})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path / "rows.json"


def test_a_spoken_set_through_a_session_counts_answers_that_come_early_late_and_never(
    tmp_path, model, questions, monkeypatch
):
    _, ids = duplex_family()
    family = duplex_family()[0]
    no, yes = (tuple(family.tokenize(text, [])) for text in ("no", "yes"))
    answer = (*no, ids.text_pad, ids.break_)
    scripts = [
        [ids.think] * 5 + [ids.shift, *yes, ids.break_],  # 0.96 s: before the last speech ends
        [ids.think] * 14 + [ids.shift, *answer],  # 2.4 s
        [ids.think] * 14 + [ids.shift, *(no * 20)],  # cut by the limit
        [ids.think] * 200,
    ]
    made = []

    def scripted(family, **options):
        made.append(options)
        return Scripted(scripts, **options)

    monkeypatch.setattr(DuplexSession, "of", scripted)
    out = tmp_path / "out"
    result = cli("--set", "own", "--data", questions, "--model", model, "--device", "cpu", "--output", out, "--through",
                 "duplex", "--no-plots", "--rewards", "none", "--max-completion-length", "50")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert made[0]["decision"].greedy and made[0]["max_turn_seconds"] == pytest.approx(1.6)
    rows = {r["id"]: r for r in map(json.loads, (out / "rows.jsonl").read_text("utf-8").splitlines())}
    assert [rows[name]["turns"][0]["outcome"] for name in "abcd"] == ["early", "answered", "answered", "never"]
    assert [rows[name]["turns"][0]["ending"] for name in "abcd"] == ["break", "break", "limit", "never"]
    assert [rows[name]["stop_reasons"][0] for name in "abcd"] == ["stop", "stop", "length", "stop"]
    assert [rows[name]["strict_correct"] for name in "abcd"] == [False, True, False, False]
    assert (rows["a"]["model_output"], rows["d"]["model_output"]) == ("yes", "") and not rows["d"]["missing"]
    assert rows["b"]["turns"][0]["delay"] == pytest.approx(0.4, abs=0.02)
    assert rows["b"]["turns"][0]["longest_pause"] == pytest.approx(1.0, abs=0.03)
    found = report(out)
    assert found["strict"]["accuracy"] == 0.25 and found["through"] == "duplex"
    turns = found["turn_taking"]
    assert [turns[name]["share"] for name in ("early_response_rate", "never_answered", "cut")] == [0.25] * 3
    assert turns["correlation"]["early_and_pause"] is None, "all questions have the same silence"
    assert turns["correlation"]["early_and_score"] == pytest.approx(-1 / 3)
    assert "Taking turns" in (out / "report.md").read_text("utf-8")


def test_a_turn_that_does_not_fit_the_context_is_said_with_the_option():
    family, _ = duplex_family()
    family.model.config.duplex |= {"left_chunks": 1, "mel_peak": 0.0}
    policy = SimpleNamespace(family=family)
    with pytest.raises(ValueError, match="--max-completion-length 90000: max_turn_seconds 2880 needs a context"):
        through_duplex.DuplexAnswerer.of(policy, None, RolloutConfig(max_completion_length=90_000), greedy=True)
