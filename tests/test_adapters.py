"""Adapters of others: whatever PEFT saves for LoRA scores here as it does there; what does not fit is one message."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from covo_rl.audio import ClipStore
from covo_rl.config import AdapterConfig
from covo_rl.export.adapter import open_policy
from covo_rl.export.exporting import export_policy
from covo_rl.export.verify import policy_logits, synthetic_prompts
from covo_rl.models import load_family
from covo_rl.policy import Policy
from covo_rl.policy.saved_adapter import AdapterError, read_adapter
from covo_rl.policy.trainable import make_trainable
from tests.policy_cases import family as small_family
from tests.policy_cases import group

QV = r".*(llm|language_model)\..*\.(q_proj|v_proj)"
#: what PEFT can save for a LoRA adapter
LORA = {
    "suffixes": {"target_modules": ["q_proj", "down_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "dora": {"target_modules": QV, "use_dora": True},
    "rslora": {"target_modules": QV, "use_rslora": True},
    "patterns": {"target_modules": QV, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "lora bias": {"target_modules": ["down_proj"], "lora_bias": True},
    "saved embeddings": {"target_modules": QV, "modules_to_save": ["embed_tokens", "lm_head"]},
    "targeted embeddings": {"target_modules": ["v_proj", "embed_tokens", "lm_head"]},
    "saved audio adapter": {"target_modules": QV, "modules_to_save": ["audio_adapter"]},
    "token deltas": {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [3, 5, 70], "lm_head": [3, 5]}},
    "biases of the targets": {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"},
    "all biases": {"target_modules": ["q_proj", "v_proj"], "bias": "all"},
    "pissa": {"target_modules": QV, "init_lora_weights": "pissa"},
}


@pytest.fixture(scope="module", params=["covo_audio", "qwen2_audio"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    family = small_family(request.param)
    family.model.save_pretrained(folder)
    family.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def covo_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("covo")
    family = small_family()
    family.model.save_pretrained(folder)
    family.processor.save_pretrained(folder)
    return folder


def saved(base: Path, folder: Path, config, *, steps: float = 0.2, **options) -> Path:
    """Somebody's training with PEFT alone: everything that trains is moved, then saved."""
    model = load_family(str(base)).model
    if isinstance(config, dict):
        config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = peft.get_peft_model(model, config)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in plain.parameters():
                if parameter.requires_grad:
                    parameter.add_(steps * torch.randn(parameter.shape, generator=generator))
        plain.save_pretrained(folder, **options)
    return folder


def logits(family):
    clips = ClipStore()
    family.model.eval()
    return torch.stack([policy_logits(prompt, family, clips) for prompt in synthetic_prompts(family, clips)])


def as_peft_does(base: Path, folder: Path):
    family = load_family(str(base))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.PeftModel.from_pretrained(family.model, str(folder))
    return family


@pytest.mark.parametrize("name", LORA)
def test_every_lora_adapter_of_peft_scores_as_in_peft(base, tmp_path, name):
    """finding 38: saved embeddings, token deltas and biases were refused as "does not fit"."""
    folder = saved(base, tmp_path / "adapter", LORA[name])
    theirs, plain = as_peft_does(base, folder), logits(load_family(str(base)))
    ours = load_family(str(base))
    modes = make_trainable(ours, AdapterConfig(adapter=str(folder)))
    assert (logits(ours) - logits(theirs)).abs().max() <= 1e-5
    assert (logits(ours) - plain).abs().max() > 1e-3, "the adapter did nothing"
    policy = Policy(ours, modes.peft_model, clips=ClipStore()).eval()
    prompts = synthetic_prompts(ours, policy.clips)
    groups = [group(prompt, (6, 3)) for prompt in prompts]
    ours_NC = policy("logps", groups, policy.features(prompts), temperature=1.0).logps_NC
    other = Policy(theirs, None, clips=policy.clips).eval()
    theirs_NC = other("logps", groups, other.features(prompts), temperature=1.0).logps_NC
    assert (ours_NC - theirs_NC).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("name", "kind"),
    [("targeted embeddings", "adapter"), pytest.param("token deltas", "adapter", marks=pytest.mark.slow),
     ("all biases", "adapter"), pytest.param("saved embeddings", "merged", marks=pytest.mark.slow),
     ("token deltas", "merged")],
)  # fmt: skip
def test_what_came_with_an_adapter_survives_export_and_reload(covo_base, tmp_path, name, kind):
    """finding 38: read, exported (verified by PEFT in a fresh process) and read again, the policy is the same."""
    opened = open_policy(saved(covo_base, tmp_path / "theirs", LORA[name]))
    expected = logits(opened.modes.family)
    result = export_policy(opened.modes, tmp_path / "ours", kind=kind)
    assert result.ok and result.max_abs_logit_diff_base > 1e-3
    again = open_policy(tmp_path / "ours").modes.family if kind == "adapter" else load_family(str(tmp_path / "ours"))
    assert (logits(again) - expected).abs().max() <= (1e-6 if kind == "adapter" else 1e-4)


