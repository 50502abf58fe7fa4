"""The monitor on histories as real runs have them: few steps, tiny groups, odd rewards. What it must not say, and what
it must say although the signs come late, slowly, or early in a short run."""

import collections

import numpy as np
import pytest

from covo_rl.algo.advantage import advantages
from covo_rl.config import LossConfig, Options
from covo_rl.records.monitor import advice
from covo_rl.records.steps import StepShare, step_metrics
from covo_rl.types import Group, RewardTable, Rollout


def drawn(seed, steps, prompts, generations, own_scale=1.0):
    """A policy that neither learns nor falls: each component is drawn anew, the figures are those of its rollouts."""
    generator, rows = np.random.default_rng(seed), []
    for step in range(1, steps + 1):
        right_PG = generator.random((prompts, generations)) < generator.beta(2, 2, (prompts, 1))
        form_PG = generator.random((prompts, generations)) < 0.7
        own_PG = own_scale * generator.random((prompts, generations))
        total_PG = right_PG + form_PG + own_PG
        pairs = [a < b for p in range(prompts) for i, a in enumerate(total_PG[p]) for j, b in enumerate(total_PG[p])
                 if right_PG[p, i] and not right_PG[p, j]]  # fmt: skip
        rows.append({
            "step": step, "kl": 0.01 * generator.lognormal(0, 1), "grad_norm": generator.lognormal(-1, 0.5),
            "learning_rate": 1e-6, "skipped_steps": 0, "reward_accuracy": right_PG.mean(), "none_accuracy": 0.0,
            "reward_format": form_PG.mean(), "none_format": 0.0, "reward_own": own_PG.mean(), "none_own": 0.0,
            "none_total": 0.0, "zero_variance_groups": (np.ptp(total_PG, axis=1) == 0).mean(),
            "sampling/entropy": 0.3 * generator.lognormal(0, 0.3), "thinking_words": generator.normal(20, 4),
            "rewards/wrong_outranks_right": np.mean(pairs) if pairs and own_scale == 1.0 else None,
            "sampling/sampling_logp_difference/mean": 0.01 * generator.lognormal(0, 0.5), "truncated": 0.05,
        })  # fmt: skip
    return rows


@pytest.mark.parametrize(("prompts", "generations", "scale"), [(2, 2, 1.0), (4, 4, 1.0), (4, 4, 100.0), (32, 8, 1.0)])
def test_noise_of_small_groups_is_hardly_ever_an_alarm(prompts, generations, scale):
    """Forty runs of 60 steps. A reward of 0 to 100 moves by more than 0.1 in any two steps."""
    said = collections.Counter(
        piece.rule for seed in range(40) for piece in advice(drawn(seed, 60, prompts, generations, scale))
    )
    del said["wrong_outranks_right"]  # what the rewards are is the figure here, and no noise
    assert sum(said.values()) <= 2, said


def flat(steps, **columns):
    """Columns of a run of so many steps: values, or functions of the step."""
    return [{"step": step, **{name: value(step) if callable(value) else value for name, value in columns.items()}}
            for step in range(1, steps + 1)]  # fmt: skip


def rules(history):
    return [piece.rule for piece in advice(history)]


@pytest.mark.parametrize("step", [2, 5, 6, 10, 14, 15])
def test_a_skipped_update_of_a_short_run_is_said(step):
    history = flat(15, skipped_steps=lambda now: int(now >= step), grad_norm=0.1)
    assert [(piece.step, piece.rule) for piece in advice(history)] == [(step, "updates_skipped")]


def test_updates_skipped_before_the_history_begins_are_no_news():
    assert rules([{"step": step, "skipped_steps": 2} for step in range(40, 60)]) == []


@pytest.mark.parametrize("accuracy", [0.0, 0.0999, 0.1, 0.1005, 0.5, 0.8995, 0.9, 1.0])
def test_groups_without_variance_are_said_at_every_accuracy(accuracy):
    said = rules(flat(6, zero_variance_groups=0.95, reward_accuracy=accuracy))
    expected = "all_groups_wrong" if accuracy < 0.1 else "deviation_nil" if accuracy < 0.9 else "all_groups_right"
    assert said == [expected]


def test_farming_is_noticed_however_slow_it_is_and_in_a_run_of_twenty_steps():
    def farmed(steps, noise=0.02):
        return flat(steps, none_own=0.0, reward_own=lambda s: 0.3 + 0.5 * s / steps + noise * (s % 2),
                    reward_accuracy=lambda s: 0.6 - 0.3 * s / steps + noise * (s % 3))  # fmt: skip

    assert rules(farmed(200)) == rules(farmed(20)) == ["component_farmed"]
    assert "R_own rose from" in advice(farmed(200))[0].text
    assert rules(farmed(12)) == [], "too few steps to tell"


def test_one_step_of_huge_kl_is_no_runaway_and_a_lasting_one_is():
    assert rules(flat(20, kl=lambda s: 50.0 if s == 12 else 0.01)) == []
    assert rules(flat(20, kl=lambda s: 1.5 if s >= 12 else 0.01)) == ["kl_runs_away"]


