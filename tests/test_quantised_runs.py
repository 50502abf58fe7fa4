"""QLoRA where bitsandbytes is installed: the arithmetic, and with -m slow whole runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import policy_cases as cases
import pytest
import torch
from torch import nn

from covo_rl.audio import ClipStore
from covo_rl.config import AdapterConfig
from covo_rl.engines.decoder import ModuleDecoder, decoder_for
from covo_rl.engines.own import sample
from covo_rl.models import load_family
from covo_rl.models.quantised import element_count
from covo_rl.policy import Policy
from covo_rl.policy.trainable import make_trainable

bitsandbytes = pytest.importorskip("bitsandbytes", reason="pip install 'covo-rl[qlora]'")

ROOT = Path(__file__).parent.parent
RECIPE = [sys.executable, str(ROOT / "recipes" / "grpo_mmau.py"), "--load-in-4bit", "true", "--evaluate", "false",
          "--prompts-per-step", "4", "--num-generations", "4", "--beta", "0.04", "--max-steps", "4",
          "--checkpoint-every", "2"]  # fmt: skip
#: largest difference of a log-prob in nats between sampling and scoring
MISMATCH = {"float32": 1e-5, "bfloat16": 0.2}
#: largest relative difference of a gradient from that of unpacked weights: the same products on a CPU
GRADIENT = {"float32": 1e-5, "bfloat16": 1e-2}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Random checkpoints of both families on disk."""
    folders = {}
    for name in ("covo_audio", "qwen2_audio"):
        folders[name], family = tmp_path_factory.mktemp(name), cases.family(name)
        family.model.save_pretrained(folders[name])
        family.processor.save_pretrained(folders[name])
    return folders


def quantised_policy(path: Path, dtype: str, **adapter) -> Policy:
    """A 4-bit base with an adapter whose B is not zero, so that it matters."""
    family = load_family(str(path), dtype=dtype, load_in_4bit=True)
    modes = make_trainable(family, AdapterConfig(lora_r=4, load_in_4bit=True, **adapter))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in family.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return Policy(family, peft_model=modes.peft_model, clips=ClipStore())


def quantised_layers(module: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in module.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}


def unpack(policy: Policy) -> int:
    """The slow and obvious reference: plain linear layers with the weights that the 4 bits stand for, in place."""
    layers = quantised_layers(policy.family.model)
    for name, packed in layers.items():
        weight = bitsandbytes.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state)
        plain = nn.Linear(packed.in_features, packed.out_features, bias=False, device="meta")
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), packed.bias
        policy.family.model.set_submodule(name, plain)
    return len(layers)


@pytest.mark.parametrize("dtype", MISMATCH)
@pytest.mark.parametrize("name", ["covo_audio", "qwen2_audio"])
def test_the_linear_layers_of_the_decoder_are_held_in_four_bits(name, dtype, bases):
    family, plain = load_family(str(bases[name]), dtype=dtype, load_in_4bit=True), load_family(str(bases[name]))
    names = quantised_layers(family.model)
    assert len(names) == 2 * 7 and all(layer.startswith(family.parts["llm"]) for layer in names)
    assert {str(p.dtype) for n, p in family.model.named_parameters() if n.rpartition(".")[0] not in names} == {
        f"torch.{dtype}"
    }
    counts = [sum(map(element_count, f.model.parameters())) for f in (family, plain)]
    assert counts[0] == counts[1] == sum(p.numel() for p in plain.model.parameters())


@pytest.mark.parametrize("dtype", GRADIENT)
@pytest.mark.parametrize("adapter", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_scores_and_gradients_are_those_of_the_unpacked_weights(adapter, dtype, bases):
    """finding: after one pass in evaluation mode no gradient went through a 4-bit layer (AVX512-BF16)."""
    policy = quantised_policy(bases["covo_audio"], dtype, **adapter)
    groups = cases.ragged_groups(policy)
    features, weights = policy.features([group.prompt for group in groups]), cases.weights(groups)

    def scores() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logps_NC = policy("logps", groups, features).logps_NC
        (weights.to(logps_NC) * logps_NC).sum().backward()
        return logps_NC.detach(), cases.gradients(policy)

    policy.eval()
    with torch.no_grad():
        policy("logps", groups, features)
    policy.train()
    logps_NC, gradients = scores()
    assert unpack(policy) == 2 * 7
    expected_NC, expected = scores()
    assert float((logps_NC - expected_NC).abs().max()) <= 10 * GRADIENT[dtype]
    assert cases.relative_difference(gradients, expected) <= GRADIENT[dtype]


@pytest.mark.parametrize("dtype", MISMATCH)
def test_sampling_is_scored_as_it_was_sampled_and_leaves_the_layers_alone(dtype, bases):
    policy = quantised_policy(bases["covo_audio"], dtype)
    prompts, layers = cases.prompts(policy), quantised_layers(policy.family.model)
    policy.eval()
    with torch.no_grad():
        groups = sample(policy, prompts, policy.features(prompts), cases.SMALL, seed=3)
        scored = policy("logps", groups, policy.features(prompts))
        assert isinstance(decoder_for(policy, rows=4, longest=64), ModuleDecoder)
    sampled = torch.tensor([logp for group in groups for rollout in group.rollouts for logp in rollout.logps])
    assert float((scored.logps_NC[scored.mask_NC].cpu() - sampled).abs().max()) <= MISMATCH[dtype]
    assert quantised_layers(policy.family.model) == layers


def command(*words: object) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_trains_resumes_exports_and_is_evaluated(dtype, tmp_path):
    """finding: the export of every QLoRA run failed, 1.95 apart at a tolerance of 0.064, and nothing was left."""
    whole, half, cli = tmp_path / "whole", tmp_path / "half", Path(sys.executable).with_name("covo-rl")
    command(*RECIPE, "--dtype", dtype, "--output", whole)
    report = json.loads((whole / "adapter" / "verification.json").read_text())
    assert report["ok"] and report["max_abs_logit_diff_trained"] <= report["tolerance"]
    assert report["update_kept"] == pytest.approx(1.0, abs=0.05)
    quantisation = report["unquantised"]
    assert quantisation["max_abs_logit_diff_of_bases"] > 10 * report["tolerance"]  # what the failed check compared
    assert quantisation["update_kept"] > 0.5

    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints" / "step_000004")
    (half / "result.json").unlink()
    assert "resumed from" in command(*RECIPE, "--dtype", dtype, "--output", half, "--resume", "auto")
    weights = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (whole, half)]
    assert weights[0] == weights[1]

    checkpoint = whole / "checkpoints" / "step_000004"
    merged = ["--merged", tmp_path / "merged"] if dtype == "float32" else []  # bfloat16 rounds a small update away
    said = command(cli, "export", checkpoint, "--adapter", tmp_path / "adapter", *merged)
    assert "checked on the 4-bit base" in said and ("merged into the unquantised base" in said) == bool(merged)
    assert json.loads((tmp_path / "adapter" / "verification.json").read_text())["unquantised"]
    words = [cli, "eval", "--set", "builtin", "--limit", 8, "--no-plots", "--max-completion-length", 32]
    on_base = [*words, "--model", "builtin:tiny", "--adapter", tmp_path / "adapter", "--dtype", dtype]
    command(*on_base, "--output", tmp_path / "in_4bit", "--load-in-4bit")
    command(*on_base, "--output", tmp_path / "in_16bit")
    if merged:
        command(*words, "--model", tmp_path / "merged", "--output", tmp_path / "of_merged")
    assert "- load_in_4bit: true" in (tmp_path / "in_4bit" / "report.md").read_text()
