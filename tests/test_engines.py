"""An engine is held to its word: the groups that were asked for, of this policy, or an error that names the row."""

import dataclasses
import math

import policy_cases as cases
import pytest
import torch
import train_cases

from covo_rl.engines.base import EngineError, Pending, check_groups
from covo_rl.engines.own import OwnEngine, sample


@pytest.fixture(scope="module")
def policy():
    return cases.policy()


def collected(policy, engine, seed=3):
    prompts = cases.prompts(policy)
    pending = engine.submit(prompts, cases.SMALL, seed=seed, generations=2)
    return prompts, pending, engine.collect(pending)


def test_submitting_asks_for_nothing_yet_and_collecting_samples_once(policy):
    engine = OwnEngine(policy)
    before = dataclasses.replace(policy.counters)
    prompts = cases.prompts(policy)
    pending = engine.submit(prompts, cases.SMALL, seed=3, generations=2)
    assert policy.counters == before
    groups = engine.collect(pending)
    expected = sample(policy, prompts, policy.features(prompts), cases.SMALL, seed=3, num_generations=2)
    assert groups == expected and [len(group.rollouts) for group in groups] == [2] * len(prompts)
    assert set(engine.metrics()) == {"encode_s", "sample_s"}


def test_rollouts_carry_the_version_that_was_in_force_when_they_were_asked_for(policy):
    engine = OwnEngine(policy)
    assert {r.version for group in collected(policy, engine)[2] for r in group.rollouts} == {0}
    assert engine.sync(7).version == 7
    pending = engine.submit(cases.prompts(policy), cases.SMALL, seed=3, generations=2)
    engine.sync(8)
    assert {r.version for group in engine.collect(pending) for r in group.rollouts} == {7}


def test_greedy_rollouts_of_a_group_are_equal(policy):
    engine = OwnEngine(policy)
    pending = engine.submit(cases.prompts(policy), cases.SMALL, seed=3, generations=2, greedy=True)
    assert all(group.rollouts[0] == group.rollouts[1] for group in engine.collect(pending))


def test_prompt_keys_are_kept_only_where_a_pass_will_need_them(policy):
    engine = OwnEngine(policy, keep_prompts=True)
    collected(policy, engine)
    assert engine.exact and policy.prompt_cache is None
    inexact = OwnEngine(policy, full_precision=False, keep_prompts=True)
    collected(policy, inexact)
    assert not inexact.exact and policy.prompt_cache is not None
    inexact.rest()
    assert policy.prompt_cache is None


def changed(groups, p, g, **fields):
    """The groups with one rollout changed."""
    rollouts = list(groups[p].rollouts)
    rollouts[g] = dataclasses.replace(rollouts[g], **fields)
    return [*groups[:p], dataclasses.replace(groups[p], rollouts=tuple(rollouts)), *groups[p + 1 :]]


def test_what_is_no_group_of_this_policy_is_refused_by_row(policy):
    _, pending, groups = collected(policy, OwnEngine(policy))
    check_groups(groups, pending, policy.family)
    rollout = groups[1].rollouts[1]
    row = groups[1].prompt.example.id
    size = policy.family.model.config.get_text_config().vocab_size
    other = "stop" if rollout.stop_reason == "length" else "length"
    faults = [
        ({"version": 5}, "sampled by version 5, not 0"),
        ({"logps": rollout.logps[:-1]}, f"{len(rollout.logps)} ids and {len(rollout.logps) - 1} log-probs"),
        ({"logps": (math.nan, *rollout.logps[1:])}, "log-probs that are not finite"),
        ({"completion_ids": (size, *rollout.completion_ids[1:])}, f"ids beyond the vocabulary of {size}"),
        ({"stop_reason": other}, f"stop reason '{other}'"),
        ({"completion_ids": (), "logps": ()}, "0 ids and 0 log-probs"),
    ]
    for fields, words in faults:
        with pytest.raises(EngineError, match=f"row {row}, rollout 1: .*{words}"):
            check_groups(changed(groups, 1, 1, **fields), pending, policy.family)
    check_groups(changed(groups, 1, 1, logps=(math.nan, *rollout.logps[1:])), pending, policy.family, finite=False)
    with pytest.raises(EngineError, match=r"of other prompts than the .* it was given, or in another order"):
        check_groups(groups[::-1], pending, policy.family)
    with pytest.raises(EngineError, match=f"row {groups[0].prompt.example.id}: 2 rollouts, 3 were asked for"):
        check_groups(groups, Pending(pending.prompts, 3, 0), policy.family)


def test_log_probs_of_the_engine_are_those_of_the_scoring_pass(policy):
    prompts, _, groups = collected(policy, OwnEngine(policy))
    scored = policy("logps", groups, policy.features(prompts))
    recorded = cases.padded([torch.tensor(r.logps) for group in groups for r in group.rollouts])
    torch.testing.assert_close(scored.logps_NC, recorded, atol=1e-5, rtol=0)


def test_an_engines_seconds_and_other_figures_reach_the_step(tmp_path, monkeypatch):
    made = train_cases.trainer(train_cases.options(tmp_path, max_steps=1))
    monkeypatch.setattr(made.engine, "metrics", lambda: {"sample_s": 2.0, "prefix_hit_rate": 0.5})
    metrics, _ = made.train_step()
    assert metrics["engine/prefix_hit_rate"] == 0.5 and "engine/sample_s" not in metrics
    assert metrics["seconds"]["sample"] == 2.0 and "prefix_hit_rate" not in metrics["seconds"]
