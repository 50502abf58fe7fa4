"""token2wav gives what the published decoder gave, row by row in any batch, and says which codes it cannot speak."""

import json
import logging

import fake_device
import numpy as np
import pytest
import torch
from fake_device import FakeDevice
from token2wav_cases import CODES, FOLDER, REFERENCE, VOICE, decoder, largest
from torch import nn

from covo_rl.models.covo_audio.token2wav import CodesError, Token2Wav, Token2WavConfig
from covo_rl.models.covo_audio.token2wav.solver import LatentError, guide, midpoint
from covo_rl.models.covo_audio.token2wav.vocoder import NormedConv, SnakeBeta, half_band_filter

UNEQUAL = [[5, 9, 0, 63], [3], [40, 41]]


def field_inputs():
    T, context, x = REFERENCE["vf_inputs"].split([64, 8, 8], dim=-1)
    return x, REFERENCE["vf_times"], T, context, REFERENCE["vf_spk"]


def conv_position():
    field = decoder().token2latent
    u = field.transformer_input_proj(REFERENCE["vf_inputs"])
    return u + field.conv_embed(u, None)


def first_activation():
    return decoder().wavegan.resblocks[0].activations[0](REFERENCE["act_in"])


OURS = {
    "vf_time_embed": lambda: decoder().token2latent.time_embedder(REFERENCE["vf_times"]),
    "vf_after_conv_pos_nomask": conv_position,
    "vf_out_nomask": lambda: decoder().token2latent(*field_inputs()),
    "latents_norm_steps4": lambda: decoder().solve(CODES, **VOICE, noise=REFERENCE["noise"], steps=4),
    "voc_wav": lambda: decoder().vocode(REFERENCE["voc_latent"]),
    "act_out": first_activation,
    "act_filter": half_band_filter,
}


@pytest.mark.parametrize("name", OURS)
def test_arrays_of_the_published_decoder_are_reproduced(name):
    with torch.no_grad():
        assert largest(OURS[name](), REFERENCE[name]) < 1e-5


def test_published_size_has_the_published_tensors():
    with torch.device("meta"):
        model = Token2Wav(Token2WavConfig())
    shapes = json.loads((FOLDER / "full_size_state_dict_shapes.json").read_text())
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == shapes
    assert len(shapes) == 947
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.token2latent, model.wavegan)]
    assert counts == [252_732_480, 113_828_690]


def test_latents_are_denormalised_then_cut_and_the_wave_is_theirs():
    model, statistics = decoder(), torch.cat([decoder().mean_E, decoder().variance_E])
    x = model.solve(CODES, **VOICE, noise=REFERENCE["noise"])
    latents = model.latents(CODES, **VOICE, noise=REFERENCE["noise"])
    assert torch.equal(latents, (statistics[:8] + x * statistics[8:].sqrt())[:, 31:])
    assert largest(model.normalise(latents), x[:, 31:]) < 1e-6
    wave = model.synthesise(CODES, **VOICE, noise=REFERENCE["noise"])
    assert torch.equal(wave, model.vocode(latents.mT))
    assert wave.shape == (1, 1, (4 * 10 - 3) * 240)  # the prompt's 31 frames for 7 codes cost three


def test_overrun_of_the_prompt_is_told_once(caplog):
    model = Token2Wav.from_pretrained(FOLDER)
    with caplog.at_level(logging.INFO, logger="covo_rl.models"):
        model.solve(CODES, steps=2)
        assert not caplog.records
        for _ in range(2):
            model.solve(CODES, **VOICE, steps=2)
    assert [record.getMessage()[:61] for record in caplog.records] == [
        "the prompt's latents run over its codes by 3 frames: the firs"
    ]


def test_midpoint_takes_one_interval_less_than_steps():
    """Of dx/dt = x one interval h multiplies by 1 + h + h^2 / 2; of dx/dt = t it is exact."""
    x = torch.ones(1, 1, 1, dtype=torch.float64)
    assert midpoint(lambda x, t: x, x, 4).item() == pytest.approx((1 + 1 / 3 + 1 / 18) ** 3, abs=1e-12)
    assert midpoint(lambda x, t: torch.full_like(x, t), x, 10).item() == pytest.approx(1.5, abs=1e-12)
    with pytest.raises(ValueError, match="steps=1; the solver needs at least 2 points"):
        midpoint(lambda x, t: x, x, 1)


