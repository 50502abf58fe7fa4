"""Decoders that cannot be packed: refused where the family says they can, else exact as plain rows."""

import warnings

import policy_cases as cases
import pytest
import torch
import transformers
from text_families import TextFamily, expected_logps, own_forward, text_family, text_groups, text_prompt

from covo_rl.config import Options, RolloutConfig
from covo_rl.engines.decoding import sample_draws
from covo_rl.engines.plain import blocks_of_one_length
from covo_rl.models import family_class
from covo_rl.policy import Policy
from covo_rl.policy.packable import PackingError, completion_leak, packing_obstacle
from covo_rl.run.doctor import plan
from covo_rl.run.sizes import sizes_of
from covo_rl.types import Group, Rollout

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be packed:UserWarning")


def _hybrid(**options):
    family = text_family("lfm2")
    own = own_forward(family)
    family.model.requires_grad_(True)
    return Policy(family, **options), own


def test_a_hybrid_leaks_and_attention_does_not():
    """By replacing one completion: Lfm2's convolution carries three positions over the seam. Windows change nothing."""
    assert completion_leak(text_family("lfm2")) > 1e-2
    for name in ("mistral", "gemma3n", "gemma4"):
        assert completion_leak(text_family(name, 3)) == 0.0
    audio = cases.family()
    before = audio.decoder.config._attn_implementation
    assert completion_leak(audio) == 0.0 and audio.decoder.config._attn_implementation == before


def test_a_family_that_calls_a_hybrid_packable_is_refused():
    family = text_family("lfm2")
    wrong = TextFamily(family.model, None)
    with pytest.raises(PackingError, match=r"Lfm2Model cannot be packed: .*layers of type conv.*packable = False"):
        Policy(wrong)


