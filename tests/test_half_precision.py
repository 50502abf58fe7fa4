"""Every room of the policy in 16 bits, against float32 on the same 16-bit operands."""

import contextlib
from types import SimpleNamespace

import policy_cases as cases
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from covo_rl.config import AdapterConfig, RolloutConfig
from covo_rl.engines.key_values import KeyMemory
from covo_rl.engines.own import sample
from covo_rl.policy import head, products
from covo_rl.policy.attention import PackedLayout
from covo_rl.policy.head import token_logps
from covo_rl.policy.packing import pack
from covo_rl.policy.trainable import make_trainable

HALF = [torch.bfloat16, torch.float16]


def _error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest relative difference of rows, by their norm."""
    difference = (ours.detach().double() - expected.detach().double()).flatten(1).norm(dim=1)
    return float((difference / expected.detach().double().flatten(1).norm(dim=1)).max())


def _confident(probability: float, rivals: int, dtype: torch.dtype, size: int = 1000, width: int = 256):
    """Hidden states whose target has about `probability`, next to one rival or to all the others."""
    generator = torch.Generator().manual_seed(rivals)
    weight_VD = nn.functional.normalize(torch.randn(size, width, generator=generator)).to(dtype)
    targets = torch.randint(size, (24,), generator=generator)
    rows = []
    for target in targets.tolist():
        direction = weight_VD[target].float()
        if rivals == 1:
            direction = direction + 0.8 * weight_VD[(target + 1) % size].float()
        direction, low, high = direction / direction.norm(), 0.0, 400.0
        for _ in range(40):
            middle = (low + high) / 2
            logits = weight_VD.float() @ (direction * middle).to(dtype).float()
            low, high = (middle, high) if float(logits.softmax(0)[target]) < probability else (low, middle)
        rows.append((direction * high).to(dtype))
    return torch.stack(rows), weight_VD, targets


def _rounding_product(a_BMK, b_BKN):
    """What CUDA does: 16-bit operands, float32 sums."""
    return torch.bmm(a_BMK.to(b_BKN.dtype).float(), b_BKN.float())


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("rivals", [1, 999])
@pytest.mark.parametrize("probability", [0.5, 0.9, 0.99, 0.999, 0.9999])
def test_gradient_of_a_log_prob_is_right_to_one_percent(monkeypatch, probability, rivals, dtype):
    """finding 17: d logp / d hidden was off by 11, 65, 70 % at p 0.99, 0.999, 0.9999; both ways of multiplying."""
    hidden, weight_VD, targets = _confident(probability, rivals, dtype)
    exact, weight64 = hidden.double().requires_grad_(), weight_VD.double()
    expected = (exact @ weight64.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert float(expected.detach().exp().median()) == pytest.approx(probability, rel=0.02)
    scale = 1000.0  # of the loss: float16 has no small numbers
    (scale * expected).sum().backward()
    for product in (products.batched_product, _rounding_product):
        monkeypatch.setattr(products, "batched_product", product)
        for frozen in (True, False):
            head = nn.Linear(256, 1000, bias=False)
            head.weight = nn.Parameter(weight_VD.clone(), requires_grad=not frozen)
            leaf = hidden.clone().requires_grad_()
            logps, _ = token_logps(leaf, targets, head, chunk=5)
            (scale * logps).sum().backward()
            torch.testing.assert_close(logps.double(), expected.detach(), atol=1e-4, rtol=0)
            assert leaf.grad.dtype == dtype
            assert _error(leaf.grad, exact.grad) < 0.01, (product, frozen)


@pytest.mark.parametrize("wrapped", [False, True], ids=["linear", "module"])
@pytest.mark.parametrize("autocast", [False, True])
def test_float32_logits_under_autocast_and_through_modules(autocast, wrapped):
    """finding 17: autograd over rounded logits costs 3 to 5 %; a head with hooks or adapters is no exception."""
    hidden, weight_VD, targets = _confident(0.999, 1, torch.bfloat16)
    head = nn.Linear(256, 1000, bias=False, dtype=torch.float32 if autocast else torch.bfloat16).requires_grad_(False)
    head.weight.copy_(weight_VD)
    module = nn.Sequential(head) if wrapped else head
    exact, leaf = hidden.double().requires_grad_(), hidden.clone().requires_grad_()
    (exact @ weight_VD.double().t()).log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        token_logps(leaf, targets, module, chunk=5)[0].sum().backward()
    assert _error(leaf.grad, exact.grad) < 0.01


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("wrapped", [False, True], ids=["linear", "module"])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_gradient_where_large_logits_leave_a_confident_target(dtype, wrapped, autocast):
    """finding 17: with logits of 60 log_softmax rounded logps of -1e-4 by 4 %; entropies under autocast had 16 bits."""
    hidden, weight_VD, targets = _confident(0.9999, 1, dtype)
    hidden, bias_V, temperature, scale = 3 * hidden, torch.full((1000,), 256.0).to(dtype), 3.0, 1000.0
    head = nn.Linear(256, 1000).requires_grad_(False)
    head.weight, head.bias = (
        nn.Parameter(x.float() if autocast else x, requires_grad=False) for x in (weight_VD, bias_V)
    )
    exact, leaf = hidden.double().requires_grad_(), hidden.clone().requires_grad_()
    table = (exact @ weight_VD.double().t() / temperature).log_softmax(-1)
    logps, entropy = table.gather(1, targets[:, None])[:, 0], -(table.exp() * table).sum(-1)
    (scale * (logps + 0.1 * entropy)).sum().backward()
    on = autocast and dtype in HALF
    with torch.autocast("cpu", dtype) if on else contextlib.nullcontext():
        ours, bonus = token_logps(
            leaf, targets, nn.Sequential(head) if wrapped else head, temperature=temperature, entropy=True, chunk=5
        )
    (scale * (ours + 0.1 * bonus)).sum().backward()
    torch.testing.assert_close(bonus.double(), entropy.detach(), atol=1e-6, rtol=2e-3)
    assert _error(leaf.grad, exact.grad) < 0.01


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_entropy_and_its_gradient(dtype):
    hidden, weight_VD, targets = _confident(0.9, 999, dtype)
    head = nn.Linear(256, 1000, bias=False).requires_grad_(False)
    head.weight = nn.Parameter(weight_VD, requires_grad=False)
    exact, leaf = hidden.double().requires_grad_(), hidden.clone().requires_grad_()
    table = (exact @ weight_VD.double().t() / 0.8).log_softmax(-1)
    expected = -(table.exp() * table).sum(-1)
    expected.sum().backward()
    _, entropy = token_logps(leaf, targets, head, temperature=0.8, entropy=True, chunk=5)
    entropy.sum().backward()
    torch.testing.assert_close(entropy.double(), expected.detach(), atol=1e-4, rtol=1e-4)
    assert _error(leaf.grad, exact.grad) < 0.01


def test_gradient_of_the_head_is_summed_in_float32():
    """finding 17: the trainable head's gradient was summed in bfloat16, 1.1 % off after 83 chunks."""
    torch.manual_seed(0)
    hidden, targets = (torch.randn(83 * 16, 32) / 4).bfloat16(), torch.randint(50, (83 * 16,))
    head = nn.Linear(32, 50, dtype=torch.bfloat16)
    exact = nn.Linear(32, 50, dtype=torch.float64)
    exact.load_state_dict(head.state_dict())
    exact(hidden.double()).log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    token_logps(hidden, targets, head, chunk=16)[0].sum().backward()
    assert _error(head.weight.grad[None], exact.weight.grad[None]) < 0.003
    assert _error(head.bias.grad[None], exact.bias.grad[None]) < 0.003