def test_guidance_goes_beyond_the_conditional_velocity():
    conditional, unconditional = torch.tensor([[[1.0, 5.0]]]), torch.tensor([[[2.0, 1.0]]])
    assert guide(conditional, unconditional, 1.0, False, None).tolist() == [[[0.0, 9.0]]]
    # the spread of (1, 5) is 2 sqrt 2, of (0, 9) 4.5 sqrt 2
    assert guide(conditional, unconditional, 1.0, True, None) == pytest.approx(torch.tensor([[[0.0, 4.0]]]))
    options = {"noise": REFERENCE["noise"].double(), "steps": 3}
    plain = decoder(torch.float64).solve(CODES, **VOICE, **options, alpha=None)
    assert largest(decoder(torch.float64).solve(CODES, **VOICE, **options, alpha=0.0), plain) < 1e-12
    assert largest(decoder(torch.float64).solve(CODES, **VOICE, **options, alpha=0.5), plain) > 1e-2


def test_unconditional_velocity_keeps_context_and_speaker():
    model = decoder(torch.float64)
    noise, field = REFERENCE["noise"].double(), model.token2latent
    codes = torch.cat([VOICE["prompt_codes"], CODES], dim=1)
    context = torch.zeros(1, 68, 8, dtype=torch.float64)
    context[:, :31] = VOICE["prompt_latent"]
    T, speaker, times = field.condition(codes), VOICE["speaker"].double(), torch.zeros(1)

    def velocity(x, t):
        known, blind = (field(x, times + t, tokens, context, speaker) for tokens in (T, 0 * T))
        v = known + 0.7 * (known - blind)
        return v * known.std() / v.std()

    with torch.no_grad():
        slow = midpoint(velocity, noise, 3)
    assert largest(model.solve(CODES, **VOICE, noise=noise, steps=3, alpha=0.7, rescale=True), slow) < 1e-6


@pytest.mark.parametrize(
    ("method", "voice"), [("solve", {}), ("solve", VOICE), ("latents", VOICE), ("synthesise", VOICE)]
)
def test_rows_of_unequal_length_are_what_they_are_alone(method, voice):
    model = decoder(torch.float64)
    compute = {"steps": 2, "rescale": True, **voice}
    together = getattr(model, method)(UNEQUAL, **compute)
    axis = 2 if method == "synthesise" else 1
    for row, codes in zip(together, UNEQUAL, strict=True):
        alone = getattr(model, method)(torch.tensor([codes]), **compute)[0]
        assert largest(row.narrow(axis - 1, 0, alone.shape[axis - 1]), alone) < 1e-9
        assert not row.narrow(axis - 1, alone.shape[axis - 1], row.shape[axis - 1] - alone.shape[axis - 1]).any()
    padded = torch.tensor([codes + [-1] * (4 - len(codes)) for codes in UNEQUAL])
    assert torch.equal(getattr(model, method)(padded, **compute), together)


def test_each_row_may_have_its_own_voice():
    model, options = decoder(torch.float64), {"steps": 2}
    prompts = [[1, 2, 3], [60]]
    latents = [torch.randn(12, 8), torch.randn(6, 8)]
    speakers = torch.randn(2, 12)
    rows = model.latents(
        [[7, 8], [9, 10, 11]], prompt_codes=prompts, prompt_latent=latents, speaker=speakers, **options
    )
    for i, codes in enumerate(([7, 8], [9, 10, 11])):
        alone = model.latents(
            [codes], prompt_codes=[prompts[i]], prompt_latent=[latents[i]], speaker=speakers[i : i + 1], **options
        )[0]
        assert largest(rows[i, : len(alone)], alone) < 1e-9


