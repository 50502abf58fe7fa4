"""What a vLLM engine is asked, and its answers taken as groups or refused; no vLLM is needed."""

import dataclasses

import numpy as np
import policy_cases as cases
import pytest
import torch

from covo_rl.config import RolloutConfig
from covo_rl.engines.base import EngineError, Pending, TextDecoder, check_groups
from covo_rl.engines.draws import prompt_noise, prompt_seeds
from covo_rl.engines.vllm_requests import (
    Completion,
    clip_uuid,
    clip_waveform,
    group_of,
    prompt_ids,
    sampling_fields,
    sampling_problems,
)


@pytest.fixture(scope="module")
def policy():
    return cases.policy()


def answered(policy, prompt, completions, *, used=None, copies=1, limit=4):
    return group_of(
        prompt, prompt.input_ids if used is None else used, completions, copies=copies, limit=limit,
        decoder=TextDecoder(policy.family), version=3,
    )  # fmt: skip


def test_a_prompt_goes_out_with_one_audio_id_per_clip_and_expands_to_ours(policy):
    audio = policy.family.audio_token_id
    for prompt in cases.prompts(policy):
        ids, slots = prompt_ids(prompt, policy.family), iter(prompt.slots)
        assert ids.count(audio) == len(prompt.clip_keys)
        expanded = [i for token in ids for i in [token] * (next(slots) if token == audio else 1)]
        assert tuple(expanded) == prompt.input_ids


def test_clips_go_out_as_the_family_hears_them(policy):
    (prompt, *_) = cases.prompts(policy)
    (key,) = prompt.clip_keys
    samples, rate = clip_waveform(key, policy.clips, policy.family)
    stored = policy.clips.waveform(key)
    assert samples.dtype == np.float32 and rate == policy.family.sampling_rate
    heard, sent = (policy.family.clip_features(*clip).tensors for clip in (stored, (samples, rate)))
    assert all(torch.equal(heard[name], sent[name]) for name in heard)


def test_a_clip_is_named_by_content_and_by_the_weights_where_these_train():
    assert clip_uuid("ab12") == "ab12"
    assert len({clip_uuid("ab12"), clip_uuid("ab12", 0), clip_uuid("ab12", 1), clip_uuid("cd", 1)}) == 4


def test_a_prompts_seed_is_the_one_its_noise_comes_from(policy):
    prompts = cases.prompts(policy)
    seeds = prompt_seeds([*prompts, prompts[0]], 5)
    assert len({*seeds}) == len(prompts) + 1  # the same row again is another draw
    assert prompt_seeds(prompts[2:], 5) == seeds[2:-1] and prompt_seeds(prompts, 6) != seeds[:-1]
    generator = torch.Generator().manual_seed(seeds[1])
    assert torch.equal(prompt_noise(prompts, 5, 2, 4)[1], torch.rand(2, 4, generator=generator, dtype=torch.float64))


def test_sampling_fields_say_all_that_the_options_say(policy):
    config = RolloutConfig(temperature=0.7, top_p=0.9, top_k=5, min_p=0.02, max_completion_length=32)
    fields = sampling_fields(config, policy.family, generations=8, seed=11)
    assert [fields[name] for name in ("temperature", "top_p", "top_k", "min_p")] == [0.7, 0.9, 5, 0.02]
    assert (fields["n"], fields["max_tokens"], fields["seed"], fields["logprobs"]) == (8, 32, 11, 0)
    assert set(fields["stop_token_ids"]) == set(policy.family.eos_token_ids) and fields["ignore_eos"]
    greedy = sampling_fields(config, policy.family, generations=8, seed=11, greedy=True)
    assert greedy["n"] == 1 and greedy["temperature"] == 0.0 and "top_p" not in greedy


@pytest.mark.parametrize(
    ("temperature", "fine"), [(0.005, False), (0.01, True), (1.0, True), (2.0, True), (2.5, False)]
)
def test_temperatures_that_vllm_would_change_or_refuse_are_named(temperature, fine):
    problems = sampling_problems(RolloutConfig(temperature=temperature))
    assert problems == ([] if fine else [f"temperature {temperature:g}: vLLM samples with 0.01 to 2"])


def test_ids_that_are_never_drawn_are_told_to_the_engine(policy, monkeypatch):
    assert "logit_bias" not in sampling_fields(RolloutConfig(), policy.family, generations=2, seed=0)
    monkeypatch.setattr(type(policy.family), "unsampled_ids", (4, 9))
    assert sampling_fields(RolloutConfig(), policy.family, generations=2, seed=0)["logit_bias"] == {4: -100, 9: -100}


def test_answers_become_a_group_that_passes_the_one_check(policy):
    (prompt, *_) = cases.prompts(policy)
    end = policy.family.eos_token_ids[0]
    group = answered(policy, prompt, [Completion((5, end), (-1.0, -0.5), "stop"),
                                      Completion((5, 6, 7, 8), (-1.0,) * 4, "length")])  # fmt: skip
    check_groups([group], Pending((prompt,), 2, 3), policy.family)
    assert [r.stop_reason for r in group.rollouts] == ["stop", "length"]
    greedy = answered(policy, prompt, [Completion((5, end), (-1.0, -0.5), "stop")], copies=3)
    assert len(greedy.rollouts) == 3 and len({*greedy.rollouts}) == 1


@pytest.mark.parametrize(
    ("ids", "reason", "message"),
    [((5, 6), "length", "after 2 of 4 ids"), ((5, 6), "abort", "'abort'"), ((5,), None, "reason None"),
     ((5,) * 4, "error\x1b[2J", r"error\\x1b")],
)  # fmt: skip
def test_a_completion_that_ended_for_another_reason_names_the_row(policy, ids, reason, message):
    (prompt, *_) = cases.prompts(policy)
    with pytest.raises(EngineError, match=f"row {prompt.example.id}, rollout 0.*{message}"):
        answered(policy, prompt, [Completion(ids, (-1.0,) * len(ids), reason)])


def test_a_prompt_that_the_engine_expanded_otherwise_names_the_row_and_the_place(policy):
    (prompt, *_) = cases.prompts(policy)
    for used in (prompt.input_ids[:-1], (*prompt.input_ids, 1), (prompt.input_ids[0] + 1, *prompt.input_ids[1:])):
        with pytest.raises(EngineError, match=f"row {prompt.example.id}: .* another prompt: {len(used)} ids"):
            answered(policy, prompt, [], used=used)


def test_a_wrong_version_is_seen_by_the_one_check(policy):
    (prompt, *_) = cases.prompts(policy)
    group = answered(policy, prompt, [Completion((5, 6, 7, 8), (-1.0,) * 4, "length")] * 2)
    stale = dataclasses.replace(group.rollouts[0], version=2)
    with pytest.raises(EngineError, match="sampled by version 2, not 3"):
        check_groups([dataclasses.replace(group, rollouts=(stale, group.rollouts[1]))], Pending((prompt,), 2, 3),
                     policy.family)  # fmt: skip
