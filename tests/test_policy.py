"""Grouped scoring gives the numbers of one plain row per rollout: log-probs to 1e-5, gradients to 1e-4 (float32)."""

import dataclasses

import policy_cases as cases
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from covo_rl.config import RolloutConfig
from covo_rl.engines.decoder import FusedDecoder, decoder_for
from covo_rl.engines.own import sample, samples_exactly
from covo_rl.policy import Policy, attention, flash
from covo_rl.policy.attention import PackedLayout
from covo_rl.policy.packing import pack
from covo_rl.types import Group

FAMILIES = ("covo_audio", "qwen2_audio")


def _grouped(made: Policy, groups, *, temperature=1.0, entropy=False):
    features = made.features([g.prompt for g in groups])
    return made("logps", groups, features, temperature=temperature, entropy=entropy)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_grouped_pass_equals_one_plain_row_per_rollout(name, lora):
    """Clips of different length, two clips in a row, text only, ragged completions; the oracle's rows left-padded."""
    made = cases.policy(name, lora=lora)
    groups = cases.ragged_groups(made)
    made.train()
    scored = _grouped(made, groups, temperature=0.7, entropy=True)
    logps, entropies = cases.oracle_logps(made, groups, temperature=0.7, left_pad=3)
    torch.testing.assert_close(scored.logps_NC, cases.padded(logps), atol=1e-5, rtol=0)
    torch.testing.assert_close(scored.entropy_NC, cases.padded(entropies), atol=1e-5, rtol=0)
    lengths = [len(r.completion_ids) for g in groups for r in g.rollouts]
    assert scored.mask_NC.sum(1).tolist() == lengths
    weight = cases.weights(groups)
    ((scored.logps_NC + 0.3 * scored.entropy_NC) * weight).sum().backward()
    ours = cases.gradients(made)
    ((cases.padded(logps) + 0.3 * cases.padded(entropies)) * weight).sum().backward()
    assert cases.relative_difference(ours, cases.gradients(made)) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_reach_a_trainable_encoder_through_the_audio_slots(name):
    parts = {"train_parts": ["encoder", "audio_adapter", "llm", "lm_head"]}
    made = cases.policy(name, lora=False, adapter=parts)
    assert not made.embedder.frozen
    groups = cases.ragged_groups(made)
    weight = cases.weights(groups)
    (_grouped(made, groups).logps_NC * weight).sum().backward()
    ours = cases.gradients(made)
    (cases.padded(cases.oracle_logps(made, groups)[0]) * weight).sum().backward()
    theirs = cases.gradients(made)
    for part in ("encoder", "audio_adapter"):
        assert any(n.startswith(made.family.parts[part]) for n in theirs)
    assert cases.relative_difference(ours, theirs) < 1e-4


