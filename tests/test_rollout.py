"""Sampling from a shared prefill: the tokens and log-probs of the plain way, whatever the batch."""

import dataclasses

import policy_cases as cases
import pytest
import torch

from covo_rl.config import RolloutConfig
from covo_rl.engines import decode_weights, decoding, key_values
from covo_rl.engines.base import TextDecoder
from covo_rl.engines.decoder import FusedDecoder, decoder_for
from covo_rl.engines.draws import Drawing, draw, prompt_noise, truncated
from covo_rl.engines.health import self_check
from covo_rl.engines.own import sample

FAMILIES = ("covo_audio", "qwen2_audio")


def _sample(made, prompts, config=cases.SMALL, **kwargs):
    return sample(made, prompts, made.features(prompts), config, **{"seed": 1, **kwargs})


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "expanded"])
@pytest.mark.parametrize("name", FAMILIES)
def test_sampling_logps_equal_the_scoring_pass(name, shared):
    made = cases.policy(name)
    prompts = cases.prompts(made)
    config = dataclasses.replace(cases.SMALL, temperature=0.8, shared_decode=shared)
    groups = _sample(made, prompts, config)
    assert [g.prompt for g in groups] == prompts and all(len(g.rollouts) == 3 for g in groups)
    scored = made("logps", groups, made.features(prompts), temperature=0.8)
    recorded = cases.padded([torch.tensor(r.logps) for g in groups for r in g.rollouts])
    torch.testing.assert_close(scored.logps_NC, recorded, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_equal_a_plain_loop_without_any_cache(name):
    made = cases.policy(name)
    prompts = cases.prompts(made)
    groups = _sample(made, prompts, dataclasses.replace(cases.SMALL, max_completion_length=6), greedy=True)
    for group in groups:
        expected = []
        while len(expected) < 6 and (not expected or expected[-1] not in made.family.eos_token_ids):
            expected.append(int(cases.oracle_logits(made, group.prompt, [*expected, 0])[-1].argmax()))
        assert [list(r.completion_ids) for r in group.rollouts] == [expected] * 3


def test_rows_that_finish_are_dropped_and_the_rest_go_on_unchanged(monkeypatch):
    made = cases.with_likely_end(cases.policy(), 4.0)
    prompts = cases.prompts(made, seconds=((0.6,), (), (0.9, 0.3), (0.4,), (0.2,)))
    config = RolloutConfig(num_generations=6, max_completion_length=24)
    dropped = _sample(made, prompts, config)
    positions = made.counters.decode_positions
    monkeypatch.setattr(decoding, "DROP_SHARE", 1.0)
    made.counters.decode_positions = 0
    kept = _sample(made, prompts, config)
    assert cases.ids_of(dropped) == cases.ids_of(kept)
    assert positions < 0.6 * made.counters.decode_positions
    lengths = {len(ids) for ids in cases.ids_of(dropped)}
    assert len(lengths) > 4, "the case should have rows of many lengths"
    scored = [t for g in dropped for r in g.rollouts for t in r.logps]
    assert scored == pytest.approx([t for g in kept for r in g.rollouts for t in r.logps], abs=1e-5)
    for rollout in (r for g in dropped for r in g.rollouts):
        ends = [i in made.family.eos_token_ids for i in rollout.completion_ids]
        assert not any(ends[:-1]), "nothing follows an end token"
        assert (rollout.stop_reason == "stop") == ends[-1]
        assert rollout.stop_reason == "stop" or len(rollout.completion_ids) == 24


def test_a_prompts_rollouts_do_not_depend_on_the_batch():
    """Alone, in another order, in a larger batch: the same seed gives the same tokens for the same row."""
    made = cases.with_likely_end(cases.policy(), 4.0)
    prompts = cases.prompts(made)
    together = _sample(made, prompts)
    backwards = _sample(made, prompts[::-1])[::-1]
    for p, prompt in enumerate(prompts):
        assert (
            cases.ids_of(_sample(made, [prompt]))
            == cases.ids_of(together[p : p + 1])
            == cases.ids_of(backwards[p : p + 1])
        )
    assert cases.ids_of(_sample(made, prompts, seed=2)) != cases.ids_of(together)


def test_the_same_prompt_twice_gets_different_rollouts_from_one_prefill():
    made = cases.policy()
    prompt = cases.prompts(made)[0]
    groups = _sample(made, [prompt, prompt])
    assert made.counters.prompt_positions == len(prompt.input_ids)
    assert cases.ids_of(groups[:1]) != cases.ids_of(groups[1:])
    scored = made("logps", groups, made.features([prompt]))
    recorded = cases.padded([torch.tensor(r.logps) for g in groups for r in g.rollouts])
    torch.testing.assert_close(scored.logps_NC, recorded, atol=1e-5, rtol=0)


def test_prompts_of_very_different_length_go_in_blocks(monkeypatch):
    """Blocks are a matter of speed: cutting them differently changes nothing."""
    made = cases.with_likely_end(cases.policy(), 4.0)
    prompts = cases.prompts(made, seconds=((0.1,), (3.0, 3.0), (0.2,), (2.0,)))
    config = RolloutConfig(num_generations=5, max_completion_length=16)
    one = _sample(made, prompts, config)
    original, blocks = key_values.in_blocks, []

    def small_blocks(spans):
        blocks.append(original(spans, slack=0.95, small=0))
        return blocks[-1]

    monkeypatch.setattr(key_values, "in_blocks", small_blocks)
    assert cases.ids_of(_sample(made, prompts, config)) == cases.ids_of(one)
    assert len(blocks[0]) >= 3


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("elements", [1, 2**30], ids=["packed", "plain"])
def test_decode_weights_give_the_same_and_leave_no_trace(lora, elements, monkeypatch):
    """LoRA folded in and weights packed for few rows, or not: same tokens, same log-probs, same modules after."""
    made = cases.policy(lora=lora)
    prompts = cases.prompts(made)
    made.fused_decode = False
    expected = _sample(made, prompts)
    made.fused_decode = True
    monkeypatch.setattr(decode_weights, "PACKED_ELEMENTS", elements)
    before = {n: (id(m), type(m)) for n, m in made.named_modules()}
    values = {n: (p.data_ptr(), p.detach().clone()) for n, p in made.named_parameters()}
    fused = decoder_for(made, rows=4, longest=8)
    assert isinstance(fused, FusedDecoder)
    linear = [part for layer in fused.layers for part in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    # four products in each of 2 decoder layers
    assert len(linear) == 8 and sum(part.packed is not None for part in linear) == (8 if elements == 1 else 0)
    assert (fused.head is not None) == (elements == 1)
    groups = _sample(made, prompts)
    assert cases.ids_of(groups) == cases.ids_of(expected)
    logps = [[t for g in some for r in g.rollouts for t in r.logps] for some in (groups, expected)]
    assert logps[0] == pytest.approx(logps[1], abs=1e-5)
    assert {n: (id(m), type(m)) for n, m in made.named_modules()} == before
    assert all(p.data_ptr() == values[n][0] and torch.equal(p, values[n][1]) for n, p in made.named_parameters())


def test_old_logps_from_the_sampling_steps_prompt_keys():
    """No prompt position is computed again; a changed weight makes the keys stale."""
    made = cases.policy()
    prompts = cases.prompts(made)
    features = made.features(prompts)
    groups = sample(made, prompts, features, cases.SMALL, seed=0, keep_prompts=True)
    before = made.counters.prompt_positions
    old = made("old_logps", groups, features)
    assert made.counters.prompt_positions == before
    torch.testing.assert_close(old.logps_NC, made("logps", groups, features).logps_NC, atol=1e-5, rtol=0)
    one = made("old_logps", groups[2:3], features)
    torch.testing.assert_close(one.logps_NC, old.logps_NC[6:9], atol=1e-5, rtol=0)
    with torch.no_grad():
        next(p for p in made.parameters() if p.requires_grad).add_(0.1)
    stale = made.counters.prompt_positions
    torch.testing.assert_close(
        made("old_logps", groups, features).logps_NC, made("logps", groups, features).logps_NC, atol=1e-5, rtol=0
    )
    assert made.counters.prompt_positions == stale + 2 * sum(len(p.input_ids) for p in prompts)


def test_self_check_reports_and_refuses_deaf_policies(monkeypatch):
    made = cases.policy()
    prompts = cases.prompts(made)
    report = self_check(made, prompts, cases.SMALL)
    assert report.sampling_vs_scoring < 1e-5
    assert report.without_audio > 1e-3 and report.swapped_audio > 1e-4
    text_only = self_check(made, prompts[1:2], cases.SMALL)
    assert text_only.without_audio is None and text_only.swapped_audio is None
    original = made.embedder.embed

    def deaf(packed, features, family, **kwargs):
        embeds = original(packed, features, family, **kwargs)
        return embeds.index_fill(0, packed.audio_positions_S, 0.0)

    monkeypatch.setattr(made.embedder, "embed", deaf)
    with pytest.raises(RuntimeError, match="does not hear"):
        self_check(made, prompts, cases.SMALL)


def test_text_keeps_the_tags_and_drops_special_tokens():
    made = cases.policy()
    tokenizer, decoder = made.family.tokenizer, TextDecoder(made.family)
    text = "<think>The bell</think><answer>bell</answer>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    noisy = [*ids, made.family.audio_token_id, tokenizer.convert_tokens_to_ids("<|im_start|>"), tokenizer.eos_token_id]
    assert decoder([*noisy, made.family.pad_token_id, 10_000]) == text


def test_tags_survive_where_they_are_special_tokens():
    made = cases.policy()
    made.family.processor.tokenizer = tokenizer = type(made.family.tokenizer)(
        tokenizer_object=made.family.tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<answer>", "</answer>"]})
    assert tokenizer.convert_tokens_to_ids("<think>") in tokenizer.all_special_ids
    ids = tokenizer("<think>a</think><answer>b</answer><|im_end|>", add_special_tokens=False)["input_ids"]
    assert TextDecoder(made.family)(ids) == "<think>a</think><answer>b</answer>"


def test_draws_follow_the_probabilities():
    """0.1, 0.2, 0.7: noise just below and above the cumulative 0.1 and 0.3 picks the neighbours."""
    logits = torch.tensor([[0.1, 0.2, 0.7]]).log()
    levels = (0.0, 0.0999, 0.1001, 0.2999, 0.3001, 0.9999)
    picks = [int(draw(logits, torch.tensor([u], dtype=torch.float64), Drawing())[0]) for u in levels]
    assert picks == [0, 0, 1, 1, 2, 2]
    token, logp = draw(logits, torch.tensor([0.5], dtype=torch.float64), Drawing(top_k=1))
    assert int(token) == 2 and float(logp) == pytest.approx(-0.35667, abs=1e-4), "log-prob before truncation"


def test_long_tails_keep_their_mass_in_large_vocabularies():
    """One token with 0.5, a hundred thousand sharing the rest: half of the draws must come from the tail."""
    logits = torch.zeros(1, 100_001)
    logits[0, 0] = torch.tensor(100_000.0).log()
    noise = torch.linspace(0.005, 0.995, 100, dtype=torch.float64)
    tokens = draw(logits.expand(100, -1), noise, Drawing())[0]
    assert int((tokens > 0).sum()) == 50
    tail = tokens[tokens > 0].double()
    assert float(tail.mean()) == pytest.approx(50_000, rel=0.02)
    assert torch.equal(tokens.sort().values, tokens), "the inverse of a cumulative sum is monotone"


def test_truncation_keeps_what_transformers_keeps():
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 3
    for how, warper in (
        (Drawing(top_k=5), TopKLogitsWarper(5)),
        (Drawing(top_p=0.8), TopPLogitsWarper(0.8)),
        (Drawing(min_p=0.05), MinPLogitsWarper(0.05)),
    ):
        ours = truncated(logits.softmax(-1), how) > 0
        assert torch.equal(ours, torch.isfinite(warper(None, logits))), how


def test_noise_belongs_to_row_and_occurrence():
    made = cases.policy()
    a, b = cases.prompts(made)[:2]
    noise = prompt_noise([a, b, a], seed=0, generations=2, length=4)
    assert torch.equal(noise[1], prompt_noise([b], seed=0, generations=2, length=4)[0])
    assert not torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], prompt_noise([a], seed=1, generations=2, length=4)[0])
    assert bool(((noise >= 0) & (noise < 1)).all())
