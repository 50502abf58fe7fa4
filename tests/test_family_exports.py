"""Exports of every family have the names of its published checkpoint, and nothing of it gets lost or counted twice.

That they answer as the policy does in a fresh process is point 8 of the conformance suite (tests/test_families.py).
"""

from __future__ import annotations

import json
import shutil
from collections import Counter

import published
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from covo_rl.config import AdapterConfig
from covo_rl.export.adapter import save_policy
from covo_rl.export.exporting import export_adapter, export_merged
from covo_rl.export.merged import write_merged
from covo_rl.models import family_class, load_family
from covo_rl.models.tiny import tiny_model
from covo_rl.policy.entries import merged_entries
from covo_rl.policy.lora import adapted_modules
from covo_rl.policy.patterns import PatternError, decoder_linears, decoder_pattern, part_of
from covo_rl.policy.sharding import layer_classes
from covo_rl.policy.trainable import make_trainable

TABLES = published.tables()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Family -> a folder with tiny weights under published names, and the tensors in it; made once each."""
    root, made = tmp_path_factory.mktemp("published"), {}

    def base(name):
        if name not in made:
            model, processor = tiny_model(name)
            (root / name).mkdir()
            published.write_published(model, processor, TABLES[name], root / name)
            made[name] = root / name, load_file(root / name / "model.safetensors")
        return made[name]

    return base


def trained(folder, config=None):
    """The policy of a base, moved as training moves it."""
    modes = make_trainable(load_family(str(folder)), config or AdapterConfig(lora_r=2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in modes.family.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return modes


def stored(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def weights_of(family, paths):
    """Published names of the adapted weights. PEFT on transformers 5.17 knows a thinker without its prefix alone."""
    prefix = "thinker." if family.parts in getattr(family, "other_parts", ()) else ""
    return {f"{prefix}{path}.weight" for path in paths}


@pytest.mark.parametrize("name", TABLES)
def test_lora_reaches_the_layers_of_the_decoder_alone(name, bases):
    modes = trained(bases(name)[0])
    family = modes.family
    assert set(adapted_modules(family.model)) == set(modes.targets)
    assert all(part_of(target, family) == "llm" for target in modes.targets)
    leaves = {target.rsplit(".", 1)[-1] for target in modes.targets}
    usual = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    known = {"qwen3_omni_moe": {"q_proj", "k_proj", "v_proj", "o_proj"},  # experts are stacked, no modules
             "phi4_multimodal": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}}  # fmt: skip
    assert leaves == known.get(name, usual)
    text = family.model.config.get_text_config()
    shared = getattr(text, "num_kv_shared_layers", 0)  # Gemma's last layers have no k_proj and v_proj of their own
    assert len(modes.targets) == text.num_hidden_layers * len(leaves) - 2 * shared


def test_a_pattern_saved_elsewhere_reaches_what_it_says_in_a_mixture_of_experts(bases, tmp_path):
    """Trap: PEFT 0.21 makes last names of it, here {q,k,v,o}_proj, three of which the audio encoder has too."""
    folder, _ = bases("qwen3_omni_moe")
    modes = trained(folder)
    save_policy(modes, tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    bare = load_family(str(folder))
    pattern = decoder_pattern(bare)
    file.write_text(json.dumps({**config, "target_modules": pattern}), encoding="utf-8")
    again = make_trainable(load_family(str(folder)), AdapterConfig(adapter=str(tmp_path)))
    assert adapted_modules(again.family.model) == list(modes.targets) and len(modes.targets) == 8
    reached = adapted_modules(get_peft_model(bare.model, LoraConfig(target_modules=pattern)))
    assert [name for name in reached if "audio_tower" in name], "PEFT does as it says: the detour can go"


def test_lora_on_stacked_experts_made_elsewhere_is_read_merged_and_written(bases, tmp_path):
    """PEFT's `target_parameters`: one wrapper around another, for the two tensors of one module."""
    folder, tensors = bases("qwen3_omni_moe")
    family = load_family(str(folder))
    attention = [target for target in decoder_linears(family) if target.endswith("q_proj")]
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=2, target_modules=attention, target_parameters=experts, init_lora_weights=False)
    theirs = get_peft_model(family.model, config)
    theirs.save_pretrained(tmp_path)
    modes = make_trainable(load_family(str(folder)), AdapterConfig(adapter=str(tmp_path)))
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(modes.family.model.eval()(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits)
    merged = {entry.name: entry.tensor() for entry in merged_entries(modes.family.model)}
    plain = {entry.name: entry.tensor() for entry in merged_entries(theirs.merge_and_unload())}
    assert merged.keys() == plain.keys() and all(torch.equal(merged[name], plain[name]) for name in plain)
    moved = {name.rsplit(".", 2)[1] for name in merged if not torch.equal(merged[name], tensors[name])}
    assert moved == {"q_proj", "gate_proj", "up_proj", "down_proj"}
    save_policy(modes, tmp_path / "again")
    again = make_trainable(load_family(str(folder)), AdapterConfig(adapter=str(tmp_path / "again")))
    state = modes.family.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.family.model.state_dict().items())


