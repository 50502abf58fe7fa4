"""What trains is what was asked for, and a pattern that does not do what it says is an error."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from covo_rl.config import AdapterConfig, ConfigError
from covo_rl.models.covo_audio import CovoAudioConfig, CovoAudioForConditionalGeneration
from covo_rl.policy.patterns import PatternError, decoder_pattern, part_of
from covo_rl.policy.trainable import make_trainable, param_groups, render_report

LLM = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
       "num_key_value_heads": 1, "vocab_size": 40, "max_position_embeddings": 64}  # fmt: skip
ENCODER = {"d_model": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "num_mel_bins": 4}


def covo(dtype: torch.dtype = torch.float32):
    """Weights and part names of a family are all that modes look at."""
    torch.manual_seed(0)
    config = CovoAudioConfig(llm_config=LLM, encoder_config={**ENCODER, "max_source_positions": 8},
                             audio_token_index=40, adapter_hidden_dim=8)  # fmt: skip
    parts = {"encoder": "encoder.", "audio_adapter": "audio_adapter.", "llm": "llm.model.", "lm_head": "llm.lm_head."}
    return SimpleNamespace(
        model=CovoAudioForConditionalGeneration(config).to(dtype),
        parts=parts,
        model_type="covo_audio",
        lora_leaves=None,
        trained_rows={},
    )


def qwen2_audio():
    torch.manual_seed(0)
    config = Qwen2AudioConfig(
        text_config={"model_type": "qwen2", **LLM},
        audio_config={"model_type": "qwen2_audio_encoder", **ENCODER, "max_source_positions": 8},
        audio_token_index=39,
    )
    parts = {"encoder": "model.audio_tower", "audio_adapter": "model.multi_modal_projector",
             "llm": "model.language_model", "lm_head": "lm_head"}  # fmt: skip
    model = Qwen2AudioForConditionalGeneration(config)
    return SimpleNamespace(model=model, parts=parts, model_type="qwen2_audio", lora_leaves=None, trained_rows={})


FAMILIES = pytest.mark.parametrize("make", [covo, qwen2_audio])


def trainable_names(family) -> list[str]:
    return [name for name, p in family.model.named_parameters() if p.requires_grad]


@FAMILIES
def test_lora_reaches_every_decoder_linear_and_nothing_else(make):
    family = make()
    modes = make_trainable(family, AdapterConfig(lora_r=4))
    # 2 layers x (q k v o gate up down), an A and a B matrix each
    assert len(modes.targets) == 14
    assert len(trainable_names(family)) == 28
    assert {part_of(name, family) for name in trainable_names(family)} == {"llm"}
    assert all(".lora_" in name for name in trainable_names(family))
    # rank 4 x (in + out) per layer: q 16+16, k and v 16+8, o 16+16, gate and up 16+24, down 24+16
    assert modes.trainable_parameters == 2 * 4 * (32 + 24 + 24 + 32 + 40 + 40 + 40)


@FAMILIES
def test_the_usual_peft_pattern_would_reach_the_encoder(make):
    """Trap: q_proj and v_proj also exist in the audio encoder; our pattern is anchored at the decoder."""
    family = make()
    names = [name for name, _ in family.model.named_modules()]
    assert any(part_of(n, family) == "encoder" and n.endswith("q_proj") for n in names)
    regex = re.compile(decoder_pattern(family))
    assert not any(regex.fullmatch(n) for n in names if part_of(n, family) != "llm")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"llm\.model\..*\.q_porj", "q_porj: q_proj"),
        (r"q_proj", r"full module names such as 'llm.model.layers.0.self_attn.q_proj'"),
        (r".*\.q_proj", "modules of the audio encoder, for example 'encoder.layers.0.self_attn.q_proj'"),
        ("all-linear", "reaches the audio encoder and the head"),
        (r"llm\.(", "is not a regular expression"),
    ],
)
def test_patterns_that_do_not_do_what_they_say_are_errors(pattern, message):
    with pytest.raises(PatternError, match=re.escape(message)):
        make_trainable(covo(), AdapterConfig(lora_target_modules=pattern))


def test_an_encoder_named_in_the_pattern_is_asked_for():
    family = covo()
    modes = make_trainable(family, AdapterConfig(lora_target_modules=r"encoder\.layers\..*\.(q_proj|v_proj)"))
    assert modes.targets == ("encoder.layers.0.self_attn.v_proj", "encoder.layers.0.self_attn.q_proj")
    assert {part_of(name, family) for name in trainable_names(family)} == {"encoder"}


@FAMILIES
def test_the_audio_adapter_trains_in_full_beside_lora(make):
    family = make()
    before = sum(p.numel() for n, p in family.model.named_parameters() if part_of(n, family) == "audio_adapter")
    make_trainable(family, AdapterConfig(modules_to_save=["audio_adapter"]))
    full = [p for n, p in family.model.named_parameters() if ".modules_to_save." in n]
    assert all(p.requires_grad for p in full)
    assert sum(p.numel() for p in full) == before
    originals = [p for n, p in family.model.named_parameters() if ".original_module." in n]
    assert not any(p.requires_grad for p in originals)


def test_modules_to_save_that_match_nothing_or_the_encoder_are_errors():
    with pytest.raises(PatternError, match="near matches: audio_adapter"):
        make_trainable(covo(), AdapterConfig(modules_to_save=["audio_adaptor"]))
    with pytest.raises(PatternError, match="also reaches 'encoder"):
        make_trainable(covo(), AdapterConfig(modules_to_save=["v_proj"]))
    with pytest.raises(PatternError, match="use --full"):
        make_trainable(covo(), AdapterConfig(modules_to_save=["llm"]))


@pytest.mark.parametrize("parts", [["llm", "lm_head"], ["audio_adapter"], ["encoder", "lm_head"]])
@FAMILIES
def test_full_mode_trains_exactly_the_named_parts(make, parts):
    family = make()
    modes = make_trainable(family, AdapterConfig(lora=False, train_parts=parts))
    assert modes.peft_model is None
    for name, parameter in family.model.named_parameters():
        assert parameter.requires_grad == (part_of(name, family) in parts), name


def test_an_unknown_part_is_an_error_with_the_nearest_name():
    with pytest.raises(PatternError, match="did you mean 'lm_head'"):
        make_trainable(covo(), AdapterConfig(lora=False, train_parts=["lm_heads"]))
    with pytest.raises(PatternError, match="Parts: encoder, audio_adapter, llm, lm_head"):
        make_trainable(covo(), AdapterConfig(part_learning_rates="xyz=1e-5"))


def test_lora_parameters_are_float32_on_a_bfloat16_base():
    family = covo(torch.bfloat16)
    modes = make_trainable(family, AdapterConfig())
    assert {p.dtype for p in family.model.parameters() if p.requires_grad} == {torch.float32}
    assert modes.notes == ()
    assert "16-bit" in make_trainable(covo(torch.bfloat16), AdapterConfig(lora=False)).notes[0]


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / math.sqrt(4))])
def test_scaling_of_lora_and_rank_stabilised_lora(rslora, scale):
    family = covo()
    make_trainable(family, AdapterConfig(lora_r=4, lora_alpha=8, use_rslora=rslora))
    assert family.model.llm.model.layers[0].self_attn.q_proj.scaling["default"] == pytest.approx(scale)


def test_dora_magnitudes_are_trained_and_not_decayed():
    family = covo()
    modes = make_trainable(family, AdapterConfig(use_dora=True))
    groups = param_groups(family.model, modes.config, 1e-3, 0.1, family=family)
    assert {g["name"]: (len(g["params"]), g["weight_decay"]) for g in groups} == {
        "llm": (28, 0.1),
        "llm (no decay)": (14, 0.0),
    }


def test_groups_have_the_rate_of_their_part_and_hold_every_trainable_parameter_once():
    family = covo()
    config = AdapterConfig(lora=False, train_parts=["encoder", "audio_adapter", "llm"],
                           part_learning_rates="audio_adapter=1e-5,encoder=1e-7")  # fmt: skip
    make_trainable(family, config)
    wrapped = torch.nn.ModuleDict({"policy": family.model})
    groups = param_groups(wrapped, config, 1e-6, 0.01, family=family)
    assert {g["name"].split(" ")[0]: g["lr"] for g in groups} == {"encoder": 1e-7, "audio_adapter": 1e-5, "llm": 1e-6}
    held = [id(p) for g in groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in family.model.parameters() if p.requires_grad)
    assert all((g["weight_decay"] == 0.0) == (p.ndim == 1) for g in groups for p in g["params"])


def test_a_rate_for_a_frozen_part_is_an_error():
    family = covo()
    config = AdapterConfig(part_learning_rates={"encoder": 1e-5})  # type: ignore[arg-type]
    make_trainable(family, config)
    with pytest.raises(PatternError, match="names encoder, in which nothing trains; training parts: llm"):
        param_groups(family.model, config, 1e-6, 0.0, family=family)
    with pytest.raises(ConfigError):
        make_trainable(covo(), AdapterConfig(part_learning_rates="llm:1"))


def test_an_adapter_folder_starts_a_run_and_a_wrong_one_is_an_error(tmp_path):
    first = covo()
    modes = make_trainable(first, AdapterConfig(lora_r=2))
    with torch.no_grad():
        for parameter in first.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    assert modes.peft_model is not None
    modes.peft_model.save_pretrained(tmp_path / "adapter")
    second = covo()
    make_trainable(second, AdapterConfig(adapter=str(tmp_path / "adapter")))
    expected = {n: p for n, p in first.model.named_parameters() if p.requires_grad}
    found = {n: p for n, p in second.model.named_parameters() if p.requires_grad}
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[n], found[n]) for n in expected)
    with pytest.raises(FileNotFoundError, match=r"has an adapter_config\.json"):
        make_trainable(covo(), AdapterConfig(adapter=str(tmp_path)))


def test_an_adapter_whose_tensors_find_no_place_is_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    modes = make_trainable(covo(), AdapterConfig(lora_r=2))
    assert modes.peft_model is not None
    modes.peft_model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    renamed = {name.replace("llm.model.", "thinker.model."): t for name, t in load_file(file).items()}
    save_file(renamed, file)
    with pytest.raises(PatternError, match="does not fit covo_audio"):
        make_trainable(covo(), AdapterConfig(adapter=str(tmp_path)))


def test_the_report_adds_up():
    family = covo()
    total = sum(p.numel() for p in family.model.parameters())
    modes = make_trainable(family, AdapterConfig(modules_to_save=["audio_adapter"]), learning_rate=3e-4)
    rows = {row.module: row for row in modes.report}
    assert list(rows) == ["encoder", "audio_adapter", "audio_adapter trained copy", "llm", "llm LoRA", "lm_head"]
    assert sum(r.trainable for r in modes.report) == modes.trainable_parameters
    base = sum(rows[n].parameters for n in ("encoder", "audio_adapter", "llm", "lm_head"))
    assert base == total
    assert rows["llm LoRA"].learning_rate == 3e-4
    assert rows["encoder"].learning_rate is None
    table = render_report(modes.report)
    assert [str(c) for c in table.columns[-1].cells][:1] == ["frozen"]
    assert str(next(iter(reversed(list(table.columns[1].cells))))) == f"{sum(r.parameters for r in modes.report):,}"


def test_four_bits_of_a_model_that_is_not_quantised_are_an_error():
    with pytest.raises(PatternError, match="the model in memory is not quantised"):
        make_trainable(covo(), AdapterConfig(load_in_4bit=True))
