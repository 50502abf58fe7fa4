"""An export is verified in a fresh process, and what is not the trained policy does not get through."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from covo_rl.audio import ClipStore
from covo_rl.config import AdapterConfig, ConfigError, PromptConfig
from covo_rl.evaluate.runner import Request
from covo_rl.evaluate.sets import EvalInputError
from covo_rl.export import ExportError
from covo_rl.export.adapter import load_policy_state, open_policy, save_policy, wording_of
from covo_rl.export.card import update_card
from covo_rl.export.cli import app
from covo_rl.export.exporting import export_adapter, export_merged, export_run_adapter, staging
from covo_rl.export.merged import write_merged, write_shards
from covo_rl.export.verify import Target, Verification, ask_policy, compare_logits, run_fresh, synthetic_prompts
from covo_rl.models import family_class, load_family
from covo_rl.models.tiny import tiny_covo_audio, tiny_qwen2_audio, tiny_tokenizer
from covo_rl.policy.entries import merged_entries
from covo_rl.policy.trainable import make_trainable
from covo_rl.run.questions import readable_prompts
from covo_rl.train.checkpoint.manifest import write_manifest
from covo_rl.train.ranks import Ranks
from covo_rl.types import Clip, Example

SIZES = {"encoder_width": 16, "encoder_layers": 1, "decoder_width": 32, "decoder_layers": 2, "mel_bins": 16}
MODES = {
    "lora": AdapterConfig(lora_r=4),
    "dora": AdapterConfig(lora_r=4, use_dora=True),
    "lora_and_adapter": AdapterConfig(lora_r=4, use_rslora=True, modules_to_save=["audio_adapter"]),
    "full": AdapterConfig(lora=False, train_parts=["audio_adapter", "llm", "lm_head"]),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Tiny random checkpoints on disk, as a user has the published ones."""
    root = tmp_path_factory.mktemp("bases")
    covo = tiny_covo_audio(tiny_tokenizer(["What do you hear?"]), adapter_hidden=16, **SIZES)
    for name, (model, processor) in {"covo_audio": covo, "qwen2_audio": tiny_qwen2_audio(**SIZES)}.items():
        model.save_pretrained(root / name)
        write_shards(merged_entries(model), root / name)  # the published key names, whatever transformers writes
        processor.save_pretrained(root / name)
    return {name: root / name for name in ("covo_audio", "qwen2_audio")}


