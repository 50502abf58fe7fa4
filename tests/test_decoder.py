"""A decode step: the fused decoder against the model's own modules, rows that make room, a step to be captured."""

import dataclasses
from contextlib import nullcontext
from types import SimpleNamespace

import policy_cases as cases
import pytest
import torch
from safetensors.torch import load_file, save_file
from text_families import TextFamily
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from covo_rl.config import RolloutConfig
from covo_rl.engines import decode_attention, decode_weights, decoding
from covo_rl.engines.decode_weights import DecodeLinear
from covo_rl.engines.decoder import FusedDecoder, ModuleDecoder, decoder_for
from covo_rl.engines.draws import Drawing, truncated
from covo_rl.engines.key_values import KeyMemory
from covo_rl.engines.own import sample
from covo_rl.policy import flash

FAMILIES = ("covo_audio", "qwen2_audio")
CONFIG = RolloutConfig(num_generations=5, max_completion_length=24)


def _sampled(made, prompts, config=CONFIG, **kwargs):
    with torch.no_grad():
        features = made.features(prompts)
    return sample(made, prompts, features, config, **{"seed": 1, **kwargs})


def _logps(groups):
    return torch.tensor([x for g in groups for r in g.rollouts for x in r.logps])


# -- the fused decoder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("megabytes", [0, 100], ids=["low-rank", "folded"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_fused_and_modules_write_the_same(name, lora, megabytes):
    made = cases.policy(name, lora=lora, decode_weights_mb=megabytes)
    prompts = cases.prompts(made)
    assert isinstance(decoder_for(made, rows=4, longest=9), FusedDecoder)
    fused = _sampled(made, prompts)
    made.fused_decode = False
    modules = _sampled(made, prompts)
    assert cases.ids_of(fused) == cases.ids_of(modules)
    torch.testing.assert_close(_logps(fused), _logps(modules), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_in_bfloat16_they_differ_by_rounding(name):
    """Largest difference of log-probs of the same ids below 0.15 nats, 0.01 on average; scoring is as near to both."""
    made = cases.policy(name, dtype=torch.bfloat16)
    prompts = cases.prompts(made)
    fused = _sampled(made, prompts)
    made.fused_decode = False
    modules = _sampled(made, prompts)
    features = made.features(prompts)
    for groups in (fused, modules):
        with torch.no_grad():
            scored = made("logps", groups, features)
        gap = (scored.logps_NC[scored.mask_NC] - _logps(groups)).abs()
        assert float(gap.mean()) < 0.02 and float(gap.max()) < 0.3
    first = [(f.rollouts, m.rollouts) for f, m in zip(fused, modules, strict=True)]
    same = [
        (a, b)
        for some, others in first
        for a, b in zip(some, others, strict=True)
        if a.completion_ids[0] == b.completion_ids[0]
    ]
    assert len(same) > 15
    assert max(abs(a.logps[0] - b.logps[0]) for a, b in same) < 0.15


def test_under_autocast_float32_weights_are_multiplied_in_bfloat16(monkeypatch):
    monkeypatch.setattr(decode_weights, "PACKED_ELEMENTS", 1)
    made = cases.policy()
    prompts = cases.prompts(made)
    with torch.autocast("cpu", torch.bfloat16):
        decoder = decoder_for(made, rows=4, longest=9)
        assert decoder.dtype == torch.bfloat16 and decoder.head is None, "the head too, though it could be packed"
        fused = _sampled(made, prompts)
        made.fused_decode = False
        modules = _sampled(made, prompts)
        scored = made("logps", fused, made.features(prompts))
    gap = (scored.logps_NC[scored.mask_NC].detach() - _logps(fused)).abs()
    assert 0 < float(gap.mean()) < 0.02
    agree = [a[0] == b[0] for a, b in zip(cases.ids_of(fused), cases.ids_of(modules), strict=True)]
    assert sum(agree) > 0.9 * len(agree)
    made.decode_weights_mb, made.fused_decode = 0, True
    with torch.autocast("cpu", torch.bfloat16):  # no room for copies in bfloat16
        assert isinstance(decoder_for(made, rows=4, longest=9), ModuleDecoder)


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 90,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3}  # fmt: skip
MAKES = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters={
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16})),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
}  # fmt: skip