@pytest.mark.parametrize("frozen", [True, False])
def test_a_gpu_reads_the_head_once_a_chunk(monkeypatch, frozen):
    """The weight, rounded once, is an operand as it is: one product for logits, slopes and gradient of each chunk."""
    torch.manual_seed(0)
    hidden, targets = torch.randn(20, 32).bfloat16(), torch.randint(56, (20,))
    head = nn.Linear(32, 56).requires_grad_(not frozen)
    exact = nn.Linear(32, 56, dtype=torch.float64)
    exact.load_state_dict({name: tensor.bfloat16() for name, tensor in head.state_dict().items()})
    exact_leaf, leaf = hidden.double().requires_grad_(), hidden.clone().requires_grad_()
    exact(exact_leaf).log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    operands = []

    def product(a_BMK, b_BKN):
        operands.append(b_BKN)
        return _rounding_product(a_BMK, b_BKN)

    monkeypatch.setattr(products, "BLOCK_ELEMENTS", 8)
    monkeypatch.setattr(products, "_takes_16_bits", lambda _: True)
    monkeypatch.setattr(products, "batched_product", product)
    with torch.autocast("cpu", torch.bfloat16):
        token_logps(leaf, targets, head, chunk=10)[0].sum().backward()
    assert _error(leaf.grad, exact_leaf.grad) < 0.02
    if not frozen:
        assert _error(head.weight.grad[None], exact.weight.grad[None]) < 0.01
    assert len(operands) == (4 if frozen else 8)
    weights = {operand.data_ptr() for operand in operands if operand.shape[1:] in ((56, 32), (32, 56))}
    assert len(weights) == (1 if frozen else 2), "forward and backward round the weight once each"


