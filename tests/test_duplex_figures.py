"""Simulated features, the figures of a policy, and the probe that says whether a turn's end can be perceived."""

import math

import numpy as np
import pytest
import torch

from covo_rl.duplex.features import (
    CUES,
    FUNCTION_WORD,
    HUM,
    LEVEL,
    TEST_COUNTS,
    draw_streams,
    encoder_features,
    percepts,
)
from covo_rl.duplex.figures import success_at_early, threshold_line, timing_figures
from covo_rl.duplex.grid import chunk_of, decision_time
from covo_rl.duplex.probe import GATE, probe_auc, probe_places, ranking_auc
from covo_rl.duplex.rollout import TimingStream, score_stops
from covo_rl.rewards import components

SURE = 30.0


def policy(stream, stop):
    """Logits of a model that is sure to stop there and nowhere before."""
    z_K = torch.full((stream.decisions,), -SURE)
    if 0 <= stop < stream.decisions:
        z_K[stop] = SURE
    return z_K


@pytest.fixture(scope="module")
def test_set():
    return draw_streams("test", {kind: n // 2 for kind, n in TEST_COUNTS.items()}, seed=5)


def test_a_perfect_policy_has_perfect_figures(test_set):
    gold = {"barge_in": lambda s: s.decision_of(s.onset) + 1, "back_channel": lambda s: s.decisions,
            "hold": lambda s: s.decisions}  # fmt: skip
    z = [policy(s, gold.get(s.kind, lambda s: s.decision_of(s.turn_end) + 1)(s)) for s in test_set]
    found = timing_figures(test_set, z)
    assert found["early_long_pause"] == found["early_single_turn"] == 0 and set(found["early_by_cue"]) == {*CUES}
    names = ("long_pause_success", "single_turn_success", "barge_in_success", "back_channel_ignored", "floor_held")
    assert [found[name] for name in names] == [1.0] * 5
    assert [found["expected"][name] for name in names] == pytest.approx([1.0] * 5)
    assert 0.16 < found["delay_p50"] < found["delay_p90"] <= 0.32 and 0.16 < found["barge_in_delay_p50"] <= 0.32


def test_a_limit_on_silence_fails_as_the_report_says(test_set):
    """0.6 s of silence: right on every single turn, early in every long pause, and it stops for each back-channel."""
    z = []
    for stream in test_set:
        at = stream.pauses[0][0] if stream.kind == "pause" else stream.turn_end
        at = at + 0.6 if stream.listening else stream.onset
        z.append(policy(stream, stream.decisions if at is None else stream.decision_of(at)))
    found = timing_figures(test_set, z)
    assert found["early_long_pause"] == 1 == found["single_turn_success"] == found["barge_in_success"]
    assert set(found["early_by_pause"].values()) == {1.0} and "0-0.7 s" not in found["early_by_pause"]
    assert found["back_channel_ignored"] == found["long_pause_success"] == 0 and found["floor_held"] == 1
    assert found["calibration"]["error"] > 0.02


def test_figures_by_hand():
    # decisions at 0.16, 0.32, ... s; the turn ends at 0.5 s, in chunk 3: delays 0.14, 0.3 s
    stream = TimingStream(id="a", kind="single", first_chunk=0, decisions=6, turn_end=0.5)
    z_K = torch.tensor([-SURE, math.log(0.25 / 0.75), -SURE, -0.0001, SURE, 0.0])
    found = timing_figures([stream], [z_K])
    assert found["single_turn_success"] == 1 and found["delay_p50"] == pytest.approx(0.3)  # greedy: 4, not 3
    expected = found["expected"]
    assert expected["early_single_turn"] == pytest.approx(0.25)
    assert expected["single_turn_success"] == pytest.approx(0.75)
    assert expected["delay_p50"] == pytest.approx(0.3) and expected["delay_p90"] == pytest.approx(0.3)
    assert found["early_long_pause"] is None and found["barge_in_success"] is None
    with pytest.raises(ValueError, match="stream a has 6 decisions and 5 logits"):
        timing_figures([stream], [z_K[:5]])


def test_calibration_by_hand():
    # whole silent chunks: 5 and 6 of the pause 0.7..1.2 s, not over; 13 and on after 2.0 s, over
    stream = TimingStream(id="a", kind="pause", first_chunk=0, decisions=15, turn_end=2.0, pauses=((0.7, 1.2),))
    z_K = torch.full((15,), -SURE)
    z_K[[5, 6]], z_K[[13, 14]] = math.log(0.35 / 0.65), math.log(0.85 / 0.15)
    found = timing_figures([stream], [z_K])["calibration"]
    assert [(row["count"], row["over"]) for row in found["bins"]] == [(2, 0.0), (2, 1.0)]
    assert found["error"] == pytest.approx((0.35 + 0.15) / 2)


def test_the_threshold_line_moves_only_shift(test_set):
    z = [policy(s, s.decision_of(s.turn_end if s.listening else s.onset or 0)) / 10 for s in test_set]  # logits +-3
    line = threshold_line(test_set, z, shifts=[0, 2, 4])
    assert [row["single_turn_success"] for row in line] == [1, 1, 0]
    assert [row["barge_in_success"] for row in line] == [1, 1, 1]


def test_success_at_an_early_rate_is_read_between_points():
    line = [{"early_long_pause": e, "single_turn_success": s} for e, s in ((1.0, 1.0), (0.6, 0.4), (0.0, 0.0))]
    assert success_at_early(line, 0.8) == pytest.approx(0.7) and success_at_early(line, 0.3) == pytest.approx(0.2)
    assert success_at_early(line, 1.0) == 1.0


@pytest.mark.parametrize("preset", ["sft", "rl", "test"])
def test_streams_hold_what_they_say(preset):
    streams = draw_streams(preset, 300, seed=1)
    low, high = {"sft": (0.18, 0.7), "rl": (0.3, 3.0), "test": (1.0, 4.0)}[preset]
    lengths = [end - start for s in streams for start, end in s.pauses]
    assert min(lengths) >= low - 1e-9 and max(lengths) <= high + 1e-9 and len(lengths) > 50
    for stream in streams:
        heard_KF = percepts(stream)
        ends = [(start, end) for start, end in stream.pauses]
        for start, end in ends:  # silence inside, speech on both sides
            assert (heard_KF[chunk_of(start) + 1 : chunk_of(end), LEVEL] == 0).all()
            assert heard_KF[chunk_of(start - 0.01), LEVEL] > 0 < heard_KF[chunk_of(end + 0.01), LEVEL]
        assert stream.first_chunk + stream.decisions <= stream.chunks == len(heard_KF)
        assert (stream.kind == "pause") <= bool(stream.pauses) and (stream.kind == "single") <= (not stream.pauses)
        if stream.kind == "barge_in":
            assert stream.break_chunk == chunk_of(stream.onset) + 3 and stream.gold_stop < stream.decisions
        if not stream.listening and stream.onset:
            spoken = decision_time(stream.first_chunk), decision_time(stream.first_chunk + stream.decisions)
            assert spoken[0] + 0.3 <= stream.onset <= spoken[1] - 1.0
    assert all(sum(s.kind == kind for s in streams) > 12 for kind in {s.kind for s in streams})


def test_supervised_stops_earn_full_marks_but_for_their_delay():
    streams = draw_streams("rl", 60, seed=2)
    rewards = components("early_response,turn_taking,barge_in,back_channel,hold_floor")
    for stream, scored in zip(streams, score_stops(streams, rewards), strict=True):
        assert scored.total_S[stream.gold_stop] >= scored.total_S.max() - 0.15, stream


def test_draws_depend_on_seed_and_id_alone():
    few, many = draw_streams("rl", 5, seed=3), draw_streams("rl", 50, seed=3)
    assert many[:5] == few and draw_streams("rl", 5, seed=4) != few
    first, again = encoder_features(few[0], 24), encoder_features(many[0], 24)
    assert first.shape == (few[0].chunks, 24) and np.array_equal(first, again)
    speaking = np.concatenate([encoder_features(s, 64)[percepts(s)[:, LEVEL] > 0.9] for s in many])
    assert 0.5 < speaking.var() < 3


def test_cues_come_in_their_shares_and_can_be_removed():
    streams, bare = draw_streams("test", {"pause": 500}, seed=0), draw_streams("test", {"pause": 500}, 0, cue="none")
    for cue, share in CUES.items():
        assert sum(s.cue == cue for s in streams) / 500 == pytest.approx(share, abs=0.07)
    for stream, other in zip(streams, bare, strict=True):
        assert other.cue == "none" and (stream.pauses, stream.turn_end) == (other.pauses, other.turn_end)
        last = [sound for sound in other.sounds if sound.end in (stream.turn_end, *[s for s, _ in stream.pauses])]
        assert len(last) == len(stream.pauses) + 1
        assert all(sound.word < FUNCTION_WORD and sound.pitch == sound.fall == 0 for sound in last)


def test_a_back_channel_is_one_word_or_a_hum_and_a_barge_in_goes_on():
    streams = draw_streams("rl", {"back_channel": 80, "barge_in": 80}, seed=0)
    hums = 0
    for stream in streams:
        event = [sound for sound in stream.sounds if sound.start >= stream.onset]
        hums += event[0].word == HUM
        assert (len(event) == 1) == (stream.kind == "back_channel") and len(event) < 11
        assert 0.2 <= event[0].end - event[0].start <= 0.6 and 0.5 <= event[0].level <= 1.0
    assert hums == pytest.approx(40, abs=12)


def windows(streams, width=48):
    """Features of the last five chunks at each place of the probe: what a decoder could have in its state."""
    rows, over, names = [], [], []
    for stream in streams:
        features = encoder_features(stream, width)
        for decision, ended in probe_places(stream):
            rows.append(features[decision - 4 : decision + 1].ravel())
            over.append(ended)
            names.append(stream.id)
    return np.array(rows), np.array(over), names


def test_the_probe_passes_its_gate_with_the_cue_and_is_blind_without():
    assert probe_auc(*windows(draw_streams("test", {"pause": 250}, 7))) > GATE
    assert abs(probe_auc(*windows(draw_streams("test", {"pause": 250}, 7, cue="none"))) - 0.5) < 0.12


def test_the_probe_does_not_learn_streams_by_heart():
    rng = np.random.default_rng(0)
    own_ND = np.repeat(rng.standard_normal((100, 60)), 2, axis=0)  # the same state for a stream's pause and its end
    names = [f"s{i}" for i in range(100) for _ in range(2)]
    assert abs(probe_auc(own_ND, np.tile([False, True], 100), names) - 0.5) < 0.05
    with pytest.raises(ValueError, match="2 streams with 2 ends among 2 silences"):
        probe_auc(own_ND[:2], np.array([True, True]), ["a", "b"])


def test_auc_by_hand():
    # of the pairs (0.4, 0.1) (0.4, 0.4) (0.9, 0.1) (0.9, 0.4) one is equal
    assert ranking_auc(np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, False, True, True])) == 3.5 / 4


def test_probe_places_are_03_s_into_a_silence():
    # 0.7 + 0.3 is in chunk 6, whose decision at 1.12 s still is in the pause; 2.0 + 0.3 is in chunk 14
    stream = TimingStream(id="a", kind="pause", first_chunk=0, decisions=20, turn_end=2.0, pauses=((0.7, 1.2),))
    assert probe_places(stream) == [(6, False), (14, True)]
    short = TimingStream(id="a", kind="pause", first_chunk=0, decisions=20, turn_end=2.0, pauses=((0.7, 1.1),))
    assert probe_places(short) == [(14, True)]
