"""What trains a tokenizer, beside slow references, finite differences and numbers by hand; and pitch from waves."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from covo_rl.speech.heads import Heads
from covo_rl.speech.measures import pitch_errors
from covo_rl.speech.objectives import commitment_loss, ctc_loss, masked_mean, mel_loss, pitch_loss, shortest_path
from covo_rl.speech.pitch import track_f0
from covo_rl.synth.speech import utterance

gradcheck = torch.autograd.gradcheck


def mask_of(*lengths):
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def test_ctc_is_the_sum_over_all_paths():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 3, dtype=torch.float64)
    targets, lengths = [[1, 2], [2]], torch.tensor([4, 3])

    def written(path):
        return [s for i, s in enumerate(path) if s and (i == 0 or path[i - 1] != s)]

    losses = []
    for row, ids, length in zip(logits.softmax(-1), targets, lengths.tolist(), strict=True):
        paths = [p for p in itertools.product(range(3), repeat=length) if written(p) == ids]
        total = sum(math.prod(float(row[i, s]) for i, s in enumerate(p)) for p in paths)
        losses.append(-math.log(total) / len(ids))  # torch's mean divides each row by its pieces
    assert float(ctc_loss(logits, lengths, targets)) == pytest.approx(sum(losses) / 2)
    logits.requires_grad_()
    assert gradcheck(lambda x: ctc_loss(x, lengths, targets), logits)


def test_rows_too_short_for_their_text_are_left_out_of_ctc():
    assert [shortest_path(ids) for ids in ([], [1], [1, 1], [1, 2, 2, 2])] == [0, 1, 3, 6]
    logits = torch.randn(3, 2, 3)
    lengths = torch.tensor([2, 2, 2])
    alone = ctc_loss(logits[:1], lengths[:1], [[1, 2]])
    assert torch.equal(ctc_loss(logits, lengths, [[1, 2], [1, 1], []]), alone)
    none = ctc_loss(logits.requires_grad_(), lengths, [[1, 1]] * 3)
    none.backward()
    assert none == 0 and not logits.grad.any()


def test_mel_loss_is_l1_over_real_frames():
    drawn, mel, mask = torch.zeros(2, 3, 2), torch.ones(2, 3, 2), mask_of(3, 1)
    mel[0] = 2
    mel[1, 1:] = 99  # padding
    assert float(mel_loss(drawn, mel, mask)) == pytest.approx((3 * 2 + 1) / 4)
    a, b = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, 2, dtype=torch.float64)
    assert gradcheck(lambda x: mel_loss(x, b, mask), a)


def test_pitch_loss_by_hand():
    f0 = torch.tensor([[100.0, 200.0, 0.0, 400.0]])
    mask = torch.tensor([[True, True, True, False]])  # the last is padding
    # the voiced frames lie half an octave around their mean
    exact = torch.tensor([[-0.5, 0.5, 7.0, 7.0]])
    sure = torch.tensor([[50.0, 50.0, -50.0, 9.0]])
    assert float(pitch_loss(sure, exact, f0, mask)) == pytest.approx(0, abs=1e-6)
    assert float(pitch_loss(sure, exact + 1 / 12, f0, mask)) == pytest.approx(3 / 12, abs=1e-5)  # a semitone off
    assert float(pitch_loss(torch.zeros(1, 4), exact, f0, mask)) == pytest.approx(math.log(2), abs=1e-6)
    # another octave is the same melody
    assert float(pitch_loss(sure, exact, 2 * f0, mask)) == pytest.approx(0, abs=1e-6)


def test_pitch_gradients():
    torch.manual_seed(0)
    voicing, contour = (torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    f0 = torch.tensor([[100, 120, 0, 90, 80], [0, 200, 210, 0, 0]], dtype=torch.float64)
    assert gradcheck(lambda v, c: pitch_loss(v, c, f0, mask_of(5, 3)), (voicing, contour))


def test_commitment_moves_vectors_and_not_codes():
    torch.manual_seed(0)
    vectors = F.normalize(torch.randn(2, 3, 4, dtype=torch.float64), dim=-1).requires_grad_()
    codes, mask = F.normalize(torch.randn(2, 3, 4, dtype=torch.float64), dim=-1).requires_grad_(), mask_of(3, 2)
    loss = commitment_loss(vectors, codes, mask)
    cosines = (vectors * codes).sum(-1)[mask]
    assert loss.item() == pytest.approx(float((2 - 2 * cosines.detach()).mean() / 4))
    loss.backward()
    assert codes.grad is None and not vectors.grad[1, 2].any()
    assert gradcheck(lambda x: commitment_loss(x, codes, mask), vectors)


def test_shares_of_an_update_add_up_to_it():
    values, mask = torch.randn(4, 5), mask_of(5, 2, 3, 1)
    whole = masked_mean(values, mask)
    halves = [masked_mean(values[i : i + 2], mask[i : i + 2], float(mask.sum())) for i in (0, 2)]
    torch.testing.assert_close(sum(halves), whole)
    assert masked_mean(values, torch.zeros_like(mask)) == 0


def test_heads_do_not_see_padding():
    torch.manual_seed(0)
    heads = Heads(6, 8, 5).eval()
    embeds, speaker, mask = torch.randn(2, 4, 6), torch.randn(2, 64), mask_of(4, 2)
    alone = embeds[1:, :2], mask[1:, :2]
    torch.testing.assert_close(heads.asr(embeds, mask)[1:, :2], heads.asr(*alone))
    drawn = heads.draw_mel(embeds, speaker, mask)
    assert drawn.shape == (2, 16, 64)
    torch.testing.assert_close(drawn[1:, :8], heads.draw_mel(alone[0], speaker[1:], alone[1]))
    for whole, part in zip(heads.read_pitch(embeds, mask), heads.read_pitch(*alone), strict=True):
        torch.testing.assert_close(whole[1:, :8], part)


@pytest.mark.parametrize("hz", [70.0, 100.0, 220.0, 440.0])
@pytest.mark.parametrize("rate", [16_000, 24_000])
def test_pitch_of_harmonic_tones(hz, rate):
    t = np.arange(rate) / rate
    f0 = track_f0(sum(np.sin(2 * np.pi * hz * k * t) / k for k in range(1, 6)), rate)
    assert f0.shape == (100,) and f0.dtype == np.float32
    assert 12 * np.abs(np.log2(f0[3:-3] / hz)).max() < 0.05


def test_pitch_follows_a_glide():
    t = np.arange(24_000) / 24_000
    f0 = track_f0(np.sin(2 * np.pi * (100 * t + 50 * t**2)), 24_000)  # 100 to 200 Hz
    true = 100 + 100 * (np.arange(100) + 0.5) / 100
    assert np.abs(f0[5:-5] / true[5:-5] - 1).max() < 0.02


def test_neither_silence_nor_noise_has_a_pitch():
    assert not track_f0(np.zeros(4800), 24_000).any() and len(track_f0(np.zeros(100), 24_000)) == 0
    noise = track_f0(np.random.default_rng(0).standard_normal(24_000), 24_000)
    assert (noise > 0).mean() < 0.1
    for wave, rate in ((np.zeros((2, 9)), 24_000), (np.zeros(9), 22_050)):
        with pytest.raises(ValueError, match="expected"):
            track_f0(wave, rate)


def test_pitch_of_speech():
    spoken = [utterance("test", i) for i in range(6)]
    errors = pitch_errors([u.f0_Z for u in spoken], [track_f0(u.wave, 24_000) for u in spoken])
    assert errors.semitones < 0.25 and errors.correlation > 0.95 and errors.voicing > 0.85