@pytest.mark.parametrize("recompute", ["mlp", "layer"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_changes_no_number_and_leaves_the_frozen_encoder_alone(name, lora, recompute):
    """Traps 17, 18, 20, 35: reentrant or cached checkpointing is silently wrong."""
    plain = cases.policy(name, lora=lora)
    checkpointed = cases.policy(name, lora=lora, gradient_checkpointing=True, recompute=recompute, clips=plain.clips)
    groups = cases.ragged_groups(plain)
    weight = cases.weights(groups)
    results = []
    for made in (plain, checkpointed):
        made.train()
        scored = _grouped(made, groups)
        (scored.logps_NC * weight).sum().backward()
        results.append((scored.logps_NC.detach(), cases.gradients(made)))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-6, rtol=0)
    assert cases.relative_difference(results[1][1], results[0][1]) < 1e-5
    assert all(torch.equal(gradient, results[0][1][n]) for n, gradient in results[1][1].items()), "every bit"
    layers = [m for m in checkpointed.family.decoder.modules() if getattr(m, "gradient_checkpointing", False)]
    assert layers, "the decoder is not checkpointed at all"
    encoder = checkpointed.family.model.get_submodule(checkpointed.family.parts["encoder"].rstrip("."))
    assert not any(getattr(m, "gradient_checkpointing", False) for m in encoder.modules())
    assert not encoder.training
    embedding = checkpointed.features([groups[0].prompt]).get()[groups[0].prompt.clip_keys[0]]
    assert not embedding.requires_grad


@pytest.mark.parametrize(("recompute", "again"), [("mlp", {"act_fn"}), ("layer", {"act_fn", "self_attn"})])
def test_layers_are_recomputed_under_checkpointing(recompute, again):
    """Counts calls: one in the forward, one more in the backward of what is recomputed, none without gradients."""
    made = cases.policy(gradient_checkpointing=True, recompute=recompute)
    made.train()
    groups = cases.ragged_groups(made)
    calls = []
    layer = made.family.decoder.layers[0]
    for name, module in (("self_attn", layer.self_attn), ("act_fn", layer.mlp.act_fn)):
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    scored = _grouped(made, groups)
    assert sorted(calls) == ["act_fn", "self_attn"]
    scored.logps_NC.sum().backward()
    assert set(calls[2:]) == again and len(calls) == 2 + len(again)
    with torch.no_grad():
        _grouped(made, groups)
    assert len(calls) == 4 + len(again)


def test_recomputed_modules_are_known_to_decoding():
    for checkpointing in (False, True):
        made = cases.policy(gradient_checkpointing=checkpointing).eval()
        assert type(decoder_for(made, rows=4, longest=64)) is FusedDecoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_the_last_product_of_the_mlp_is_not_made_again(lora, dtype):
    """Products with a weight of the down projection's shape: forward, and the gradients that are asked for."""

    class Products(TorchDispatchMode):
        """Counts products of (positions, I) and (I, D)."""

        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                self.count += tuple(args[-1].shape) == (wide, width)
            return func(*args, **(kwargs or {}))

    counts = []
    for checkpointing in (False, True):
        made = cases.policy(lora=lora, gradient_checkpointing=checkpointing)
        made.model.to(dtype)
        width, wide = made.family.model.config.get_text_config().hidden_size, 96
        assert tuple(made.family.decoder.layers[0].mlp.down_proj.weight.shape) == (width, wide)
        made.train()
        groups = cases.ragged_groups(made)
        with Products() as products:
            _grouped(made, groups).logps_NC.sum().backward()
        counts.append(products.count)
    assert counts[0] == counts[1] > 0


def _force(monkeypatch, method: str) -> None:
    """Every pass computes its attention this way."""
    original = PackedLayout.__init__
    monkeypatch.setattr(PackedLayout, "__init__", lambda *a, **k: original(*a, **{**k, "method": method}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "method", "checkpointing"),
    [("covo_audio", "varlen", True), ("qwen2_audio", "varlen", False), ("covo_audio", "concat", True)],
    ids=str,
)
def test_attention_of_other_devices_equals_that_of_the_cpu_and_plain_rows(
    monkeypatch, name, method, checkpointing, dtype
):
    """The forms of CUDA and of other devices, several prompts, completions without inputs of their own."""
    made = cases.policy(name, gradient_checkpointing=checkpointing)
    made.family.model.to(dtype)
    made.train()
    groups = cases.ragged_groups(made)
    weight = cases.weights(groups)
    expected = cases.padded(cases.oracle_logps(made, groups)[0])
    (expected * weight).sum().backward()
    results = [(expected.detach(), cases.gradients(made))]
    for way in ("split", method):
        with monkeypatch.context() as patch:
            _force(patch, way)
            scored = _grouped(made, groups)
            (scored.logps_NC * weight).sum().backward()
        results.append((scored.logps_NC.detach(), cases.gradients(made)))
    limit, share = (1e-5, 1e-4) if dtype == torch.float32 else (0.08, 0.1)
    for other in results[:2]:
        torch.testing.assert_close(results[2][0], other[0].float(), atol=limit, rtol=0)
        assert cases.relative_difference(results[2][1], other[1]) < share


@pytest.mark.parametrize("method", ["concat", "varlen"])
def test_cached_prompt_keys_in_any_order_on_other_devices(monkeypatch, method):
    """A micro-batch of some of the prompts that were sampled: their keys lie the other way round, others between."""
    made = cases.policy()
    prompts = cases.prompts(made)
    features = made.features(prompts)
    sample(made, prompts, features, RolloutConfig(max_completion_length=2), seed=0, keep_prompts=True)
    groups = [cases.ragged_groups(made)[i] for i in (3, 1, 0)]
    expected = made.logps(groups, features).logps_NC.detach()
    _force(monkeypatch, method)
    passes = made.counters.prompt_positions
    torch.testing.assert_close(made.old_logps(groups, features).logps_NC, expected, atol=1e-5, rtol=0)
    assert made.counters.prompt_positions == passes, "the prompts were computed again"
    packed = pack(groups, made.family.audio_token_id, "cpu", cached_prompts=True)
    operands = [torch.zeros(len(packed.input_ids_L), n, 16) for n in (4, 2, 2)]
    with pytest.raises(RuntimeError, match="carry no gradient"):
        PackedLayout(packed, prompt_keys=made.prompt_cache.keys).attend(0, *operands, 0.25)


def test_the_kernel_is_called_twice_a_layer_however_many_prompts_there_are(monkeypatch):
    """And the operations around it do not depend on the number of prompts: no loop over them is left."""
    calls = []

    def kernel(q, *args):
        calls.append("forward")
        return q.clone(), q.new_zeros(q.shape[1::-1], dtype=torch.float32)

    def kernel_backward(grad_out, *operands):
        calls.append("backward")
        return tuple(x.clone() for x in operands[:3])

    class Count(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.total += 1
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(flash, "_kernel", kernel)
    monkeypatch.setattr(flash, "_kernel_backward", kernel_backward)
    for module in (flash, attention):
        monkeypatch.setattr(module, "available", lambda *_: True)
    made, totals = cases.policy(), []
    for count in (1, 4):
        packed = pack(cases.ragged_groups(made)[:count], made.family.audio_token_id, "cpu")
        layout = PackedLayout(packed)
        leaves = [torch.randn(len(packed.input_ids_L), n, 16, requires_grad=True) for n in (4, 2, 2)]
        layout.attend(0, *leaves, 0.25)  # makes the index tensors
        calls.clear()
        with Count() as counted:
            layout.attend(1, *leaves, 0.25).backward(torch.ones(len(packed.input_ids_L), 4, 16))
        assert calls == ["forward"] * 2 + ["backward"] * 2
        totals.append(counted.total)
    assert totals[0] == totals[1] < 60, totals


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_one_large_group_split_over_micro_batches_has_the_same_gradient(name, lora):
    made = cases.policy(name, lora=lora)
    whole = cases.ragged_groups(made)[1]
    weight = cases.weights([whole])
    (_grouped(made, [whole]).logps_NC * weight).sum().backward()
    full = cases.gradients(made)
    for part in (slice(0, 1), slice(1, 4)):
        scored = _grouped(made, [Group(whole.prompt, whole.rollouts[part])])
        (scored.logps_NC * weight[part, : scored.logps_NC.shape[1]]).sum().backward()
    assert cases.relative_difference(cases.gradients(made), full) < 1e-4


def test_equal_prompts_and_clips_are_computed_once():
    """Two groups of the same row and two rows with the same clip: 3 unique prompts, 2 unique clips."""
    made = cases.policy()
    first, second, *_ = cases.prompts(made, seconds=((0.6,), (0.9,)))
    twin = dataclasses.replace(first, input_ids=(*first.input_ids[:-1], first.input_ids[-1] - 1))
    groups = [cases.group(p, (4, 6), seed=i) for i, p in enumerate((first, second, first, twin))]
    scored = _grouped(made, groups)
    assert made.store.encoded_clips == 2
    assert made.store.encoded_rows == 2  # one segment of 1 s each
    unique = len(first.input_ids) + len(second.input_ids) + len(twin.input_ids)
    assert made.counters.prompt_positions == unique
    assert made.counters.completion_positions == 4 * (3 + 5)  # the last id of a completion is no input
    reference, _ = cases.oracle_logps(made, groups)
    torch.testing.assert_close(scored.logps_NC, cases.padded(reference), atol=1e-5, rtol=0)


def test_clips_are_encoded_once_over_sampling_scoring_and_iterations():
    made = cases.policy()
    from covo_rl.engines.own import sample

    prompts = cases.prompts(made)
    for _ in range(2):
        features = made.features(prompts)
        groups = sample(made, prompts, features, cases.SMALL, seed=0)
        made("logps", groups, features)
        made("logps", groups, features, reference=True)
    assert made.store.encoded_clips == 4  # clips of 0.6, 0.9, 0.3 and 0.4 s


def test_trainable_encoder_runs_once_per_clip_in_every_pass_that_needs_gradients():
    made = cases.policy(lora=False, adapter={"train_parts": ["audio_adapter", "llm"]})
    prompts = cases.prompts(made)
    groups = [cases.group(p, (3, 3)) for p in prompts]
    features = made.features(prompts)
    assert made.store.encoded_clips == 0, "a trainable encoder runs inside the pass"
    for n in (1, 2):
        made("logps", groups, features).logps_NC.sum().backward()
        assert made.store.encoded_clips == 4 * n
    with torch.no_grad():
        made("logps", groups, features)
        made("logps", groups, features)
    assert made.store.encoded_clips == 12, "without gradients once for these features"


def test_reference_of_lora_is_the_base_model_and_leaves_the_adapter_on():
    made = cases.policy()
    groups = cases.ragged_groups(made)
    features = made.features([g.prompt for g in groups])
    before = {n: p.requires_grad for n, p in made.named_parameters()}
    reference = made("logps", groups, features, reference=True)
    assert not reference.logps_NC.requires_grad
    assert {n: p.requires_grad for n, p in made.named_parameters()} == before
    policy = made("logps", groups, features)
    assert float((policy.logps_NC.detach() - reference.logps_NC).abs().max()) > 0.01
    with torch.no_grad():
        for n, p in made.named_parameters():
            if "lora_B" in n:
                p.zero_()
    torch.testing.assert_close(made("logps", groups, features).logps_NC, reference.logps_NC, atol=1e-6, rtol=0)


@pytest.mark.parametrize("parts", [["llm", "lm_head"], ["audio_adapter", "llm", "lm_head"]])
def test_reference_of_full_training_is_the_policy_at_the_start(parts):
    made = cases.policy(lora=False, adapter={"train_parts": parts}, keep_reference=True)
    groups = cases.ragged_groups(made)
    start = _grouped(made, groups).logps_NC.detach()
    with torch.no_grad():
        for p in made.model.parameters():
            if p.requires_grad:
                p.add_(0.01)
    reference = made("logps", groups, made.features([g.prompt for g in groups]), reference=True)
    torch.testing.assert_close(reference.logps_NC, start, atol=1e-6, rtol=0)
    assert float((_grouped(made, groups).logps_NC.detach() - start).abs().max()) > 0.01
    assert not any(p.requires_grad for p in made.reference_model.parameters())
    shared = {id(p) for p in made.family.model.encoder.parameters()}
    copied = {id(p) for p in made.reference_model.encoder.parameters()}
    assert shared == copied, "a frozen encoder is shared, not copied"


def test_a_full_policy_without_reference_says_so():
    made = cases.policy(lora=False)
    groups = cases.ragged_groups(made)[:1]
    with pytest.raises(RuntimeError, match="keep_reference=True"):
        made("logps", groups, made.features([groups[0].prompt]), reference=True)


def test_dropout_is_on_in_the_loss_pass_only():
    """Trap 19: LoRA dropout while sampling or in the old pass makes ratios that are not 1."""
    made = cases.policy(adapter={"lora_dropout": 0.5})
    groups = cases.ragged_groups(made)
    made.train()
    with torch.no_grad():
        quiet = [_grouped(made, groups).logps_NC for _ in range(2)]
    assert torch.equal(*quiet)
    assert float((_grouped(made, groups).logps_NC - quiet[0]).detach().abs().max()) > 1e-3
    assert made.training


def test_the_same_model_still_serves_plain_forwards_and_generate():
    made = cases.policy()
    prompt = cases.prompts(made)[1]
    ids = torch.tensor([prompt.input_ids])
    out = made.family.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False
    )
    new = out[0, ids.shape[1] :].tolist()
    greedy = []
    for _ in new:
        greedy.append(int(cases.oracle_logits(made, prompt, [*greedy, 0])[-1].argmax()))
    assert new == greedy


def test_features_of_other_prompts_are_refused_by_name():
    made = cases.policy()
    groups = cases.ragged_groups(made)
    with pytest.raises(KeyError, match="features were made for 1 clips"):
        made("logps", groups, made.features([groups[0].prompt]))
    with pytest.raises(ValueError, match="no method 'train'"):
        made("train")


def test_bfloat16_runs_and_is_not_called_exact():
    made = cases.policy()
    assert samples_exactly(made)
    made.family.model.to(torch.bfloat16)
    assert not samples_exactly(made)
    groups = cases.ragged_groups(made)
    scored = _grouped(made, groups)
    assert scored.logps_NC.dtype == torch.float32
    scored.logps_NC.sum().backward()
    assert all(torch.isfinite(g).all() for g in cases.gradients(made).values())


@pytest.mark.parametrize("method", ["concat", "split", "varlen"])
def test_under_autocast_blocks_of_16_bits_find_their_places(monkeypatch, method):
    """float32 weights with bf16 autocast: attention returns 16 bits, the row that it is put into is float32."""
    made = cases.policy()
    groups = cases.ragged_groups(made)
    expected = made("logps", groups, made.features([group.prompt for group in groups]))
    _force(monkeypatch, method)
    with torch.autocast("cpu", torch.bfloat16):
        scored = made("logps", groups, made.features([group.prompt for group in groups]))
    torch.testing.assert_close(scored.logps_NC, expected.logps_NC, atol=0.1, rtol=0)
