"""QLoRA without bitsandbytes: what would be quantised, what an export is compared with, and what is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import policy_cases
import pytest
import torch
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from covo_rl.audio import ClipStore
from covo_rl.config import AdapterConfig, Options, option_problems
from covo_rl.engines.decoder import FusedDecoder, ModuleDecoder, decoder_for
from covo_rl.evaluate.runner import Request
from covo_rl.export import ExportError
from covo_rl.export.adapter import open_policy, save_policy
from covo_rl.export.exporting import export_adapter, export_merged, export_run_adapter
from covo_rl.export.verify import ask_policy, synthetic_prompts
from covo_rl.models import load_family
from covo_rl.models.covo_audio.family import CovoAudio
from covo_rl.models.quantised import (
    BYTES_IN_4BIT,
    QuantisationError,
    check_quantisation,
    element_count,
    quantisation_of,
)
from covo_rl.models.tiny import tiny_covo_audio, tiny_tokenizer
from covo_rl.policy.trainable import Trainable, make_trainable
from covo_rl.run.doctor import plan, sizes_of

SIZES = {"encoder_width": 16, "encoder_layers": 1, "decoder_width": 32, "decoder_layers": 2, "mel_bins": 16}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    for part in tiny_covo_audio(tiny_tokenizer(["What do you hear?"]), adapter_hidden=16, **SIZES):
        part.save_pretrained(folder)
    return folder


def trained(base: Path, seed: int = 1) -> Trainable:
    """A policy whose adapter was moved, as training does."""
    modes = make_trainable(load_family(str(base)), AdapterConfig(lora_r=4))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in modes.family.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return modes


def as_if_quantised(modes: Trainable) -> Trainable:
    """What bitsandbytes and transformers leave on a model."""
    modes.family.model.is_loaded_in_4bit = True
    modes.family.model.config.quantization_config = quantisation_of(modes.family.parts, "float32")
    return modes


# -- what is quantised -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["covo_audio", "qwen2_audio"])
def test_the_decoder_is_quantised_and_nothing_else(name):
    """finding: of Qwen2-Audio the encoder and the projector were quantised too."""
    family = policy_cases.family(name)
    skip = quantisation_of(family.parts, "bfloat16").llm_int8_skip_modules
    linear = [name for name, module in family.model.named_modules() if isinstance(module, nn.Linear)]
    quantised = {name for name in linear if should_convert_module(name, skip)}
    assert quantised == {name for name in linear if name.startswith(family.parts["llm"])}
    assert len(quantised) == 2 * 7 and len(linear) > len(quantised) + 4  # q k v o gate up down


def test_products_are_in_the_dtype_of_the_model():
    for dtype in ("float32", "bfloat16"):
        config = quantisation_of(CovoAudio.parts, dtype)
        assert config.bnb_4bit_compute_dtype == getattr(torch, dtype) and config.bnb_4bit_quant_type == "nf4"


def test_four_bits_that_cannot_be_had_are_said_with_what_to_do(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(QuantisationError, match=r"needs bitsandbytes: pip install 'covo-rl\[qlora\]'"):
        load_family(str(base), load_in_4bit=True)
    request = Request(model=str(base), load_in_4bit=True)
    assert "--load-in-4bit: a base in 4 bits" in request.model_problems()[0]
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    stub = SimpleNamespace(__version__="0.45.0")
    monkeypatch.setitem(sys.modules, "bitsandbytes", stub)
    with pytest.raises(QuantisationError, match=r"bitsandbytes 0\.45\.0 computes on cuda, not on cpu"):
        check_quantisation()
    stub.supported_torch_devices = {"cpu", "cuda"}
    check_quantisation()


def test_whole_parameters_cannot_train_in_four_bits():
    options = Options(adapter=AdapterConfig(lora=False, load_in_4bit=True))
    assert [text for text in option_problems(options) if "load_in_4bit" in text] == [
        "load_in_4bit: the decoder's own parameters cannot train in 4 bits: use --lora, or leave it out"
    ]
    replies = Request(predictions=Path("r.json"), set_="mmar", output=Path("o"), load_in_4bit=True)
    assert any(text.startswith("--load-in-4bit needs a --model") for text in replies.problems())


def test_two_numbers_of_a_quantised_parameter_share_a_byte():
    packed = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = SimpleNamespace(shape=torch.Size([8, 8]))
    assert element_count(packed) == 64
    assert element_count(nn.Parameter(torch.zeros(8, 8))) == 64


def test_the_plan_counts_the_decoder_in_four_bits():
    """7B: of 8.40 B parameters in bfloat16 the 6.53 B of the decoder's linear layers shrink to 0.516 bytes each."""
    config, options = sizes_of("tencent/Covo-Audio-Chat"), Options()
    whole = plan(config, options, prompt_positions=300).memory["weights"]
    options.adapter.load_in_4bit = True
    in_4bit = plan(config, options, prompt_positions=300).memory["weights"]
    assert pytest.approx((whole - in_4bit) / 6.525e9, rel=1e-3) == 2 - BYTES_IN_4BIT


