"""The rooms of the policy on a device, in float32 and bfloat16, against the slow way and against float32."""

import warnings
from dataclasses import replace

import policy_cases as cases
import pytest
import torch
from torch import nn

from covo_rl.config import RolloutConfig
from covo_rl.engines import decoding, graphs
from covo_rl.engines.health import self_check
from covo_rl.engines.own import sample
from covo_rl.policy import flash, products
from covo_rl.policy.attention import PackedLayout
from covo_rl.policy.head import token_logps
from covo_rl.policy.packing import pack

DTYPES = [torch.float32, torch.bfloat16]
FAMILIES = ["covo_audio", "qwen2_audio"]
pytestmark = pytest.mark.usefixtures("whole_float32")


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    ours, exact = (x.detach().cpu().double() for x in (ours, exact))
    return float((ours - exact).norm() / exact.norm())


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradients[name].flatten().float() for name in sorted(gradients)])


def grouped(made, groups):
    """Log-probs and gradients of one packed pass."""
    scored = made("logps", groups, made.features([g.prompt for g in groups]))
    (scored.logps_NC * cases.weights(groups).to(made.device)).sum().backward()
    return scored.logps_NC.detach(), flat(cases.gradients(made))


def plain(made, groups):
    """The same from one plain row per rollout."""
    logps_NC = cases.padded(cases.oracle_logps(made, groups)[0])
    (logps_NC * cases.weights(groups).to(made.device)).sum().backward()
    return logps_NC.detach(), flat(cases.gradients(made))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_features_of_a_clip(device, name, dtype):
    exact, made = cases.policy(name), cases.policy(name, device=device, dtype=dtype)
    expected, ours = (policy.features(cases.prompts(policy)).get() for policy in (exact, made))
    assert ours.keys() == expected.keys() and len(ours) == 4
    for key in ours:
        assert ours[key].device.type == device.type and ours[key].dtype == dtype
        assert error(ours[key], expected[key]) < (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_grouped_scoring_equals_one_plain_row_per_rollout(device, lora):
    """Several prompts, completions of 1 to 40 ids. float32: log-probs to 1e-4, gradients to 1e-4."""
    made = cases.policy(lora=lora, device=device)
    groups = cases.ragged_groups(made)
    (ours, our_gradient), (theirs, their_gradient) = grouped(made, groups), plain(made, groups)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert error(our_gradient, their_gradient) < 1e-4


@pytest.mark.parametrize(("name", "lora"), [("covo_audio", True), ("covo_audio", False), ("qwen2_audio", True)])
def test_grouped_scoring_in_bfloat16_is_as_near_to_float32_as_plain_rows(device, name, lora):
    """All three on the same rounded weights; log-probs within 0.15 nats, 0.03 on average."""
    made = cases.policy(name, lora=lora, device=device, dtype=torch.bfloat16)
    groups = cases.ragged_groups(made)
    ours, rows = grouped(made, groups), plain(made, groups)
    made.family.model.float()
    made.store.clear()
    exact = plain(made, groups)
    difference = (ours[0] - exact[0]).abs()
    assert difference.max() < 0.15 and difference.mean() < 0.03
    for packed, row, true in zip(ours, rows, exact, strict=True):
        assert error(packed, true) < 2 * error(row, true)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_of_a_packed_row_and_its_gradients_in_bfloat16(device, head_dim):
    """Against the same in float32: 1 %. On CUDA the flash kernel must be the one that runs, in 16 bits only."""
    assert flash.available(device, torch.bfloat16, head_dim) == (device.type == "cuda")
    assert not flash.available(device, torch.float32, head_dim)
    made = cases.policy(device=device)
    packed = pack(cases.ragged_groups(made), made.family.audio_token_id, device)
    generator = torch.Generator().manual_seed(0)
    shapes = [(len(packed.input_ids_L), heads, head_dim) for heads in (4, 2, 2, 4)]
    *half, weight = (torch.randn(shape, generator=generator).bfloat16().to(device) for shape in shapes)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in half]
        out = PackedLayout(packed).attend(0, *leaves, head_dim**-0.5)
        results.append((out, *torch.autograd.grad((weight.float() * out).sum(), leaves)))
    for exact, ours in zip(*results, strict=True):
        assert ours.dtype == torch.bfloat16 and error(ours, exact) < 0.01


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checkpointing_changes_nothing(device, dtype):
    made = cases.policy(device=device, dtype=dtype)
    saving = cases.policy(device=device, dtype=dtype, gradient_checkpointing=True, clips=made.clips)
    groups = cases.ragged_groups(made)
    saving.train()
    for ours, theirs in zip(grouped(saving, groups), grouped(made, groups), strict=True):
        assert error(ours, theirs) < (1e-5 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("confidence", [1.0, 12.0])
def test_gradient_of_the_head_in_bfloat16(device, confidence, frozen):
    """Against float64 autograd on the same 16-bit weights and hidden states, in chunks of 7 rows: 1 %."""
    generator = torch.Generator().manual_seed(0)
    weight_VD = nn.functional.normalize(torch.randn(1000, 256, generator=generator)).bfloat16()
    targets = torch.randint(1000, (40,), generator=generator)
    noise = torch.randn(40, 256, generator=generator)
    hidden = (confidence * weight_VD[targets].float() + noise / 16).bfloat16()
    exact_h, exact_w = hidden.double().requires_grad_(), weight_VD.double().requires_grad_()
    table = (exact_h @ exact_w.t() / 0.7).log_softmax(-1)
    expected, entropy = table.gather(1, targets[:, None])[:, 0], -(table.exp() * table).sum(-1)
    (expected + 0.1 * entropy).sum().backward()

    head = nn.Linear(256, 1000, bias=False)
    head.weight = nn.Parameter(weight_VD.to(device), requires_grad=not frozen)
    leaf = hidden.to(device).requires_grad_()
    logps, bonus = token_logps(leaf, targets.to(device), head, temperature=0.7, entropy=True, chunk=7)
    (logps + 0.1 * bonus).sum().backward()
    torch.testing.assert_close(logps.cpu().double(), expected.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bonus.cpu().double(), entropy.detach(), atol=1e-4, rtol=1e-3)
    assert leaf.grad.dtype == torch.bfloat16 and error(leaf.grad, exact_h.grad) < 0.01
    assert frozen or error(head.weight.grad, exact_w.grad) < 0.01


@pytest.mark.parametrize("vocabulary", [1000, 1003])
def test_products_of_16_bits_are_summed_in_float32(device, vocabulary):
    """Logits and the head's gradient to 1e-5; a float32 slope is rounded once, to 2^-8."""
    generator = torch.Generator().manual_seed(0)
    x_cD, weight_VD = (torch.randn(n, 512, generator=generator).bfloat16() for n in (33, vocabulary))
    slope_cV = torch.randn(33, vocabulary, generator=generator)
    ours = products.logits_of(x_cD.to(device), weight_VD.to(device), None, torch.bfloat16)
    assert ours.dtype == torch.float32 and error(ours, x_cD.double() @ weight_VD.double().t()) < 1e-5
    ours = products.weight_sum(slope_cV.to(device), weight_VD.to(device), torch.bfloat16)
    assert ours.dtype == torch.float32 and error(ours, slope_cV.double() @ weight_VD.double()) < 2**-8
    total = torch.zeros(vocabulary, 512, device=device)
    products.add_outer(total, slope_cV.to(device), x_cD.to(device), torch.bfloat16)
    assert error(total, slope_cV.double().t() @ x_cD.double()) < 2**-8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_sampling_equals_scoring(device, name, dtype):
    """float32: 1e-4 nats. bfloat16: at most 0.15, 0.03 on average, also from the prompt keys that sampling kept."""
    made = cases.policy(name, device=device, dtype=dtype)
    features = made.features(prompts := cases.prompts(made))
    config = RolloutConfig(max_completion_length=40, num_generations=6, temperature=0.8)
    groups = sample(made, prompts, features, config, seed=3, keep_prompts=True)
    with torch.no_grad():
        old, scored = (made(call, groups, features, temperature=0.8).logps_NC for call in ("old_logps", "logps"))
    sampled = cases.padded([torch.tensor(r.logps) for g in groups for r in g.rollouts]).to(device)
    highest, mean = (1e-4, 1e-5) if dtype == torch.float32 else (0.15, 0.03)
    for logps_NC in (old, scored):
        difference = (logps_NC - sampled).abs()
        assert difference.max() < highest and difference.mean() < mean
    assert sample(made, prompts, features, config, seed=3) == groups, "the same seed, bit by bit"
    assert sample(made, prompts, features, config, seed=4) != groups


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_truncated_and_greedy_sampling(device, dtype):
    """Top-k, top-p and min-p leave no token outside the k likeliest; greedy takes the likeliest."""
    made = cases.policy(device=device, dtype=dtype)
    features = made.features(prompts := cases.prompts(made))
    config = replace(cases.SMALL, top_k=5, top_p=0.9, min_p=0.01)
    for greedy, highest in ((False, 5), (True, 1)):
        for group in sample(made, prompts, features, config, seed=1, greedy=greedy):
            for rollout in group.rollouts:
                logits_CV = cases.oracle_logits(made, group.prompt, rollout.completion_ids).float()
                ids_C1 = torch.tensor(rollout.completion_ids, device=device)[:, None]
                slack = 1e-3 if dtype == torch.float32 else 0.1
                above_C = (logits_CV > logits_CV.gather(1, ids_C1) + slack).sum(1)
                assert int(above_C.max()) < highest


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_check_before_training(device, dtype):
    made = cases.policy(device=device, dtype=dtype)
    checked = self_check(made, cases.prompts(made), cases.SMALL)
    assert (checked.tolerance is None) == (dtype == torch.bfloat16)
    assert checked.without_audio > 0 and checked.swapped_audio > 0


def test_a_prompt_alone_in_a_pass_and_completions_of_one_id(device):
    made = cases.policy(device=device)
    prompt = cases.prompts(made)[0]
    for lengths in ((1,), (1, 1, 1), (1, 30)):
        groups = [cases.group(prompt, lengths)]
        (ours, our_gradient), (theirs, their_gradient) = grouped(made, groups), plain(made, groups)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
        assert error(our_gradient, their_gradient) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_decode_step_as_a_graph_equals_the_plain_one_bit_for_bit(device, dtype, monkeypatch):
    """Ids and log-probs of rows that end at different steps; on CUDA a step that cannot be captured is an error."""
    monkeypatch.setattr(decoding, "DROP_SHARE", 0.5)  # when finished rows go, which graphs do less often
    captured: list[graphs.StepGraphs] = []
    original = graphs.StepGraphs.__init__
    monkeypatch.setattr(graphs.StepGraphs, "__init__", lambda *args: (captured.append(args[0]), original(*args))[1])
    config, drawn = RolloutConfig(max_completion_length=40, num_generations=6), []
    for on in (True, False):
        sizes = {"decoder_width": 128, "decoder_heads": 2}  # heads of 64, which the attention kernel takes
        made = cases.policy(device=device, dtype=dtype, sizes=sizes, decode_graphs=on)
        features = made.features(prompts := cases.prompts(made))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*could not be captured")
            drawn.append([r for group in sample(made, prompts, features, config, seed=3) for r in group.rollouts])
    assert drawn[0] == drawn[1] and len({len(rollout.completion_ids) for rollout in drawn[0]}) > 1
    replays = sum(step.replays for step in captured)
    assert replays > 10 if device.type == "cuda" and dtype == torch.bfloat16 else replays == 0