def test_logits_held_at_once_are_a_fixed_share_of_the_card(monkeypatch):
    """Fixed, so that every pass cuts alike; never what happens to be free."""
    assert head.chunk_elements(torch.device("cpu")) * 4 == 64 * 2**20
    for gib, mib in ((16, 256), (24, 384), (80, 512), (140, 512)):
        card = SimpleNamespace(total_memory=gib * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, card=card: card)
        assert head.chunk_elements(torch.device("cuda")) * 4 == mib * 2**20


def test_products_in_blocks_of_the_weight(monkeypatch):
    """A whole float32 copy of a large head would need twice its memory."""
    torch.manual_seed(0)
    weight_VD, x_cD = torch.randn(103, 8).bfloat16(), torch.randn(5, 8).bfloat16()
    slope_cV = torch.randn(5, 103)
    monkeypatch.setattr(products, "BLOCK_ELEMENTS", 8 * 10)
    torch.testing.assert_close(
        products.logits_of(x_cD, weight_VD, None, torch.bfloat16), x_cD.float() @ weight_VD.float().t()
    )
    torch.testing.assert_close(
        products.weight_sum(slope_cV, weight_VD, torch.bfloat16), slope_cV @ weight_VD.float(), atol=1e-5, rtol=1e-5
    )
    products.add_outer(total := torch.zeros(103, 8), slope_cV, x_cD, torch.bfloat16)
    torch.testing.assert_close(total, slope_cV.t() @ x_cD.float(), atol=1e-5, rtol=1e-5)


def test_products_of_an_odd_vocabulary_are_aligned(monkeypatch):
    """On an H200 168,055 logits took four times as long as 168,048, and their gradient seven times."""
    weight_VD, x_cD, shapes = torch.randn(103, 8).bfloat16(), torch.randn(5, 8).bfloat16(), []
    original = products.batched_product

    def product(a_BMK, b_BKN):
        shapes.append((a_BMK.shape[1], *b_BKN.shape[1:]))
        return original(a_BMK, b_BKN)

    monkeypatch.setattr(products, "batched_product", product)
    logits_cV = products.logits_of(x_cD, weight_VD, None, torch.bfloat16)
    assert logits_cV.shape == (5, 103) and logits_cV.stride() == (104, 1)
    products.weight_sum(logits_cV, weight_VD, torch.bfloat16)
    products.add_outer(torch.zeros(103, 8), logits_cV, x_cD, torch.bfloat16)
    assert shapes == [(5, 8, 96), (5, 8, 7), (5, 96, 8), (5, 7, 8), (96, 5, 8), (7, 5, 8)]


def _memory(keys, spans, prompt_of_row, varlen):
    """Room for the rows, and the order in which they are in it."""
    memory = KeyMemory({0: keys}, spans, rows=len(prompt_of_row), limit=8, widest=len(prompt_of_row), varlen=varlen)
    order = sorted(range(len(prompt_of_row)), key=lambda row: memory.rank[prompt_of_row[row]])
    memory.arrange([-1] * len(order), [prompt_of_row[row] for row in order])
    return memory, order