def test_masked_frames_are_heard_by_nobody_yet_have_values():
    field, (x, t, T, context, speaker) = decoder().token2latent, field_inputs()
    mask = torch.arange(68) < torch.tensor([[68], [40]])
    with torch.no_grad():
        masked = field(x, t, T, context, speaker, mask)
        alone = field(x[1:, :40], t[1:], T[1:, :40], context[1:, :40], speaker[1:])
    assert largest(masked[:1], REFERENCE["vf_out_nomask"][:1]) < 1e-5
    assert largest(masked[1:, :40], alone) < 1e-5
    assert masked[1, 40:].isfinite().all() and masked[1, 40:].any()


def test_bfloat16_says_the_same():
    model = decoder(torch.bfloat16)
    latents = model.latents(CODES, **VOICE)
    exact = decoder().latents(CODES, **VOICE)
    assert latents.dtype == torch.float32
    assert float((latents - exact).norm() / exact.norm()) < 0.03
    waves = model.vocode(exact.mT), decoder().vocode(exact.mT)
    assert waves[0].dtype == torch.float32
    assert float((waves[0] - waves[1]).norm() / waves[1].norm()) < 0.05


def test_noise_is_a_frame_s_own_and_of_the_seed():
    model = decoder()
    assert torch.equal(model.solve(CODES, steps=2), model.solve(CODES, steps=2, seed=0))
    assert largest(model.solve(CODES, steps=2), model.solve(CODES, steps=2, seed=1)) > 0.1
    with pytest.raises(CodesError, match=r"noise of shape \(1, 39, 8\); expected \(1, 40, 8\)"):
        model.solve(CODES, noise=torch.zeros(1, 39, 8))


def test_code_minus_one_embeds_as_zeros():
    field = decoder().token2latent
    embedded = field.embed(torch.tensor([[4, -1]]))
    assert torch.equal(embedded[0, 0], field.token_embedding.weight[4])
    assert not embedded[0, 1].any()


@pytest.mark.parametrize(
    ("codes", "text"),
    [
        ([[1, 2], [3, 64]], r"codes, row 1, position 1: code 64 is outside 0..63. Is it an id of the vocabulary"),
        (torch.tensor([[1, -1, 2]]), r"codes, row 0, position 1: code -1 is outside 0..63"),
        ([[1, -1]], r"codes, row 0, position 1: code -1"),
        (torch.tensor([[1, 2], [-1, -1]]), r"codes, row 1: no code; a decoder speaks at least one \(40 ms\)"),
        ([], "codes: no row"),
        (torch.tensor([1, 2]), r"codes of shape \(2,\); expected \(B, L\), or a list of rows"),
        ([[0.5]], "codes, row 0: torch.float32 are no codes"),
        ([[1j]], "codes, row 0: torch.complex64 are no codes"),
        ([1, 2], r"codes, row 0: of shape \(\); expected \(L,\), as in \[\[3, 1, 4\]\]"),
        ([["ab"]], "codes are no rows of whole numbers"),
        ([[2**70]], "codes are no rows of whole numbers"),
        (None, "codes are no rows of whole numbers"),
        (np.array([[1, 64]], dtype=np.uint16), r"codes, row 0, position 1: code 64 is outside 0\.\.63"),
    ],
)
def test_codes_that_cannot_be_spoken_are_named(codes, text):
    with pytest.raises(CodesError, match=text):
        decoder().synthesise(codes)


def test_a_device_waits_for_the_host_no_oftener_with_more_steps(monkeypatch):
    """All tensors are where they belong, and none is copied or looked at in a step of the solver."""
    waits = []

    class Device(FakeDevice):
        def run(self, func, args, kwargs):
            if func._schema.name == "aten::_local_scalar_dense" and self.holds(args[0]):
                waits.append("item")
            return super().run(func, args, kwargs)

    moved = fake_device._Names._moved
    monkeypatch.setattr(fake_device._Names, "_moved", lambda self, func, here, tensor, *words, **options: (
        result := moved(self, func, here, tensor, *words, **options),
        waits.append("copy") if self.fake.holds(result) != here else None,
    )[0])  # fmt: skip
    for vocoder in ("harmonic", "griffin_lim", "bigvgan"):
        model, counts = Token2Wav(Token2WavConfig.tiny(vocoder=vocoder)).eval(), []
        with Device("cuda") as device:
            model.to("cuda")
            for steps in (2, 4):
                waits.clear()
                model.synthesise([[1, 2, 3], [4]], speaker=torch.ones(1, 66), steps=steps)
                counts.append(len(waits))
            assert sum(piece.shape[-1] for piece in model.stream([1, 2], steps=2, blocks=(1,), look_ahead=1)) == 1920
        assert not device.problems
        assert counts[0] == counts[1] < 20