@pytest.mark.parametrize("make", MAKES)
def test_decoders_of_other_makes_step_as_their_own_forward(make):
    """Qwen3 has norms on queries and keys and wider heads, Llama scaled angles: logits to 1e-4 of a whole forward."""
    torch.manual_seed(0)
    model = MAKES[make]().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    family = TextFamily(model, None)
    ids_RT = torch.randint(0, 90, (3, 12))
    with torch.inference_mode():
        cache = model(ids_RT[:1, :7], use_cache=True).past_key_values
        ids_RT[:, :7] = ids_RT[0, :7]
        keys = {
            n: tuple(x[0].transpose(0, 1) for x in (layer.keys, layer.values)) for n, layer in enumerate(cache.layers)
        }
        memory = KeyMemory(keys, [(0, 7)], rows=3, limit=5, widest=3)
        memory.arrange([-1, -1, -1], [0, 0, 0])
        policy = SimpleNamespace(family=family, fused_decode=True, sharded=False, decode_weights_mb=10)
        decoder = decoder_for(policy, rows=3, longest=12)
        assert isinstance(decoder, FusedDecoder)
        expected = model(ids_RT).logits
        for step in range(5):
            memory.begin(torch.full((3,), step + 1), step + 1, equal=True)
            hidden = decoder.hidden(ids_RT[:, 7 + step], torch.full((3,), 7 + step), memory)
            torch.testing.assert_close(decoder.logits(hidden), expected[:, 7 + step], atol=1e-4, rtol=1e-4)


def test_what_is_not_known_is_left_to_the_modules():
    """A hook, DoRA, another class: their calls do more than the fused step knows. A weight that is a slice of
    DeepSpeed's flat tensor must stay there."""
    hooked = cases.policy()
    hooked.family.decoder.layers[1].mlp.register_forward_hook(lambda module, args, out: out)
    other = cases.policy()
    norm = other.family.decoder.layers[0].input_layernorm
    norm.__class__ = type("Other", (type(norm),), {"__module__": "elsewhere"})
    flat = cases.policy(lora=False)
    flat.family.decoder.layers[0].mlp.up_proj.weight._hp_mapping = None
    for made in (
        hooked,
        other,
        flat,
        cases.policy(adapter={"use_dora": True}),
        cases.policy(fused_decode=False),
    ):
        assert isinstance(decoder_for(made, rows=4, longest=9), ModuleDecoder)


# -- weights ---------------------------------------------------------------------------------------------------------


def test_products_of_16_bits_share_the_parameters_memory(tmp_path):
    """No second copy of the weights: the parameters are slices of the product's, with the same values; a file of them
    is as before; and a parameter that is given other memory is joined again, not forgotten."""
    made = cases.policy(dtype=torch.bfloat16)
    values = {name: p.detach().clone() for name, p in made.named_parameters()}
    prompts = cases.prompts(made)
    before = _sampled(made, prompts)
    mlp = made.family.decoder.layers[0].mlp
    gate, up = mlp.gate_proj.base_layer, mlp.up_proj.base_layer
    assert up.weight.data_ptr() == gate.weight.data_ptr() + gate.weight.numel() * 2
    assert all(torch.equal(p, values[name]) for name, p in made.named_parameters())
    places = [p.data_ptr() for p in made.parameters()]
    assert _sampled(made, prompts) == before and places == [p.data_ptr() for p in made.parameters()]
    save_file({name: p.data for name, p in gate.named_parameters()}, tmp_path / "gate.safetensors")
    assert (tmp_path / "gate.safetensors").stat().st_size < 2 * gate.weight.numel() + 200
    assert torch.equal(load_file(tmp_path / "gate.safetensors")["weight"], gate.weight)
    up.weight.data = up.weight.data.clone()
    assert _sampled(made, prompts) == before
    assert up.weight.data_ptr() == gate.weight.data_ptr() + gate.weight.numel() * 2


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_an_update_of_adapter_or_weights_is_sampled_with(half):
    """No stale copy: what an optimiser changes is seen by the next call."""
    made = cases.policy(dtype=torch.bfloat16) if half else cases.policy()
    prompts = cases.prompts(made)
    before = _logps(_sampled(made, prompts, greedy=True))
    layer = made.family.decoder.layers[1].self_attn.q_proj
    for tensor in (layer.lora_B["default"].weight, layer.lora_A["default"].weight, layer.base_layer.weight):
        with torch.no_grad():
            tensor.mul_(1.5)
        after = _logps(_sampled(made, prompts, greedy=True))
        assert after.shape != before.shape or not torch.equal(after, before)
        before = after


