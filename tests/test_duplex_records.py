"""Rows, metrics and sounds that a step of learning when to stop leaves behind, made by hand."""

import json
from dataclasses import fields

import numpy as np
import pytest
import torch

from covo_rl.duplex.features import FUNCTION_WORD, HUM, FeatureStream, Sound, draw_streams
from covo_rl.duplex.records import TimingSounds, stop_table, stop_text, timing_rows, timing_step_metrics
from covo_rl.duplex.rollout import TimingStream, score_stops
from covo_rl.records.folder import Run
from covo_rl.records.monitor import advice
from covo_rl.records.samples import sample_text
from covo_rl.rewards import components

SHARED = {"kind": "pause", "first_chunk": 0, "turn_end": 1.0, "onset": None, "pauses": [[0.3, 0.7]]}
STREAM = FeatureStream(
    id="one", kind="pause", first_chunk=0, decisions=8, chunks=8, turn_end=1.0, pauses=((0.3, 0.7),), cue="word",
    sounds=(Sound(0.1, 0.3, FUNCTION_WORD), Sound(0.7, 1.0, 5)), shift_chunk=7, gold_stop=7,
)  # fmt: skip
Z = torch.tensor([-2.0] * 7 + [0.0])
#: a step of one group: SHIFT in chunk 3 (early), in chunk 7, never
STOPS, TOTALS = np.array([[3, 7, 8]]), [np.array([0.0] * 7 + [2.0, 0.0])]
PARTS = [{"early_response": TOTALS[0] / 2, "turn_taking": TOTALS[0] / 2}]
ADVANTAGES = np.array([[-0.5, 1.0, -0.5]])


def rows_of(**changes):
    return timing_rows([STREAM], [Z], TOTALS, STOPS, ADVANTAGES, PARTS, **changes)


def test_a_row_says_what_the_rollout_did_earned_and_shares():
    early, right, never = rows_of(first_group=4, sounds={"one": ("one, SHIFT at 1.28 s", "ab" * 32)})
    said = [row["completion"] for row in (early, right, never)]
    assert said == ["SHIFT at 0.64 s", "SHIFT at 1.28 s", "no SHIFT"]
    assert (right["id"], right["group"], right["rollout"], right["answer"]) == ("one", 4, 1, "SHIFT after 1.00 s")
    assert right["question"] == "and (0.40 s) five"
    assert right["rewards"] == {"early_response": 1.0, "turn_taking": 1.0}
    assert (right["reward_total"], right["advantage"], right["length"], never["length"]) == (2.0, 1.0, 8, 8)
    hazard = 1 / (1 + np.exp(2.0))
    assert early["mean_logp"] == pytest.approx((3 * np.log(1 - hazard) + np.log(hazard)) / 4)
    assert right["clips"] == ["one, SHIFT at 1.28 s"] and right["clip_keys"] == ["ab" * 32]
    assert early["speech"][0] == pytest.approx(5 * 0.16 + 308 / 24_000) and never["speech"] is None
    timing = early["timing"]
    assert right["timing"] is None  # once for a group
    assert timing.items() >= SHARED.items() and timing["hazards"] == [round(hazard, 4)] * 7 + [0.5]
    assert timing["turns"] == [{"channel": "user", "start": 0.1, "end": 0.3, "text": "and"},
                               {"channel": "user", "start": 0.7, "end": 1.0, "text": "five"}]  # fmt: skip


