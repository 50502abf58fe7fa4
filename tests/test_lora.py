"""LoRA in the dtype of the activations: PEFT's own forward is the reference, in float32 and in 16 bits."""

import copy

import peft
import policy_cases as cases
import pytest
import torch
from peft.tuners.lora import Linear
from torch import nn

from covo_rl.audio import ClipStore
from covo_rl.config import AdapterConfig
from covo_rl.export.verify import ask_policy, policy_logits, synthetic_prompts
from covo_rl.policy.lora import RoundedLinear, RoundedLora, inject
from covo_rl.policy.trainable import make_trainable

ROWS, WIDTH, OUT, RANK = 64, 48, 80, 4


def pair(dtype=torch.float32, **options):
    """The same adapted layer twice: as PEFT makes it, and ours. B is not zero, so that it matters."""
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(WIDTH, OUT)).to(dtype)
    ours = copy.deepcopy(theirs)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"], **options)  # scaling: a power of two
    made = (peft.get_peft_model(theirs, config), inject(ours, config))  # type: ignore[arg-type]
    with torch.no_grad():
        for (name, a), (_, b) in zip(made[0].named_parameters(), made[1].named_parameters(), strict=True):
            if "lora_" in name:
                a.copy_(0.3 * torch.randn(a.shape, generator=torch.Generator().manual_seed(len(name))))
            b.copy_(a)
    return made