def test_low_rank_products_beside_a_16_bit_weight_keep_small_updates():
    """An update of a 4,000th of a weight vanishes when it is folded into bfloat16; beside it, most of it is there."""
    torch.manual_seed(0)
    made = cases.policy()
    layer = made.family.decoder.layers[0].mlp.down_proj
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.ones_like(layer.base_layer.weight))
        layer.lora_A["default"].weight.fill_(2**-6)
        layer.lora_B["default"].weight.fill_(2**-8 / layer.scaling["default"])
    layer.base_layer.bfloat16()
    size = layer.base_layer.in_features
    x_RD = torch.eye(size, dtype=torch.bfloat16)[:3]
    product = DecodeLinear([layer], torch.bfloat16, fold=False, rows=3)
    delta = 4 * 2**-14  # four ranks
    y_RO = x_RD.mm(product.turned).detach()
    low_RO = y_RO[:, layer.base_layer.out_features :].float() @ product.up.detach().float()
    torch.testing.assert_close(low_RO, torch.full_like(low_RO, delta), rtol=0.01, atol=0)
    assert torch.equal(torch.ones(1).bfloat16() + delta, torch.ones(1).bfloat16()), "folded, it would be lost"


# -- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("varlen", [False, True], ids=["grid", "varlen"])
@pytest.mark.parametrize("fused", [False, True], ids=["modules", "fused"])
def test_rows_that_finish_make_room_for_others(fused, varlen, monkeypatch):
    """25 rows, 4 at a time or all at once: the same completions, and fewer row-steps than lanes of 4 would make."""
    made = cases.with_likely_end(cases.policy(fused_decode=fused), 3.0)
    prompts = cases.prompts(made, seconds=((0.6,), (), (0.9, 0.3), (0.4,), (0.2,)))
    together = _sampled(made, prompts)
    lengths = [len(ids) for ids in cases.ids_of(together)]
    assert len(set(lengths)) > 5
    if varlen:
        monkeypatch.setattr(decoding, "flash", SimpleNamespace(available=lambda *device: True))
    made.counters.decode_positions = 0
    few = _sampled(made, prompts, dataclasses.replace(CONFIG, decode_rows=4))
    assert cases.ids_of(few) == cases.ids_of(together)
    torch.testing.assert_close(_logps(few), _logps(together), atol=1e-5, rtol=0)
    lanes = sum(4 * max(lengths[n : n + 4]) for n in range(0, 25, 4))
    assert sum(lengths) - 25 <= made.counters.decode_positions < lanes
    one = _sampled(made, prompts, dataclasses.replace(CONFIG, decode_rows=1))
    assert cases.ids_of(one) == cases.ids_of(together)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_very_short_completions(length):
    made = cases.policy()
    prompts = cases.prompts(made)
    config = dataclasses.replace(CONFIG, max_completion_length=length)
    groups = _sampled(made, prompts, config)
    assert all(len(ids) <= length for ids in cases.ids_of(groups))
    assert cases.ids_of(groups) == cases.ids_of(_sampled(made, prompts, dataclasses.replace(config, decode_rows=3)))
    made.fused_decode = False
    assert cases.ids_of(groups) == cases.ids_of(_sampled(made, prompts, config))


