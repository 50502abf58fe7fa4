"""Adapters that come from elsewhere: written by plain PEFT alone, evaluated and compared by our command."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from covo_rl import synth
from covo_rl.config import AdapterConfig
from covo_rl.evaluate.cli import app
from covo_rl.export.adapter import save_policy
from covo_rl.export.merged import write_shards
from covo_rl.models import family_class
from covo_rl.models.covo_audio import CovoAudioForConditionalGeneration
from covo_rl.models.tiny import tiny_covo_audio, tiny_model, tiny_tokenizer
from covo_rl.policy.entries import merged_entries
from covo_rl.policy.saved_adapter import put_on, read_adapter
from covo_rl.policy.trainable import make_trainable


def elsewhere(base: Path, folder: Path, seed: int) -> Path:
    """Someone's training script: transformers and PEFT, targets by suffix, no covo_rl but the model class."""
    torch.manual_seed(seed)
    model = CovoAudioForConditionalGeneration.from_pretrained(base)
    plain = get_peft_model(model, LoraConfig(r=3, target_modules=r"llm\..*\.(q_proj|down_proj)", lora_alpha=32))
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)
    plain.save_pretrained(folder)
    return folder


def test_adapters_trained_elsewhere_are_evaluated_and_compared(tmp_path):
    questions = synth.render_set(tmp_path / "questions", seed=3, train=11, validation=11, test=11)["test"]
    model, processor = tiny_covo_audio(tiny_tokenizer(["What do you hear?"]), mel_bins=16, initializer_range=0.2)
    model.save_pretrained(tmp_path / "base")
    write_shards(merged_entries(model), tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    common = ["--set", "builtin", "--data", questions, "--audio-dir", questions.parent, "--model", tmp_path / "base",
              "--limit", 4, "--max-completion-length", 8, "--no-plots"]  # fmt: skip
    said, hashes = {}, {}
    for name, seed in (("base", None), ("first", 1), ("second", 2)):
        adapter = [] if seed is None else ["--adapter", elsewhere(tmp_path / "base", tmp_path / f"peft_{name}", seed)]
        done = CliRunner().invoke(app, [*map(str, [*common, *adapter, "--output", tmp_path / name])])
        assert done.exit_code == 0, done.output
        lines = (tmp_path / name / "rows.jsonl").read_text(encoding="utf-8").splitlines()
        said[name] = [json.loads(line)["model_output"] for line in lines]
        hashes[name] = json.loads((tmp_path / name / "report.json").read_text(encoding="utf-8"))["adapter_sha256"]
    assert len(said["base"]) == 4
    assert said["base"] != said["first"] != said["second"] != said["base"], "an adapter was loaded and did nothing"
    assert hashes["base"] is None and hashes["first"] != hashes["second"]
    for pair in (("base", "first"), ("first", "second")):
        words = ["compare", *(str(tmp_path / name) for name in pair), "--output", str(tmp_path / "c.json")]
        assert CliRunner().invoke(app, words).exit_code == 0
        assert json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))["strict"]["n"] == 4


def test_an_adapter_of_an_older_transformers_finds_the_encoder_too(tmp_path):
    """ms-swift with transformers 4 names the encoder of Qwen2-Audio as published, without the `model.` of today."""
    model, _ = tiny_model("qwen2_audio")
    plain = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)
    plain.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    older = {
        name.replace("model.model.audio_tower", "model.audio_tower").replace(
            "model.model.language_model.", "model.language_model.model."
        ): tensor
        for name, tensor in tensors.items()
    }
    assert sum("model.audio_tower" in name for name in older) == sum("language_model" in name for name in older) == 8
    save_file(older, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    family = family_class("qwen2_audio")(*tiny_model("qwen2_audio"))
    loaded, _ = put_on(family, read_adapter(tmp_path))
    state, wanted = loaded.state_dict(), plain.state_dict()
    places = [name for name in state if ".lora_" in name]
    assert len(places) == 16 and all(torch.equal(state[name], wanted[name]) for name in places)


def test_an_adapter_on_the_encoder_is_found_again_by_plain_peft(tmp_path):
    """It was not: exports of Qwen2-Audio with LoRA on the encoder failed their check, at the end of a run."""
    pattern = r"model\.(audio_tower|language_model).*q_proj"
    modes = make_trainable(family_class("qwen2_audio")(*tiny_model("qwen2_audio")),
                           AdapterConfig(lora_r=4, lora_target_modules=pattern))  # fmt: skip
    save_policy(modes, tmp_path)
    plain, _ = tiny_model("qwen2_audio")
    again = PeftModel.from_pretrained(plain, tmp_path).state_dict()
    state = modes.family.model.state_dict()
    names = [name for name in state if ".lora_A" in name]
    assert sum("audio_tower" in name for name in names) == sum("language_model" in name for name in names) == 2
    assert all(torch.equal(again[f"base_model.model.{name}"], state[name]) for name in names)
