"""The model card: its code runs as it stands, it names nothing of this machine; and the way to a hub."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hub import fake_hub

from covo_rl.audio import ClipStore
from covo_rl.config import AdapterConfig, PromptConfig
from covo_rl.data.files import write_json
from covo_rl.export.card import update_card, without_paths
from covo_rl.export.exporting import export_policy
from covo_rl.export.hub import local_paths
from covo_rl.export.merged import write_shards
from covo_rl.models import load_family
from covo_rl.models.tiny import tiny_covo_audio, tiny_qwen2_audio, tiny_tokenizer
from covo_rl.policy.entries import merged_entries
from covo_rl.policy.trainable import make_trainable
from covo_rl.prompt import build_prompt
from covo_rl.types import Clip, Example

SIZES = {"encoder_width": 16, "encoder_layers": 1, "decoder_width": 32, "decoder_layers": 2, "mel_bins": 16}
QUESTION, CHOICES = "How many beeps are there?", ("one", "two")
WORDING = PromptConfig(system_prompt='Say "bell\\" \N{BELL}.', instruction="Überlege.\n</answer>", choice_style="lines")


def base_folder(root: Path, name: str) -> Path:
    if name == "covo_audio":
        model, processor = tiny_covo_audio(tiny_tokenizer([QUESTION]), adapter_hidden=16, **SIZES)
    else:
        model, processor = tiny_qwen2_audio(**SIZES)
    model.save_pretrained(root / name)
    write_shards(merged_entries(model), root / name)
    processor.save_pretrained(root / name)
    return root / name


def moved(base: Path):
    modes = make_trainable(load_family(str(base)), AdapterConfig(lora_r=4))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in modes.family.model.parameters() if p.requires_grad):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return modes


@pytest.mark.parametrize("name", ["covo_audio", pytest.param("qwen2_audio", marks=pytest.mark.slow)])
def test_the_code_of_the_card_runs_and_sees_the_prompt_of_training(name, tmp_path, monkeypatch, capsys):
    base = base_folder(tmp_path / "secret home", name)
    modes = moved(base)
    seconds = np.arange(24_000) / 24_000
    soundfile.write(tmp_path / "clip.wav", 0.2 * np.sin(2 * np.pi * 440 * seconds), 24_000)
    row = Example("a", (Clip(path=str(tmp_path / "clip.wav")),), QUESTION, CHOICES, "two")
    prompt = build_prompt(row, modes.family, ClipStore(), WORDING)
    for kind in ("adapter", "merged"):
        export_policy(modes, tmp_path / kind, kind=kind, wording=WORDING)
        card = (tmp_path / kind / "README.md").read_text()
        assert "secret home" not in card and str(tmp_path) not in card
        code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
        code = code.replace("path/to/this/folder", kind).replace("path/to/base", str(base))
        monkeypatch.chdir(tmp_path)
        space: dict = {}
        exec(compile(code, f"card of {name} {kind}", "exec"), space)
        assert space["prompt"] == prompt.text
        assert tuple(space["inputs"]["input_ids"][0].tolist()) == prompt.input_ids
        ids = space["reply"].tolist()
        with torch.no_grad():  # the first token is the policy's
            assert int(modes.family.model(**space["inputs"]).logits[0, -1].argmax()) == ids[0]
        assert capsys.readouterr().out.strip() == space["processor"].tokenizer.decode(
            ids, skip_special_tokens=True).strip()  # fmt: skip


def test_paths_of_this_machine_become_names(tmp_path):
    assert without_paths("/home/me/rows.json") == "rows.json"
    assert without_paths("./brevity.py:brevity") == "brevity.py:brevity"
    assert without_paths("transformers:/models/judge") == "transformers:judge"
    for same in (
        "openai:qwen@http://judge:8000/v1",
        "accuracy",
        "hf:a/b:train",
        "Qwen/Qwen2-Audio-7B-Instruct",
        3,
        None,
    ):
        assert without_paths(same) == same


def test_a_card_of_the_demo_names_its_shipped_base_and_no_path(tmp_path):
    record = {"kind": "adapter", "base_model": "builtin:tiny", "model_type": "covo_audio",
              "model_class": "CovoAudioForConditionalGeneration",
              "model_module": "covo_rl.models.covo_audio"}  # fmt: skip
    verification = {"fresh_process_imports_covo_rl": True, "prompts": ["a"], "dtype": "float32", "tolerance": 1e-4,
                    "max_abs_logit_diff_trained": 0.0, "max_abs_logit_diff_base": 0.5, "update_kept": 1.0}  # fmt: skip
    write_json(tmp_path / "export.json", record)
    write_json(tmp_path / "verification.json", verification)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(
        "model: builtin:tiny\ndata: /home/me/rows.json\n"
        "rewards: accuracy,./mine.py:f\njudge: transformers:/home/me/judge\n"
    )
    write_json(run / "environment.json", {"sha256": {"data": "d", "reward:./mine.py:f": "e"}})
    card = update_card(tmp_path, run).read_text()
    assert "/home/me" not in card and "./mine.py" not in card
    assert 'BASE = resolve_model("builtin:tiny")' in card and "base_model:" not in card
    assert (
        "R_accuracy + R_mine.py:f" in card
        and "| data | rows.json |" in card
        and "| judge | transformers:judge |" in card
    )
    assert "| reward:mine.py:f | `e` |" in card
    assert "--model builtin:tiny --adapter path/to/this/folder" in card


def test_local_paths_in_records(tmp_path):
    (tmp_path / "a.json").write_text(
        json.dumps({"base": str(tmp_path / "a.json"), "url": "https://x.org/a/b", "no": "/a/b"})
    )
    assert local_paths(tmp_path / "a.json") == [str(tmp_path / "a.json")]


def export(*words, **env):
    command = [sys.executable, "-c", "from covo_rl.cli import console_script as run; run()", "export"]
    quiet = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run([*command, *map(str, words)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, **quiet, **env})  # fmt: skip


def test_an_adapter_is_pushed_to_a_hub_as_it_was_verified(tmp_path):
    base, out = base_folder(tmp_path, "covo_audio"), tmp_path / "out"
    export_policy(moved(base), tmp_path / "mine", kind="adapter", wording=WORDING)
    with fake_hub() as (address, state):
        done = export(tmp_path / "mine", "--adapter", out, "--push-to-hub", "bells", "--published-base", "someone/covo",
                      HF_ENDPOINT=address, HF_TOKEN="right")  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"pushed: {address}/ada/bells/commit/1111" in done.stdout and state["repository"] == "ada/bells"
        created = state["created"]  # huggingface_hub 1 and 2 word it otherwise
        assert created["name"] == "bells" and (created.get("private") or created["visibility"] == "private")
    assert set(state["files"]) == set(json.loads((out / "export.json").read_text())["files"]) == {*os.listdir(out)}
    for name, content in state["files"].items():
        assert content == (out / name).read_bytes()
        assert str(tmp_path).encode() not in content
    assert json.loads(state["files"]["adapter_config.json"])["base_model_name_or_path"] == "someone/covo"
    assert b"base_model: someone/covo" in state["files"]["README.md"]


@pytest.mark.slow
def test_what_cannot_be_pushed_is_refused_before_anything_is_written(tmp_path):
    base, out = base_folder(tmp_path, "covo_audio"), tmp_path / "out"
    export_policy(moved(base), tmp_path / "mine", kind="adapter", wording=WORDING)
    push = tmp_path / "mine", "--adapter", out, "--push-to-hub"
    with fake_hub() as (address, state):
        for words, token, offline, why in (
            (("ada/bells",), "wrong", "0", "does not take the token"),
            (("ada/bells",), "right", "0", "--published-base OWNER/NAME"),
            (("bells",), "right", "1", "HF_HUB_OFFLINE is set"),
        ):
            refused = export(*push, *words, HF_ENDPOINT=address, HF_TOKEN=token, HF_HUB_OFFLINE=offline)
            assert refused.returncode == 1 and why in refused.stderr and not out.exists()
        assert not state["files"]


VERIFIED = {"fresh_process_imports_covo_rl": False, "prompts": ["a", "b"], "dtype": "float32", "update_kept": 1.0,
            "max_abs_logit_diff_trained": 1e-6, "tolerance": 1e-4, "max_abs_logit_diff_base": 0.5}  # fmt: skip


def test_a_card_says_what_the_stock_class_leaves_out(tmp_path):
    """Its processor imports more than audio wants, its logits are not divided, and the base has a LoRA of its own."""
    record = {"kind": "adapter", "base_model": "ibm-granite/granite-speech-3.3-2b", "model_type": "granite_speech",
              "model_class": "GraniteSpeechForConditionalGeneration", "model_module": "transformers",
              "stock_processor": False, "shipped_adapter": ".", "stock_logits_divisor": 8.0}  # fmt: skip
    for name, content in (("export.json", record), ("verification.json", VERIFIED)):
        (tmp_path / name).write_text(json.dumps(content))
    card = update_card(tmp_path, None).read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    compile(code, "card", "exec")
    assert 'model = covo_rl.load(BASE, adapter=FOLDER)\nreply = model.generate("How many' in code
    assert "verified as such, after the base's own LoRA was merged into it with PEFT." in card
    assert "does not divide its logits by 8" in card and "ask for 8 T" in card
    (tmp_path / "export.json").write_text(json.dumps({**record, "stock_logits_divisor": 1, "shipped_adapter": ""}))
    card = update_card(tmp_path, None).read_text()
    assert "divide" not in card and "as such. Clips" in card