def test_rows_are_json_and_their_rewards_can_be_given_again_from_them(tmp_path):
    streams = draw_streams("rl", {"pause": 1, "single": 1, "barge_in": 1, "back_channel": 1, "hold": 1}, seed=1)
    terms = components("early_response,turn_taking,barge_in,back_channel,hold_floor")
    scores, z = score_stops(streams, terms), [torch.zeros(stream.decisions) for stream in streams]
    stops_PG = np.array([[2, stream.decisions] for stream in streams])
    parts, totals = [score.parts for score in scores], [score.total_S for score in scores]
    rows = timing_rows(streams, z, totals, stops_PG, np.zeros((5, 2)), parts)
    Run(tmp_path).log_rollouts(1, rows)
    read = [json.loads(line) for line in (tmp_path / "rollouts" / "step_00001.jsonl").read_text().splitlines()]
    assert read == rows and [row["group"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    for term in terms:
        names = ("kind", "shift_time", "break_time", "turn_end", "pauses", "onset", "chunk")
        given = term.reward(completions=[""] * len(read), **{name: [row[name] for row in read] for name in names})
        assert given == [row["rewards"].get(term.name) for row in read]


def test_a_stream_of_which_nobody_knows_the_words_has_spans():
    heard = TimingStream(id="w", kind="pause", first_chunk=0, decisions=8, turn_end=1.0, pauses=((0.3, 0.7),))
    speaks = TimingStream(id="v", kind="barge_in", first_chunk=2, decisions=8, turn_end=2.5, onset=1.0)
    rows = timing_rows([heard, speaks], [Z, Z], TOTALS * 2, np.array([[7], [3]]), np.zeros((2, 1)), PARTS * 2)
    assert rows[0]["question"] == "0.00-0.30 s (0.40 s) 0.70-1.00 s"
    assert rows[1]["completion"] == "BREAK at 0.96 s" and rows[1]["question"] == "[0.49-1.77 s] 1.00-2.50 s"
    assert rows[1]["timing"]["seconds"] == 2.5 and rows[1]["speech"] == pytest.approx([0.493, 0.973], abs=1e-3)


def test_a_question_has_the_reply_within_it():
    stream = FeatureStream(
        id="b", kind="back_channel", first_chunk=5, decisions=12, chunks=22, turn_end=1.9, onset=1.6, reply=(3, 1),
        sounds=(Sound(0.1, 0.4, 3), Sound(0.4, 0.8, 1), Sound(1.6, 1.9, HUM)), shift_chunk=4, gold_stop=12,
    )  # fmt: skip
    z, totals = [torch.zeros(12)], [np.ones(13)]
    row = timing_rows([stream], z, totals, np.array([[12]]), np.zeros((1, 1)), [{"back_channel": np.ones(13)}])[0]
    assert (row["question"], row["answer"]) == ("three one [three one] mm", "no BREAK")
    assert row["completion"] == "no BREAK" and row["speech"] == pytest.approx([0.973, 2.893], abs=1e-3)


def test_what_failed_is_null_with_its_reason_and_what_does_not_judge_is_not_there():
    row = timing_rows([STREAM], [Z], TOTALS, STOPS, ADVANTAGES, PARTS, failures=[{"content": "failed: it raised"}])[0]
    assert row["rewards"] == {"early_response": 0.0, "turn_taking": 0.0, "content": None}
    assert row["missing"] == {"content": "failed: it raised"}


def test_a_step_has_the_figures_that_report_and_monitor_know():
    hold = TimingStream(id="h", kind="hold", first_chunk=0, decisions=4)
    stops_PG = np.array([[3, 7, 8], [0, 4, 4]])
    table = stop_table(
        [*TOTALS, np.ones(5)], stops_PG, [*PARTS, {"hold_floor": np.ones(5)}], [{"content": "failed: it raised"}, {}]
    )
    found = timing_step_metrics(
        [STREAM, hold], [Z, torch.zeros(4)], stops_PG, table,
        losses={"timing_loss": 0.5, "kl": 12.0}, step=3, grad_norm=0.1,
    )  # fmt: skip
    assert (found["step"], found["grad_norm"], found["timing/loss"], found["timing/kl"], found["kl"]) == (
        3, 0.1, 0.5, 12.0, 2.0)  # fmt: skip
    assert found["reward_total"] == pytest.approx(3 / 3) and found["none_total"] == 0  # that group's failed in content
    assert (found["reward_early_response"], found["none_early_response"]) == (pytest.approx(1 / 3), 0.5)
    assert (found["reward_content"], found["failed_content"]) == (None, 0.5)
    assert found["zero_variance_groups"] == 0.5 and found["completion_length"] == (4 + 8 + 8 + 1 + 4 + 4) / 6
    assert found["timing/entropy"] == pytest.approx(_entropy(Z) / 2 + _entropy(torch.zeros(4)) / 2)
    assert not {"truncated", "format_broken", "sampling/entropy"} & found.keys()


def _entropy(z_K):
    h, left, total = z_K.sigmoid().tolist(), 1.0, 0.0
    for hazard in h:
        total -= left * hazard * np.log(left * hazard)
        left *= 1 - hazard
    return total - left * np.log(left)


def test_a_run_that_learns_gets_no_advice():
    others = {"grad_norm": 0.5, "learning_rate": 1e-3, "losses": {"timing_loss": 0.1, "kl": 4.0}}
    table = stop_table(TOTALS, STOPS, PARTS)
    lines = [timing_step_metrics([STREAM], [Z], STOPS, table, step=step, **others) for step in range(1, 40)]
    assert [str(piece) for piece in advice(lines)] == []


def test_what_the_terminal_shows_of_a_rollout_is_its_stop():
    text = sample_text("best", rows_of()[1], None).plain
    assert "question  and (0.40 s) five" in text and "said      SHIFT at 1.28 s" in text and "format" not in text


def test_a_sound_is_kept_once_by_its_content_until_there_is_no_room(tmp_path):
    sounds = TimingSounds(tmp_path, limit=400_000)
    name, key = sounds.keep(STREAM, 7)
    assert name == "one, SHIFT at 1.28 s" and sounds.keep(STREAM, 7) == (name, key)
    assert [path.name for path in (tmp_path / "clips").iterdir()] == [f"{key}.flac"]
    assert sounds.keep(STREAM, 3)[1] != key
    assert TimingSounds(tmp_path, limit=1000).keep(STREAM, 5) is None and len([*(tmp_path / "clips").iterdir()]) == 2


def test_texts_of_stops():
    assert [stop_text(STREAM, stop) for stop in (0, 8)] == ["SHIFT at 0.16 s", "no SHIFT"]
    assert {"kind", "pauses"} <= {field.name for field in fields(STREAM)}