def test_a_model_that_answers_nothing_is_not_said_to_answer_from_the_text():
    assert rules(flat(10, listen_real=0.0, listen_silent=0.0)) == []
    assert rules(flat(10, listen_real=0.3, listen_silent=0.3)) == ["stops_listening"]
    assert rules(flat(10, listen_real=0.5, listen_silent=0.5, listen_rows=2)) == [], "two rows say nothing"
    assert rules(flat(10, listen_real=0.5, listen_silent=0.5, listen_rows=16)) == ["stops_listening"]


def test_a_policy_that_mostly_stops_listening_is_noticed():
    history = flat(12, listen_real=0.7, listen_silent=lambda s: 0.3 if s < 8 else 0.62)
    (piece,) = advice(history)
    assert piece.rule == "stops_listening" and "is 62%, with the clip 70%" in piece.text
    assert rules(flat(12, listen_real=0.7, listen_silent=lambda s: 0.3 if s < 8 else 0.45)) == []


def test_a_component_for_rows_of_another_kind_is_no_fault():
    """Two thirds of the rows are no transcriptions: `wer` is left out for their whole groups."""
    assert rules(flat(10, none_wer=0.67, reward_wer=0.5, none_total=0.0)) == []
    (piece,) = advice(flat(10, none_wer=1.0, reward_wer=None, none_total=0.0))
    assert piece.rule == "component_missing" and "no score of wer: it counts for nothing" in piece.text
    (piece,) = advice(flat(10, none_own=0.6, none_total=0.5))
    assert "50% of all rollouts leave their group" in piece.text


def test_agreement_on_solved_questions_is_no_collapse_and_a_fall_long_ago_is_one():
    wobble = {"majority_unanimous": 0.95, "zero_variance_groups": 0.5}
    assert rules(flat(40, **wobble, reward_accuracy=lambda s: [1.0, 0.9, 1.0, 0.85][s % 4])) == []
    late = flat(60, majority_unanimous=lambda s: min(s / 50, 1.0), reward_accuracy=lambda s: 0.5 if s < 15 else 0.2)
    assert rules(late) == ["majority_collapses"]


def test_sentences_say_what_is_known_and_what_is_set():
    falling = {"sampling/entropy": lambda s: 0.3 if s < 8 else 0.01}
    assert "nothing measures accuracy" in advice(flat(20, **falling))[0].text
    assert "accuracy is 40%" in advice(flat(20, **falling, reward_accuracy=0.4))[0].text
    lost = advice(flat(30, reward_format=lambda s: 0.9 if s < 10 else 0.05))
    assert lost[0].rule == "format_never_rises" and "has lost the tags" in lost[0].text
    assert "does not find the tags" in advice(flat(30, reward_format=0.05))[0].text
    drift = flat(20, **{"sampling/sampling_logp_difference/mean": 0.2})
    assert "--sampler_correction (now off)" in advice(drift)[0].text
    assert "--sampler_correction (now on)" in advice(drift, {"sampler_correction": True})[0].text
    failing = flat(10, failed_own=0.5, none_own=0.5, none_total=0.0)
    assert "(--judge, now none)" in advice(failing)[0].text
    for text in (piece.text for piece in advice(failing, dict.fromkeys(Options().flat()))):
        assert "None" not in text


def test_a_history_of_an_older_version_is_read():
    """Before thinking_words, failed_NAME and sampling/entropy were logged."""
    old = flat(30, none_accuracy=0.0, reward_accuracy=0.0, zero_variance_groups=1.0, truncated=0.9, loss=0.0)
    assert rules(old) == ["all_groups_wrong", "completions_hit_the_limit"]


def test_what_a_reward_logs_is_not_taken_for_a_measurement_of_the_run():
    table = RewardTable(("accuracy",), np.ones(1), np.ones((1, 2, 1)), np.ones((1, 2)),
                        metrics={"kl": 9.0, "listen_real": 0.5, "eval/mmar/accuracy": 0.5, "mine": 1.0})  # fmt: skip
    rollouts = (Rollout((1,), (-0.5,), "", "stop", think="我听到三声钟响"), Rollout((1,), (-0.5,), "", "stop"))
    share = StepShare.of([Group(None, rollouts)], table, advantages(table, LossConfig()))  # type: ignore[arg-type]
    metrics = step_metrics([share], {"step": 1})
    assert not {"kl", "listen_real", "eval_accuracy", "eval/mmar/accuracy"} & {*metrics} and metrics["mine"] == 1.0
    assert metrics["logged/kl"] == 9.0 and metrics["logged/eval/mmar/accuracy"] == 0.5 and next(iter(metrics)) == "step"
    assert step_metrics([share], {"step": 1, "kl": 0.1})["kl"] == 0.1
    assert metrics["thinking_words"] == 7 / 2, "a Chinese character counts as a word"
