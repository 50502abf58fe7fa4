"""Training of decoders: losses beside slow ones, gradients beside differences, the harmonic vocoder, resuming."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from covo_rl.data.read import DataError
from covo_rl.models.covo_audio.token2wav import CodesError, Token2Wav, Token2WavConfig
from covo_rl.models.covo_audio.token2wav.configuration import FlowConfig, TransformerConfig
from covo_rl.models.covo_audio.token2wav.flow import FlowField
from covo_rl.models.covo_audio.token2wav.harmonic import HarmonicVocoder
from covo_rl.models.covo_audio.token2wav.inputs import frame_noise
from covo_rl.models.covo_audio.token2wav.stream import overlapped
from covo_rl.resolve import ConfigError
from covo_rl.speech.clips import digit_rows
from covo_rl.speech.configuration import SpeechTokenizerConfig
from covo_rl.speech.decoder_clips import speaker_width
from covo_rl.speech.decoder_losses import (
    FlowDraw,
    discriminator_loss,
    draw_flow,
    flow_loss,
    spectral_loss,
    vocoder_loss,
)
from covo_rl.speech.decoder_training import read_decoder_training
from covo_rl.speech.discriminators import Discriminators
from covo_rl.speech.latents import LatentSpaceError, latents_of, voice_of
from covo_rl.speech.pitch import track_f0
from covo_rl.speech.tokenizer import SpeechTokenizer
from covo_rl.speech.train_decoder import DecoderTrainer, codes_of_rows, train_decoder

SMALL = FlowConfig(8, 4, z_dim=3, spkr_embed_dim=2, transformer=TransformerConfig(1, 16, 8, 2, 0.0))


def small_case(dtype=torch.float64):
    torch.manual_seed(0)
    field = FlowField(SMALL).to(dtype)
    for parameter in field.parameters():  # the output is zero at first, and so are gradients behind it
        torch.nn.init.normal_(parameter, std=0.2)
    mask = torch.arange(24) < torch.tensor([24, 16])[:, None]
    draw = draw_flow(SMALL, mask, torch.Generator().manual_seed(1))
    draw = dataclasses.replace(draw, seen_B=torch.tensor([True, False]))
    codes = torch.randint(0, 8, (2, 6))
    return field, (torch.randn(2, 24, 3).to(dtype), codes, torch.randn(2, 2).to(dtype), mask, draw)


def test_flow_loss_is_the_mean_square_over_the_span_row_by_row():
    field, (latents, codes, speaker, mask, draw) = small_case()
    squares, count = 0.0, 0
    for row, length in enumerate((24, 16)):
        x1, x0, t = latents[row, :length], draw.noise_BZE[row, :length].double(), draw.t_B[row].double()
        span = draw.span_BZ[row, :length]
        T = field.condition(codes[row : row + 1, : length // 4]) * (1.0 if row == 0 else 0.0)
        x_t = t * x1 + (1 - (1 - 1e-5) * t) * x0
        context = torch.where(span[:, None], 0.0, x1)
        velocity = field(x_t[None], t[None], T, context[None], speaker[row : row + 1])[0]
        squares += ((velocity - (x1 - (1 - 1e-5) * x0)) ** 2)[span].mean(-1).sum()
        count += int(span.sum())
    assert torch.allclose(flow_loss(field, latents, codes, speaker, mask, draw), squares / count, rtol=1e-6)
    shares = [
        flow_loss(field, latents[i : i + 1], codes[i : i + 1], speaker[i : i + 1], mask[i : i + 1],
                  FlowDraw(*(part[i : i + 1] for part in dataclasses.astuple(draw))), total=count)
        for i in (0, 1)
    ]  # fmt: skip
    assert torch.allclose(sum(shares), squares / count, rtol=1e-6)


def test_span_is_a_tail_of_real_frames_at_least_ten_long():
    mask = torch.arange(400) < torch.tensor([400, 200, 12])[:, None]
    draws = [draw_flow(FlowConfig(bert_mask_rate0=0.7), mask, torch.Generator().manual_seed(i)) for i in range(40)]
    spans = torch.stack([draw.span_BZ for draw in draws])
    assert not (spans & ~mask).any()
    shares = spans.sum(-1) / mask.sum(-1)
    assert shares[:, :2].min() >= 0.7 and shares[:, 0].std() > 0.05
    assert (spans.sum(-1)[:, 2] >= 10).all()
    first = spans[0, 0].int().argmax()
    assert spans[0, 0, first:].all()
    hidden = 1 - torch.stack([draw.seen_B for draw in draws]).float().mean()
    assert 0.1 < hidden < 0.3


def check_gradient(loss, tensor, step=1e-6):
    """Central differences along a random direction; absolute values have corners, so not to the last digit."""
    (gradient,) = torch.autograd.grad(loss(), tensor)
    direction = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3), dtype=tensor.dtype)
    with torch.no_grad():
        tensor += step * direction
        above = loss()
        tensor -= 2 * step * direction
        below = loss()
        tensor += step * direction
    expected = (above - below) / (2 * step)
    assert abs(expected) > 1e-7
    assert torch.allclose((gradient * direction).sum(), expected.detach(), rtol=1e-3)


def test_gradients_of_flow_matching():
    field, case = small_case()
    for name in ("token_embedding.weight", "cond_proj.weight", "blocks.0.attn.q_proj.weight"):
        check_gradient(lambda: flow_loss(field, *case), field.get_parameter(name))


def test_gradients_of_spectra_and_of_the_game():
    torch.manual_seed(0)
    true, heard = torch.randn(2, 4800).double(), torch.randn(2, 4800).double().requires_grad_()
    check_gradient(lambda: spectral_loss(heard, true), heard)
    judge = Discriminators(width=1).double()
    for part in ("adversarial", "matching", "mel"):
        check_gradient(lambda part=part: vocoder_loss(judge(true), judge(heard), true, heard)[part], heard)
    weight = judge.each[0].layers[0].bias
    check_gradient(lambda: discriminator_loss(judge(true), judge(heard.detach())), weight)


def test_spectral_loss_by_hand():
    wave = torch.sin(torch.arange(9600) / 7.0)[None]
    assert spectral_loss(wave, wave) == 0
    # half as loud: convergence 0.5, logs log 2 where the floor does not matter
    louder = 1000 * torch.randn(1, 9600)
    assert spectral_loss(louder / 2, louder) == pytest.approx(0.5 + math.log(2), abs=1e-3)


def test_verdicts_by_hand():
    true, heard = [[torch.ones(2), torch.full((2,), 0.5)]], [[torch.zeros(2), torch.full((2,), 0.25)]]
    assert discriminator_loss(true, heard) == pytest.approx(0.5**2 + 0.25**2)
    wave = torch.zeros(1, 960)
    losses = vocoder_loss(true, heard, wave, wave)
    assert losses["adversarial"] == pytest.approx(0.75**2) and losses["matching"] == 2 and losses["mel"] == 0


# -- the harmonic vocoder


def pitched_latents(frames=120, batch=2, dtype=torch.float64):
    torch.manual_seed(0)
    latents = torch.randn(batch, 66, frames, dtype=dtype) - 3
    latents[:, 64] = 7.3 + 0.4 * torch.sin(torch.arange(frames) / 9.0)
    latents[:, 65] = (torch.arange(frames) % 50 < 40).to(dtype)
    return latents


@pytest.mark.parametrize("sizes", [(60, 60), (15, 30, 60, 15), (7,) * 17 + (1,)])
def test_harmonic_pieces_join_without_a_seam(sizes):
    vocoder = HarmonicVocoder(16).double().eval()
    torch.nn.init.normal_(vocoder.filters.weight, std=0.1)
    latents = pitched_latents()
    chunks = list(latents.split(list(sizes), dim=-1))
    pieces = overlapped(vocoder, ((chunk, i == len(chunks) - 1) for i, chunk in enumerate(chunks)))
    with torch.no_grad():
        assert torch.allclose(torch.cat(list(pieces), dim=-1), vocoder(latents), atol=1e-10)


def test_harmonics_lie_where_the_channel_says_and_nowhere_without_voice():
    frames = 100
    latents = -torch.arange(66.0)[None, :, None].repeat(1, 1, frames) / 6  # as dull as speech
    hz = 2 ** torch.linspace(math.log2(100), math.log2(200), frames)
    latents[:, 64], latents[:, 65] = hz.log2(), 1
    vocoder = HarmonicVocoder(16)
    with torch.no_grad():
        vocoder.filters.bias[513:] -= 5  # the noise, which is as loud as the harmonics before training
        heard = track_f0(vocoder(latents)[0, 0].numpy(), 24_000)
        latents[:, 65] = 0
        silent = track_f0(vocoder(latents)[0, 0].numpy(), 24_000)
    inner = slice(5, -5)
    assert np.abs(12 * np.log2(heard[inner] / hz.numpy()[inner])).max() < 0.3
    assert (silent > 0).mean() < 0.1


def test_rows_do_not_hear_each_other_and_bfloat16_keeps_the_pitch():
    vocoder, latents = HarmonicVocoder(16), pitched_latents(dtype=torch.float32)
    with torch.no_grad():
        whole = vocoder(latents)
        assert torch.allclose(vocoder(latents[1:]), whole[1:], atol=1e-5)
        # in bfloat16 F0 itself would be off by up to 0.4 semitones
        narrow = vocoder.bfloat16()(latents)
    assert functional.cosine_similarity(narrow.flatten(), whole.flatten(), dim=0) > 0.99


# -- latents and training


def test_latents_of_a_recording():
    row = digit_rows("test", 1)[0]
    wave = row.wave()
    latents = latents_of(wave, "mel_pitch")
    assert latents.shape == (len(wave) // 240, 66) and latents.dtype == torch.float32
    assert torch.equal(latents[:, :64], latents_of(wave, "mel"))
    truth, voiced = row.source["f0_Z"], latents[:, 65].bool().numpy()
    both = voiced & (truth > 0)
    assert np.median(np.abs(12 * (latents[:, 64].numpy() - np.log2(np.maximum(truth, 1))))[both]) < 0.3
    assert latents[:, 64].min() > 6 and latents_of(np.zeros(4800, np.float32), "mel_pitch")[:, 65].sum() == 0
    with pytest.raises(LatentSpaceError, match="not released"):
        latents_of(wave, "vae")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    torch.manual_seed(0)
    tokenizer = SpeechTokenizer(SpeechTokenizerConfig.tiny()).eval()
    tokenizer.save_pretrained(folder)
    return folder, tokenizer


def training(tokenizer, output, **options):
    return read_decoder_training(None, {
        "tokenizer": str(tokenizer[0]), "output": str(output), "clips": 6, "flow_frames": 128, "sequence_frames": 48,
        "vocoder_batch": 2, "vocoder_frames": 24, "flow_steps": 2, "vocoder_steps": 2, **options,
    })  # fmt: skip


def test_a_training_that_is_cut_off_goes_on_as_if_it_had_not_been(tokenizer, tmp_path, monkeypatch):
    whole = Token2Wav.from_pretrained(train_decoder(training(tokenizer, tmp_path / "whole")))
    config = training(tokenizer, tmp_path / "cut", save_steps=3)

    class CutOff(Exception):
        pass

    def stop(self):
        raise CutOff

    with monkeypatch.context() as patched:
        patched.setattr("covo_rl.speech.train_decoder.DecoderTrainer._finish", stop)
        with pytest.raises(CutOff):
            train_decoder(config)
    assert torch.load(tmp_path / "cut/training.pt", weights_only=True)["step"] == 3
    with pytest.raises(ConfigError, match="flow_steps 2 there, 9 now"):
        train_decoder(dataclasses.replace(config, resume=True, flow_steps=9))
    again = Token2Wav.from_pretrained(train_decoder(dataclasses.replace(config, resume=True)))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    # it speaks in the voice of any recording, and refuses codes of another tokenizer
    rows = digit_rows("test", 2)
    codes = tokenizer[1].encode([rows[0].wave()])[0]
    wave = whole.synthesise(codes[None], **voice_of(rows[1].wave(), tokenizer[1], whole))
    assert wave.shape == (1, 1, 960 * len(codes)) and wave.isfinite().all()
    torch.manual_seed(1)
    other = SpeechTokenizer(SpeechTokenizerConfig.tiny()).eval()
    with pytest.raises(CodesError, match="codes of tokenizer"):
        voice_of(rows[1].wave(), other, whole)


def test_the_vocoder_learns_and_the_flow_learns(tokenizer, tmp_path):
    folder = train_decoder(training(tokenizer, tmp_path, vocoder_steps=25, flow_steps=40, clips=2, warmup_steps=2))
    lines = [line.split('"')[3::2] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [names[0] for names in lines] == ["spectra"] * 3 + ["flow"] * 5
    values = [float(line.rsplit(" ", 1)[1].rstrip("}")) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert values[2] < 0.95 * values[0] and values[-1] < 0.95 * values[3]


def test_one_update_of_the_adversarial_recipe(tokenizer, tmp_path):
    config = training(tokenizer, tmp_path, vocoder="bigvgan", discriminators=True, vocoder_steps=1, flow_steps=0,
                      vocoder_batch=1, vocoder_frames=16)  # fmt: skip
    import covo_rl.speech.train_decoder as module

    before = Token2WavConfig.tiny(vocoder="bigvgan")
    torch.manual_seed(config.seed)
    start = Token2Wav(before).state_dict()
    after = Token2Wav.from_pretrained(module.train_decoder(config)).state_dict()
    assert not torch.equal(start["wavegan.conv_pre.weight_v"], after["wavegan.conv_pre.weight_v"])
    assert torch.equal(start["token2latent.token_embedding.weight"], after["token2latent.token_embedding.weight"])


def test_rows_may_bring_vectors_of_their_speakers(tokenizer, tmp_path):
    def rows_of(*vectors):
        rows = digit_rows("train", len(vectors))
        return [dataclasses.replace(row, source={**row.source, "speaker_vector": vector})
                for row, vector in zip(rows, vectors, strict=True)]  # fmt: skip

    rows, config = rows_of([0.5] * 5, [1] * 5), training(tokenizer, tmp_path)
    trainer = DecoderTrainer(config, rows, codes_of_rows(rows, tokenizer[1]), tokenizer[1])
    assert trainer.field.config.spkr_embed_dim == 5 and trainer.clips.speaker([1]).tolist() == [1] * 5
    for vectors in (([1, 2], None), ([1, 2], [1]), ("x", [1, 2]), ([float("nan"), 1], [1, 2])):
        with pytest.raises(DataError, match="no list of 2 numbers"):
            speaker_width(rows_of(*vectors))


def test_problems_are_named_together():
    with pytest.raises(ConfigError) as caught:
        read_decoder_training(None, {"vocoder": "griffin_lim", "latent": "mel", "flow_frames": 100, "audio_dir": "x",
                                     "pitch_gain": 0, "flow_step": 3, "vocoder_frames": 8})  # fmt: skip
    for text in (
        "vocoder_frames 8",
        "vocoder_steps 0",
        "flow_frames 100",
        "audio_dir needs data",
        "pitch_gain",
        "did you mean flow_steps",
    ):
        assert text in str(caught.value)


def test_pitch_begins_at_its_mean_and_is_not_guided(tokenizer):
    torch.manual_seed(0)
    decoder = Token2Wav(Token2WavConfig.tiny()).eval()
    noise = frame_noise(range(8), decoder.config, 0)
    assert not noise[:, 64].any() and noise[:, 65].std() > 0.3 and noise[:, :64].std() == pytest.approx(1, abs=0.1)
    for parameter in decoder.token2latent.output_layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    codes = torch.tensor([[3, 9]])
    # one step of the solver's two calls: mel goes where guidance sends it, pitch where the codes do
    strong, weak = (decoder.solve(codes, steps=2, alpha=alpha) for alpha in (3.0, None))
    assert (strong[..., :64] - weak[..., :64]).abs().mean() > 0.05
    first = decoder.token2latent
    with torch.no_grad():
        start, T = noise[None], first.condition(codes)
        zeros = torch.zeros_like(start), torch.zeros(1, 66)
        v_c, v_u = (first(start, torch.zeros(1), part, *zeros) for part in (T, torch.zeros_like(T)))
        middle = start + 0.5 * torch.cat([4 * v_c[..., :64] - 3 * v_u[..., :64], v_c[..., 64:]], dim=-1)
        pitch = start[..., 64:] + first(middle, torch.full((1,), 0.5), T, *zeros)[..., 64:]
    assert torch.allclose(strong[..., 64:], pitch, atol=1e-5)