OTHERS = {
    "IA3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LOHA": peft.LoHaConfig(r=2, target_modules=["q_proj"]),
    "LOKR": peft.LoKrConfig(r=2, target_modules=["q_proj"]),
    "OFT": peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"]),
    "VERA": peft.VeraConfig(r=2, target_modules=["q_proj"]),
    "ADALORA": peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_of_adapters_are_named_and_lora_asked_for(covo_base, tmp_path, kind):
    """finding 38: the message says what was given and that only LoRA is taken, before a model is loaded."""
    folder = saved(covo_base, tmp_path, OTHERS[kind])
    with pytest.raises(AdapterError, match=rf"adapter_config\.json: peft_type is '{kind}'; only LoRA") as error:
        read_adapter(folder)
    assert "merge_and_unload" in str(error.value)


def cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def edited(change):
    def edit(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file({k: t.contiguous() for k, t in change(load_file(file)).items()}, file)

    return edit


def config(**values):
    def edit(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return edit


def renamed(tensors):
    return {name.replace("q_proj", "query"): tensor for name, tensor in tensors.items()}


def first_only(tensors):
    return dict(sorted(tensors.items())[:2])


#: what is done to a good adapter of rank 4 -> what the message says
DAMAGE = {
    "rank of the weights": (config(r=8), ["q_proj.lora_A", "[4, 32] in the file", "[8, 32] in the model"]),
    "rank of one pattern": (config(rank_pattern={"v_proj": 2}), ["v_proj.lora_A", "[4, 32]", "[2, 32]"]),
    "other names": (edited(renamed), ["no place in the model for", "query.lora_A.weight"]),
    "tensors left out": (edited(first_only), ["the file lacks", "another model?"]),
    "empty (ZeRO-3)": (
        edited(lambda t: {name: torch.empty(0) for name in t}),
        ["8 of 8 tensors are empty", "(0,)", "ZeRO-3", "get_state_dict"],
    ),
    "one empty": (
        edited(lambda t: t | {next(iter(t)): torch.empty(0, 32)}),
        ["1 of 8 tensors are empty", "(0, 32)"],
    ),
    "no tensors": (edited(lambda t: {}), ["adapter_model.safetensors holds no tensor"]),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), ["has no weights", "found ['README.md'"]),
    "half the weights": (cut, ["adapter_model.safetensors is damaged", "bytes", "copy it again"]),
    "empty file": (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), ["is damaged (0 bytes)"]),
    "a pointer of git-lfs": (
        lambda f: (f / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        ["is damaged (43 bytes)"],
    ),
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), ["has an adapter_config.json; found"]),
    "half a configuration": (
        lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LO'),
        ["adapter_config.json cannot be read"],
    ),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), ["expected an object", "list"]),
    "no kind": (config(peft_type=None), ["peft_type is None"]),
    "a rank in words": (config(r="four"), ["adapter", "does not fit"]),
    "rank 0": (config(r=0), ["does not fit", "`r` should be a positive integer"]),
    "targets of another model": (config(target_modules=["c_attn"]), ["c_attn", "not found in the base model"]),
    "targets that exist in part": (
        config(target_modules=["q_proj", "c_attn"]),
        ["no place in the model for", "v_proj.lora_A.weight"],
    ),
    "a copy that is not there": (config(modules_to_save=["lm_head"]), ["the file lacks", "lm_head.weight"]),
    "no regular expression": (config(target_modules="("), ["does not fit", "unterminated subpattern"]),
    "a package that is missing": (config(megatron_config={"a": 1}), ["does not fit", "No module named 'megatron'"]),
    "activated LoRA": (config(alora_invocation_tokens=[1, 2]), ["alora_invocation_tokens"]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_an_adapter_that_does_not_fit_is_one_message_with_its_file(covo_base, tmp_path, name):
    """finding 38: tracebacks of 60 lines for another shape, an empty one, one without weights."""
    folder = saved(covo_base, tmp_path / "adapter", {"target_modules": QV})
    break_it, parts = DAMAGE[name]
    break_it(folder)
    with pytest.raises((AdapterError, FileNotFoundError)) as error:
        make_trainable(load_family(str(covo_base)), AdapterConfig(adapter=str(folder)))
    message = str(error.value)
    assert str(folder) in message
    assert all(part in message for part in parts), message
    assert len(message) < 800 and message.count("\n") < 6, message


def test_an_adapter_of_a_wider_model_names_tensor_and_shapes(covo_base, tmp_path):
    """finding 38: file, tensor, both shapes, and what it may be."""
    wide = small_family()
    from covo_rl.models.tiny import tiny_covo_audio

    model, processor = tiny_covo_audio(wide.tokenizer, decoder_width=64, mel_bins=16)
    model.save_pretrained(tmp_path / "wide")
    processor.save_pretrained(tmp_path / "wide")
    folder = saved(tmp_path / "wide", tmp_path / "adapter", {"target_modules": QV})
    with pytest.raises(AdapterError) as error:
        make_trainable(load_family(str(covo_base)), AdapterConfig(adapter=str(folder)))
    assert "[4, 64] in the file, [4, 32] in the model" in str(error.value)
    assert "more. Is it an adapter of another model?" in str(error.value)


def test_what_one_should_know_of_an_adapter_is_noted(covo_base, tmp_path):
    """finding 38: fields of a newer PEFT, another base, and an adapter that changes nothing are never silent."""
    folder = saved(covo_base, tmp_path / "adapter", {"target_modules": QV})
    assert read_adapter(folder, model=str(covo_base)).notes == ()
    config(new_scaling=3, off=None, base_model_name_or_path="someone/else-7B")(folder)
    known, base = read_adapter(folder, model=str(covo_base)).notes
    assert "new_scaling=3" in known and "off" not in known
    assert "trained on someone/else-7B" in base
    edited(lambda t: {n: t * 0 if "lora_B" in n else t for n, t in t.items()})(folder)
    modes = make_trainable(load_family(str(covo_base)), AdapterConfig(adapter=str(folder)))
    assert any("every LoRA product is zero" in note for note in modes.notes)


IDLE = {"alpha": {"lora_alpha": 0}, "patterns": {"alpha_pattern": {"q_proj": 0, "layers.*v_proj": 0}}}


@pytest.mark.parametrize("name", IDLE)
def test_an_adapter_that_is_scaled_to_nothing_is_noted(covo_base, tmp_path, name):
    """finding 38: alpha 0 multiplies every product by zero; one module that counts is enough to say nothing."""
    folder = saved(covo_base, tmp_path / "adapter", {"target_modules": QV})
    config(**IDLE[name])(folder)
    assert ["is zero" in note for note in read_adapter(folder).notes] == [True]
    plain, family = logits(load_family(str(covo_base))), load_family(str(covo_base))
    make_trainable(family, AdapterConfig(adapter=str(folder)))
    assert (logits(family) - plain).abs().max() == 0
    config(lora_alpha=8, alpha_pattern={"q_proj": 0})(folder)
    assert read_adapter(folder).notes == ()


def test_an_initialisation_that_loading_cannot_repeat_is_noted(covo_base, tmp_path):
    """finding 38: pissa_niter_4 draws at random, so the base is changed in another way at each load."""
    folder = saved(covo_base, tmp_path / "adapter", {"target_modules": QV, "init_lora_weights": "pissa_niter_4"})
    assert "pissa_niter_4, changed the base" in read_adapter(folder).notes[0]
    config(init_lora_weights="pissa")(folder)
    assert read_adapter(folder).notes == ()


def test_options_of_a_new_adapter_beside_a_saved_one_are_noted(covo_base, tmp_path):
    """finding 38: --adapter FOLDER --lora_r 64 trained the folder's rank 4 and said nothing."""
    folder = str(saved(covo_base, tmp_path / "adapter", {"target_modules": QV}))
    others = ({"lora_r": 64, "use_dora": True}, "lora_r 64 (its own: 4), use_dora True")
    for options, note in (others, ({"lora_r": 4}, "")):
        modes = make_trainable(load_family(str(covo_base)), AdapterConfig(adapter=folder, **options))
        assert [text for text in modes.notes if "no effect" in text and note in text] == list(modes.notes)
        assert bool(modes.notes) == bool(note)


def test_a_configuration_that_windows_saved_is_read(covo_base, tmp_path):
    """finding 38: a byte order mark and CRLF in adapter_config.json."""
    file = saved(covo_base, tmp_path, {"target_modules": QV}) / "adapter_config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert read_adapter(tmp_path).config.r == 4


def test_two_adapters_in_one_folder_are_both_named(covo_base, tmp_path):
    """finding 38: the first of two was suggested alone."""
    for name in ("a", "b"):
        saved(covo_base, tmp_path / name, {"target_modules": QV})
    with pytest.raises(FileNotFoundError, match=r"did you mean .*/a or .*/b\?"):
        read_adapter(tmp_path)


def test_a_run_folder_is_answered_with_the_adapter_inside(covo_base, tmp_path):
    """finding 38: the nearest folder that would do is named."""
    saved(covo_base, tmp_path / "run" / "adapter", {"target_modules": QV})
    with pytest.raises(FileNotFoundError, match=r"did you mean .*run/adapter"):
        read_adapter(tmp_path / "run")


def test_a_pickled_adapter_loads_as_well(covo_base, tmp_path):
    """finding 38: any PEFT LoRA, also the older adapter_model.bin."""
    folder = saved(covo_base, tmp_path, {"target_modules": QV}, safe_serialization=False)
    assert not (folder / "adapter_model.safetensors").exists()
    ours = load_family(str(covo_base))
    make_trainable(ours, AdapterConfig(adapter=str(folder)))
    assert (logits(ours) - logits(as_peft_does(covo_base, folder))).abs().max() <= 1e-5
    (folder / "adapter_model.bin").write_bytes(b"PK\x03\x04 no more")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin is damaged"):
        read_adapter(shutil.copytree(folder, tmp_path / "cut"))