class PackedElsewhere(nn.Linear):
    """Any linear layer whose weight is not what `nn.Linear` takes it for, as bitsandbytes' is."""


def test_decoding_leaves_layers_alone_that_are_no_plain_linear():
    policy = policy_cases.policy()
    assert isinstance(decoder_for(policy, rows=4, longest=64), FusedDecoder)
    down: Any = policy.family.decoder.layers[1].mlp.down_proj
    down.base_layer.__class__ = PackedElsewhere
    assert isinstance(decoder_for(policy, rows=4, longest=64), ModuleDecoder)


# -- what an export is compared with -----------------------------------------------------------------------------


def fresh_process(modes, prompts, clips, *, quantisation: float, loses: float = 0.0):
    """Stands for the process that loads the export: on a base that is the policy's, and on the unquantised one, whose
    logits lie `quantisation` apart. Of the update it `loses` a share."""
    expected = ask_policy(modes, prompts, clips)
    adapted = expected.trained + loses * (expected.base - expected.trained)
    targets = []

    def run(family, folder, asked, *_):
        targets.extend(asked)
        logits = {asked[0].name: adapted, asked[0].base: expected.base}
        logits |= {t.name: adapted + quantisation for t in asked[1:]}
        logits |= {t.base: expected.base + quantisation for t in asked[1:]}
        notes = {"loaded": [], "versions": {}, **{t.name: {"missing_keys": []} for t in asked}}
        return logits, notes

    return run, targets