def test_what_stands_against_packing_is_named():
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "vocab_size": 90, "num_key_value_heads": 2}  # fmt: skip
    capped = transformers.Gemma2Model(transformers.Gemma2Config(**small, head_dim=8))
    sinks = transformers.GptOssModel(
        transformers.GptOssConfig(**small, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    )
    mixed, deaf = (text_family("mistral", 5).decoder for _ in range(2))
    mixed.layers[1].mixer = torch.nn.Conv1d(4, 4, 3)
    deaf.layers[1].self_attn = torch.nn.Linear(4, 4)
    assert packing_obstacle(mixed) == "layer 1 has mixer, a Conv1d"
    assert packing_obstacle(deaf) == "layer 1 has no attention that reads transformers' AttentionInterface"
    assert "attn_logit_softcapping" in packing_obstacle(capped)
    assert "sinks" in packing_obstacle(sinks)
    chunked = text_family("qwen2", 5).decoder
    chunked.config.layer_types = ["chunked_attention", "full_attention"]
    assert "chunked_attention" in packing_obstacle(chunked)
    for name in ("mistral", "qwen2", "gemma3", "gemma3n", "gemma4"):
        assert packing_obstacle(text_family(name, 5).decoder) == ""
    for name in ("covo_audio", "qwen2_audio"):
        assert packing_obstacle(cases.policy(name).family.decoder) == "", "with adapters on it"


def test_plain_rows_are_said_once_and_by_one_rank(monkeypatch):
    family = text_family("lfm2")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            Policy(family)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
        warnings.simplefilter("always")
        Policy(family)
    assert len([w for w in caught if "computed once per completion" in str(w.message)]) == 1


def test_plain_rows_of_a_hybrid_are_its_own_forward():
    """Log-probs, entropy and gradients, against one row after the other by transformers alone."""
    made, own = _hybrid(keep_reference=True)
    groups = text_groups()
    weight = cases.weights(groups)
    scored = made("logps", groups, made.features([]), entropy=True)
    torch.testing.assert_close(scored.logps_NC, expected_logps(own, groups), atol=1e-5, rtol=0)
    (scored.logps_NC * weight).sum().backward()
    ours = cases.gradients(made)
    rows, entropies = [], []
    for group in groups:
        for rollout in group.rollouts:
            ids = torch.tensor([[*group.prompt.input_ids, *rollout.completion_ids]])
            table = made.model(ids, use_cache=False).logits[0, len(group.prompt.input_ids) - 1 : -1].log_softmax(-1)
            rows.append(table.gather(1, torch.tensor(rollout.completion_ids)[:, None])[:, 0])
            entropies.append(-(table.exp() * table).sum(-1))
    (cases.padded(rows) * weight).sum().backward()
    assert cases.relative_difference(ours, cases.gradients(made)) < 1e-4
    torch.testing.assert_close(scored.entropy_NC, cases.padded(entropies), atol=1e-5, rtol=0)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.mul_(1.1)
    reference = made("logps", groups, made.features([]), reference=True).logps_NC
    torch.testing.assert_close(reference, scored.logps_NC.detach(), atol=1e-5, rtol=0)
    old = made("old_logps", groups, made.features([])).logps_NC
    assert (old - reference).abs().max() > 1e-3


def test_plain_rows_count_what_they_compute():
    made, _ = _hybrid()
    groups = text_groups()
    made("logps", groups, made.features([]))
    each = sum(len(g.prompt.input_ids) * len(g.rollouts) for g in groups)
    inputs = sum(len(r.completion_ids) - 1 for g in groups for r in g.rollouts)
    assert (made.counters.prompt_positions, made.counters.completion_positions) == (each, inputs)


def test_doctor_counts_a_prompt_for_every_plain_row(monkeypatch):
    """8 rollouts of a prompt of 400: a micro-batch of 8 x (400 + 100) positions instead of 400 + 8 x 100."""
    options = Options()
    options.model.model = "builtin:tiny"
    options.train.prompts_per_step = options.train.micro_batch_prompts = 1
    options.rollout.num_generations, options.rollout.max_completion_length = 8, 100
    config = sizes_of("builtin:tiny")
    packed = plan(config, options, prompt_positions=400)
    monkeypatch.setattr(family_class(config.model_type), "packable", False)
    plain = plan(config, options, prompt_positions=400)
    assert packed.positions["micro-batch"] == 1200 and plain.positions["micro-batch"] == 4000
    assert plain.sampling["prompt keys"] == 8 * packed.sampling["prompt keys"]
    assert plain.loss["activations"] > 3 * packed.loss["activations"]


def test_a_hybrid_samples_what_it_scores_and_greedily_what_generate_writes():
    made, own = _hybrid()
    prompts = [text_prompt(11), text_prompt(5, 1), text_prompt(11)]
    config = RolloutConfig(max_completion_length=20, num_generations=3, decode_rows=2)
    draws = made(sample_draws, prompts, made.features([]), config, seed=3, generations=3)
    groups = []
    for p, prompt in enumerate(prompts):
        ids = [tuple(draws.ids_NC[n, : draws.lengths_N[n]].tolist()) for n in range(3 * p, 3 * p + 3)]
        groups.append(Group(prompt, tuple(Rollout(i, (0.0,) * len(i), "", "length") for i in ids)))
    expected = expected_logps(own, groups)
    torch.testing.assert_close(draws.logps_NC[:, : expected.shape[1]], expected, atol=1e-5, rtol=0)
    assert len({r.completion_ids for g in groups for r in g.rollouts}) == 9, "equal prompts draw on their own"
    alone = made(sample_draws, prompts[1:2], made.features([]), config, seed=3, generations=3)
    assert torch.equal(alone.ids_NC, draws.ids_NC[3:6]), "whatever else is asked for"
    greedy = made(sample_draws, prompts[:2], made.features([]), config, seed=0, generations=1, greedy=True)
    for prompt, ids_C, length in zip(prompts, greedy.ids_NC, greedy.lengths_N, strict=False):
        input_ids = torch.tensor([prompt.input_ids])
        written = made.model.generate(input_ids, max_new_tokens=20, do_sample=False)[0, len(prompt.input_ids) :]
        assert written.tolist() == ids_C[:length].tolist()


@pytest.mark.parametrize("name", ["covo_audio", "qwen2_audio"])
def test_plain_rows_of_a_model_that_hears_are_those_of_the_packed_row(name, monkeypatch):
    """One clip, two, none, in one batch: the same numbers both ways, the same draws."""
    made = cases.policy(name)
    groups = cases.ragged_groups(made)
    prompts = [group.prompt for group in groups]
    features, weight = made.features(prompts), cases.weights(groups)
    config = RolloutConfig(max_completion_length=8, num_generations=2)
    results = []
    for packable in (True, False):
        monkeypatch.setattr(type(made.family), "packable", packable)
        scored = made("logps", groups, features, temperature=0.8, entropy=True)
        (scored.logps_NC * weight).sum().backward()
        reference = made("logps", groups, features, reference=True).logps_NC
        draws = made(sample_draws, prompts, features, config, seed=1, generations=2)
        results.append((scored, reference, draws, cases.gradients(made)))
    (packed, packed_reference, packed_draws, ours), (plain, plain_reference, plain_draws, theirs) = results
    torch.testing.assert_close(packed.logps_NC, plain.logps_NC, atol=1e-5, rtol=0)
    torch.testing.assert_close(packed.entropy_NC, plain.entropy_NC, atol=1e-5, rtol=0)
    torch.testing.assert_close(packed_reference, plain_reference, atol=1e-5, rtol=0)
    assert torch.equal(packed_draws.ids_NC, plain_draws.ids_NC)
    torch.testing.assert_close(packed_draws.logps_NC, plain_draws.logps_NC, atol=1e-5, rtol=0)
    assert cases.relative_difference(ours, theirs) < 1e-4


def test_sharded_ranks_are_told_to_launch_otherwise(monkeypatch):
    made, _ = _hybrid()
    monkeypatch.setattr(Policy, "sharded", True)
    with pytest.raises(PackingError, match=r"Lfm2Model cannot be packed.*launch without FSDP and without ZeRO-3"):
        made(sample_draws, [text_prompt(5)], made.features([]), RolloutConfig(), seed=0, generations=1)


def test_rows_are_written_together_where_their_prompts_have_one_length():
    """Blocks of at most the capacity, and of so many that their prompts fit a prefill."""
    assert blocks_of_one_length([5, 7, 5, 5, 7], 2) == [[0, 2], [3], [1, 4]]
    assert blocks_of_one_length([2**15 + 1] * 3 + [2**20], 8) == [[0], [1], [2], [3]]
