"""A family that covo_rl has never seen: named by --family or an entry point, its code beside the weights."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from covo_rl import models
from covo_rl.models import registry
from covo_rl.models.tiny import tiny_model

RATE = 16_000
CLIP = np.random.default_rng(0).normal(0, 0.1, RATE).astype(np.float32)
CHAT = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "What do you hear?"}]}]
FAMILY = '''
from covo_rl.models.audio_flamingo import AudioFlamingo3

class Mine(AudioFlamingo3):
    """AudioFlamingo3 under another name, whose code ships with the checkpoint."""
    title, model_type, model_class = "Mine", "mine", "AutoModelForCausalLM"

class Unfinished(AudioFlamingo3.__mro__[2]):
    model_type = "unfinished"

class Numbered(AudioFlamingo3):
    model_type = ["a", "b"]

class Nameless(AudioFlamingo3.__mro__[2]):
    model_type, model_class, extract, slots = "nameless", "AudioFlamingo3ForConditionalGeneration", print, print
'''
CODE = """
from transformers import AudioFlamingo3Config, AudioFlamingo3ForConditionalGeneration

class MineConfig(AudioFlamingo3Config):
    model_type = "mine"

class MineForAudio(AudioFlamingo3ForConditionalGeneration):
    config_class = MineConfig
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder whose model_type nobody knows, with its own code, and beside it mine.py with the family."""
    root = tmp_path_factory.mktemp("own")
    model, processor = tiny_model("audioflamingo3")
    model.config.save_pretrained(root / "model")
    model.generation_config.save_pretrained(root / "model")
    save_file(model.state_dict(), root / "model" / "model.safetensors", metadata={"format": "pt"})
    processor.save_pretrained(root / "model")
    config = json.loads((root / "model" / "config.json").read_text())
    config |= {"model_type": "mine", "architectures": ["MineForAudio"]}
    config["auto_map"] = {"AutoConfig": "code.MineConfig", "AutoModelForCausalLM": "code.MineForAudio"}
    (root / "model" / "config.json").write_text(json.dumps(config))
    (root / "model" / "code.py").write_text(CODE)
    (root / "mine.py").write_text(FAMILY)
    return root


@pytest.fixture(autouse=True)
def forgotten(monkeypatch, tmp_path):
    """Nothing that a test chooses outlives it; code of checkpoints is copied into its own folder."""
    monkeypatch.setattr(registry, "_CHOSEN", {})
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))


def installed(folder, package, **points):
    """A package with these entry points, as pip leaves it behind."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{kind} = {spec}" for kind, spec in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[covo_rl.families]", *lines]) + "\n")


def test_a_family_of_ones_own_loads_code_from_the_checkpoint_once_that_is_allowed(checkpoint):
    path = str(checkpoint / "model")
    with pytest.raises(models.ModelError, match=r"model_type 'mine' has no family.*--family ./mine.py:Mine"):
        models.load_family(path)
    models.use_family(f"{checkpoint}/mine.py:Mine")
    assert models.family_at(path).model_type == "mine"  # no weights, no code of the checkpoint
    with pytest.raises(ValueError, match=r"its code ships with the checkpoint; --trust-remote-code runs it on this"):
        models.load_family(path)
    family = models.load_family(path, trust_remote_code=True)
    assert type(family.model).__name__ == "MineForAudio"
    features = family.clip_features(CLIP, RATE)
    stock = tiny_model("audioflamingo3")[0]
    ids = torch.tensor([family.tokenize(family.render(CHAT), [features.slots])])
    with torch.no_grad():
        want = stock(input_ids=ids, **features.tensors).logits
        embeds_LD = family.embed_tokens(ids[0]).index_copy(
            0, (ids[0] == family.audio_token_id).nonzero()[:, 0], family.encode([features])[0]
        )
        got = family.lm_head(family.decoder(inputs_embeds=embeds_LD[None]).last_hidden_state)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("mine", r"--family mine: write \./file\.py:Class or package\.module:Class"),
        ("{}/none.py:Mine", r"none\.py does not exist .*did you mean .*mine\.py\?"),
        ("{}/mine.py:Yours", "there is no Yours; its families are AudioFlamingo3, Mine"),
        ("{}/mine.py:FAMILY", "there is no FAMILY"),
        ("{}/mine.py:Unfinished", "Unfinished does not say extract, slots"),
        ("{}/mine.py:Numbered", r"Numbered has the model_type \['a', 'b'\]; it is a text"),
        ("{}/mine.py:Nameless", "Nameless does not say audio_token"),
        ("leaving:Mine", "cannot import 'leaving': SystemExit: 3"),
        ("json:JSONDecoder", "JSONDecoder is no subclass of covo_rl.models.base.AudioFamily"),
        ("no_such_package:Mine", "cannot import 'no_such_package': ModuleNotFoundError"),
        ("{}/broken.py:Mine", r"broken\.py raises ZeroDivisionError while it is imported"),
    ],
)
def test_a_spec_that_names_no_family_says_what_is_there(checkpoint, spec, message, monkeypatch):
    (checkpoint / "broken.py").write_text("1 / 0\n")
    (checkpoint / "leaving.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(checkpoint)
    with pytest.raises(models.ModelError, match=message):
        models.use_family(spec.format(checkpoint))


def test_an_entry_point_names_a_family_unless_two_claim_its_type(checkpoint, tmp_path, monkeypatch):
    shutil.copy(checkpoint / "mine.py", tmp_path / "some_package.py")
    installed(
        tmp_path, "some-package", mine="some_package:Mine", broken="some_package:Nothing", glmasr="some_package:X"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert models.family_class("mine").__name__ == "Mine"
    assert registry.family_types()["mine"] == "some_package:Mine"
    with pytest.raises(models.ModelError, match="the family some_package:Nothing of some-package: there is no Nothing"):
        models.family_class("broken")
    claims = r"covo_rl\.models\.glm_asr:GlmAsr of covo_rl, some_package:X of some-package; choose one: --family"
    with pytest.raises(models.ModelError, match=f"model_type 'glmasr' has several families: {claims}"):
        models.family_class("glmasr")
    models.use_family("covo_rl.models.glm_asr:GlmAsr")
    assert models.family_class("glmasr").title == "GLM-ASR"
    installed(tmp_path, "another", mine="another:Mine")
    with pytest.raises(models.ModelError, match="'mine' has several families: "):
        models.family_class("mine")


def test_an_unknown_type_is_told_the_nearest_ones():
    with pytest.raises(models.ModelError, match=r"'qwen2_5_omni_talker' has no family.*Nearest: qwen2_5_omni"):
        models.family_class("qwen2_5_omni_talker")
    with pytest.raises(models.ModelError, match="Nearest: voxtral"):
        models.family_class("voxtral_realtime")
    with pytest.raises(models.ModelError, match="model_type None has no family"):
        models.family_class(None)


def test_a_class_that_the_installed_transformers_lacks_is_named():
    gone = type("Gone", (models.family_class("glmasr"),), {"model_class": "GlmAsr9ForConditionalGeneration"})
    with pytest.raises(
        ImportError, match=r"Gone needs GlmAsr9ForConditionalGeneration, which transformers [\d.]+ does"
    ):
        gone.load("anywhere")
