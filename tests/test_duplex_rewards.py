"""The six rewards for turn-taking: their values by hand, and that no policy without ears lives on them."""

import numpy as np
import pytest

from covo_rl.duplex.grid import chunk_of
from covo_rl.duplex.rollout import TimingStream, score_stops
from covo_rl.rewards import RewardError, components, lint, load_reward
from covo_rl.rewards.duplex_lint import check_timing, policy_shares
from covo_rl.rewards.rules.turns import LISTENING, SPEAKING, stop_columns

TURNS = ("early_response", "turn_taking", "response_delay")
BREAKS = ("barge_in", "back_channel", "hold_floor")


def scores(name, kind, chunks, **about):
    return load_reward(name)(completions=[""] * len(chunks), **stop_columns(kind, chunks, **about))


@pytest.mark.parametrize(
    ("name", "expected"),
    # the turn ends at 4.9 s, in chunk 30; SHIFT of chunk 30 is said at 4.96 s, of 36 at 5.92 (d = 1.02), of 45 at 7.36
    [("early_response", [0, 0, 1, 1, 1, 0]), ("turn_taking", [0, 0, 1, 1, 0, 0]),
     ("response_delay", [0, 0, 1, 1 - 0.54 / 1.52, 0, 0])],
)  # fmt: skip
def test_turns_by_hand(name, expected):
    found = scores(name, "pause", [8, 29, 30, 36, 45, None], turn_end=4.9, pauses=[(1.2, 4.0)])
    assert found == pytest.approx(expected)


def test_the_chunk_that_holds_the_end_is_the_first_that_is_not_early():
    for end in np.random.default_rng(0).uniform(0.3, 9.0, 200).round(3):
        first = chunk_of(end)
        assert scores("early_response", "single", [first - 1, first], turn_end=float(end)) == [0.0, 1.0]
    assert scores("early_response", "single", [4, 5], turn_end=0.8) == [0.0, 1.0]  # on a border: of the later chunk


@pytest.mark.parametrize(
    ("name", "kind", "about", "expected"),
    # BREAK of chunk 11 is said at 1.92 s, of 12 at 2.08, of 17 at 2.88, of 24 at 4.0
    [("barge_in", "barge_in", {"onset": 2.04, "turn_end": 5.0}, [0, 1, 0.75, 0, 0]),
     ("hold_floor", "barge_in", {"onset": 2.04, "turn_end": 5.0}, [0, 1, 1, 1, 1]),
     ("back_channel", "back_channel", {"onset": 2.04, "turn_end": 2.3}, [0, 0, 0, 1, 1]),
     ("hold_floor", "back_channel", {"onset": 2.04, "turn_end": 2.3}, [0, 1, 0, 0, 1]),
     ("hold_floor", "hold", {}, [0, 0, 0, 0, 1])],
)  # fmt: skip
def test_breaks_by_hand(name, kind, about, expected):
    assert scores(name, kind, [11, 12, 17, 24, None], **about) == pytest.approx(expected)


def test_a_barge_in_is_half_paid_within_a_second_and_not_after():
    # 1.0 s: 0.5 + 0.5 (1 - 0.52 / 0.72); 1.16 s: 0.5 (1 - 0.68 / 0.72)
    found = scores("barge_in", "barge_in", [12, 13], onset=1.08, turn_end=4.0)
    assert found == pytest.approx([0.5 + 0.5 * 0.2 / 0.72, 0.5 * 0.04 / 0.72])


@pytest.mark.parametrize("name", [*TURNS, *BREAKS])
def test_none_where_the_stream_has_no_such_event(name):
    about = {"pause": {"turn_end": 2.0}, "single": {"turn_end": 2.0}, "hold": {}}
    judged = {"barge_in": ["barge_in"], "back_channel": ["back_channel"], "hold_floor": SPEAKING}.get(name, LISTENING)
    for kind in (*LISTENING, *SPEAKING):
        found = scores(name, kind, [3, None], **about.get(kind, {"onset": 1.0, "turn_end": 2.0}))
        assert (None not in found) if kind in judged else found == [None, None]