def trained(base: Path, config: AdapterConfig, size: float = 0.05):
    """A policy whose trainable parameters were all moved, as training does."""
    modes = make_trainable(load_family(str(base)), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in modes.family.model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return modes


def broken_targets(root: Path) -> dict[str, Target]:
    """Exports with the faults that other stacks ship."""
    zero, renamed, lost = root / "zero", root / "renamed", root / "lost"
    shutil.copytree(root / "lora_adapter", zero)
    weights = load_file(zero / "adapter_model.safetensors")
    save_file({k: torch.zeros_like(t) if "lora_B" in k else t for k, t in weights.items()},
              zero / "adapter_model.safetensors")  # fmt: skip
    shutil.copytree(root / "lora_adapter", renamed)
    save_file({k.replace("self_attn", "attention"): t for k, t in weights.items()},
              renamed / "adapter_model.safetensors")  # fmt: skip
    shutil.copytree(root / "lora_merged", lost)
    weights = load_file(lost / "model.safetensors")
    save_file({k: t for k, t in weights.items() if not k.endswith("layers.1.mlp.up_proj.weight")},
              lost / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    return {
        "zero": Target("zero", "adapter", zero, "float32"),
        "renamed": Target("renamed", "adapter", renamed, "float32"),
        "lost": Target("lost", "merged", lost, "float32"),
    }


@pytest.mark.parametrize("name", ["covo_audio", "qwen2_audio"])
def test_round_trips_in_a_fresh_process(name, bases, tmp_path):
    """LoRA, DoRA, LoRA + whole adapter, full; as adapter, merged, re-sharded: all in one fresh process."""
    clips = ClipStore()
    targets, expected, prompts = {}, {}, None
    for mode, config in MODES.items():
        modes = trained(bases[name], config)
        prompts = prompts or synthetic_prompts(modes.family, clips)
        wanted = ask_policy(modes, prompts, clips)
        for kind in ("merged", "sharded", "adapter"):
            if kind == "adapter" and mode == "full":
                continue
            folder = tmp_path / f"{mode}_{kind}"
            folder.mkdir()
            if kind == "adapter":
                save_policy(modes, folder)
            else:
                write_merged(modes.family, folder, None, 40_000 if kind == "sharded" else None)
            target = Target(folder.name, "adapter" if kind == "adapter" else "merged", folder, "float32")
            targets[target.name], expected[target.name] = target, wanted
    broken = broken_targets(tmp_path)
    expected |= dict.fromkeys(broken, expected["lora_adapter"])
    family = load_family(str(bases[name]))
    logits, notes = run_fresh(family, str(bases[name]), [*targets.values(), *broken.values()], prompts, clips)

    assert notes["loaded"].count("covo_rl") == (1 if name == "covo_audio" else 0)
    assert len(list((tmp_path / "full_sharded").glob("model-*.safetensors"))) > 2
    for key, target in targets.items():
        result = compare_logits(target, expected[key], logits, notes, base_model="base")
        assert result.ok, (key, result.problems)
        assert result.max_abs_logit_diff_trained <= 1e-5 < 1e-2 < result.max_abs_logit_diff_base
        assert result.update_kept == pytest.approx(1.0, abs=1e-4)
    for mode in ("lora", "dora", "lora_and_adapter"):
        for adapter, merged in zip(logits[f"{mode}_adapter"], logits[f"{mode}_merged"], strict=True):
            torch.testing.assert_close(adapter, merged, atol=1e-5, rtol=0)
    faults = {
        key: compare_logits(target, expected[key], logits, notes, base_model="base") for key, target in broken.items()
    }
    assert not any(result.ok for result in faults.values())
    assert faults["zero"].max_abs_logit_diff_base == 0.0
    assert "shows 0 %" in " ".join(faults["zero"].problems)
    assert any("missing" in problem for problem in faults["renamed"].problems)
    assert any("up_proj" in problem for problem in faults["lost"].problems)


# -- runs --------------------------------------------------------------------------------------------------------


def run_folder(root: Path, base: Path, **options) -> Path:
    """What the trainer leaves: options, environment; result.json comes after the export."""
    run = root / "run"
    run.mkdir()
    given = {"model": str(base), "rewards": "accuracy,format=0.5", "learning_rate": 1e-5, "lora_r": 4, **options}
    (run / "config.yaml").write_text(yaml.safe_dump(given))
    (run / "environment.json").write_text(
        json.dumps({"commit": "abc123", "sha256": {"data": "d" * 64}, "packages": {"peft": "0.21"}})
    )
    return run


def checkpoint(modes, run: Path, name: str) -> Path:
    """What the trainer's checkpoint holds of the policy: trained parameters as the wrapped policy names them."""
    folder = run / "checkpoints" / name
    folder.mkdir(parents=True)
    prefix = "model." if modes.peft_model is None else "model.base_model.model."
    weights = {prefix + n: p.detach().clone() for n, p in modes.family.model.named_parameters() if p.requires_grad}
    save_file(weights, folder / "weights.safetensors")
    options = yaml.safe_load((run / "config.yaml").read_text())
    adapter = {f.name: getattr(modes.config, f.name) for f in fields(AdapterConfig)}
    (folder / "state.json").write_text(json.dumps({"config": options | adapter}))
    return folder


RESULT = {"train_seconds": 12.5, "trainable_parameters": 4096,
          "before": {"accuracy_greedy": 0.25, "accuracy_sampled": 0.2, "n": 400},
          "after": {"accuracy_greedy": 0.75, "accuracy_sampled": 0.7, "n": 400},
          "after_silent_audio": {"accuracy_sampled": 0.3}}  # fmt: skip


def test_the_export_at_the_end_of_a_run_and_its_card(bases, tmp_path):
    run = run_folder(tmp_path, bases["covo_audio"])
    modes = trained(bases["covo_audio"], MODES["lora_and_adapter"])
    clips = ClipStore()
    folder = export_run_adapter(modes, run, synthetic_prompts(modes.family, clips), clips)
    assert folder == run / "adapter"
    report = json.loads((folder / "verification.json").read_text())
    assert report["ok"] and report["tolerance"] == 1e-4 and report["prompts"] == ["export-tone", "export-noise"]
    assert report["max_abs_logit_diff_trained"] <= 1e-5 < report["max_abs_logit_diff_base"]
    assert not [p for p in run.iterdir() if p.name.startswith(".")]
    assert "no result.json yet" in (folder / "README.md").read_text()

    (run / "result.json").write_text(json.dumps(RESULT))
    card = update_card(folder, run).read_text()
    for line in ("| accuracy greedy | 0.25 | 0.75 |", "With silence in place of the clip, sampled accuracy is 0.3.",
                 "R_total = R_accuracy + 0.5 R_format", f"| data | `{'d' * 64}` |", "| commit | abc123 |",
                 "academic use only", "400 held-out rows"):  # fmt: skip
        assert line in card

    done = CliRunner().invoke(app, ["serve-check", str(folder)])
    assert done.exit_code == 0 and json.loads(done.stdout)["max_abs_logit_diff_base"] > 1e-2

    # The adapter starts another run, and plain PEFT needs nothing of ours but the model class.
    again = make_trainable(load_family(str(bases["covo_audio"])), AdapterConfig(adapter=str(folder)))
    for (n, a), (m, b) in zip(modes.family.model.state_dict().items(), again.family.model.state_dict().items(),
                              strict=True):  # fmt: skip
        assert n == m and torch.equal(a, b)


def test_a_sharded_policy_is_gathered_and_exported_at_the_end_of_a_run(bases, tmp_path):
    """One rank, every parameter a DTensor; the gathered adapter is verified and nothing else stays."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    base = bases["qwen2_audio"]
    run = run_folder(tmp_path, base)
    modes, clips = trained(base, MODES["lora"]), ClipStore()
    prompts = synthetic_prompts(modes.family, clips)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(modes.family.model, mesh=init_device_mesh("cpu", (1,)))
        folder = export_run_adapter(modes, run, prompts, clips)
    finally:
        dist.destroy_process_group()
    assert json.loads((folder / "verification.json").read_text())["ok"]
    assert any(".language_model.model.layers.0." in key for key in load_file(folder / "adapter_model.safetensors"))
    assert sorted(p.name for p in run.iterdir()) == ["adapter", "config.yaml", "environment.json"]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_run_that_changed_nothing_ends_with_an_error_and_no_export(sharded, bases, tmp_path):
    """The policy is its base. An earlier run's export does not stand in for it; the run's random numbers go on."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    base = bases["qwen2_audio"]
    run = run_folder(tmp_path, base)
    modes, clips = make_trainable(load_family(str(base)), MODES["lora"]), ClipStore()
    prompts = synthetic_prompts(modes.family, clips)
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").write_text("{}")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        if sharded:
            fully_shard(modes.family.model, mesh=init_device_mesh("cpu", (1,)))
        before = torch.get_rng_state()
        with pytest.raises(ExportError, match="no-op: the trained policy equals the base model"):
            export_run_adapter(modes, run, prompts, clips)
        assert torch.equal(torch.get_rng_state(), before)
    finally:
        dist.destroy_process_group()
    assert sorted(p.name for p in run.iterdir()) == ["config.yaml", "environment.json"]


def test_every_rank_learns_that_the_export_of_rank_0_failed(bases, tmp_path, monkeypatch):
    """Rank 1 has nothing to write, and must not go on alone."""
    modes, clips = trained(bases["qwen2_audio"], MODES["lora"]), ClipStore()
    monkeypatch.setattr("covo_rl.export.exporting.Ranks.current", lambda: Ranks(1, 2))
    monkeypatch.setattr("covo_rl.export.exporting.Ranks.from_main", lambda self, value: "no space left on device")
    with pytest.raises(ExportError, match="no space left"):
        export_run_adapter(modes, tmp_path, synthetic_prompts(modes.family, clips), clips)
    assert list(tmp_path.iterdir()) == []


def test_the_command_exports_merged_weights_from_the_last_checkpoint(bases, tmp_path):
    run = run_folder(tmp_path, bases["qwen2_audio"], lora=False)
    first, second = (trained(bases["qwen2_audio"], MODES["full"], size) for size in (0.01, 0.05))
    save_policy(first, run / "checkpoints" / "step_000009" / "policy")
    checkpoint(second, run, "step_000010.001")
    out = tmp_path / "merged"
    done = CliRunner().invoke(app, ["export", str(run), "--merged", str(out), "--dtype", "bfloat16"])
    assert done.exit_code == 0, done.output
    weights = load_file(out / "model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    assert weights.keys() == load_file(bases["qwen2_audio"] / "model.safetensors").keys()
    wanted = second.family.model.lm_head.weight.detach().bfloat16()
    assert torch.equal(weights["language_model.lm_head.weight"], wanted)
    for name in ("config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json", "README.md"):
        assert (out / name).is_file(), name
    assert not json.loads((out / "verification.json").read_text())["fresh_process_imports_covo_rl"]

    done = CliRunner().invoke(app, ["export", str(run), "--merged", str(out)])
    assert done.exit_code == 1 and "exists: give another folder, or --replace it" in done.output
    done = CliRunner().invoke(app, ["export", str(run), "--adapter", str(tmp_path / "a")])
    assert done.exit_code == 1 and "full-parameter policy has no adapter" in done.output
    done = CliRunner().invoke(app, ["export", str(tmp_path), "--adapter", str(tmp_path / "a")])
    assert done.exit_code == 1 and "checkpoints/step_*" in done.output


def test_a_trainers_checkpoint_opens_as_the_policy_it_was_saved_from(bases, tmp_path):
    run = run_folder(tmp_path, bases["covo_audio"])
    modes = trained(bases["covo_audio"], MODES["lora_and_adapter"])
    folder = checkpoint(modes, run, "step_000002")
    opened = open_policy(run)
    assert opened.folder == folder and opened.run_folder == run and opened.base_model == str(bases["covo_audio"])
    state = modes.family.model.state_dict()
    assert all(torch.equal(state[n], t) for n, t in opened.modes.family.model.state_dict().items())
    weights = load_file(folder / "weights.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, folder / "weights.safetensors")
    with pytest.raises(ExportError, match=r"missing \['audio_adapter"):
        open_policy(folder)


def test_a_damaged_checkpoint_is_not_exported(bases, tmp_path):
    """finding 03: one flipped bit of its weights would be verified against itself."""
    run = run_folder(tmp_path, bases["covo_audio"])
    folder = checkpoint(trained(bases["covo_audio"], MODES["lora"]), run, "step_000002")
    write_manifest(folder, {"step": 2, "update": 0})
    assert open_policy(run).folder == folder
    file = folder / "weights.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ExportError, match=r"step_000002 is damaged: weights\.safetensors has changed.*an older"):
        open_policy(run)


def test_a_failed_check_leaves_nothing_behind(bases, tmp_path, monkeypatch):
    """Here the fresh process sees the base model: an adapter that loads and does nothing."""
    modes = trained(bases["covo_audio"], MODES["lora"])

    def idle(family, base, targets, prompts, clips):
        expected = ask_policy(modes, prompts, clips)
        notes = {"loaded": [], "versions": {}, "adapter": {"missing_keys": []}}
        return {"adapter": expected.base, "base.float32": expected.base}, notes

    monkeypatch.setattr("covo_rl.export.verify.run_fresh", idle)
    with pytest.raises(ExportError, match="differ from the trained policy"):
        export_adapter(modes, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_untrained_adapter_is_refused(bases, tmp_path):
    modes = make_trainable(load_family(str(bases["covo_audio"])), MODES["lora"])
    with pytest.raises(ExportError, match="no-op: the trained policy equals the base"):
        export_adapter(modes, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_made_by_plain_peft_starts_a_run_and_goes_on_from_a_checkpoint(bases, tmp_path):
    """Interop: no covo_rl code wrote this folder; suffix targets and PEFT's own names."""
    model = load_family(str(bases["qwen2_audio"])).model
    plain = get_peft_model(model, LoraConfig(r=3, target_modules=r".*language_model.*(q_proj|v_proj)"))
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    plain.save_pretrained(tmp_path / "elsewhere")
    started = make_trainable(load_family(str(bases["qwen2_audio"])), AdapterConfig(adapter=str(tmp_path / "elsewhere")))
    assert started.trainable_parameters == sum(p.numel() for p in plain.parameters() if p.requires_grad)
    save_policy(started, tmp_path / "policy")
    fresh = make_trainable(load_family(str(bases["qwen2_audio"])), AdapterConfig(adapter=str(tmp_path / "elsewhere")))
    with torch.no_grad():
        for parameter in fresh.family.model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    load_policy_state(fresh, tmp_path / "policy")
    state = started.family.model.state_dict()
    assert all(torch.equal(state[n], t) for n, t in fresh.family.model.state_dict().items())
    back = PeftModel.from_pretrained(load_family(str(bases["qwen2_audio"])).model, str(tmp_path / "policy"))
    assert back.peft_config["default"].r == 3  # type: ignore[attr-defined]


def test_a_policy_that_does_not_fit_is_an_error(bases, tmp_path):
    save_policy(trained(bases["covo_audio"], MODES["lora"]), tmp_path / "policy")
    wider = make_trainable(load_family(str(bases["covo_audio"])), replace(MODES["lora"], lora_r=8))
    with pytest.raises(ExportError, match=r"has shape \(8, .*in memory and \(4, "):
        load_policy_state(wider, tmp_path / "policy")
    other = make_trainable(load_family(str(bases["covo_audio"])), MODES["lora_and_adapter"])
    with pytest.raises(ExportError, match=r"missing \['base_model.model.audio_adapter"):
        load_policy_state(other, tmp_path / "policy")
    full = make_trainable(load_family(str(bases["covo_audio"])), MODES["full"])
    with pytest.raises(FileNotFoundError, match="full-parameter policy is saved as"):
        load_policy_state(full, tmp_path / "policy")


# -- which rows, which wording, which folder ----------------------------------------------------------------------


def text_row(name):
    return Example(name, (), f"What does {name} sound like?", ("high", "low"), "low")


def test_rows_with_audio_are_verified_first_and_clips_that_went_away_are_passed_over(bases, tmp_path):
    """finding 23"""
    family, clips = load_family(str(bases["covo_audio"])), ClipStore()
    tone = Clip(array=np.sin(np.arange(8000) / 20).astype(np.float32), sampling_rate=16000)
    gone = Clip(path=str(tmp_path / "deleted.wav"))
    rows = [*map(text_row, "ab"), Example("gone", (gone,), "?"), *(Example(i, (tone,), "What?") for i in "cde")]

    def ids(rows):
        return [prompt.example.id for prompt in readable_prompts(rows, 2, family, clips, PromptConfig())]

    assert ids(rows) == ["c", "d"]
    assert ids(rows[:4]) == ["c", "a"]
    assert ids(rows[:3]) == ["a", "b"]
    assert ids(rows[2:3]) == []


@pytest.mark.parametrize("rows", [list(map(text_row, "ab")), []])
def test_a_set_without_readable_audio_still_ends_with_an_adapter(rows, bases, tmp_path):
    """finding 23: verified on text, or on two made sounds where no row can be read any more."""
    run = run_folder(tmp_path, bases["covo_audio"])
    modes, clips = trained(bases["covo_audio"], MODES["lora"]), ClipStore()
    prompts = readable_prompts(rows, 2, modes.family, clips, PromptConfig())
    folder = export_run_adapter(modes, run, prompts, clips)
    report = json.loads((folder / "verification.json").read_text())
    assert report["ok"] and report["max_abs_logit_diff_trained"] <= 1e-5 < report["max_abs_logit_diff_base"]
    assert report["prompts"] == (["a", "b"] if rows else ["export-tone", "export-noise"])
    assert report["prompts_with_audio"] == (0 if rows else 2)
    assert f"2 prompts, {report['prompts_with_audio']} of them with audio" in (folder / "README.md").read_text()


def test_exports_carry_the_wording_of_training_and_evaluation_takes_it(bases, tmp_path, monkeypatch):
    """finding 39: from a run, a checkpoint and an adapter; merged weights do not keep their base's wording."""
    wording = {
        "system_prompt": None,
        "instruction": "Entscheide dich: <answer>.",
        "choice_style": "lines",
        "written_question": True,
    }
    base = Path(shutil.copytree(bases["covo_audio"], tmp_path / "base"))
    fine = Verification(True, "adapter", 0.0, 1.0, 1e-4, 1.0, 1.0, "float32", str(base), ["a"])
    monkeypatch.setattr("covo_rl.export.verify.run_fresh", lambda *_: ({}, {}))
    monkeypatch.setattr("covo_rl.export.verify.compare_logits", lambda *_, **__: fine)
    (base / "prompt.yaml").write_text("instruction: of the cold start\n")
    run = run_folder(tmp_path, base, **wording)
    step = checkpoint(trained(base, MODES["lora"]), run, "step_000003")
    for source, kind, out in ((run, "adapter", "a"), (step, "merged", "m"), (tmp_path / "a", "adapter", "again")):
        done = CliRunner().invoke(app, ["export", str(source), f"--{kind}", str(tmp_path / out)])
        assert done.exit_code == 0, done.output
        assert yaml.safe_load((tmp_path / out / "prompt.yaml").read_text()) == wording
        assert "prompt.yaml" in json.loads((tmp_path / out / "export.json").read_text())["files"]
    for request in (Request(model=str(base), adapter=str(tmp_path / "a")), Request(model=str(tmp_path / "m"))):
        assert request.prompt_config() == PromptConfig(**wording)
    assert Request(model=str(base)).prompt_config().instruction == "of the cold start"


@pytest.mark.parametrize("content", ["instruction: [", "instructoin: x", "- a"])
def test_a_wording_that_cannot_be_read_is_named(content, tmp_path):
    """finding 39"""
    (tmp_path / "prompt.yaml").write_text(content)
    with pytest.raises((EvalInputError, ConfigError), match=r"prompt\.yaml"):
        Request(model="builtin:tiny", adapter=str(tmp_path)).prompt_config()
    with pytest.raises((ExportError, ValueError), match=r"prompt\.yaml"):
        wording_of(tmp_path, {})


def test_merging_a_model_made_in_memory_copies_nothing_of_the_current_folder(tmp_path, monkeypatch):
    """finding 39: it has no folder of its own, and the current one is not it."""
    here, out = tmp_path / "here", tmp_path / "out"
    for folder in (here / "photos", out):
        folder.mkdir(parents=True)
    (here / "photos" / "mine.txt").write_text("mine")
    save_file({"mine": torch.ones(2)}, here / "mine.safetensors")
    monkeypatch.chdir(here)
    model, processor = tiny_covo_audio(tiny_tokenizer(["What?"]), adapter_hidden=16, **SIZES)
    write_merged(family_class("covo_audio")(model, processor), out)
    assert not (out / "photos").exists()
    assert "mine" not in load_file(out / "model.safetensors")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_at_the_export_is_a_message_on_every_rank(error, bases, tmp_path, monkeypatch):
    """finding 11"""

    def full(*_, **__):
        raise error

    monkeypatch.setattr("covo_rl.export.exporting.save_policy", full)
    modes, clips = trained(bases["covo_audio"], MODES["lora"]), ClipStore()
    with pytest.raises(ExportError, match="No space left on device"):
        export_run_adapter(modes, tmp_path, synthetic_prompts(modes.family, clips), clips)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def no_policy(monkeypatch):
    def load(*_, **__):
        raise AssertionError("a policy was loaded before the export was refused")

    monkeypatch.setattr("covo_rl.export.adapter.open_policy", load)


def test_an_export_replaces_nothing_but_an_export_and_says_so_before_a_model_is_loaded(tmp_path, no_policy):
    """finding 09"""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for words, said in (
        (["--adapter", "mine"], "exists: give another folder"),
        (["--adapter", "mine", "--replace"], "holds no adapter and no weights"),
        (["--merged", "mine/notes.txt", "--replace"], "holds no adapter and no weights"),
        (["--adapter", "x", "--merged", "x"], "give two folders"),
    ):
        words = [str(tmp_path / word) if word[0] != "-" else word for word in words]
        done = CliRunner().invoke(app, ["export", str(tmp_path), *words])
        assert done.exit_code == 1 and said in done.output
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["mine", "mine/notes.txt"]


def test_the_base_model_is_never_replaced_by_its_own_merge(bases, tmp_path):
    """finding 38: `--merged BASE --replace` took the base away that the run, its adapter and its checkpoints need."""
    base = shutil.copytree(bases["covo_audio"], tmp_path / "base")
    modes, before = trained(base, MODES["lora"]), sorted(base.iterdir())
    with pytest.raises(ExportError, match="is the base model of this policy"):
        export_merged(modes, tmp_path / "." / "base", replace=True)
    assert sorted(base.iterdir()) == before


def test_what_no_export_wrote_outlives_its_replacement(tmp_path):
    """finding 09"""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("adapter_config.json", "old.safetensors", "notes.txt"):
        (folder / name).write_text(name)
    (folder / "export.json").write_text(
        json.dumps({"files": ["adapter_config.json", "old.safetensors", "export.json"]})
    )
    with staging(folder, replace=True) as stage:
        (stage / "adapter_config.json").write_text("new")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "adapter_config.json": "new", "notes.txt": "notes.txt"
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == [folder]
    with pytest.raises(KeyError), staging(folder, replace=True):
        raise KeyError
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "notes.txt"]


@pytest.mark.parametrize("name", ["result.json", "config.yaml", "environment.json"])
def test_a_damaged_record_of_a_run_is_named_by_its_card(name, bases, tmp_path):
    """finding 10"""
    run = run_folder(tmp_path, bases["covo_audio"])
    for file, content in (("export.json", {"kind": "adapter"}), ("verification.json", {"ok": True})):
        (run / file).write_text(json.dumps(content))
    (run / name).write_text('{"before": {"n": 4}, "aft')
    with pytest.raises(ValueError, match=f"{name} cannot be read, was it cut"):
        update_card(run, run)
    done = CliRunner().invoke(app, ["serve-check", str(run)])
    assert done.exit_code == 1 and not isinstance(done.exception, KeyError)