@pytest.mark.parametrize("varlen", [False, True], ids=["grid", "varlen"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("bias", [0.0, 60.0, 300.0])
def test_decode_attention_is_as_right_as_sdpa(bias, dtype, varlen):
    """finding 20: with key biases of 60 the outputs were 12 % off, because scores were rounded; SDPA 0.2 %."""
    torch.manual_seed(0)
    kv_heads, heads, width, lengths = 2, 4, 64, (300, 40)
    push = nn.functional.normalize(torch.randn(kv_heads, width), dim=-1) * bias
    k_LKd = (torch.randn(sum(lengths), kv_heads, width) + push).to(dtype)
    v_LKd = torch.randn(sum(lengths), kv_heads, width).to(dtype)
    spans, rows = [(0, 300), (300, 340)], [0, 0, 0, 1, 1]
    memory, order = _memory((k_LKd, v_LKd), spans, rows, varlen)
    assert varlen or len(memory.attention.blocks) == 2
    steps: list[tuple[torch.Tensor, torch.Tensor]] = []
    for step in range(4):
        q_RHd = torch.randn(5, heads, width).to(dtype)
        steps.append(((torch.randn(5, kv_heads, width) + push).to(dtype), torch.randn(5, kv_heads, width).to(dtype)))
        memory.begin(torch.full((5,), step + 1), step + 1, equal=True)
        out_RHd = memory.attend(0, q_RHd, *steps[-1], width**-0.5)
        assert out_RHd.dtype == dtype
        for row, given in enumerate(order):
            start, end = spans[rows[given]]
            keys, values = (
                torch.cat((prompt[start:end], *[own[which][row : row + 1] for own in steps]))
                .repeat_interleave(heads // kv_heads, 1).transpose(0, 1).float()
                for which, prompt in enumerate((k_LKd, v_LKd))
            )  # fmt: skip
            expected = scaled_dot_product_attention(q_RHd[row][:, None].float(), keys, values)[:, 0]
            assert _error(out_RHd[row][None], expected[None]) < 0.005


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("lengths", [(5,), (1,), (300, 1, 3), (1, 1, 1)])
@pytest.mark.parametrize(("kv_heads", "heads"), [(1, 1), (1, 6), (4, 4), (2, 6)])
@pytest.mark.parametrize("varlen", [False, True], ids=["grid", "varlen"])
def test_decode_attention_of_any_heads_and_prompts(kv_heads, heads, lengths, dtype, varlen):
    """finding 20: as many key heads as heads, with a prompt alone in its block, could not be decoded at all."""
    torch.manual_seed(0)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    spans = [(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    keys = [torch.randn(ends[-1], kv_heads, 16).to(dtype) for _ in range(2)]
    rows = [p for p in range(len(lengths)) for _ in range(2 + p % 2)]
    (memory, order), own = _memory((keys[0], keys[1]), spans, rows, varlen), []
    for step in range(3):
        memory.begin(torch.full((len(rows),), step + 1), step + 1, equal=True)
        q_RHd, *new = (torch.randn(len(rows), n, 16).to(dtype) for n in (heads, kv_heads, kv_heads))
        own.append(new)
        out_RHd = memory.attend(0, q_RHd[order], new[0][order], new[1][order], 0.25)
        for row, given in enumerate(order):
            both = (
                torch.cat((prompt[slice(*spans[rows[given]])], *[one[which][given : given + 1] for one in own]))
                .repeat_interleave(heads // kv_heads, 1).transpose(0, 1).float()
                for which, prompt in enumerate(keys)
            )  # fmt: skip
            expected = scaled_dot_product_attention(q_RHd[given][:, None].float(), *both, scale=0.25)[:, 0]
            assert _error(out_RHd[row][None], expected[None]) < 0.005


def test_a_sliding_window_shorter_than_what_is_written_is_held():
    """finding 20: only the prompt's length was looked at, so that decoding saw more than the model does."""
    made = cases.policy()
    prompts = cases.prompts(made)
    window = max(len(prompt.input_ids) for prompt in prompts) + 3
    for layer in made.family.decoder.layers:
        layer.self_attn.sliding_window = window
    features = made.features(prompts)
    groups = sample(made, prompts, features, RolloutConfig(max_completion_length=12, num_generations=2), seed=0)
    sampled = cases.padded([torch.tensor(r.logps) for g in groups for r in g.rollouts])
    with torch.no_grad():
        scored = made("logps", groups, features).logps_NC
        for layer in made.family.decoder.layers:
            layer.self_attn.sliding_window = None
        without = made("logps", groups, features).logps_NC
    torch.testing.assert_close(sampled, scored, atol=1e-5, rtol=0)
    assert (sampled - without).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["split", "concat", "varlen"])
def test_packed_attention_and_its_gradients_in_bfloat16(method):
    made = cases.policy()
    packed = pack(cases.ragged_groups(made), made.family.audio_token_id, "cpu")
    torch.manual_seed(0)
    half = [torch.randn(len(packed.input_ids_L), n, 16).bfloat16() for n in (4, 2, 2)]
    weight = torch.randn(len(packed.input_ids_L), 4, 16)
    results = []
    for cast in (torch.Tensor.float, torch.Tensor.clone):
        leaves = [cast(tensor).requires_grad_() for tensor in half]
        out = PackedLayout(packed, method=method).attend(0, *leaves, 0.25)
        results.append((out, *torch.autograd.grad((weight * out).sum(), leaves)))
    for exact, ours in zip(*results, strict=True):
        assert ours.dtype == torch.bfloat16
        assert _error(ours[None], exact[None]) < 0.01


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["covo_audio", "qwen2_audio"])
def test_sampling_scoring_and_prompt_keys_agree_up_to_rounding(name, autocast, dtype):
    """finding 20: weights in 16 bits, and float32 ones under autocast, which the CPU's attention refused."""
    made = cases.policy(name)
    expected_embeddings = made.features(cases.prompts(made)).get()
    made.store.clear()
    if not autocast:
        made.family.model.to(dtype)
    with torch.autocast("cpu", dtype) if autocast else contextlib.nullcontext():
        features = made.features(prompts := cases.prompts(made))
        config = RolloutConfig(max_completion_length=12, num_generations=2)
        groups = sample(made, prompts, features, config, seed=0, keep_prompts=True)
        old = made.old_logps(groups, features)
        scored = made("logps", groups, features, entropy=True)
    for key, embedding in features.get().items():
        assert _error(embedding[None], expected_embeddings[key][None]) < 0.02, "the audio itself is not rounded"
    sampled = cases.padded([torch.tensor(r.logps) for group in groups for r in group.rollouts])
    limit = 0.08 if dtype == torch.bfloat16 else 0.01
    for other in (old, scored):
        torch.testing.assert_close(other.logps_NC, sampled, atol=limit, rtol=0)
    (scored.logps_NC.sum() + scored.entropy_NC.sum()).backward()
    assert all(torch.isfinite(g).all() for g in cases.gradients(made).values())


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"modules_to_save": ["audio_adapter"]}], ids=str)
def test_an_adapter_trains_in_float32_on_a_base_of_16_bits(tmp_path, changes, stored, dtype):
    """Whatever dtype its file has; whole copies have the base's, and a note says what that costs."""

    def base():
        family = cases.family()
        family.model.to(dtype)
        return family

    first = make_trainable(base(), AdapterConfig(lora_r=2, **changes))
    first.peft_model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {name: tensor.to(stored) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    again = make_trainable(base(), AdapterConfig(adapter=str(tmp_path)))
    trained = {name: p for name, p in again.family.model.named_parameters() if p.requires_grad}
    assert len(trained) == len(tensors)
    assert {p.dtype for name, p in trained.items() if "lora_" in name} == {torch.float32}
    copies = [name for name, p in trained.items() if p.dtype == dtype]
    assert bool(copies) == ("modules_to_save" in changes) == any("16-bit" in note for note in again.notes)
    for name, parameter in trained.items():
        name = f"base_model.model.{name}".replace(".default", "").replace(".modules_to_save", "")
        saved = tensors[name.replace("magnitude_vector.weight", "magnitude_vector")]
        torch.testing.assert_close(parameter.float(), saved.to(parameter.dtype).float(), atol=0, rtol=0)