def test_an_unknown_kind_is_an_error_and_not_none():
    columns = stop_columns("pause", [3], turn_end=2.0) | {"kind": ["puase"]}
    with pytest.raises(ValueError, match="kind puase: a stream is one of pause, single, barge_in"):
        load_reward("early_response")(completions=[""], **columns)


def test_our_rewards_pass_the_linter_alone_and_together():
    assert lint([*TURNS, *BREAKS], full=True) == []
    for name in (*TURNS, *BREAKS):
        assert lint([name], full=True) == []


def test_no_policy_without_ears_earns_085_of_the_best():
    shares = policy_shares(components(",".join([*TURNS, *BREAKS])))
    assert shares["always THINK"] == shares["SHIFT at 0"] == 0
    assert shares["SHIFT at once when silent"] == pytest.approx(0.4)  # all of the 4 single turns of 10
    # of 1.8 a stream: 0.4 + 0.4 + 0.4 + 0.2 = 1.4 for both
    assert shares["never BREAK"] == pytest.approx(1.4 / 1.8) == shares["BREAK at any sound"]


@pytest.mark.parametrize(
    ("rewards", "hack"),
    [("back_channel,hold_floor", "'never BREAK' earns 100% of the best sum"),
     ("barge_in,hold_floor=0.1", "'BREAK at any sound' earns"),
     ("early_response=0.01,./pays.py:silence", "'always THINK' earns")],
)  # fmt: skip
def test_the_linter_finds_sums_that_pay_for_deafness(rewards, hack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pays.py").write_text(
        "def silence(completions, shift_time, **kwargs):\n    return [float(t is None) for t in shift_time]\n"
        "silence.isolation = 'thread'\n"
    )
    findings = [str(finding) for finding in lint(components(rewards))]
    assert any(hack in finding and "hack" in finding for finding in findings), findings


def test_the_linter_finds_what_is_wrong_with_one_of_them():
    def mine(completions, shift_time, **kwargs):
        return [2.0] * len(completions)

    assert {finding.check for finding in lint([mine])} == {"range"}


def test_a_run_of_replies_refuses_them():
    check_timing(components("accuracy"))
    with pytest.raises(RewardError, match="turn_taking: judges when a full-duplex rollout stops"):
        check_timing(components("accuracy,turn_taking"))


def test_every_stop_of_every_stream_is_scored():
    streams = [
        TimingStream(id="a", kind="single", first_chunk=0, decisions=30, turn_end=2.0),
        TimingStream(id="b", kind="hold", first_chunk=12, decisions=4),
    ]
    turn, hold = score_stops(streams, components("early_response,response_delay=2,hold_floor"))
    assert set(turn.parts) == {"early_response", "response_delay"} and set(hold.parts) == {"hold_floor"}
    assert turn.total_S[:12].tolist() == [0.0] * 12 and turn.total_S[12] == 3.0 and turn.total_S[-1] == 0
    assert turn.total_S[20] == pytest.approx(1 + 2 * (1 - (3.36 - 2.0 - 0.48) / 1.52))
    assert hold.total_S.tolist() == [0, 0, 0, 0, 1]


def test_a_component_that_fails_once_leaves_the_stream_and_one_that_always_fails_is_an_error():
    def moody(completions, chunk, **kwargs):
        return [float("nan") if k == 3 else 1.0 for k in chunk]

    stream = TimingStream(id="a", kind="single", first_chunk=0, decisions=5, turn_end=0.3)
    (scored,) = score_stops([stream], components({"early_response": 1.0, moody: 1.0}))
    assert scored.total_S.tolist() == [0, 1, 1, 1, 1, 0] and "nan" in scored.failures["moody"]
    with pytest.raises(RewardError, match=r"stream a .single.: none of barge_in judges all of its stops: each"):
        score_stops([stream], components("barge_in"))
