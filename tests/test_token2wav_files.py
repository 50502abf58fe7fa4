"""A decoder's folder: every published form of it loads, and what is not whole is refused by name."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from token2wav_cases import CODES, FOLDER, VOICE, decoder, largest

from covo_rl.models.covo_audio.token2wav import Token2Wav, Token2WavConfig
from covo_rl.models.covo_audio.token2wav.configuration import DecoderConfigError, VocoderConfig
from covo_rl.models.weights import WeightsError

WEIGHTS = load_file(FOLDER / "model.safetensors")
NEWER = {".weight_g": ".parametrizations.weight.original0", ".weight_v": ".parametrizations.weight.original1"}


def folder_with(path, tensors, name="model.safetensors"):
    for file in ("config.json", "global_mean_var.npy"):
        shutil.copy(FOLDER / file, path / file)
    if name.endswith(".pt"):
        torch.save(tensors, path / name)
    else:
        save_file(tensors, path / name)
    return path


def newer_names(tensors):
    renamed = {}
    for name, value in tensors.items():
        for published, parametrised in NEWER.items():
            name = name.removesuffix(published) + parametrised if name.endswith(published) else name
        renamed[name] = value
    return renamed


FORMS = {
    "wrapper and prefix": {"model": {f"module.{name}": value for name, value in WEIGHTS.items()}, "step": 7},
    "newer weight norm, no buffers": newer_names(
        {name: value for name, value in WEIGHTS.items() if not name.endswith((".inv_freq", ".filter"))}
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_published_form_is_the_same_decoder(form, tmp_path):
    model = Token2Wav.from_pretrained(folder_with(tmp_path, FORMS[form], "model.pt"))
    ours, published = model.state_dict(), decoder().state_dict()
    assert ours.keys() == published.keys() == WEIGHTS.keys()
    for name, value in ours.items():
        assert largest(value, published[name]) < 1e-6
    assert not model.training and torch.equal(model.mean_E, decoder().mean_E)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_saved_and_loaded_it_says_the_same(dtype, tmp_path):
    decoder().save_pretrained(tmp_path, dtype=dtype)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == WEIGHTS.keys()
    assert {value.dtype for value in tensors.values()} == {dtype or torch.float32}
    again = Token2Wav.from_pretrained(tmp_path)
    assert again.config == decoder().config
    latents = [model.latents(CODES, **VOICE, steps=3) for model in (decoder(), again)]
    assert float((latents[1] - latents[0]).norm() / latents[0].norm()) < (0 if dtype is None else 0.02) + 1e-9
    assert next(again.parameters()).dtype == torch.float32
    assert (np.load(tmp_path / "global_mean_var.npy") == np.load(FOLDER / "global_mean_var.npy").reshape(-1)).all()


def test_statistics_of_any_published_shape_are_read(tmp_path):
    folder = folder_with(tmp_path, WEIGHTS)
    np.save(
        folder / "global_mean_var.npy", np.load(FOLDER / "global_mean_var.npy").astype(np.float64).reshape(1, 16, 1)
    )
    assert torch.equal(Token2Wav.from_pretrained(folder).variance_E, decoder().variance_E)


def without(name):
    return {key: value for key, value in WEIGHTS.items() if key != name}


EMBEDDING = "token2latent.token_embedding.weight"
BROKEN = {
    "missing": (without(EMBEDDING), f"tensors missing: {EMBEDDING}"),
    "unknown": ({**WEIGHTS, "extra": torch.zeros(1)}, "tensors unknown: extra"),
    "shape": (
        {**WEIGHTS, EMBEDDING: torch.zeros(65, 24)},
        f"of another shape than config.json says: {EMBEDDING} \\(65, 24\\), here \\(64, 24\\)",
    ),
    "nan": ({**WEIGHTS, EMBEDDING: torch.full((64, 24), torch.nan)}, f"NaN or infinite numbers in 1 \\({EMBEDDING}"),
    "filter": ({**WEIGHTS, "wavegan.activation_post.upsample.filter": torch.ones(1, 1, 12)}, "with other values"),
    "rotation": ({**WEIGHTS, "token2latent.blocks.0.attn.rotary.inv_freq": torch.ones(8)}, "with other values"),
    "twice": (
        {**WEIGHTS, f"module.{EMBEDDING}": torch.zeros(64, 24)},
        f"holds {EMBEDDING} twice, under two names",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_weights_that_are_not_whole_are_refused(case, tmp_path):
    tensors, text = BROKEN[case]
    with pytest.raises(WeightsError, match=text):
        Token2Wav.from_pretrained(folder_with(tmp_path, tensors))


class Call:
    def __reduce__(self):
        return print, ("this must not run",)


def test_files_that_are_no_decoder_are_refused(tmp_path, capsys):
    with pytest.raises(DecoderConfigError, match=r"config.json cannot be read: .*No such file"):
        Token2Wav.from_pretrained(tmp_path)
    folder = folder_with(tmp_path, WEIGHTS)
    (folder / "model.safetensors").write_bytes((FOLDER / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(WeightsError, match=r"model.safetensors cannot be read: .*Is the download complete\?"):
        Token2Wav.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"holds neither model.safetensors nor model.pt"):
        Token2Wav.from_pretrained(folder)
    for content, text in (
        (pickle.dumps(Call()), "model.pt cannot be read"), (b"", "model.pt cannot be read"),
    ):  # fmt: skip
        (folder / "model.pt").write_bytes(content)
        with pytest.raises(WeightsError, match=text):
            Token2Wav.from_pretrained(folder)
    torch.save({"a": 3}, folder / "model.pt")
    with pytest.raises(WeightsError, match="'a' is int; only tensors by name are expected"):
        Token2Wav.from_pretrained(folder)
    torch.save(torch.zeros(3), folder / "model.pt")
    with pytest.raises(WeightsError, match=r"model\.pt holds Tensor; tensors by name are expected"):
        Token2Wav.from_pretrained(folder)
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (
            np.zeros(15, np.float32),
            r"is \(15,\) float32; expected 16 floating-point numbers: 8 means",
        ),
        (np.zeros(16, np.int64), r"is \(16,\) int64; expected 16"),
        (np.zeros(16, np.float32), "variances .* finite and above 0"),
        (np.full(16, np.nan, np.float32), "means must be finite"),
        (np.array([Call()] * 16, dtype=object), "global_mean_var.npy cannot be read"),
    ],
)
def test_statistics_that_cannot_be_used_are_refused(array, text, tmp_path):
    folder = folder_with(tmp_path, WEIGHTS)
    np.save(folder / "global_mean_var.npy", array, allow_pickle=True)
    with pytest.raises(WeightsError, match=text):
        Token2Wav.from_pretrained(folder)


def published_config(*path, value=None):
    data = json.loads((FOLDER / "config.json").read_text())
    part = data
    for name in path[:-1]:
        part = part[name]
    if value is None:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return data


TRANSFORMER = ("model", "token2latent", "transformer")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ([], r"config.json: \[\] is no JSON object"),
        (published_config("model", "wavegan"), r"has no 'wavegan' \(only .*token2latent"),
        (
            published_config(*TRANSFORMER, "qk_norm", value=True),
            "transformer.qk_norm is True; only False",
        ),
        (published_config("model", "wavegan", "causal", value=False), "wavegan.causal is False; only True"),
        (published_config(*TRANSFORMER, "num_layers", value=10**9), "num_layers is 1000000000, which is no"),
        (published_config(*TRANSFORMER, "num_layers", value=1000), "num_layers 1000 is more than 512"),
        (published_config(*TRANSFORMER, "num_layers", value=2.0), "num_layers is 2.0, which is no"),
        (published_config(*TRANSFORMER, "num_layers", value=True), "num_layers is True, which is no"),
        (published_config(*TRANSFORMER, "num_heads", value=3), "hidden_size 64 is no multiple of 2 \\* num_heads 3"),
        (published_config("model", "token2latent", "sigma", value=-1), "token2latent.sigma is -1"),
        (
            published_config("model", "token2latent", "z_dim", value=9),
            "latent_dim 8 is not token2latent.z_dim 9",
        ),
        (
            published_config("model", "token2latent", "upsample_factor", value=2),
            "upsample_factor 2: a code has 4",
        ),
        (published_config("model", "wavegan", "upsample_rates", value=[5, 3, 2, 2, 2]), "is 120, not 240 samples"),
        (published_config("model", "wavegan", "upsample_rates", value=[]), "upsample_rates is \\[\\], which is no"),
        (published_config("model", "wavegan", "upsample_initial_channel", value=100), "cannot be halved 6 times"),
        (published_config("vocoder", value="wavernn"), "vocoder 'wavernn' is none of bigvgan, griffin_lim, harmonic"),
        (published_config("latent", value=3), "latent is 3, which is no str"),
        (published_config("vocoder", value="griffin_lim"), "griffin_lim needs latent mel or mel_pitch, not vae"),
    ],
)
def test_configurations_that_no_network_has_are_refused(data, text):
    with pytest.raises(DecoderConfigError, match=text):
        Token2WavConfig.from_dict(data)


@pytest.mark.parametrize(
    "config",
    [
        Token2WavConfig(), Token2WavConfig.tiny(), Token2WavConfig.tiny(tokenizer="ab12"),
        Token2WavConfig.tiny("mel", "griffin_lim"), Token2WavConfig.tiny("mel", "bigvgan"),
    ],
)  # fmt: skip
def test_configurations_survive_their_file(config, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert Token2WavConfig.from_file(path) == config


def test_a_published_file_has_keys_that_nobody_reads():
    data = json.loads((FOLDER / "config.json").read_text())
    assert data["data"]["audio"]["hop_size"] == 480 and data["model"]["wavegan"]["use_flow"]  # read by nobody
    config = Token2WavConfig.from_dict(data)
    assert (config.latent, config.vocoder, config.flow.z_dim) == ("vae", "bigvgan", 8)
    assert config.wavegan == VocoderConfig(upsample_initial_channel=128)


@pytest.mark.parametrize("latent", ["mel", "mel_pitch"])
def test_griffin_lim_has_no_weights_of_its_own(latent, tmp_path):
    torch.manual_seed(0)
    model = Token2Wav(Token2WavConfig.tiny(latent, "griffin_lim")).eval()
    model.save_pretrained(tmp_path)
    again = Token2Wav.from_pretrained(tmp_path)
    assert not any(name.startswith("wavegan") for name in again.state_dict())
    assert torch.equal(again.synthesise([[3, 5]], steps=2), model.synthesise([[3, 5]], steps=2))
