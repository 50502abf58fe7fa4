"""LoRA on a model that listens while it speaks trains the rows of think, shift and break too, and no other row."""

import warnings

import peft
import pytest
import torch
from duplex_cases import duplex_family
from peft.tuners.trainable_tokens import TrainableTokensLayer

from covo_rl.config import AdapterConfig, Options
from covo_rl.engines.vllm_checks import fit_problems
from covo_rl.export.adapter import save_policy
from covo_rl.policy.entries import merged_entries
from covo_rl.policy.lora import TrainedRows
from covo_rl.policy.policy import adapters_disabled
from covo_rl.policy.trainable import make_trainable
from covo_rl.types import Example, Prompt

DIALOGUE = torch.tensor([[5, 20, 6, 21, 40, 300, 22, 7, 20]])


def trained(family, config):
    """Three steps on a dialogue in which every control occurs."""
    modes = make_trainable(family, config)
    weights = [p for p in family.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    for _ in range(3):
        family.model(input_ids=DIALOGUE, labels=DIALOGUE).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return modes


@pytest.fixture(scope="module")
def modes():
    return trained(duplex_family()[0], AdapterConfig(lora_r=2))


def logits(model):
    with torch.no_grad():
        return model(input_ids=DIALOGUE).logits


def test_the_rows_of_the_controls_change_and_no_others(modes):
    before = {entry.name: entry.tensor() for entry in merged_entries(duplex_family()[0].model)}
    after = {entry.name: entry.tensor() for entry in merged_entries(modes.family.model)}
    adapted = {f"{name}.weight" for name in modes.targets}
    assert before.keys() == after.keys() and len(adapted) == 14
    for name, weight in after.items():
        changed = weight != before[name]
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            assert changed.any(1).nonzero()[:, 0].tolist() == [20, 21, 22], name
        else:
            assert changed.any() == (name in adapted), name
    (row,) = [row for row in modes.report if row.module == "lm_head token deltas"]
    assert (row.trainable, row.dtype) == (3 * 48, "float32")
    with adapters_disabled(modes.family.model):
        assert torch.equal(logits(modes.family.model), logits(duplex_family()[0].model))


def test_the_adapter_brings_them_back_here_and_in_peft(modes, tmp_path):
    expected = logits(modes.family.model)
    save_policy(modes, tmp_path)
    again, theirs = duplex_family()[0], duplex_family()[0]
    read = make_trainable(again, AdapterConfig(adapter=str(tmp_path)))
    assert torch.equal(logits(again.model), expected) and read.trainable_parameters == modes.trainable_parameters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.PeftModel.from_pretrained(theirs.model, str(tmp_path))
    torch.testing.assert_close(logits(theirs.model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_they_make_and_their_gradients_are_pefts(dtype):
    """PEFT writes the rows into a copy of the weight; here they replace what the base makes of its own."""
    family = duplex_family()[0]
    family.model.to(dtype)
    make_trainable(family, AdapterConfig(lora_r=2))
    rows = {n: p for n, p in family.model.named_parameters() if "trainable_tokens" in n}
    assert len(rows) == 2 and {p.dtype for p in rows.values()} == {torch.float32}
    with torch.no_grad():
        for parameter in rows.values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))

    def passed():
        out = family.model(input_ids=DIALOGUE, labels=DIALOGUE)
        return [out.logits.detach(), *torch.autograd.grad(out.loss, list(rows.values()))]

    ours = passed()
    for layer in family.model.modules():
        if type(layer) is TrainedRows:
            layer.__class__ = TrainableTokensLayer
    limit = 1e-6 if dtype is torch.float32 else 2e-2
    for here, there in zip(ours, passed(), strict=True):
        assert there.abs().max() > 1e-3
        torch.testing.assert_close(here, there, rtol=limit, atol=limit * float(there.abs().max()))


def test_modules_that_train_as_a_whole_need_no_rows():
    modes = make_trainable(duplex_family()[0], AdapterConfig(lora_r=2, modules_to_save=["lm_head"]))
    assert modes.peft_model is not None
    assert modes.peft_model.peft_config["default"].trainable_token_indices == {"embed_tokens": [20, 21, 22]}


def test_an_adapter_without_them_is_noted_and_vllm_is_refused(modes, tmp_path):
    plain, ids = duplex_family()
    section, plain.model.config.duplex = plain.model.config.duplex, None
    save_policy(make_trainable(plain, AdapterConfig(lora_r=2)), tmp_path)
    family = duplex_family()[0]
    (note,) = [n for n in make_trainable(family, AdapterConfig(adapter=str(tmp_path))).notes if "rows" in n]
    assert "leaves rows 20, 21, 22 of embed_tokens and lm_head as the model has them" in note
    assert section["shift"] == ids.shift
    options = Options()
    options.engine.use_vllm = True
    prompt = Prompt(Example("a", (), "?"), (), "?", (1, 2))
    assert "which vLLM does not load" in fit_problems(options, modes, [prompt])[0]