@pytest.mark.parametrize(
    ("voice", "text"),
    [
        ({"prompt_latent": torch.zeros(1, 4, 8)}, "prompt_latent without prompt_codes"),
        ({"prompt_codes": [[1, 2]], "prompt_latent": torch.zeros(1, 12, 8)}, r"\(12, 8\) for 2 prompt codes; expected"),
        ({"prompt_codes": [[1, 2]], "prompt_latent": torch.zeros(1, 7, 8)}, r"expected \(8 to 11, 8\): 4 frames"),
        ({"prompt_codes": [[1], [2]]}, "prompt_codes: 2 rows for 1 rows of codes"),
        ({"prompt_codes": [[64]]}, "prompt_codes, row 0, position 0: code 64"),
        ({"speaker": torch.zeros(1, 11)}, r"speaker, row 0: \(11,\); expected \(12,\)"),
    ],
)  # fmt: skip
def test_prompts_that_do_not_fit_are_refused(voice, text):
    with pytest.raises(CodesError, match=text):
        decoder().synthesise(CODES, **voice)


@pytest.mark.parametrize("shape", [(1, 7, 3), (8, 3), (1, 8, 0)])
def test_latents_that_are_no_rows_of_frames_are_refused(shape):
    with pytest.raises(CodesError, match=r"latents of shape \(.*\); expected \(B, 8, frames\)"):
        decoder().vocode(torch.zeros(shape))


def test_latents_that_are_no_numbers_name_the_step():
    model = Token2Wav.from_pretrained(FOLDER)
    with torch.no_grad():
        model.token2latent.cond_proj.bias.fill_(float("nan"))
    with pytest.raises(LatentError, match="after step 1 of 3: the weights or the prompt are damaged"):
        model.solve(CODES, steps=4)


def test_codes_of_another_tokenizer_are_refused():
    model = Token2Wav(Token2WavConfig.tiny(tokenizer="abc"))
    model.check_tokenizer("abc")
    decoder().check_tokenizer("abc")  # a published decoder does not say whose codes it speaks
    with pytest.raises(CodesError, match="codes of tokenizer xyz, but this decoder speaks those of abc"):
        model.check_tokenizer("xyz")


@pytest.mark.parametrize("rate", [0, 3])
def test_weight_norm_is_torch_s(rate):
    torch.manual_seed(0)
    plain = nn.ConvTranspose1d(4, 2, 6, stride=3) if rate else nn.Conv1d(4, 2, 5, dilation=2)
    theirs = nn.utils.parametrizations.weight_norm(plain)
    ours = NormedConv(4, 2, 6, rate=3) if rate else NormedConv(4, 2, 5, dilation=2)
    ours.load_state_dict({
        "weight_g": plain.parametrizations.weight.original0 * 1.5, "weight_v": plain.parametrizations.weight.original1,
        "bias": plain.bias,
    })  # fmt: skip
    with torch.no_grad():
        plain.parametrizations.weight.original0 *= 1.5
        x = torch.randn(2, 4, 20)
        expected = theirs(x)[..., :-3] if rate else theirs(nn.functional.pad(x, (8, 0)))
        assert largest(ours(x), expected) < 1e-6


def test_snake_begins_as_x_plus_the_square_of_its_sine():
    x = torch.linspace(-3, 3, 7)[None, None]
    assert largest(SnakeBeta(1)(x), x + x.sin() ** 2) < 1e-6