def test_positions_beyond_those_of_the_configuration():
    """Scaled positions reach further than `max_position_embeddings`."""
    made = cases.policy(sizes={"max_position_embeddings": 40})
    prompts = cases.prompts(made)
    assert max(len(prompt.input_ids) for prompt in prompts) > 60
    fused = _sampled(made, prompts)
    made.fused_decode = False
    assert cases.ids_of(fused) == cases.ids_of(_sampled(made, prompts))


# -- a step that can be captured -----------------------------------------------------------------------------------


class NoHost(TorchDispatchMode):
    """Refuses what would wait for a device: values or sizes that the host must know."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "_unique2", "bincount")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name.split("::")[1] not in self.WAITS, func
        return func(*args, **(kwargs or {}))


def _dense_varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, causal, scale, used_k):
    """policy/flash.varlen for a record: from its tensors alone, where the plain form reads lengths on the host."""
    query, key = torch.arange(len(q)), torch.arange(len(k))
    segment = torch.bucketize(query, cu_q[1:].long(), right=True).clamp(max=len(used_k) - 1)
    first, last = cu_k[segment].long(), (cu_k[:-1] + used_k)[segment].long()
    inside = (key >= first[:, None]) & (key < last[:, None])
    k, v = (x.float().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q.float(), k).mul(scale).masked_fill(~inside, -torch.inf)
    return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v).to(q.dtype), scores.logsumexp(-1)


class Traced:
    """Stands for CUDA graphs on a CPU: a step is recorded once per number of rows, with every host value as it was,
    and the record is what runs from then on."""

    replays = 0

    def __init__(self, advance, device):
        self.advance, self.records = advance, {}

    def run(self, rows):
        if rows not in self.records:
            with NoHost():
                self.advance()
            self.records[rows] = None
        elif self.records[rows] is None:
            self.records[rows] = _recorded(self.advance)
            self.run(rows)
        else:
            self.records[rows]()
            Traced.replays += 1


def _recorded(advance):
    """The calls of one `advance`, to be made again on the same tensors; what it changed is put back."""
    calls, saved = [], {}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            schema = func._schema
            for argument, value in zip(schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    key = value.untyped_storage().data_ptr()
                    saved.setdefault(key, (value, value.untyped_storage().nbytes(), bytes(value.untyped_storage())))
            out = func(*args, **kwargs)
            calls.append((func, args, kwargs, out))
            return out

    with Recorder():
        advance()
    for value, _, content in saved.values():
        value.untyped_storage().copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8).untyped_storage())

    def replay():
        for func, args, kwargs, out in calls:
            again = func(*args, **kwargs)
            for old, new in zip(*(x if isinstance(x, (tuple, list)) else [x] for x in (out, again)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)  # where the next call looks for it

    return replay


@pytest.mark.parametrize(
    ("half", "window"), [(False, None), (True, None), (False, 6)], ids=["float32", "bfloat16", "window"]
)
def test_a_recorded_step_is_the_plain_step_bit_for_bit(half, window, monkeypatch):
    """What a CUDA graph needs: no value on the host, no tensor that moves, nothing that depends on the step's number;
    also while rows leave and others begin."""
    made = cases.with_likely_end(cases.policy(dtype=torch.bfloat16) if half else cases.policy(), 3.0)
    for layer in made.family.decoder.layers:
        layer.self_attn.sliding_window = window
    prompts = cases.prompts(made)
    config = dataclasses.replace(CONFIG, decode_rows=6)
    monkeypatch.setattr(decoding, "flash", SimpleNamespace(available=lambda *device: True))
    made.decode_graphs = False
    expected = _sampled(made, prompts, config)
    monkeypatch.setattr(decode_attention, "flash", SimpleNamespace(varlen=_dense_varlen))
    made.decode_graphs = True
    plain = _sampled(made, prompts, config)  # on a CPU graphs are plain steps
    monkeypatch.setattr(decoding, "StepGraphs", Traced)
    monkeypatch.setattr(Traced, "replays", 0)
    assert _sampled(made, prompts, config) == plain
    assert Traced.replays > 20
    if not half:
        assert cases.ids_of(plain) == cases.ids_of(expected)


# -- truncation --------------------------------------------------------------------------------------------------------


def test_of_equally_likely_tokens_the_first_ones_are_kept():
    """Eight tokens of 1/8: 0.55 of the mass is reached within the fifth; a ninth, heavier one comes before all."""
    even = torch.full((1, 8), 1 / 8)
    assert (truncated(even, Drawing(top_p=0.55)) > 0).tolist() == [[True] * 5 + [False] * 3]
    heavy = torch.tensor([[0.05] * 10 + [0.5]])
    assert (truncated(heavy, Drawing(top_p=0.57)) > 0).tolist() == [[True] * 2 + [False] * 8 + [True]]
    assert (truncated(heavy, Drawing(top_p=1e-9)) > 0).tolist() == [[False] * 10 + [True]]


def test_the_nucleus_without_a_sort_is_that_of_a_sort():
    logits = torch.randn(40, 3000, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 6, 40)[:, None]
    probs = logits.softmax(-1)
    for top_p in (0.05, 0.5, 0.9, 0.99):
        ranked, order = probs.sort(dim=-1, descending=True, stable=True)
        before = ranked.double().cumsum(-1) - ranked
        expected = torch.zeros_like(probs, dtype=torch.bool).scatter(
            1, order, before < top_p * ranked.double().sum(-1, True)
        )
        assert torch.equal(truncated(probs, Drawing(top_p=top_p)) > 0, expected)


def test_the_kernels_step_has_every_tensor_on_the_device(monkeypatch):
    """Shapes, dtypes and devices of the CUDA step by torch's own rules for them, on a device without values: kernel,
    products, draw, and what they write. An operand that was left on the host is an error here."""
    made = cases.policy(dtype=torch.bfloat16)
    monkeypatch.setattr(flash, "available", lambda *device: True)
    seen = []
    original = flash._kernel
    monkeypatch.setattr(flash, "_kernel", lambda *args: seen.append(args[0].stride()) or original(*args))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # which knows no device without values
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    with torch.inference_mode():
        for module in made.modules():  # a twin of every tensor, on the device
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    twin = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                    module._parameters[name] = torch.nn.Parameter(twin, requires_grad=False)
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")
        kv_heads, width = (
            made.family.decoder.config.num_key_value_heads,
            made.family.decoder.layers[0].self_attn.head_dim,
        )
        k_LKd = torch.empty(30, kv_heads, width, dtype=torch.bfloat16, device="meta")
        keys = dict.fromkeys((0, 1), (k_LKd, k_LKd))
        memory = KeyMemory(keys, [(0, 20), (20, 30)], rows=6, limit=11, widest=4, varlen=True)
        memory.arrange([-1] * 6, [0, 0, 0, 0, 1, 1])
        decoder = decoder_for(made, rows=6, longest=32)
        ends = torch.tensor([3, 5], device="meta")
        noise = torch.empty(6, 12, dtype=torch.float64, device="meta")
        rows = decoding.DecodeRows(noise, torch.full((6,), 20, device="meta"), ends, Drawing(top_p=0.9, top_k=20), 6)
        rows.arrange([-1] * 6, list(range(6)))
        memory.begin(rows.drawn_R, 3, equal=False)
        hidden = decoder.hidden(rows.token_R, rows.drawn_R + 20, memory)
        rows.draw(decoder.logits(hidden))
        assert hidden.device.type == "meta" and hidden.dtype == torch.bfloat16
        assert len(seen) == 4 and rows.token_R.device.type == "meta"
        # the kernel reads 16 bytes at once: with three adapters of rank 4 behind them, queries must be padded to that
        assert all(stride % 8 == 0 for strides in seen for stride in strides[:2]), seen