def test_what_peft_leaves_out_is_an_error(bases):
    """A module that is trained in full takes no LoRA: asked for both, it would silently have the one."""
    path = "model.language_model.layers.0.self_attn.q_proj"
    with pytest.raises(PatternError, match=rf"adapt 14 modules of glmasr, and PEFT left out 1, for example '{path}'"):
        trained(bases("glmasr")[0], AdapterConfig(modules_to_save=[path]))


@pytest.mark.parametrize("name", TABLES)
def test_fsdp_gives_every_layer_of_encoder_and_decoder_a_unit(name, bases):
    """By classes that are there (accelerate refuses others), no layer within another."""
    family = load_family(str(bases(name)[0]))
    wrapped = [path for path, m in family.model.named_modules() if type(m).__name__ in layer_classes(family.model)]
    assert not [path for path in wrapped for other in wrapped if path.startswith(f"{other}.")]
    counts = Counter(part_of(path, family) for path in wrapped)
    assert counts["llm"] == family.model.config.get_text_config().num_hidden_layers
    assert counts["encoder"] == 2


@pytest.mark.parametrize("name", TABLES)
def test_an_adapter_has_the_names_of_the_published_checkpoint(name, bases, tmp_path):
    folder, tensors = bases(name)
    modes = trained(folder)
    save_policy(modes, tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    paths = {key.removeprefix("base_model.model.").split(".lora_")[0] for key in keys}
    assert len(paths) == len(modes.targets)
    assert weights_of(modes.family, paths) <= tensors.keys()
    targets = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["target_modules"]
    assert set(targets) == {*modes.targets, *paths}, "by full name, in memory and as published"


@pytest.mark.parametrize("name", TABLES)
def test_merged_weights_are_the_published_checkpoint_with_other_numbers(name, bases, tmp_path):
    folder, before = bases(name)
    modes = trained(folder)
    write_merged(modes.family, tmp_path, torch.bfloat16)
    after = stored(tmp_path)
    assert {key: tensor.shape for key, tensor in after.items()} == {key: t.shape for key, t in before.items()}
    moved = {key for key in before if not torch.equal(after[key], before[key].to(after[key].dtype))}
    save_policy(modes, tmp_path / "adapter")
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    paths = {key.removeprefix("base_model.model.").split(".lora_")[0] for key in keys}
    assert moved == weights_of(modes.family, paths)
    config, base = (json.loads((path / "config.json").read_text(encoding="utf-8")) for path in (tmp_path, folder))
    assert config["model_type"] == base["model_type"] and config["dtype"] == "bfloat16"
    assert config.keys() >= base.keys()
    again = load_family(str(tmp_path))
    assert again.embed_tokens.weight.dtype == torch.bfloat16
    assert type(again) is family_class(base["model_type"])


# -- a LoRA that the checkpoint itself ships ---------------------------------------------------------------------------

SHIPPED = {"granite_speech": "", "phi4_multimodal": "speech-lora"}  # folder of the checkpoint -> its LoRA for speech


@pytest.fixture(params=SHIPPED)
def shipped(request, bases, tmp_path):
    """A base that ships a LoRA of its own, as the published Granite Speech 3.x and Phi-4-multimodal do."""
    name, base = request.param, tmp_path / "base"
    shutil.copytree(bases(name)[0], base)
    plain = load_family(str(base)).model
    targets = [target for target in trained(base).targets if target.endswith("o_proj")]
    model = get_peft_model(plain, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    model.save_pretrained(str(base / SHIPPED[name]))
    return base


def test_the_lora_of_the_checkpoint_is_in_its_merged_export_once(shipped, tmp_path):
    before = {name: tensor.clone() for name, tensor in load_family(str(shipped)).model.state_dict().items()}
    bare = stored(shipped)
    modes = make_trainable(load_family(str(shipped)), AdapterConfig(lora_r=2))  # B is zero: nothing of ours
    (tmp_path / "merged").mkdir()
    write_merged(modes.family, tmp_path / "merged")
    after = stored(tmp_path / "merged")
    assert after.keys() == {name for name in bare if ".lora_" not in name}
    moved = [name for name in after if not torch.equal(after[name], bare[name])]
    assert moved and all(name.endswith("o_proj.weight") for name in moved)
    again = load_family(str(tmp_path / "merged")).model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())
    assert not list((tmp_path / "merged").rglob("adapter_*"))


@pytest.mark.slow
def test_an_adapter_beside_the_checkpoints_own_is_verified_on_both(shipped, tmp_path):
    """In a fresh process: the base, its own LoRA merged, ours on it."""
    modes = trained(shipped)
    result = export_adapter(modes, tmp_path / "adapter")
    assert result.max_abs_logit_diff_trained <= 1e-5 < 1e-2 < result.max_abs_logit_diff_base
    result = export_merged(modes, tmp_path / "merged")
    assert result.max_abs_logit_diff_trained <= 1e-4 < 1e-2 < result.max_abs_logit_diff_base
