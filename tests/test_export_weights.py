"""Merging, naming, sharding and judging, with numbers that a reader can check."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from covo_rl.audio import ClipStore
from covo_rl.config import AdapterConfig
from covo_rl.export import ExportError
from covo_rl.export.adapter import load_policy_state, policy_folder, run_of, save_policy
from covo_rl.export.card import update_card
from covo_rl.export.exporting import staging, torch_dtype
from covo_rl.export.merged import carried_over, write_merged, write_shards
from covo_rl.export.verify import (
    Expected,
    Target,
    ask_policy,
    compare_logits,
    largest_gap,
    synthetic_prompts,
    update_kept,
)
from covo_rl.models.covo_audio.family import CovoAudio
from covo_rl.models.qwen2_audio import Qwen2Audio
from covo_rl.models.tiny import tiny_covo_audio, tiny_qwen2_audio, tiny_tokenizer
from covo_rl.policy.entries import Entry, merged_entries, merged_parameter, shards
from covo_rl.policy.published import base_name
from covo_rl.policy.trainable import make_trainable

SIZES = {"encoder_width": 16, "encoder_layers": 1, "decoder_width": 32, "decoder_layers": 2, "mel_bins": 16}


def covo() -> CovoAudio:
    return CovoAudio(*tiny_covo_audio(tiny_tokenizer(["What do you hear?"]), adapter_hidden=16, **SIZES))


def qwen2_audio() -> Qwen2Audio:
    return Qwen2Audio(*tiny_qwen2_audio(**SIZES))


def moved(family, config, size=0.05):
    modes = make_trainable(family, config)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in family.model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
    return modes


CONFIGS = [
    AdapterConfig(lora_r=4, modules_to_save=["audio_adapter"]),
    AdapterConfig(lora_r=4, use_dora=True),
    AdapterConfig(lora_r=4, use_rslora=True),
]


@pytest.mark.parametrize("make", [covo, qwen2_audio])
@pytest.mark.parametrize("config", CONFIGS, ids=["lora_and_adapter", "dora", "rslora"])
def test_streamed_merge_is_pefts_merge_and_changes_nothing_in_memory(make, config):
    modes = moved(make(), config)
    before = {name: tensor.clone() for name, tensor in modes.family.model.state_dict().items()}
    entries = {entry.name: entry.tensor() for entry in merged_entries(modes.family.model)}
    after = modes.family.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)

    reference = copy.deepcopy(modes.peft_model).merge_and_unload()
    published = {e.name: e.tensor() for e in merged_entries(reference)}  # no adapter left: names only
    assert entries.keys() == published.keys()
    for name, tensor in published.items():
        torch.testing.assert_close(entries[name], tensor, atol=1e-6, rtol=0)


def test_published_names():
    names = {entry.name for entry in merged_entries(moved(covo(), CONFIGS[0]).family.model)}
    assert {"llm.model.embed_tokens.weight", "llm.model.layers.0.self_attn.q_proj.weight", "llm.lm_head.weight",
            "encoder.conv1.weight", "audio_adapter.downsample_layers.0.conv1d.weight"} <= names  # fmt: skip
    names = {entry.name for entry in merged_entries(moved(qwen2_audio(), CONFIGS[0]).family.model)}
    assert {"language_model.model.layers.0.self_attn.q_proj.weight", "language_model.lm_head.weight",
            "audio_tower.conv1.weight", "multi_modal_projector.linear.weight"} <= names  # fmt: skip


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("llm.model.layers.0.mlp.up_proj.base_layer.weight", "llm.model.layers.0.mlp.up_proj.weight"),
        ("llm.model.layers.0.mlp.up_proj.lora_A.default.weight", None),
        ("audio_adapter.modules_to_save.default.linear.bias", "audio_adapter.linear.bias"),
        ("audio_adapter.modules_to_save.other.linear.bias", None),
        ("audio_adapter.original_module.linear.bias", None),
        ("encoder.conv1.weight", "encoder.conv1.weight"),
    ],
)
def test_names_in_a_model_with_an_adapter(name, plain):
    assert base_name(name) == plain


def test_a_bfloat16_base_is_merged_in_float32_and_rounded_once():
    """The adapter adds 2 x 2^-9 = 2^-8, half a step of bfloat16 above 1: a merge in bfloat16 would drop it."""
    from peft import LoraConfig, get_peft_model

    layer = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False)).to(torch.bfloat16)
    model = get_peft_model(layer, LoraConfig(r=2, lora_alpha=2, target_modules=["0"]))  # type: ignore[arg-type]
    lora = model.base_model.model[0]
    with torch.no_grad():
        lora.base_layer.weight.fill_(1.0)
        lora.lora_A["default"].weight.fill_(1.0)
        lora.lora_B["default"].weight.fill_(2.0**-9)
    merged = merged_parameter(lora, "weight")
    assert merged.dtype == torch.float32
    assert merged.item() == 1.0 + 2.0**-8
    assert lora.base_layer.weight.dtype == torch.bfloat16
    assert lora.base_layer.weight.item() == 1.0


def entry(name: str, count: int) -> Entry:
    return Entry(name, (count,), torch.float32, lambda: torch.full((count,), float(count)))


def test_shards_hold_at_most_the_limit_and_one_is_made_at_a_time(tmp_path):
    # 4 bytes a number: 40, 40, 40, 400, 40 bytes against 100
    entries = [entry("a", 10), entry("b", 10), entry("c", 10), entry("d", 100), entry("e", 10)]
    assert [[e.name for e in group] for group in shards(entries, 100)] == [["a", "b"], ["c"], ["d"], ["e"]]
    write_shards(entries, tmp_path, 100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 560
    assert index["weight_map"]["d"] == "model-00003-of-00004.safetensors"
    assert load_file(tmp_path / index["weight_map"]["d"])["d"].tolist() == [100.0] * 100


def test_a_shard_is_an_eighth_of_the_model_by_default():
    """16 tensors of 64 MB, 1 GB: 128 MB a shard, so that model + shard = 1.125 x the model. None is made here."""
    entries = [entry(str(i), 16_000_000) for i in range(16)]
    assert [len(group) for group in shards(entries)] == [2] * 8


def test_what_the_model_class_does_not_hold_is_carried_along(tmp_path):
    family = covo()
    base, out = tmp_path / "base", tmp_path / "out"
    family.model.save_pretrained(base)
    family.processor.save_pretrained(base)
    save_file({"vocoder.weight": torch.ones(3)}, base / "extra.safetensors")
    (base / "token2wav").mkdir()
    (base / "token2wav" / "model.pt").write_bytes(b"bytes")
    (base / "LICENSE").write_text("terms")
    modes = make_trainable(CovoAudio.load(str(base)), AdapterConfig())
    assert [e.name for e in carried_over(base, merged_entries(modes.family.model))] == ["vocoder.weight"]
    out.mkdir()
    write_merged(modes.family, out, torch.bfloat16)
    weights = {}
    for file in out.glob("*.safetensors"):
        weights |= load_file(file)
    assert weights["vocoder.weight"].tolist() == [1.0, 1.0, 1.0]
    assert weights["llm.lm_head.weight"].dtype == torch.bfloat16
    assert (out / "token2wav" / "model.pt").read_bytes() == b"bytes"
    assert (out / "LICENSE").read_text() == "terms"
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["architectures"] == ["CovoAudioForConditionalGeneration"]


# -- judgement ---------------------------------------------------------------------------------------------------

TRAINED, BASE = torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]])
NOTES = {"loaded": [], "versions": {}, "x": {}}


def verdict(
    found, *, base=BASE, expected_base=BASE, dtype="float32", allow_noop=False, trained=TRAINED, kind="adapter"
):
    expected = Expected([], "float32", trained, expected_base)
    logits = {"x": found, f"base.{dtype}": base}
    return compare_logits(
        Target("x", kind, Path(), dtype), expected, logits, NOTES, base_model="b", allow_noop=allow_noop
    )


def test_the_policy_itself_passes_and_the_base_does_not():
    same = verdict(torch.tensor([[1.0, 3.0 + 5e-5]]))
    assert same.ok and same.max_abs_logit_diff_trained == pytest.approx(5e-5, rel=0.01)
    assert same.max_abs_logit_diff_base == pytest.approx(2.0, abs=1e-3)
    idle = verdict(BASE)
    assert not idle.ok and idle.update_kept == 0.0 and idle.max_abs_logit_diff_trained == 2.0


def test_rounding_that_the_base_has_too_does_not_count_as_the_update():
    """Everything is off by 0.02 in bfloat16; half of the update of 2.0 would be 1.0, and all of it is there."""
    shifted = verdict(TRAINED + 0.02, base=BASE + 0.02, dtype="bfloat16")
    assert shifted.ok and shifted.update_kept == pytest.approx(1.0)
    lost = verdict(BASE + 0.02, base=BASE + 0.02, dtype="bfloat16",
                   trained=torch.tensor([[1.0, 1.01]]))  # fmt: skip
    assert lost.max_abs_logit_diff_trained < lost.tolerance
    assert "bfloat16 rounds it away" in lost.problems[0]


@pytest.mark.parametrize(
    ("kind", "dtype", "top", "tolerance"),
    [
        ("adapter", "float32", 3.0, 1e-4),
        ("adapter", "float32", 300.0, 1e-4),  # the same arithmetic: nothing to round
        ("merged", "float32", 10.0, 1e-4),
        ("merged", "float32", 300.0, 3e-3),
        ("adapter", "bfloat16", 20.0, 0.1),
    ],
)
def test_the_tolerance_is_flat_where_that_can_hold(kind, dtype, top, tolerance):
    trained, base = torch.tensor([[top, 0.0]]), torch.tensor([[top, 5.0]])
    for off, ok in ((0.9, True), (1.1, False)):
        found = trained + torch.tensor([[0.0, off * tolerance]])
        result = verdict(found, base=base, expected_base=base, trained=trained, dtype=dtype, kind=kind)
        assert result.ok is ok, result.problems
        assert result.tolerance == pytest.approx(tolerance)
        assert result.tolerance == max(result.tolerance_flat, result.tolerance_relative * result.max_abs_logit)


def test_an_untrained_policy_is_a_no_op_unless_allowed():
    refused = verdict(BASE, trained=BASE)
    assert not refused.ok and "no-op" in refused.problems[0] and refused.noop
    assert verdict(BASE, trained=BASE, allow_noop=True).ok


def test_full_mode_knows_its_base_from_the_fresh_process_only():
    assert verdict(TRAINED, expected_base=None).ok
    assert verdict(BASE, trained=BASE, expected_base=None).noop


def test_the_policy_is_asked_in_whole_float32(monkeypatch):
    """Seen on an H200: under --mixed_precision bf16 TF32 was on, and the merged export was 0.0074 off by that alone."""
    modes, clips, precisions = moved(covo(), CONFIGS[0]), ClipStore(), []
    for layer in (modes.family.decoder, modes.family.lm_head):
        layer.register_forward_pre_hook(lambda *_: precisions.append(torch.get_float32_matmul_precision()))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        ask_policy(modes, synthetic_prompts(modes.family, clips), clips)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(precisions) == {"highest"}


def test_nan_is_never_equal():
    nan = torch.tensor([[1.0, float("nan")]])
    assert largest_gap(nan, TRAINED) == float("inf")
    assert not verdict(nan).ok


def test_update_kept_is_a_projection():
    # s = (0, 2), o = (1, 1): <s, o> / <s, s> = 2 / 4
    assert update_kept(TRAINED, BASE, torch.tensor([[2.0, 2.0]]), BASE) == 0.5


# -- folders, card, command --------------------------------------------------------------------------------------


def test_where_the_policy_of_a_run_is_found(tmp_path):
    for step in (2, 10):
        folder = tmp_path / "checkpoints" / f"step_{step}" / "policy"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
    for name in ("config.yaml", "environment.json"):
        (tmp_path / name).write_text("model: x\n")
    assert policy_folder(tmp_path).parent.name == "step_10"
    assert policy_folder(tmp_path / "checkpoints" / "step_2") == tmp_path / "checkpoints" / "step_2" / "policy"
    assert run_of(folder) == tmp_path
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert policy_folder(tmp_path) == tmp_path / "adapter"
    with pytest.raises(ExportError, match="no such folder"):
        policy_folder(tmp_path / "nowhere")


def test_a_failed_block_leaves_the_old_export(tmp_path):
    target = tmp_path / "out"
    with staging(target, replace=False) as stage:
        (stage / "adapter_config.json").write_text("old")
    with pytest.raises(ZeroDivisionError), staging(target, replace=True) as stage:
        (stage / "adapter_config.json").write_text("new")
        raise ZeroDivisionError
    assert (target / "adapter_config.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_card_of_another_family_names_its_base(tmp_path):
    verification = {"fresh_process_imports_covo_rl": False, "prompts": ["a", "b"], "dtype": "float32",
                    "max_abs_logit_diff_trained": 1e-6, "tolerance": 1e-4, "max_abs_logit_diff_base": 0.5,
                    "update_kept": 1.0}  # fmt: skip
    record = {"kind": "merged", "base_model": "Qwen/Qwen2-Audio-7B-Instruct", "model_type": "qwen2_audio",
              "model_class": "Qwen2AudioForConditionalGeneration", "model_module": "transformers"}  # fmt: skip
    for name, content in (("export.json", record), ("verification.json", verification)):
        (tmp_path / name).write_text(json.dumps(content))
    card = update_card(tmp_path, None).read_text()
    assert card.startswith("---\nbase_model: Qwen/Qwen2-Audio-7B-Instruct\nlibrary_name: transformers\n")
    assert "academic" not in card and "in a fresh process without covo_rl" in card
    assert "| largest logit difference to the base model | 0.5 |" in card


def test_dtype_names():
    assert torch_dtype("auto") is None and torch_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(ExportError, match="there are auto, float32, bfloat16, float16"):
        torch_dtype("fp16")


def test_the_command_imports_no_torch():
    code = "import sys, covo_rl.export.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


# -- sharded parameters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIGS[0], AdapterConfig(lora=False)], ids=["lora_and_adapter", "full"])
def test_a_policy_sharded_by_fsdp2_is_saved_and_loaded_whole(config, tmp_path):
    """One rank, but every parameter is a DTensor as on many: gathered on saving, cut on loading."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    modes = moved(covo(), config)
    plain = {name: tensor.clone() for name, tensor in modes.family.model.state_dict().items()}
    save_policy(modes, tmp_path / "plain", base="b")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for layer in modes.family.model.llm.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(modes.family.model, mesh=mesh)
        save_policy(modes, tmp_path / "sharded", base="b")
        with torch.no_grad():
            for parameter in modes.family.model.parameters():
                if parameter.requires_grad:
                    parameter.zero_()
        load_policy_state(modes, tmp_path / "sharded")
        state = modes.family.model.state_dict()
        assert all(torch.equal(plain[name], t.full_tensor()) for name, t in state.items())
    finally:
        dist.destroy_process_group()
    name = "model.safetensors" if not config.lora else "adapter_model.safetensors"
    files = [load_file(tmp_path / kind / name) for kind in ("plain", "sharded")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