def passed(model, x, **kwargs):
    """Output, and the gradients of input and adapter, for a fixed slope; dropout draws the same in both models."""
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    out = model(x, **kwargs)
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    model.zero_grad()
    out.backward(slope)
    return [out.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def inputs(dtype=torch.float32):
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize(
    "options",
    [{}, {"lora_dropout": 0.3}, {"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}],
    ids=["plain", "dropout", "dora", "lora bias", "rslora"],
)
def test_in_float32_every_bit_is_pefts(options):
    theirs, ours = pair(**options)
    for a, b in zip(passed(theirs, inputs()), passed(ours, inputs()), strict=True):
        assert torch.equal(a, b)


def test_in_float32_another_scaling_rounds_elsewhere():
    theirs, ours = pair(alpha_pattern={"0": 3})
    for a, b in zip(passed(theirs, inputs()), passed(ours, inputs()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(a.abs().max()))


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.5}, {"use_dora": True}], ids=["plain", "dropout", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32 in", "bfloat16 in"])
def test_under_autocast_every_bit_is_pefts(dtype, options):
    """A scaling that is a power of two, 2 here and in dropout, commutes with rounding."""
    theirs, ours = pair(**options)
    with torch.autocast("cpu", torch.bfloat16):
        results = [passed(model, inputs(dtype)) for model in (theirs, ours)]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_in_bfloat16_it_is_the_float32_computation_to_one_rounding():
    """Products are rounded to 8 bits: each result within 2^-7 of the largest that float32 makes of the same weights."""
    theirs, ours = pair(torch.bfloat16)
    x = inputs(torch.bfloat16)
    results = passed(ours, x)
    wide = copy.deepcopy(theirs).float()
    for ours_, exact, pefts in zip(results, passed(wide, x.float()), passed(theirs, x), strict=True):
        error = (ours_.float() - exact).abs().max() / exact.abs().max()
        assert error < 2**-7 and error < 2 * (pefts.float() - exact).abs().max() / exact.abs().max() + 2**-8
    assert [r.dtype for r in results] == [torch.bfloat16] * 2 + [torch.float32] * 2, "masters get float32 gradients"


def saved(model, x):
    """Tensors that autograd keeps, parameters left out; one per storage."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x.requires_grad_())
    return list(kept.values())


def test_in_bfloat16_no_float32_activation_is_kept():
    """Input (shared with whoever else reads it), the r wide product twice less one, and the rounded A and B."""
    theirs, ours = pair(torch.bfloat16)
    kept = saved(ours, inputs(torch.bfloat16))
    assert {tensor.dtype for tensor in kept} == {torch.bfloat16}
    assert sum(t.numel() for t in kept) == ROWS * WIDTH + ROWS * RANK + RANK * (WIDTH + OUT)
    assert any(t.dtype == torch.float32 and t.numel() == ROWS * WIDTH for t in saved(theirs, inputs(torch.bfloat16)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switching_merging_and_several_adapters_are_pefts(dtype):
    theirs, ours = pair(dtype)
    x, tolerance = inputs(dtype), 0 if dtype == torch.float32 else 2**-5
    for model in (theirs, ours):
        model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0"], init_lora_weights=False))
    for name in ("lora_A", "lora_B"):
        second = getattr(theirs.base_model.model[0], name)["second"].weight
        getattr(ours.base_model.model[0], name)["second"].weight.data.copy_(second.data)
    assert type(ours.base_model.model[0].lora_A["second"]) is RoundedLinear, "an adapter that came later"

    def both(do=lambda model: None, **kwargs):
        results = []
        for model in (theirs, ours):
            do(model)
            results.append(model(x, **kwargs).detach().float())
        assert (results[0] - results[1]).abs().max() <= tolerance * results[0].abs().max()
        return results[1]

    default = both()
    assert not torch.equal(default, both(lambda model: model.base_model.set_adapter(["default", "second"])))
    with theirs.disable_adapter(), ours.disable_adapter():
        base = both()
    assert not torch.equal(default, base)
    names = ["default", "second", "__base__", "default"] * (ROWS // 4)
    mixed = both(lambda model: model.eval(), adapter_names=names)
    assert (mixed[0::4] - default[0::4]).abs().max() <= tolerance * default.abs().max()
    assert torch.equal(mixed[2::4], base[2::4])
    merged = both(lambda model: (model.base_model.set_adapter("default"), model.merge_adapter()))
    assert (merged - default).abs().max() <= max(tolerance, 1e-6) * default.abs().max()
    unloaded = ours.unload()
    assert type(unloaded[0]) is nn.Linear


@pytest.mark.parametrize("own", [True, False], ids=["new", "saved"])
def test_whatever_puts_an_adapter_on_the_model_makes_such_layers(tmp_path, own):
    config = AdapterConfig(lora_r=4, lora_alpha=8.0)
    if not own:
        made = make_trainable(cases.family(), config)
        made.peft_model.save_pretrained(tmp_path)
        config = AdapterConfig(adapter=str(tmp_path))
    family = cases.family()
    family.model.bfloat16()
    modes = make_trainable(family, config)
    layers = [m for m in family.model.modules() if isinstance(m, Linear)]
    assert layers and all(type(layer) is RoundedLora for layer in layers)
    assert {p.dtype for p in family.model.parameters() if p.requires_grad} == {torch.float32}
    assert modes.peft_model is not None and copy.deepcopy(modes.peft_model) is not None


def test_an_export_in_16_bits_is_compared_in_pefts_arithmetic(tmp_path):
    """Otherwise the roundings of 28 layers, not the weights, would decide whether it passes."""
    family, clips = cases.family(), ClipStore()
    family.model.bfloat16()
    plain = copy.deepcopy(family)
    modes = make_trainable(family, AdapterConfig(lora_r=4))
    with torch.no_grad():
        for name, parameter in family.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    modes.peft_model.save_pretrained(tmp_path)
    prompts = synthetic_prompts(family, clips)
    trained = ask_policy(modes, prompts, clips).trained
    peft.PeftModel.from_pretrained(plain.model, tmp_path).eval()
    theirs = torch.stack([policy_logits(prompt, plain, clips) for prompt in prompts])
    ours = torch.stack([policy_logits(prompt, family, clips) for prompt in prompts])
    assert torch.equal(trained, theirs) and not torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["covo_audio", "qwen2_audio"])
def test_gradients_of_a_whole_pass_in_bfloat16(name):
    """Within 5 % (norm) of those that float32 makes of the same weights."""
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        made = cases.policy(name)
        for part in made.family.model.modules():
            for parameter in part.parameters(recurse=False):
                if not parameter.requires_grad:  # the same weights in both
                    parameter.data = parameter.data.bfloat16().to(dtype)
        for buffer in made.family.model.buffers():
            buffer.data = buffer.data.to(dtype) if buffer.is_floating_point() else buffer.data
        made.train()
        groups = cases.ragged_groups(made)
        scored = made("logps", groups, made.features([g.prompt for g in groups]))
        (scored.logps_NC * cases.weights(groups)).sum().backward()
        results[dtype] = torch.cat([g.flatten() for g in cases.gradients(made).values()])
    exact, half = results.values()
    assert (half - exact).norm() < 0.05 * exact.norm()