def test_an_adapter_is_compared_on_the_base_that_it_was_trained_on(base, tmp_path, monkeypatch):
    """finding: three steps trained, then the export failed with logits 1.95 apart, tolerance 0.064."""
    modes, clips = as_if_quantised(trained(base)), ClipStore()
    prompts = synthetic_prompts(modes.family, clips)
    run, targets = fresh_process(modes, prompts, clips, quantisation=1.95)
    monkeypatch.setattr("covo_rl.export.verify.run_fresh", run)
    result = export_adapter(modes, tmp_path / "out", prompts=prompts, clips=clips)
    assert [(t.name, t.kind, t.base) for t in targets] == [
        ("adapter", "adapter", "base.float32.4bit"),
        ("unquantised", "adapter", "base.float32"),
    ]
    assert targets[0].quantization_config["bnb_4bit_quant_type"] == "nf4" and not targets[1].quantization_config
    assert result.ok and result.max_abs_logit_diff_trained == 0.0
    assert result.unquantised == pytest.approx(
        {"max_abs_logit_diff_trained": 1.95, "max_abs_logit_diff_of_bases": 1.95, "update_kept": 1.0}, abs=1e-3
    )
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["load_in_4bit"] and record["quantization_config"]["load_in_4bit"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "differ from the trained policy's by up to 1.95 (1.95 lies between the two bases without it)" in card
    assert "quantization_config=held" in card

    lost, _ = fresh_process(modes, prompts, clips, quantisation=0.0, loses=0.9)
    monkeypatch.setattr("covo_rl.export.verify.run_fresh", lost)
    with pytest.raises(ExportError, match=r"shows 10 % of what training changed"):
        export_adapter(modes, tmp_path / "lost", prompts=prompts, clips=clips)


def test_an_adapter_on_an_unquantised_base_is_compared_once(base, tmp_path, monkeypatch):
    modes, clips = trained(base), ClipStore()
    prompts = synthetic_prompts(modes.family, clips)
    run, targets = fresh_process(modes, prompts, clips, quantisation=0.0)
    monkeypatch.setattr("covo_rl.export.verify.run_fresh", run)
    result = export_adapter(modes, tmp_path / "out", prompts=prompts, clips=clips)
    assert [t.base for t in targets] == ["base.float32"] and result.unquantised is None
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["load_in_4bit"] is False and record["quantization_config"] is None
    assert "4 bits" not in (tmp_path / "out" / "README.md").read_text()


def test_four_bits_take_up_no_update_and_the_unquantised_base_does(base, tmp_path):
    """Merging is refused in memory; of a 4-bit export it goes into the unquantised base, and says so."""
    modes = trained(base)
    save_policy(modes, tmp_path / "adapter", base=str(base))
    (tmp_path / "adapter" / "export.json").write_text('{"load_in_4bit": true}')
    with pytest.raises(ExportError, match=r"4-bit weights cannot take up an update.*covo-rl export --merged"):
        export_merged(as_if_quantised(modes), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()

    opened = open_policy(tmp_path / "adapter", unquantised=True)
    assert opened.load_in_4bit and "trained on a 4-bit base, and is put on one that is not" in opened.modes.notes[-1]
    result = export_merged(opened.modes, tmp_path / "merged", load_in_4bit=opened.load_in_4bit)
    assert result.ok and result.unquantised is None
    assert json.loads((tmp_path / "merged" / "export.json").read_text())["load_in_4bit"]
    assert "which is not exactly the policy that was trained" in (tmp_path / "merged" / "README.md").read_text()
    assert "quantization_config" not in (tmp_path / "merged" / "config.json").read_text()


def test_a_four_bit_policy_is_opened_on_a_four_bit_base(base, tmp_path, monkeypatch):
    asked = []

    def load(path, **options):
        asked.append(options)
        return load_family(path, dtype=options["dtype"])

    save_policy(trained(base), tmp_path / "adapter", base=str(base))
    (tmp_path / "adapter" / "export.json").write_text('{"load_in_4bit": true}')
    monkeypatch.setattr("covo_rl.export.adapter.load_family", load)
    open_policy(tmp_path / "adapter")
    open_policy(tmp_path / "adapter", unquantised=True)
    assert [options["load_in_4bit"] for options in asked] == [True, False]


# -- the end of a run that cannot export -------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [(), ("step_000002", "step_000010")])
def test_a_run_that_cannot_export_names_the_checkpoint_that_holds_its_work(steps, base, tmp_path, monkeypatch):
    modes, clips = trained(base), ClipStore()
    prompts = synthetic_prompts(modes.family, clips)
    for name in steps:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    lost, _ = fresh_process(modes, prompts, clips, quantisation=0.0, loses=0.9)
    monkeypatch.setattr("covo_rl.export.verify.run_fresh", lost)
    with pytest.raises(ExportError) as error:
        export_run_adapter(modes, tmp_path, prompts, clips)
    problem, _, end = str(error.value).rpartition("\n")
    assert "the adapter export failed its check" in problem
    if steps:
        step = tmp_path / "checkpoints" / "step_000010"
        assert end.startswith(f"the run's work is not lost, {step} holds it: `covo-rl export {step} --adapter DIR` ")
    else:
        assert end.startswith(f"no checkpoint lies in {tmp_path / 'checkpoints'}") and "--checkpoint-every N" in end
    with pytest.raises(ExportError) as error:  # of a periodic checkpoint: the message before it names that
        export_run_adapter(modes, tmp_path, prompts, clips, folder=tmp_path / "exports" / "step_000002")
    assert "holds it" not in str(error.value) and "no checkpoint lies" not in str(error.value)


def test_a_run_that_changed_nothing_says_how_its_checkpoint_is_exported(base, tmp_path):
    modes, clips = make_trainable(load_family(str(base)), AdapterConfig(lora_r=4)), ClipStore()
    (tmp_path / "checkpoints" / "step_000003").mkdir(parents=True)
    with pytest.raises(ExportError, match=r"no-op.*\n.*step_000003 --adapter DIR --allow-noop` tries again"):
        export_run_adapter(modes, tmp_path, synthetic_prompts(modes.family, clips), clips)
