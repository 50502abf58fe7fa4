"""Speech while its codes come: as long as the whole, equal to it where it must be, and no sooner or later than said."""

from functools import cache
from itertools import repeat

import pytest
import torch
from speaking_cases import small_decoder
from token2wav_cases import CODES, FOLDER, REFERENCE, VOICE, decoder, largest
from torch import nn

from covo_rl.models.covo_audio.token2wav import CodesError, Token2Wav, Token2WavConfig
from covo_rl.models.covo_audio.token2wav.harmonic import HarmonicVocoder
from covo_rl.models.covo_audio.token2wav.mel import griffin_lim, log_mel
from covo_rl.models.covo_audio.token2wav.stream import overlapped
from covo_rl.models.covo_audio.token2wav.vocoder import GriffinLim, Vocoder

REPLY = CODES[0].tolist()


def chunks(latents, sizes):
    parts = latents.split(sizes, dim=-1)
    return [(part, i == len(parts) - 1) for i, part in enumerate(parts)]


def test_pieces_of_the_vocoder_are_the_whole():
    """The second stands behind 48 past frames, and each but the last keeps 6 back; the first is not enough for any."""
    torch.manual_seed(0)
    latents, vocoder = torch.randn(1, 8, 67, dtype=torch.float64), decoder(torch.float64).wavegan
    with torch.no_grad():
        pieces = list(overlapped(vocoder, chunks(latents, (3, 55, 9))))
        assert largest(torch.cat(pieces, dim=-1), vocoder(latents)) < 1e-11
    assert [piece.shape[-1] // 240 for piece in pieces] == [52, 15]


@pytest.mark.parametrize("voice", [{}, VOICE], ids=["no prompt", "prompt"])
def test_reply_of_one_block_is_the_whole_exactly(voice):
    (piece,) = decoder().stream(iter(REPLY), **voice, steps=3, seed=5)
    assert torch.equal(piece, decoder().synthesise(CODES, **voice, steps=3, seed=5))


class Marks(Vocoder):
    """Each frame's first latent, held for its 240 samples."""

    past_frames, future_frames = 2, 1

    def __init__(self):
        nn.Module.__init__(self)

    def forward(self, latents_BEZ, state=None):
        return latents_BEZ[:, :1].repeat_interleave(240, dim=-1)


@cache
def without_motion():
    """A decoder whose velocity is 0: its latents are the noise, so that a stream must equal the whole throughout."""
    model = Token2Wav.from_pretrained(FOLDER, dtype=torch.float64)
    model.wavegan = Marks()
    with torch.no_grad():
        for parameter in model.token2latent.output_layer.linear.parameters():
            parameter.zero_()
    return model


@pytest.mark.parametrize("voice", [{}, VOICE], ids=["no prompt", "prompt"])
@pytest.mark.parametrize(
    "cut", [{"blocks": (2, 3), "past": 4, "look_ahead": 1}, {"blocks": (1,), "past": 0, "look_ahead": 1}]
)
def test_a_frame_has_its_place_and_its_noise_whatever_the_blocks(voice, cut):
    model = without_motion()
    pieces = list(model.stream(iter(REPLY), **voice, **cut, steps=2, seed=3))
    assert len(pieces) > 2
    whole = model.latents(CODES, **voice, steps=2, seed=3)
    assert largest(torch.cat(pieces, dim=-1)[..., ::240], whole.mT[:, :1]) < 1e-12


def test_later_blocks_follow_the_latents_that_were_made(monkeypatch):
    """A block is solved behind [prompt | past codes], with their latents as context, before the look-ahead."""
    model = decoder(torch.float64)
    calls = []
    solve = model.solve

    def watched(codes, **options):
        calls.append((codes, options, solve(codes, **options)))
        return calls[-1][2]

    monkeypatch.setattr(model, "solve", watched)
    monkeypatch.setattr(model, "wavegan", Marks())
    list(model.stream(iter(REPLY), **VOICE, steps=2, blocks=(2, 3), past=3, look_ahead=2))
    prompt = VOICE["prompt_codes"][0].tolist()
    assert [codes for codes, *_ in calls] == [[REPLY[:4]], [REPLY[2:7]], [REPLY[5:]], [REPLY[8:]]]
    assert [options["prompt_codes"] for _, options, _ in calls] == [
        [prompt], [prompt + REPLY[:2]], [prompt + REPLY[2:5]], [prompt + REPLY[5:8]],
    ]  # fmt: skip
    first, second, third, _ = (options["prompt_latent"][0] for _, options, _ in calls)
    known = VOICE["prompt_latent"][0].double()  # 31 frames: 28 of the prompt and 3 of the first code
    assert torch.equal(first, known)
    made = calls[0][2][0, 31:36]
    assert torch.equal(second, torch.cat([known, made]))
    assert torch.equal(third, torch.cat([known[:28], calls[1][2][0, 36:48]]))


def test_a_piece_comes_as_soon_as_its_block_and_look_ahead_are_there():
    model = Token2Wav(Token2WavConfig.tiny()).eval()
    drawn = []
    stream = model.stream((drawn.append(code) or code for code in repeat(7, 108)), steps=2, alpha=None)
    assert not drawn
    lengths = []
    for piece in stream:
        lengths.append((len(drawn), piece.shape[-1] // 240))
    # 15, 30 and 60 codes with 3 of look-ahead each, 6 frames held back; the last 3 codes have none
    assert lengths == [(18, 4 * 15 - 6), (48, 4 * 30), (108, 4 * 60), (108, 4 * 3 + 6)]


def test_a_stream_that_ends_early_is_spoken_whole():
    decoder = small_decoder()
    for count in (1, 15, 17):
        pieces = list(decoder.stream(repeat(7, count), steps=2, alpha=None))
        assert torch.cat(pieces, dim=-1).shape == (1, 1, 960 * count)


def test_bad_streams_are_refused_with_the_place():
    with pytest.raises(CodesError, match="prompt_latent without prompt_codes"):  # before a code is drawn
        decoder().stream(iter([]), prompt_latent=REFERENCE["prompt_latent"])
    with pytest.raises(CodesError, match="the stream ended without a code"):
        list(decoder().stream(iter([])))
    with pytest.raises(CodesError, match=r"position 21: code 64 is outside 0\.\.63"):
        list(decoder().stream(iter([1] * 21 + [64]), steps=2, alpha=None))
    with pytest.raises(CodesError, match=r"codes, row 0: torch\.float32 are no codes"):
        list(decoder().stream(iter([1.5]), steps=2))
    with pytest.raises(ValueError, match=r"blocks=\(\), look_ahead=3, past=150: at least 1, 1 and 0 codes"):
        decoder().stream(iter(REPLY), blocks=())


def test_pieces_of_the_harmonic_vocoder_are_the_whole():
    """Phase and noise go on: F0 glides over an octave, and the last third has no voice."""
    torch.manual_seed(0)
    vocoder = HarmonicVocoder(16).double()
    nn.init.normal_(vocoder.filters.weight, std=0.1)
    mel, f0 = torch.randn(1, 64, 90), torch.linspace(6.5, 7.5, 90)[None, None]
    latents = torch.cat([mel, f0, (torch.arange(90) < 60).float()[None, None]], dim=1).double()
    with torch.no_grad():
        pieces = list(overlapped(vocoder, chunks(latents, (4, 36, 30, 20))))
        whole = vocoder(latents)
    assert whole.std() > 1e-3
    assert largest(torch.cat(pieces, dim=-1), whole) < 1e-9


def test_griffin_lim_goes_on_where_it_stopped():
    """A steady tone of 200 Hz in pieces: the wave does not jump where two pieces meet."""
    time = torch.arange(24000) / 24000
    mel = log_mel(sum(torch.sin(2 * torch.pi * 200 * k * time) / k for k in range(1, 20))[None] / 8)
    pieces = list(overlapped(GriffinLim(), chunks(mel.mT, (40, 30, 30))))
    wave = torch.cat(pieces, dim=-1)
    assert wave.shape == (1, 1, 24000)
    steps = wave.diff().abs()[0, 0]
    for seam in (34 * 240, 64 * 240):
        assert steps[seam - 5 : seam + 5].max() <= steps.quantile(0.999)
    whole = griffin_lim(mel)
    assert largest(log_mel(wave[:, 0]).mean(1), mel.mean(1)) < 1.5 * largest(log_mel(whole[:, 0]).mean(1), mel.mean(1))
